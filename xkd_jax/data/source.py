"""The interface of data sources, the decoded split and the syntax of splits."""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD, Statistics
from xkd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of a split, decoded and in memory.

    Attributes:
      images: uint8 [n, H, W, 3].
      labels: int32 [n], 0..num_classes-1.
      class_names: the name of each class, indexed by label.
      mean: per channel, in units of [0, 1], for `augment.ops.normalize`.
      std: per channel, in the same units.
      crop_pct: the share of the shorter side that evaluation crops from the centre, for
        `augment.ops.resize_crop`; 0 crops nothing.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: Statistics = IMAGENET_MEAN
    std: Statistics = IMAGENET_STD
    crop_pct: float = 0.0

    @property
    def num_classes(self) -> int:
        """The number of classes of the data set, including any that this split lacks."""
        return len(self.class_names)

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


class Source(Protocol):
    """A data set found on disk, not decoded yet."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of examples of each named split."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, indexed by label."""
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


_SPLIT = re.compile(r"(\w+)(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?")


def parse_split(spec: str, sizes: Mapping[str, int]) -> tuple[str, int, int]:
    """Parses TFDS's slicing syntax: `train`, `train[:1000]`, `train[45000:]`, `test[10%:20%]`.

    Negative bounds count from the end; percentages round to the nearest example, as TFDS does.

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
    if match is None or match[1] not in sizes:
        raise UserError(
            f"unknown split {spec!r}; known: {known}, or a slice such as "
            f"'{next(iter(sizes))}[:1000]' or '{next(iter(sizes))}[90%:]'."
        )
    name, size = match[1], sizes[match[1]]

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
