"""MobileNetV2, with timm's names, weights and numerics.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (arXiv:1801.04381). The
layout follows timm (Ross Wightman, Apache-2.0), whose MobileNetV2 is also an `EfficientNet`.
"""

from typing import Any, ClassVar

from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD
from xkd_jax.models.efficientnet import EfficientNet
from xkd_jax.models.variant import Variant


class MobileNetV2(EfficientNet):
    """MobileNetV2: an `EfficientNet` with other stages, ReLU6 and no squeeze-excite.

    Fields, call, intermediates and errors are those of `EfficientNet`. The head never has fewer
    than 1280 channels, however small the `width`.
    """

    stages: ClassVar[tuple[tuple[int, int, int], ...]] = (
        (3, 16, 1),
        (3, 24, 2),
        (3, 32, 3),
        (3, 64, 4),
        (3, 96, 3),
        (3, 160, 3),
        (3, 320, 1),
    )

    activation: str = "relu6"
    squeeze_excite: bool = False

    def _head_channels(self) -> int:
        return max(1280, super()._head_channels())


_ARGS: dict[str, dict[str, Any]] = {
    "mobilenetv2_035": {"width": 0.35},
    "mobilenetv2_050": {"width": 0.5},
    "mobilenetv2_075": {"width": 0.75},
    "mobilenetv2_100": {},
    "mobilenetv2_140": {"width": 1.4},
    "mobilenetv2_110d": {"width": 1.1, "depth": 1.2, "fix_stem_head": True},
    "mobilenetv2_120d": {"width": 1.2, "depth": 1.4, "fix_stem_head": True},
}

VARIANTS = {name: Variant(MobileNetV2, args) for name, args in _ARGS.items()}
# Not in timm: for the 32x32 images of CIFAR.
VARIANTS["mobilenetv2_100_32"] = Variant(
    MobileNetV2, {"stem": "cifar"}, 32, CIFAR100_MEAN, CIFAR100_STD
)
