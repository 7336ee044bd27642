"""Other libraries' names for the tensors of the networks here, translated to timm's."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD
from xkd_jax.convert import layouts_clip, layouts_convnext, layouts_eva, layouts_regnet
from xkd_jax.convert.layout import Layout
from xkd_jax.convert.layouts_detection import DETECTOR
from xkd_jax.convert.layouts_efficientnet import EFFICIENTNETS
from xkd_jax.convert.layouts_swinv2 import name_biases

_BATCH_NORM_EPSILON = 1e-5


_LATER_DOWNSAMPLING = (  # at the end of a stage, where timm now begins the next one
    (r"^layers\.2\.downsample", "layers.3.downsample"),
    (r"^layers\.1\.downsample", "layers.2.downsample"),
    (r"^layers\.0\.downsample", "layers.1.downsample"),
)

_OLD_SWIN = Layout(
    "Microsoft's, or timm's before 0.9",
    r"layers\.0\.downsample\..*",
    (*_LATER_DOWNSAMPLING, (r"^head\.(weight|bias)$", r"head.fc.\1")),
)

_TORCHVISION_VIT = Layout(
    "torchvision's",
    r"encoder\.layers\.encoder_layer_0\.self_attention\.in_proj_weight",
    (
        (r"^class_token$", "cls_token"),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.layers\.encoder_layer_", "blocks."),
        (r"^encoder\.ln\.", "norm."),
        (r"^heads\.head\.", "head."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    ),
    prefix="vit_",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)

_TORCHVISION_SWIN = Layout(
    "torchvision's",
    r"features\.1\.0\.attn\.(relative_position_bias_table|logit_scale)",
    (
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        *((rf"^features\.{2 * i + 1}\.", f"layers.{i}.blocks.") for i in range(4)),
        *((rf"^features\.{2 * i}\.", f"layers.{i}.downsample.") for i in range(1, 4)),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
        (r"^head\.", "head.fc."),
    ),
    prefix=r"swin_|swinv2_\w+_window8_",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    arrange=name_biases,
)

_META_DINOV2 = Layout(
    "Meta's",
    r"mask_token|register_tokens",
    ((r"^register_tokens$", "reg_token"),),
    skipped=r"mask_token",
    prefix="vit_",
)

_HUGGING_FACE_VIT = Layout(  # and DeiT, DINOv2
    "Hugging Face's",
    r"((vit|deit|dinov2|dinov2_with_registers)\.)?"
    r"encoder\.layer\.0\.attention\.attention\.query\.weight",
    (
        (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.layer\.", "blocks."),
        (r"^layernorm\.", "norm."),
        (r"^(cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    ),
    skipped=r"(.*\.)?(pooler\.dense\.(weight|bias)|embeddings\.mask_token)",
)

_HUGGING_FACE_SWIN = Layout(
    "Hugging Face's",
    r"((swin|swinv2)\.)?encoder\.layers\.0\.blocks\.0\.attention\.self\."
    r"(relative_position_bias_table|logit_scale)",
    (
        (r"^(swin|swinv2)\.", ""),
        (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^encoder\.layers\.", "layers."),
        *_LATER_DOWNSAMPLING,
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head.fc."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.self\.", ".attn."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    ),
    skipped=r"(.*\.)?embeddings\.mask_token",
    arrange=name_biases,
)

_HUGGING_FACE_RESNET = Layout(
    "Hugging Face's",
    r"(resnet\.)?embedder\.embedder\.convolution\.weight",
    (
        (r"^resnet\.", ""),
        (r"^embedder\.embedder\.convolution\.", "conv1."),
        (r"^embedder\.embedder\.normalization\.", "bn1."),
        (r"^classifier\.1\.", "fc."),
        *((rf"^encoder\.stages\.{i}\.layers\.", f"layer{i + 1}.") for i in range(4)),
        *((rf"\.layer\.{i}\.convolution\.", f".conv{i + 1}.") for i in range(3)),
        *((rf"\.layer\.{i}\.normalization\.", f".bn{i + 1}.") for i in range(3)),
        (r"\.shortcut\.convolution\.", ".downsample.0."),
        (r"\.shortcut\.normalization\.", ".downsample.1."),
    ),
)

# kuangliu/pytorch-cifar and akamaster/pytorch_resnet_cifar10; the latter's have three groups.
_CIFAR_RENAMES = ((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc."))
_PYTORCH_CIFAR = Layout("pytorch-cifar's", r"linear\.weight", _CIFAR_RENAMES)
_PYTORCH_RESNET_CIFAR10 = Layout(
    "pytorch_resnet_cifar10's",
    r"(?!)",  # found by what it lacks
    _CIFAR_RENAMES,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)

_LAYOUTS = (
    DETECTOR,  # before those of its backbone
    *layouts_eva.LAYOUTS,  # first: DINOv2 and ViT have some of the same names
    _OLD_SWIN,
    *EFFICIENTNETS,
    _TORCHVISION_VIT,
    _TORCHVISION_SWIN,
    *layouts_regnet.LAYOUTS,  # before ResNet, whose stem has the same name
    _META_DINOV2,
    _HUGGING_FACE_VIT,
    _HUGGING_FACE_SWIN,
    _HUGGING_FACE_RESNET,
    *layouts_convnext.LAYOUTS,
    _PYTORCH_CIFAR,
    *layouts_clip.LAYOUTS,
)

# Names that no network here has, whose they are, and what to do about them.
_UNREAD = (
    (r"features\.\d+\.\d+\.block\.5\.weight", "torchvision's ConvNeXt of another size"),
    (r"trunk_output\.block1\..*", "torchvision's RegNet of another size"),
    (r"stage0\.rbr_(dense|reparam)\..*", "RepVGG from its authors' code"),
    (r"features\.denseblock1\..*", "torchvision's DenseNet"),
    (r"features\.\d+\.weight", "torchvision's VGG, AlexNet or SqueezeNet"),
    (r"(backbone\.)?layers\.0\.ln1\.weight", "mmpretrain's ViT"),
    (r"(backbone\.)?stages\.0\.blocks\.0\.attn\.w_msa\..*", "mmpretrain's Swin Transformer"),
    (r"(backbone\.)?conv1\.conv\.weight", "mmpretrain's MobileNetV2"),
    (r"(backbone\.)?layers\.0\.attention\.q_proj\.weight", "Hugging Face's ViT of another version"),
    (r"(model\.)?embeddings\.patch_embeddings\.weight", "Hugging Face's DINOv3 of another size"),
    (
        r"(visual\.)?transformer\.resblocks\.0\..*",
        "OpenAI's CLIP or OpenCLIP, other than ViT-B/16 and ViT-B/32",
    ),
    (r"storage_tokens|rope_embed\.periods", "Meta's DINOv3 of another size"),
    (r"blocks\.0\.gamma_1", "timm's DINOv3, EVA or BEiT of another size"),
    (r"blocks\.0\.mlp\.w12\.weight", "DINOv2's ViT-g"),
    (r"(dinov2\w*\.)?encoder\.layer\.0\.mlp\.weights_in\.weight", "DINOv2's ViT-g"),
)


def find_layout(names: Iterable[str]) -> Layout | None:
    """The layout of tensors with these `names`; None for timm's."""
    names = list(names)
    if lacks_shortcuts(names):
        return _PYTORCH_RESNET_CIFAR10 if "linear.weight" in names else None
    for layout in _LAYOUTS:
        if any(re.fullmatch(layout.marker, name) for name in names):
            return layout
    return None


def name_unread(names: Iterable[str]) -> str:
    """The network whose tensors have these `names`, if it is a known one that isn't read."""
    names = list(names)
    for pattern, network in _UNREAD:
        if any(re.fullmatch(pattern, name) for name in names):
            return network
    return ""


def rename(name: str, layout: Layout) -> str:
    """timm's name of the tensor that `layout` calls `name`."""
    for pattern, replacement in layout.renames:
        name = re.sub(pattern, replacement, name)
    return name


def translate(state: Mapping[str, np.ndarray], layout: Layout) -> dict[str, np.ndarray]:
    """The state under timm's names, with queries, keys and values in one tensor."""
    kept = {name: array for name, array in state.items() if not re.fullmatch(layout.skipped, name)}
    renamed = {rename(name, layout): array for name, array in kept.items()}
    joined = {}
    for name, array in renamed.items():
        found = re.fullmatch(r"(.*\.attn\.)(query|key|value)\.(weight|bias)", name)
        if not found:
            joined[name] = array
            continue
        parts = [f"{found[1]}{part}.{found[3]}" for part in ("query", "key", "value")]
        if not all(part in renamed for part in parts):
            joined[name] = array
        elif found[2] == "query":
            joined[f"{found[1]}qkv.{found[3]}"] = np.concatenate([renamed[part] for part in parts])
    return layout.arrange(joined) if layout.arrange else joined


def fold_class_position(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the class token's position embedding to the token, as timm stores networks of registers.

    DINOv2 embeds the positions of the class token and the patches, and not those of registers;
    with `no_embed_class`, timm's networks only embed those of patches. Both compute the same.

    Args:
      state: tensors by timm's name, with `pos_embed` [1, 1 + T, D].
    """
    token, positions = state["cls_token"], state["pos_embed"]
    folded = np.asarray(token, np.float32) + np.asarray(positions[:, :1], np.float32)
    return {**state, "cls_token": folded, "pos_embed": positions[:, 1:]}


def reads_mean_token(state: Mapping[str, np.ndarray]) -> bool:
    """Whether the head reads the class token together with the mean of the patch tokens.

    That of Hugging Face's `Dinov2ForImageClassification` does.

    Args:
      state: tensors by timm's name, in PyTorch's layout.
    """
    if not state.keys() >= {"cls_token", "head.weight"}:
        return False
    return state["head.weight"].shape[-1] == 2 * state["cls_token"].shape[-1]


def lacks_shortcuts(names: Iterable[str]) -> bool:
    """Whether `names` are a CIFAR ResNet's with shortcuts of option A, which have no weights."""
    names = set(names)
    groups = [f"layer{i}.0.conv1.weight" in names for i in range(1, 5)]
    return groups == [True, True, True, False] and not any(
        re.match(r"layer\d\.0\.(downsample|shortcut)\.", name) for name in names
    )


def add_shortcuts(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Writes a CIFAR ResNet's shortcuts of option A as 1x1 convolutions with BatchNorm.

    Option A (arXiv:1512.03385, section 4.2) takes every second pixel, as a convolution of stride 2
    does, and pads the channels with zeros: half of them before and half after, as in
    pytorch_resnet_cifar10. The kernel's zeros and ones do the same, and the variance 1 - epsilon
    makes the BatchNorm the identity.

    Args:
      state: tensors by timm's name, in PyTorch's layout.
    """
    state = dict(state)
    for group in (1, 2, 3):
        outputs, inputs = state[f"layer{group}.0.conv1.weight"].shape[:2]
        if inputs == outputs:
            continue
        prefix, before = f"layer{group}.0.downsample", (outputs - inputs) // 2
        kernel = np.zeros((outputs, inputs, 1, 1), np.float32)
        kernel[before + np.arange(inputs), np.arange(inputs)] = 1
        state[f"{prefix}.0.weight"] = kernel
        state[f"{prefix}.1.weight"] = np.ones(outputs, np.float32)
        state[f"{prefix}.1.bias"] = np.zeros(outputs, np.float32)
        state[f"{prefix}.1.running_mean"] = np.zeros(outputs, np.float32)
        state[f"{prefix}.1.running_var"] = np.full(outputs, 1 - _BATCH_NORM_EPSILON, np.float32)
    return state
