"""The interface of data sources, the decoded split and the syntax of splits."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD, Statistics
from xkd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of a split, decoded and in memory.

    Attributes:
      images: uint8 [n, H, W, 3].
      labels: int32 [n], 0..num_classes-1; 0 without labels.
      class_names: the name of each class, indexed by label; empty without labels.
      mean: per channel, in units of [0, 1], for `augment.ops.normalize`.
      std: per channel, in the same units.
      crop_pct: the share of the shorter side that evaluation crops from the centre, for
        `augment.ops.resize_crop`; 0 crops nothing.
      examples_digest: for `identity`; None computes a digest of the labels alone.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: Statistics = IMAGENET_MEAN
    std: Statistics = IMAGENET_STD
    crop_pct: float = 0.0
    examples_digest: Callable[[], str] | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes, including any that this split lacks; 0 without labels."""
        return len(self.class_names)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What makes two splits the same data, wherever they are stored; can be saved as JSON.

        `class_names`, the number of `examples`, and the `digest` of the examples in their order
        (`Examples.digest`). No image is read.
        """
        digest = self.examples_digest or (lambda: sha256(np.asarray(self.labels).tobytes()))
        names = list(self.class_names)
        return {"class_names": names, "examples": len(self), "digest": digest()}

    def __len__(self) -> int:
        return len(self.labels)


class Example(NamedTuple):
    """An image that is not decoded yet.

    Attributes:
      image: JPEG, PNG, ... bytes, or decoded pixels: uint8 [h, w, 3].
      label: 0..num_classes-1.
      name: of the image, for messages.
    """

    image: bytes | np.ndarray
    label: int
    name: str


class Examples(Protocol):
    """Random access to a part of a split; picklable, for use in worker processes."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [n]; a TFDS set reads all its records on first access."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def faults(self) -> dict[int, str]:
        """Damage found without decoding: by index, a message that names the image."""
        ...

    def digest(self, kept: np.ndarray | None = None) -> str:
        """16 hexadecimal digits that other files, labels or another order would change.

        The location of the data set has no influence, and no image is read.

        Args:
          kept: the indices of the examples that count; None: all.
        """
        ...


class Source(Protocol):
    """A data set found on disk, not decoded yet."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of examples of each named split."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, indexed by label; empty without labels."""
        ...

    @property
    def mean(self) -> Statistics:
        """Per channel, in units of [0, 1]."""
        ...

    @property
    def std(self) -> Statistics:
        """Per channel, in the same units."""
        ...

    def examples(self, split: str, start: int, stop: int) -> Examples:
        """The examples [start, stop) of a named split, none of them decoded."""
        ...


# What people call the folders of a data set, in lower case.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_CANONICAL = {name: split for split, names in _SPLIT_NAMES.items() for name in names}


def canonical_split(name: str) -> str | None:
    """ "train", "val" or "test" for the usual names of these splits, in any case; else None."""
    return _CANONICAL.get(name.casefold())


def check_classes(name: str, class_names: tuple[str, ...]) -> None:
    """Refuses a data set with a single class.

    Args:
      name: of the data set.
      class_names: of its classes.

    Raises:
      UserError: there is one class.
    """
    if len(class_names) == 1:
        raise UserError(
            f"{name} has a single class, {class_names[0]!r}, and a classifier needs at least two; "
            f"use another data set."
        )


def sha256(*parts: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the parts, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


_SPLIT = re.compile(r"(\w+)(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?")


def parse_split(spec: str, sizes: Mapping[str, int]) -> tuple[str, int, int]:
    """Parses TFDS's slicing syntax: `train`, `train[:1000]`, `train[45000:]`, `test[10%:20%]`.

    Negative bounds count from the end; percentages round to the nearest example, as TFDS does.
    `val`, `valid` and `validation` find each other, as do the other names of `canonical_split`.

    Args:
      spec: the split, as the user wrote it.
      sizes: the number of examples of each named split.

    Returns:
      The named split and the bounds of the half-open range in it.

    Raises:
      UserError: the syntax is invalid, the split does not exist, or the range is empty or too big.
    """
    match = _SPLIT.fullmatch(spec.strip())
    known = ", ".join(f"{name} ({size})" for name, size in sizes.items())
    name = _find_split(match[1], sizes) if match else None
    if match is None or name is None:
        raise UserError(
            f"unknown split {spec!r}; known: {known}, or a slice such as "
            f"'{next(iter(sizes))}[:1000]' or '{next(iter(sizes))}[90%:]'."
        )
    size = sizes[name]

    def bound(number: str | None, percent: str | None, default: int) -> int:
        if number is None:
            return default
        value = round(size * int(number) / 100) if percent else int(number)
        return value + size if number.startswith("-") else value

    start, stop = bound(match[2], match[3], 0), bound(match[4], match[5], size)
    if not 0 <= start < stop <= size:
        raise UserError(
            f"split {spec!r} is the range {start} to {stop}, but {name!r} has {size} examples, and "
            f"a slice needs at least one."
        )
    return name, start, stop


def _find_split(wanted: str, sizes: Mapping[str, int]) -> str | None:
    """The key of `sizes` that `wanted` stands for."""
    if wanted in sizes:
        return wanted
    split = canonical_split(wanted)
    return next((name for name in sizes if split and canonical_split(name) == split), None)
