"""EfficientNets, with timm's names, weights and numerics.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(arXiv:1905.11946). The layout follows `EfficientNet` in timm (Ross Wightman, Apache-2.0), which
builds MobileNetV2 from the same blocks, as `mobilenetv2` does here.
"""

import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD, HALF_MEAN, HALF_STD
from xkd_jax.models.layers import BatchNorm, Conv, add_logits, drop_path, recomputed
from xkd_jax.models.variant import Variant

_ACTIVATIONS = {"silu": nn.silu, "relu6": nn.relu6}
# Of the stem and the seven stages; "cifar" drops the first two, so that 32x32 images end at 4x4.
_STRIDES = {"imagenet": (2, 1, 2, 2, 2, 1, 2, 1), "cifar": (1, 1, 1, 2, 2, 1, 2, 1)}
# The last stage at each resolution except the highest: timm's reductions 4, 8, 16 and 32.
_TAPS = {1: "stage1", 2: "stage2", 4: "stage3", 6: "stage4"}

# As in Google's code: uniform within +-1/sqrt(num_classes).
_head_init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


def round_channels(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8, but never down by more than 10%."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class SqueezeExcite(nn.Module):
    """Scales channels by gates computed from the whole image (Hu et al., arXiv:1709.01507)."""

    reduced: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales `x` [N, h, w, C]; `reduced` channels are between the two 1x1 convolutions."""
        conv = partial(Conv, kernel_size=1, use_bias=True, dtype=self.dtype)
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = _ACTIVATIONS[self.activation](conv(self.reduced, name="conv_reduce")(gate))
        return x * nn.sigmoid(conv(x.shape[-1], name="conv_expand")(gate))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and linear projection (MobileNetV2, arXiv:1801.04381).

    With `expansion` 1 there is no expansion, and the layers have the names of timm's
    `DepthwiseSeparableConv`. The other fields are those of `EfficientNet`; `drop_path` is the rate
    of stochastic depth. There is a shortcut where neither size nor channel count changes.
    """

    features: int
    kernel_size: int
    stride: int
    expansion: int
    activation: str
    squeeze_excite: bool
    padding: str | None
    bn_epsilon: float
    drop_path: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, features], without activation."""
        conv = partial(Conv, padding=self.padding, dtype=self.dtype)
        norm = partial(BatchNorm, epsilon=self.bn_epsilon, dtype=self.dtype)
        activation = _ACTIVATIONS[self.activation]
        channels = x.shape[-1]
        y, hidden = x, channels * self.expansion
        depthwise_norm, project, project_norm = "bn1", "conv_pw", "bn2"
        if self.expansion > 1:
            y = conv(hidden, 1, name="conv_pw")(y)
            y = activation(norm(name="bn1")(y, train))
            depthwise_norm, project, project_norm = "bn2", "conv_pwl", "bn3"
        y = conv(
            hidden,
            self.kernel_size,
            self.stride,
            groups=hidden,
            # timm's fan-out counts the outputs that one input reaches: those of one channel.
            kernel_init=nn.initializers.variance_scaling(2.0 * hidden, "fan_out", "normal"),
            name="conv_dw",
        )(y)
        y = activation(norm(name=depthwise_norm)(y, train))
        if self.squeeze_excite:
            y = SqueezeExcite(channels // 4, self.activation, self.dtype, name="se")(y)
        y = conv(self.features, 1, name=project)(y)
        y = norm(name=project_norm)(y, train)
        if self.stride > 1 or channels != self.features:
            return y
        return drop_path(self, y, self.drop_path, train) + x


class EfficientNet(nn.Module):
    """timm's `EfficientNet` of seven stages; the defaults are B0's.

    `width` multiplies every channel count, rounded to multiples of 8, and `depth` every stage's
    blocks, rounded up; `fix_stem_head` exempts the channels of the stem and the head, and the
    number of blocks of the first and the last stage. The stem is "imagenet" (stride 2) or, for
    32x32 images, "cifar" (stride 1, in the second stage too). `activation` is "silu" or "relu6";
    `padding` is None, as in PyTorch, or "SAME", as in TensorFlow. Training updates the collection
    `batch_stats`; with `drop_rate` or `drop_path_rate` above 0 it needs `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"
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

    num_classes: int = 1000
    width: float = 1.0
    depth: float = 1.0
    fix_stem_head: bool = False
    stem: str = "imagenet"
    activation: str = "silu"
    squeeze_excite: bool = True
    padding: str | None = None
    bn_epsilon: float = 1e-5
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, H, W, 3], already normalised, of any size.

        Returns:
          logits [N, num_classes] float32, and the intermediates: `stage1` ... `stage4`
          [N, h, w, C], the last block's output at each resolution; `stage1_pre` ..., the same
          tensors, because a linear bottleneck ends without an activation; `pooled` [N, C],
          `logits`.

        Raises:
          UserError: `width`, `depth`, `stem`, `activation` or `padding` has an invalid value.
        """
        self._check()
        stem_stride, *strides = _STRIDES[self.stem]
        channels = 32 if self.fix_stem_head else round_channels(32, self.width)
        x = self._conv_norm(images, channels, 3, stem_stride, ("conv_stem", "bn1"), train)
        out: dict[str, Any] = {}
        blocks = [self._blocks(stage) for stage in range(len(self.stages))]
        block = recomputed(InvertedResidual, self.remat and train)
        for stage, (kernel_size, channels, _) in enumerate(self.stages):
            for i in range(blocks[stage]):
                x = block(
                    round_channels(channels, self.width),
                    kernel_size,
                    strides[stage] if i == 0 else 1,
                    expansion=6 if stage > 0 else 1,
                    activation=self.activation,
                    squeeze_excite=self.squeeze_excite,
                    padding=self.padding,
                    bn_epsilon=self.bn_epsilon,
                    drop_path=self.drop_path_rate * (sum(blocks[:stage]) + i) / sum(blocks),
                    dtype=self.dtype,
                    name=f"blocks_{stage}_{i}",
                )(x, train)
            if stage in _TAPS:
                out[_TAPS[stage]] = out[f"{_TAPS[stage]}_pre"] = x
        x = self._conv_norm(x, self._head_channels(), 1, 1, ("conv_head", "bn2"), train)
        out["pooled"] = jnp.mean(x, axis=(1, 2))
        return add_logits(out, self.num_classes, self.drop_rate, train, "classifier", _head_init)

    def _conv_norm(
        self,
        x: jax.Array,
        channels: int,
        kernel_size: int,
        stride: int,
        names: tuple[str, str],
        train: bool,
    ) -> jax.Array:
        """Convolution and normalisation, called `names`, and the activation."""
        conv, norm = names
        x = Conv(channels, kernel_size, stride, padding=self.padding, dtype=self.dtype, name=conv)(
            x
        )
        x = BatchNorm(epsilon=self.bn_epsilon, dtype=self.dtype, name=norm)(x, train)
        return _ACTIVATIONS[self.activation](x)

    def _blocks(self, stage: int) -> int:
        blocks = self.stages[stage][2]
        if self.fix_stem_head and stage in (0, len(self.stages) - 1):
            return blocks
        return math.ceil(blocks * self.depth)

    def _head_channels(self) -> int:
        return 1280 if self.fix_stem_head else round_channels(1280, self.width)

    def _check(self) -> None:
        if self.stem not in _STRIDES:
            raise errors.unknown("stem", self.stem, _STRIDES)
        if self.activation not in _ACTIVATIONS:
            raise errors.unknown("activation", self.activation, _ACTIVATIONS)
        if self.padding not in (None, "SAME"):
            raise errors.UserError(f"padding must be None or 'SAME', not {self.padding!r}.")
        for field in ("width", "depth"):
            if not getattr(self, field) > 0:
                raise errors.UserError(f"{field} must be above 0, not {getattr(self, field)}.")


_LITE = {
    "activation": "relu6",
    "squeeze_excite": False,
    "padding": "SAME",
    "bn_epsilon": 1e-3,
    "fix_stem_head": True,
}

VARIANTS = {
    "efficientnet_b0": Variant(EfficientNet, {}),
    "tf_efficientnet_lite0": Variant(EfficientNet, _LITE, mean=HALF_MEAN, std=HALF_STD),
    # Not in timm: for the 32x32 images of CIFAR.
    "efficientnet_b0_32": Variant(EfficientNet, {"stem": "cifar"}, 32, CIFAR100_MEAN, CIFAR100_STD),
}
