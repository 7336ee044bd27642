"""What the files next to weights, and trainers inside them, state about the network."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xkd_jax.models import MODELS

# torchvision's names, where they differ from timm's.
_SAME = {
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "efficientnet_v2_s": "tf_efficientnetv2_s",
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "swin_v2_b": "swinv2_base_window8_256",
    "regnet_y_400mf": "regnety_004",
    "regnet_y_800mf": "regnety_008_tv",
    "regnet_y_1_6gf": "regnety_016",
    "regnet_y_3_2gf": "regnety_032",
}
# Names of classes, which don't say which network it is: some versions of timm store them.
_CLASSES = {variant.network.__name__.lower() for variant in MODELS.values()} | {"dataparallel"}
# Hugging Face's image encoders of CLIP and SigLIP, in models with and without text, and what their
# config.json leaves out where it is the default.
_CLIP = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_CLIP |= {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {**_CLIP, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_IMAGE_ENCODERS = {"clip": _CLIP, "siglip": _SIGLIP}
_IMAGE_ENCODERS |= {f"{kind}_vision_model": fields for kind, fields in _IMAGE_ENCODERS.items()}
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# Hugging Face's model types that are read.
_HUGGING_FACE = (
    "vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "beit", "swin", "swinv2",
    "resnet", "regnet", "efficientnet", "convnext", "convnextv2",
)  # fmt: skip


def state_network(name: str) -> dict[str, Any]:
    """The metadata of a network that a file calls `name`.

    "model" if it is one of `MODELS`, "architecture" if it is another, and neither if `name` only
    names a class of networks.
    """
    base = name.rpartition("/")[2].partition(".")[0]
    base = _SAME.get(base, base)
    if base in MODELS:
        return {"model": base}
    return {} if base.lower() in _CLASSES else {"architecture": name}


def read_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The metadata in the config.json that timm and Hugging Face put next to weights.

    Returns:
      model, args, image_size, mean, std, class_names ..., where stated, and a sentence about a
      file that can't be read.
    """
    try:
        config = _read_json(folder / "config.json")
        if isinstance(config.get("architecture"), str):
            return _timms(config), []
        if isinstance(config.get("model_type"), str) and config.get("architectures"):
            return _hugging_faces(config, _read_json(folder / "preprocessor_config.json")), []
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}, [f"ignored {folder / 'config.json'}, which is not what timm or others write"]
    return {}, []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError:
        return {}
    if not isinstance(config, dict):
        raise TypeError(f"{path} is not an object")
    return config


def _timms(config: Mapping[str, Any]) -> dict[str, Any]:
    metadata = state_network(config["architecture"])
    if "model" in metadata:
        metadata["args"] = config.get("model_args", {})
    pretrained = config.get("pretrained_cfg", config)
    for field in ("mean", "std"):
        if pretrained.get(field):
            metadata[field] = list(pretrained[field])
    if pretrained.get("input_size"):
        metadata["image_size"] = pretrained["input_size"][-1]
    for field in ("interpolation", "license"):
        if pretrained.get(field):
            metadata[field] = pretrained[field]
    return metadata


def _hugging_faces(config: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    kind, metadata, args = config["model_type"], {}, {}
    changes = ("downsample_in_bottleneck", "use_swiglu_ffn", "use_gated_mlp")
    # The classifiers of CLIP and SigLIP read the mean of the tokens.
    classifies = config["architectures"][0].endswith("ForImageClassification")
    if kind in _IMAGE_ENCODERS and not classifies:
        config = {**_IMAGE_ENCODERS[kind], **config.get("vision_config", config)}
        metadata, args = _image_encoder(kind, config)
    elif kind not in _HUGGING_FACE or any(config.get(change) for change in changes):
        metadata["architecture"] = config["architectures"][0]
    if kind in ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "beit"):
        args["num_heads"] = config["num_attention_heads"]
    if kind == "beit" and not config.get("use_mean_pooling", True):
        args["global_pool"] = "token"
    if kind in ("swin", "swinv2"):
        args["window_size"] = config["window_size"]
    if kind == "swinv2":
        args["pretrained_window_sizes"] = config["pretrained_window_sizes"]
    if kind == "efficientnet":
        args["bn_epsilon"] = config["batch_norm_eps"]
    if args:
        metadata["args"] = args
    for field, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if images.get(theirs):
            metadata[field] = list(images[theirs])
    if config.get("image_size"):
        metadata["image_size"] = config["image_size"]
    names = config.get("id2label", {})
    if names and not all(str(name).startswith("LABEL_") for name in names.values()):
        metadata["class_names"] = [names[index] for index in sorted(names, key=int)]
    return metadata


def _image_encoder(kind: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata and arguments of CLIP's or SigLIP's image encoder; "model" if it is here."""
    act_layer = _ACTIVATIONS[config["hidden_act"]]
    args = {"num_heads": config["num_attention_heads"], "act_layer": act_layer}
    args["norm_epsilon"] = config["layer_norm_eps"]
    family = kind.removesuffix("_vision_model")
    if family == "clip" and act_layer == "quick_gelu":
        family = "clip_quickgelu"
    name = f"vit_base_patch{config['patch_size']}_{family}_224"
    base = (config["hidden_size"], config["num_hidden_layers"]) == (768, 12)
    return {"model": name} if base and name in MODELS else {}, args
