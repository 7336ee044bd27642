"""Other libraries' names for the tensors of ConvNeXts."""

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD
from xkd_jax.convert.layout import Layout

_META = Layout(
    "Meta's",
    r"stages\.0\.0\.dwconv\.weight",
    (
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.pwconv([12])\.", r".mlp.fc\1."),
        (r"\.grn\.gamma$", ".mlp.grn.weight"),
        (r"\.grn\.beta$", ".mlp.grn.bias"),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)

_TORCHVISION = Layout(
    "torchvision's",
    r"features\.1\.0\.block\.5\.weight",
    (
        (r"^features\.0\.", "stem."),
        *((rf"^features\.{2 * i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
        *((rf"^features\.{2 * i}\.", f"stages.{i}.downsample.") for i in range(1, 4)),
        (r"\.block\.0\.", ".conv_dw."),
        (r"\.block\.2\.", ".norm."),
        (r"\.block\.3\.", ".mlp.fc1."),
        (r"\.block\.5\.", ".mlp.fc2."),
        (r"\.layer_scale$", ".gamma"),
        (r"^classifier\.0\.", "head.norm."),
        (r"^classifier\.2\.", "head.fc."),
    ),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)

_HUGGING_FACE = Layout(
    "Hugging Face's",
    r"(convnext(v2)?\.)?encoder\.stages\.0\.layers\.0\.dwconv\.weight",
    (
        (r"^convnext(v2)?\.", ""),
        (r"^embeddings\.patch_embeddings\.", "stem.0."),
        (r"^embeddings\.layernorm\.", "stem.1."),
        (r"^layernorm\.", "head.norm."),
        (r"^classifier\.", "head.fc."),
        (r"^encoder\.stages\.(\d)\.layers\.", r"stages.\1.blocks."),
        (r"^encoder\.stages\.(\d)\.downsampling_layer\.", r"stages.\1.downsample."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.layernorm\.", ".norm."),
        (r"\.pwconv([12])\.", r".mlp.fc\1."),
        (r"\.grn\.", ".mlp.grn."),
        (r"\.layer_scale_parameter$", ".gamma"),
    ),
)

LAYOUTS = (_META, _TORCHVISION, _HUGGING_FACE)
