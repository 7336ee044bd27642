"""Other libraries' names for RegNet's tensors."""

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD
from xkd_jax.convert.layout import Layout

_MOST_BLOCKS = 17  # in a stage of the networks here

_TORCHVISION = Layout(
    "torchvision's",
    r"trunk_output\.block1\.block1-0\.f\.se\.fc1\.weight",
    (
        (r"^stem\.0\.", "stem.conv."),
        (r"^stem\.1\.", "stem.bn."),
        (r"^fc\.", "head.fc."),
        *(
            (rf"^trunk_output\.block(\d)\.block\d-{i}\.", rf"s\1.b{i + 1}.")
            for i in range(_MOST_BLOCKS)
        ),
        (r"\.proj\.", ".downsample."),
        (r"\.f\.se\.", ".se."),
        *((rf"\.f\.{part}\.", f".conv{i}.") for i, part in enumerate("abc", start=1)),
        (r"\.(conv\d|downsample)\.0\.", r".\1.conv."),
        (r"\.(conv\d|downsample)\.1\.", r".\1.bn."),
    ),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)

_HUGGING_FACE = Layout(
    "Hugging Face's",
    r"(regnet\.)?encoder\.stages\.0\.layers\.0\.layer\.2\.attention\.0\.weight",
    (
        (r"^regnet\.", ""),
        (r"^embedder\.embedder\.", "stem."),
        (r"^classifier\.1\.", "head.fc."),
        *((rf"^encoder\.stages\.{i}\.layers\.", f"s{i + 1}.layers.") for i in range(4)),
        *((rf"\.layers\.{i}\.", f".b{i + 1}.") for i in range(_MOST_BLOCKS)),
        (r"\.layer\.2\.attention\.0\.", ".se.fc1."),
        (r"\.layer\.2\.attention\.2\.", ".se.fc2."),
        *((rf"\.layer\.{i}\.", f".conv{n}.") for i, n in ((0, 1), (1, 2), (3, 3))),
        (r"\.shortcut\.", ".downsample."),
        (r"\.convolution\.", ".conv."),
        (r"\.normalization\.", ".bn."),
    ),
)

LAYOUTS = (_TORCHVISION, _HUGGING_FACE)
