"""What the files next to weights, and trainers inside them, state about the network."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xkd_jax.models import MODELS

# torchvision's names, where they differ from timm's.
_SAME = {
    "mobilenet_v2": "mobilenetv2_100",
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
}
# Names of classes, which don't say which network it is: some versions of timm store them.
_CLASSES = {variant.network.__name__.lower() for variant in MODELS.values()} | {"dataparallel"}
# Hugging Face's model types that are read.
_HUGGING_FACE = ("vit", "deit", "dinov2", "dinov2_with_registers", "swin", "resnet")


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
    kind, metadata = config["model_type"], {}
    changed = config.get("downsample_in_bottleneck") or config.get("use_swiglu_ffn")
    if kind not in _HUGGING_FACE or changed:
        metadata["architecture"] = config["architectures"][0]
    args = {}
    if kind in ("vit", "deit", "dinov2", "dinov2_with_registers"):
        args["num_heads"] = config["num_attention_heads"]
    if kind == "swin":
        args["window_size"] = config["window_size"]
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
