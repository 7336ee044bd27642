"""EfficientNets, with timm's names, weights and numerics.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(arXiv:1905.11946). The layout follows `EfficientNet` in timm (Ross Wightman, Apache-2.0), which
builds MobileNetV2 from the same blocks, as `mobilenetv2` does here.
"""

from collections.abc import Sequence
from typing import ClassVar

from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD, HALF_MEAN, HALF_STD
from xkd_jax.models.inverted_residual import BlockNetwork, InvertedResidual, Row
from xkd_jax.models.variant import Variant

_STRIDES = (1, 2, 2, 2, 1, 2, 1)


class EfficientNet(BlockNetwork):
    """timm's `EfficientNet` of seven stages; the defaults are B0's.

    `fix_stem_head` exempts the channels of the stem and the head from `width`, and the blocks of
    the first and the last stage from `depth`. The other fields, call, intermediates and errors are
    those of `BlockNetwork`.
    """

    # Kernel size, channels and blocks of each stage.
    stages: ClassVar[tuple[tuple[int, int, int], ...]] = (
        (3, 16, 1),
        (3, 24, 2),
        (5, 40, 2),
        (3, 80, 3),
        (5, 112, 3),
        (5, 192, 4),
        (3, 320, 1),
    )

    fix_stem_head: bool = False
    squeeze_excite: bool = True

    def _stages(self) -> tuple[tuple[Row, ...], ...]:
        rows = []
        for stage, (kernel_size, channels, blocks) in enumerate(self.stages):
            args = {
                "kernel_size": kernel_size,
                "expansion": 6 if stage > 0 else 1,
                "squeeze_excite": "efficientnet" if self.squeeze_excite else None,
            }
            rows.append((Row(InvertedResidual, channels, blocks, _STRIDES[stage], args),))
        return tuple(rows)

    def _count_blocks(self, stage: int, rows: Sequence[Row]) -> list[int]:
        if self.fix_stem_head and stage in (0, len(self.stages) - 1):
            return [row.repeats for row in rows]
        return super()._count_blocks(stage, rows)

    def _stem_channels(self) -> int:
        return 32 if self.fix_stem_head else super()._stem_channels()

    def _head_channels(self) -> int:
        return 1280 if self.fix_stem_head else super()._head_channels()


_LITE = {
    "activation": "relu6",
    "squeeze_excite": False,
    "padding": "SAME",
    "bn_epsilon": 1e-3,
    "fix_stem_head": True,
}

VARIANTS = {
    "efficientnet_b0": Variant(EfficientNet, {}),
    "efficientnet_b1": Variant(EfficientNet, {"depth": 1.1}, 240, HALF_MEAN, HALF_STD),
    "efficientnet_b2": Variant(EfficientNet, {"width": 1.1, "depth": 1.2}, 256),
    "efficientnet_b3": Variant(EfficientNet, {"width": 1.2, "depth": 1.4}, 288),
    "tf_efficientnet_lite0": Variant(EfficientNet, _LITE, mean=HALF_MEAN, std=HALF_STD),
    # Not in timm: for the 32x32 images of CIFAR.
    "efficientnet_b0_32": Variant(EfficientNet, {"stem": "cifar"}, 32, CIFAR100_MEAN, CIFAR100_STD),
}
