"""The rules that map PyTorch's tensor names and layouts to ours.

One rule covers almost all tensors: our path is timm's name, with numbers joined to the part before
(`layer1.0.conv1` is `layer1_0/conv1`) and Flax's names for the leaves. `FAMILIES` lists the
exceptions.
"""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from xkd_jax.models import MODELS


@dataclasses.dataclass(frozen=True)
class Layout:
    """Another library's, or an older timm's, names for the same tensors.

    Attributes:
      source: whose names they are.
      marker: a pattern that matches a name in this layout, and none in others.
      renames: patterns and replacements, applied in order.
    """

    source: str
    marker: str
    renames: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """The exceptions of a family of networks from the common rule.

    Attributes:
      underscored: pattern of the parts of a name whose number follows an underscore in timm too.
      skipped: pattern of tensors that are not learnt, or belong to an optional part.
      optional: pattern of an optional part's tensors, and the network's argument that is False if
        a checkpoint has none of them.
      layouts: the other layouts in which checkpoints occur.
    """

    underscored: str = r"(?!)"
    skipped: str = r"(?!)"
    optional: tuple[tuple[str, str], ...] = ()
    layouts: tuple[Layout, ...] = ()


_OLD_SWIN = Layout(
    "Microsoft's, or timm's before 0.9",
    r"layers\.0\.downsample\..*",  # at the end of a stage, where timm now begins the next one
    (
        (r"^layers\.2\.downsample", "layers.3.downsample"),
        (r"^layers\.1\.downsample", "layers.2.downsample"),
        (r"^layers\.0\.downsample", "layers.1.downsample"),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ),
)

# Stage and index of the 16 blocks of EfficientNet-B0 and Lite0.
_B0_BLOCKS = [(i, j) for i, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for j in range(depth)]
_EFFICIENTNET_PYTORCH = Layout(
    "efficientnet-pytorch's",
    r"_conv_stem\.weight",
    (
        (r"^_conv_(stem|head)", r"conv_\1"),
        (r"^_bn1", "bn2"),
        (r"^_bn0", "bn1"),
        (r"^_fc", "classifier"),
        (r"^(_blocks\.0\.)_project_conv", r"\1conv_pw"),
        (r"^(_blocks\.0\.)_(bn[12])", r"\1\2"),
        (r"\._expand_conv", ".conv_pw"),
        (r"\._depthwise_conv", ".conv_dw"),
        (r"\._project_conv", ".conv_pwl"),
        (r"\._se_(reduce|expand)", r".se.conv_\1"),
        (r"\._bn2", ".bn3"),
        (r"\._bn1", ".bn2"),
        (r"\._bn0", ".bn1"),
        *((rf"^_blocks\.{n}\.", f"blocks.{i}.{j}.") for n, (i, j) in enumerate(_B0_BLOCKS)),
    ),
)

# By the module that defines the network; those without an entry follow the common rule.
FAMILIES = {
    "swin": Family(
        skipped=r".*\.(relative_position_index|attn_mask)",  # computed from the sizes
        layouts=(_OLD_SWIN,),
    ),
    "efficientnet": Family(layouts=(_EFFICIENTNET_PYTORCH,)),
    "inception": Family(
        underscored=r"branch\w+_\d",
        skipped=r"AuxLogits\..*",
        optional=((r"AuxLogits\..*", "aux_logits"),),
    ),
}

# The table omits the head, which is recognised by its shape, and the tensors that `resize` handles.

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def family_of(model: str) -> Family:
    """The rules of the network called `model`."""
    return FAMILIES.get(MODELS[model].network.__module__.rpartition(".")[2], Family())


def find_layout(names: Iterable[str]) -> Layout | None:
    """The layout of tensors with these `names`; None for timm's."""
    names = list(names)
    for family in FAMILIES.values():
        for layout in family.layouts:
            if any(re.fullmatch(layout.marker, name) for name in names):
                return layout
    return None


def rename(name: str, layout: Layout) -> str:
    """timm's name of the tensor that `layout` calls `name`."""
    for pattern, replacement in layout.renames:
        name = re.sub(pattern, replacement, name)
    return name


def timm_name(path: str, family: Family) -> str:
    """timm's name of our tensor at `path`, such as "params/layer1_0/conv1/kernel"."""
    _, *parts, leaf = path.split("/")
    names = [
        part
        if re.fullmatch(family.underscored, part)
        else re.sub(r"(_\d+)+$", lambda numbers: numbers[0].replace("_", "."), part)
        for part in parts
    ]
    return ".".join([*names, _LEAVES.get(leaf, leaf)])


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """Our tensor in PyTorch's layout: kernels [h, w, I, O] as [O, I, h, w], [I, O] as [O, I]."""
    return array.transpose(_torch_axes(path, array.ndim))


def from_torch(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    return array.transpose(np.argsort(_torch_axes(path, array.ndim)))


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that `to_torch` gives a tensor of `shape`."""
    return tuple(shape[axis] for axis in _torch_axes(path, len(shape)))


def _torch_axes(path: str, ndim: int) -> tuple[int, ...]:
    kernel = {2: (1, 0), 4: (3, 2, 0, 1)}
    return kernel.get(ndim, tuple(range(ndim))) if path.endswith("/kernel") else tuple(range(ndim))
