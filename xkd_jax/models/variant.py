"""The entry of a named network in the registry."""

import dataclasses
from typing import Any

from flax import linen as nn

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD, Statistics


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named network: its class, its arguments, and how its input images are prepared.

    Attributes:
      network: the module class.
      args: fields of the module that differ from its defaults.
      image_size: height and width, in pixels, of the images its published weights expect.
      mean: the mean per channel that they expect images in [0, 1] to be normalised with.
      std: the standard deviation per channel, in the same units.
    """

    network: type[nn.Module]
    args: dict[str, Any]
    image_size: int = 224
    mean: Statistics = IMAGENET_MEAN
    std: Statistics = IMAGENET_STD
