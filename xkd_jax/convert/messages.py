"""Sentences about tensors that don't fit, and about what a checkpoint leaves open."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from xkd_jax.augment.normalization import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    CIFAR100_MEAN,
    CIFAR100_STD,
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
)
from xkd_jax.models import create_model

_SHOWN = 5  # groups of tensors in a message
_STATISTICS = {
    (CIFAR10_MEAN, CIFAR10_STD): "CIFAR-10's",
    (CIFAR100_MEAN, CIFAR100_STD): "CIFAR-100's",
    (IMAGENET_MEAN, IMAGENET_STD): "ImageNet's",
    (CLIP_MEAN, CLIP_STD): "CLIP's",
}


@dataclasses.dataclass(frozen=True)
class Misfit:
    """A tensor that doesn't fit, as the phrase "{before}{name}{after} ({path})".

    Attributes:
      name: of the tensor.
      kind: what is wrong: "missing", "shape" or "unexpected".
      after: the shapes and what is wrong, as text.
      before: text before the name.
      path: of the tensor in our variables, or "".
    """

    name: str
    kind: str
    after: str
    before: str = ""
    path: str = ""

    def __str__(self) -> str:
        path = f" ({self.path})" if self.path else ""
        return f"{self.before}{self.name}{self.after}{path}"


def describe(misfits: Sequence[Misfit]) -> list[str]:
    """At most five phrases about `misfits` and one with the number of the rest.

    Tensors that differ only in the numbers of their names share a phrase:
    "blocks.{0..11}.attn.qkv.weight [576, 192] is missing (12 tensors)".
    """
    if len(misfits) <= _SHOWN:
        return [str(misfit) for misfit in misfits]
    groups: dict[tuple[str, ...], list[Misfit]] = {}
    for misfit in misfits:
        key = (misfit.kind, re.sub(r"\d+", "#", misfit.name), misfit.after)
        groups.setdefault(key, []).append(misfit)
    # Some of each kind: the tensors that are missing may be there under unexpected names.
    kinds: dict[str, list[list[Misfit]]] = {}
    for (kind, *_), group in groups.items():
        kinds.setdefault(kind, []).append(group)
    order = [group for group in chain(*zip_longest(*kinds.values())) if group]
    phrases = [_describe_group(group) for group in order[:_SHOWN]]
    rest = sum(map(len, order[_SHOWN:]))
    return [*phrases, f"and {rest} more"] if rest else phrases


def _describe_group(group: Sequence[Misfit]) -> str:
    if len(group) == 1:
        return str(group[0])
    first = group[0]
    pattern = join_names([misfit.name for misfit in group])
    return f"{first.before}{pattern}{first.after} ({len(group)} tensors)"


def join_names(names: Sequence[str]) -> str:
    """One pattern for names that differ only in numbers: "blocks.{0..11}.norm1.weight"."""
    parts = [re.split(r"(\d+)", name) for name in names]
    joined = []
    for column in zip(*parts, strict=True):
        values = sorted(set(column), key=lambda text: int(text) if text.isdecimal() else 0)
        if len(values) == 1:
            joined.append(values[0])
        elif int(values[-1]) - int(values[0]) == len(values) - 1 > 1:
            joined.append(f"{{{values[0]}..{values[-1]}}}")
        else:
            joined.append(f"{{{','.join(values)}}}")
    return "".join(joined)


def summarize_names(names: Iterable[str]) -> str:
    """The first few of `names`, with those that differ only in numbers as one pattern."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    listed = list(groups.values())
    rest = sum(map(len, listed[_SHOWN:]))
    shown = ", ".join(join_names(group) for group in listed[:_SHOWN])
    return f"{shown} and {rest} more" if rest else shown


def describe_not_finite(state: Mapping[str, np.ndarray]) -> str:
    """The names of tensors with NaN or infinite values; "" without any."""
    return summarize_names(name for name, array in state.items() if not np.isfinite(array).all())


def describe_assumptions(metadata: Mapping[str, Any], stated: Iterable[str]) -> str:
    """What the tensors don't tell and the checkpoint doesn't state, and the flags that change it.

    Args:
      metadata: of the converted network.
      stated: the fields of `metadata`, and of its `args`, that the checkpoint, its authors or the
        caller give.
    """
    stated, parts, flags = set(stated), [], []
    model = metadata["model"]
    module = create_model(model, num_classes=1, **metadata["args"])
    named = "model" in stated
    heads = getattr(module, "num_heads", None)
    if isinstance(heads, int) and not named and "num_heads" not in stated:
        parts.append(f"{heads} heads")
        flags.append("--arg num_heads=N")
    if not stated.issuperset(("mean", "std")):
        mean, std = metadata["mean"], metadata["std"]
        whose = _STATISTICS.get((tuple(mean), tuple(std)))
        text = f"mean {_numbers(mean)} and std {_numbers(std)}"
        parts.append(f"{text} ({whose})" if whose else text)
        flags += ["--mean R G B", "--std R G B"]
    if not hasattr(module, "img_size") and not named and "image_size" not in stated:
        parts.append(f"{metadata['image_size']} pixels")
        flags.append("--image_size PIXELS")
    if hasattr(module, "bn_epsilon") and not named and "bn_epsilon" not in stated:
        parts.append(f"BatchNorm epsilon {module.bn_epsilon:g}")
        flags.append("--arg bn_epsilon=X")
    elif hasattr(module, "norm_epsilon") and not named and "norm_epsilon" not in stated:
        parts.append(f"LayerNorm epsilon {module.norm_epsilon:g}")
        flags.append("--arg norm_epsilon=X")
    if hasattr(module, "act_layer") and not named and "act_layer" not in stated:
        parts.append(f"activation {module.act_layer}")
        flags.append("--arg act_layer=NAME")
    interpolation = metadata.get("interpolation", "bilinear")
    if interpolation != "bilinear":
        parts.append(f"bilinear interpolation of images, although it states {interpolation}")
    elif parts and "interpolation" not in stated:
        parts.append("bilinear interpolation of images")
    if not parts:
        return ""
    change = f"; change with {' '.join(flags)}" if flags else ""
    return f"assumed, not in the tensors: {', '.join(parts)}{change}"


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
