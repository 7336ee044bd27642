"""The rules that map PyTorch's tensor names and layouts to ours.

One rule covers almost all tensors: our path is timm's name, with numbers joined to the part before
(`layer1.0.conv1` is `layer1_0/conv1`) and Flax's names for the leaves. `FAMILIES` lists the
exceptions, and `layouts` other libraries' names.
"""

import dataclasses
import re

import numpy as np

from xkd_jax.models import NETWORKS


@dataclasses.dataclass(frozen=True)
class Family:
    """The exceptions of a family of networks from the common rule.

    Attributes:
      underscored: pattern of the parts of a name whose number follows an underscore in timm too.
      skipped: pattern of tensors that are not learnt, or belong to an optional part.
      optional: pattern of an optional part's tensors, and the network's argument that says whether
        it has that part: whether a checkpoint has any of them.
    """

    underscored: str = r"(?!)"
    skipped: str = r"(?!)"
    optional: tuple[tuple[str, str], ...] = ()


# By the module that defines the network; those without an entry follow the common rule.
FAMILIES = {
    "swin": Family(
        skipped=r".*\.(relative_position_index|attn_mask)",  # computed from the sizes
    ),
    "beit": Family(
        skipped=r".*\.relative_position_index",
        optional=(
            (r"pos_embed", "use_abs_pos_emb"),
            (r"blocks\.\d+\.attn\.relative_position_bias_table", "use_rel_pos_bias"),
            (r"rel_pos_bias\..*", "use_shared_rel_pos_bias"),
        ),
    ),
    "eva": Family(
        skipped=r"rope\..*",
        optional=((r".*\.attn\.(q_bias|q_proj\.bias)", "qkv_bias"),),
    ),
    "swinv2": Family(
        skipped=r".*\.(relative_(coords_table|position_index)|attn_mask)",  # likewise
    ),
    "inception": Family(
        underscored=r"branch\w+_\d",
        skipped=r"AuxLogits\..*",
        optional=((r"AuxLogits\..*", "aux_logits"),),
    ),
    "repvgg": Family(
        optional=((r"stem\.conv_kxk\..*", "branches"),),  # re-parameterised ones have none
    ),
}

# The table omits the head, which is recognised by its shape, and the tensors that `resize` handles.

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def family_of(model: str) -> Family:
    """The rules of the network called `model`."""
    return FAMILIES.get(NETWORKS[model].network.__module__.rpartition(".")[2], Family())


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
