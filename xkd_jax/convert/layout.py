"""A set of names for tensors, other than timm's: what `layouts` and its parts list."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from xkd_jax.augment.normalization import Statistics


@dataclasses.dataclass(frozen=True)
class Layout:
    """Another library's, or an older timm's, names for the same tensors.

    Attributes:
      source: whose names they are.
      marker: a pattern that matches a name in this layout, and none in others.
      renames: patterns and replacements, applied in order.
      skipped: pattern of tensors, by their own names, that classification doesn't use.
      prefix: a pattern of the beginning of the names of networks that the layout occurs with, where
        networks under other names have the same tensors.
      mean: the mean that all of its published weights were trained with; None if they differ.
      std: the standard deviation, likewise.
      arrange: turns renamed tensors that timm divides otherwise, by timm's names, into timm's.
      args: the arguments that make our network compute the same, where the tensors don't tell.
    """

    source: str
    marker: str
    renames: tuple[tuple[str, str], ...]
    skipped: str = r"(?!)"
    prefix: str = ""
    mean: Statistics | None = None
    std: Statistics | None = None
    arrange: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
