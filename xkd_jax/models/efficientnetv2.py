"""EfficientNetV2, with timm's names, weights and numerics.

Tan and Le, "EfficientNetV2: Smaller Models and Faster Training" (arXiv:2104.00298). The layout
follows timm (Ross Wightman, Apache-2.0), where `efficientnetv2_rw_t` is a smaller S of its own.
"""

from typing import Any

from xkd_jax import errors
from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD, HALF_MEAN, HALF_STD
from xkd_jax.models.inverted_residual import (
    BlockNetwork,
    ConvBlock,
    FusedInvertedResidual,
    InvertedResidual,
    Row,
    round_channels,
)
from xkd_jax.models.variant import Variant

# Channels of the stem, then channels and blocks of the six stages.
_SIZES = {
    "b0": (32, ((16, 1), (32, 2), (48, 2), (96, 3), (112, 5), (192, 8))),
    "s": (24, ((24, 2), (48, 4), (64, 4), (128, 6), (160, 9), (256, 15))),
}
_STRIDES = (1, 2, 2, 2, 1, 2)


class EfficientNetV2(BlockNetwork):
    """An EfficientNetV2 whose first stages fuse the expansion with the depthwise convolution.

    `size` is "b0" or "s". The other fields, call, intermediates and errors are those of
    `BlockNetwork`.
    """

    size: str = "b0"

    def _stages(self) -> tuple[tuple[Row, ...], ...]:
        rows = []
        for stage, (channels, blocks) in enumerate(_SIZES[self.size][1]):
            block, args = FusedInvertedResidual, {"expansion": 4}
            if stage == 0:
                block, args = ConvBlock, {"shortcut": True}
            elif stage > 2:
                block = InvertedResidual
                args = {"expansion": 4 if stage == 3 else 6, "squeeze_excite": "efficientnet"}
            rows.append((Row(block, channels, blocks, _STRIDES[stage], args),))
        return tuple(rows)

    def _stem_channels(self) -> int:
        return self._channels(_SIZES[self.size][0])

    def _channels(self, channels: int) -> int:
        # Google's B0 to B3 round to the nearest multiple.
        return round_channels(channels, self.width, 0.0 if self.size == "b0" else 0.9)

    def _check(self) -> None:
        super()._check()
        if self.size not in _SIZES:
            raise errors.unknown("size", self.size, _SIZES)


_TF: dict[str, Any] = {"padding": "SAME", "bn_epsilon": 1e-3}

VARIANTS = {
    "tf_efficientnetv2_b0": Variant(EfficientNetV2, _TF, 192),
    "tf_efficientnetv2_s": Variant(EfficientNetV2, {"size": "s", **_TF}, 300, HALF_MEAN, HALF_STD),
    "efficientnetv2_rw_t": Variant(EfficientNetV2, {"size": "s", "width": 0.8, "depth": 0.9}),
    # Not in timm: for the 32x32 images of CIFAR.
    "tf_efficientnetv2_b0_32": Variant(
        EfficientNetV2, {**_TF, "stem": "cifar"}, 32, CIFAR100_MEAN, CIFAR100_STD
    ),
}
