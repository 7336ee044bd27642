"""What a network's name stands for."""

import dataclasses
from typing import Any

from flax import linen as nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A network by name.

    Attributes:
      network: the module class.
      args: fields of it, over its defaults.
      image_size: the side that its published weights were trained on, pixels.
      mean: per channel, of images in [0, 1], that they were trained with.
      std: likewise.
    """

    network: type[nn.Module]
    args: dict[str, Any]
    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
