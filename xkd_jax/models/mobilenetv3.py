"""MobileNetV3, with timm's names, weights and numerics.

Howard et al., "Searching for MobileNetV3" (arXiv:1905.02244). The layout follows `MobileNetV3` in
timm (Ross Wightman, Apache-2.0).
"""

import jax
import jax.numpy as jnp

from xkd_jax import errors
from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD
from xkd_jax.models.inverted_residual import (
    ACTIVATIONS,
    BlockNetwork,
    ConvBlock,
    InvertedResidual,
    Row,
)
from xkd_jax.models.layers import Conv
from xkd_jax.models.variant import Variant


def _row(
    kernel_size: int,
    expansion: float,
    channels: int,
    blocks: int = 1,
    stride: int = 1,
    squeeze: bool = True,
    relu: bool = False,
) -> Row:
    """Inverted residuals, with squeeze-excite if `squeeze` and with ReLU if `relu`."""
    args = {"kernel_size": kernel_size, "expansion": expansion}
    if squeeze:
        args |= {"squeeze_excite": "mobilenetv3"}
    if relu:
        args |= {"activation": "relu"}
    return Row(InvertedResidual, channels, blocks, stride, args)


# Channels of the head, and the rows of each stage.
_SIZES = {
    "small": (
        1024,
        (
            (_row(3, 1, 16, stride=2, relu=True),),
            (
                _row(3, 4.5, 24, stride=2, squeeze=False, relu=True),
                _row(3, 3.67, 24, squeeze=False, relu=True),
            ),
            (_row(5, 4, 40, stride=2), _row(5, 6, 40, 2)),
            (_row(5, 3, 48, 2),),
            (_row(5, 6, 96, 3, stride=2),),
            (Row(ConvBlock, 576, args={"kernel_size": 1}),),
        ),
    ),
    "large": (
        1280,
        (
            (_row(3, 1, 16, squeeze=False, relu=True),),
            (
                _row(3, 4, 24, stride=2, squeeze=False, relu=True),
                _row(3, 3, 24, squeeze=False, relu=True),
            ),
            (_row(5, 3, 40, 3, stride=2, relu=True),),
            (
                _row(3, 6, 80, stride=2, squeeze=False),
                _row(3, 2.5, 80, squeeze=False),
                _row(3, 2.3, 80, 2, squeeze=False),
            ),
            (_row(3, 6, 112, 2),),
            (_row(5, 6, 160, 3, stride=2),),
            (Row(ConvBlock, 960, args={"kernel_size": 1}),),
        ),
    ),
}


class MobileNetV3(BlockNetwork):
    """A MobileNetV3, whose head's convolution follows the pooling.

    `size` is "small" or "large". The head has the same channels whatever the `width`, and so has
    the stem below 0.75. The other fields, call, intermediates and errors are those of
    `BlockNetwork`; `stage4` is what is pooled, after an activation.
    """

    size: str = "large"
    activation: str = "hard_swish"

    def _stages(self) -> tuple[tuple[Row, ...], ...]:
        return _SIZES[self.size][1]

    def _stem_channels(self) -> int:
        return 16 if self.width < 0.75 else self._channels(16)

    def _pool(self, x: jax.Array, train: bool) -> jax.Array:
        x = jnp.mean(x, axis=(1, 2), keepdims=True)
        channels = _SIZES[self.size][0]
        x = Conv(channels, 1, use_bias=True, dtype=self.dtype, name="conv_head")(x)
        return ACTIVATIONS[self.activation](x)[:, 0, 0]

    def _check(self) -> None:
        super()._check()
        if self.size not in _SIZES:
            raise errors.unknown("size", self.size, _SIZES)


VARIANTS = {
    "mobilenetv3_small_100": Variant(MobileNetV3, {"size": "small"}),
    "mobilenetv3_large_100": Variant(MobileNetV3, {}),
    # Not in timm: for the 32x32 images of CIFAR.
    "mobilenetv3_small_100_32": Variant(
        MobileNetV3, {"size": "small", "stem": "cifar"}, 32, CIFAR100_MEAN, CIFAR100_STD
    ),
}
