"""MobileNetV4, with timm's names, weights and numerics.

Qin et al., "MobileNetV4 - Universal Models for the Mobile Ecosystem" (arXiv:2404.10518). The layout
follows timm (Ross Wightman, Apache-2.0).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD
from xkd_jax.models.inverted_residual import (
    ACTIVATIONS,
    Block,
    BlockNetwork,
    ConvBlock,
    FusedInvertedResidual,
    Row,
    round_channels,
)
from xkd_jax.models.layers import BatchNorm, Conv, drop_path
from xkd_jax.models.variant import Variant
from xkd_jax.models.vit_layers import LayerScale

_xavier = nn.initializers.xavier_uniform()


class ConvNorm(Block):
    """A convolution and normalisation without an activation; depthwise if `depthwise`."""

    kernel_size: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, features]."""
        names = ("conv", "bn")
        return self._conv_norm(
            x, self.features, self.kernel_size, names, train, self.stride, self.depthwise
        )


class UniversalInvertedResidual(Block):
    """An inverted residual whose depthwise convolutions are optional (section 4.1 of the paper).

    `start` and `middle` are the kernel sizes of the depthwise convolutions before the expansion and
    after it; 0 omits one. `layer_scale` is the initial factor per channel of the branch, None for
    none.
    """

    start: int = 0
    middle: int = 3
    expansion: float = 4
    layer_scale: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Maps `x` as described in `Block`."""
        channels, activation = x.shape[-1], ACTIVATIONS[self.activation]
        hidden = round_channels(channels, self.expansion)
        layer = partial(
            ConvNorm, padding=self.padding, bn_epsilon=self.bn_epsilon, dtype=self.dtype
        )
        depthwise = partial(layer, depthwise=True)
        y = x
        if self.start:
            stride = 1 if self.middle else self.stride
            y = depthwise(channels, stride, kernel_size=self.start, name="dw_start")(y, train)
        y = activation(layer(hidden, name="pw_exp")(y, train))
        if self.middle:
            y = depthwise(hidden, self.stride, kernel_size=self.middle, name="dw_mid")(y, train)
            y = activation(y)
        y = layer(self.features, name="pw_proj")(y, train)
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, self.dtype, name="layer_scale")(y)
        y = self._add_shortcut(x, y, train)
        return y, y


class MultiQueryAttention(nn.Module):
    """Attention of all heads to the same keys and values (Shazeer, arXiv:1911.02150).

    With `kv_stride` 2, keys and values are of a map of half the size (section 4.2 of the paper).
    """

    num_heads: int
    head_dim: int
    kv_stride: int
    bn_epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `x` [N, h, w, C] to the same shape."""
        n, h, w, channels = x.shape
        query = Projection(self.num_heads * self.head_dim, 1, 0.0, self.dtype, name="query")
        part = partial(Projection, self.head_dim, self.kv_stride, self.bn_epsilon, self.dtype)
        q = query(x, train).reshape(n, h * w, self.num_heads, self.head_dim)
        k, v = (
            part(name=name)(x, train).reshape(n, -1, self.head_dim) for name in ("key", "value")
        )
        scores = jnp.einsum("nthd,nsd->nhts", q * self.head_dim**-0.5, k)
        weights = nn.softmax(scores.astype(jnp.float32)).astype(self.dtype)
        y = jnp.einsum("nhts,nsd->nthd", weights, v).reshape(n, h, w, -1)
        return Projection(channels, 1, 0.0, self.dtype, name="output")(y, train)


class Projection(nn.Module):
    """A 1x1 convolution, after a depthwise one and normalisation if `stride` is 2."""

    features: int
    stride: int
    bn_epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, features]."""
        conv, channels = partial(Conv, kernel_init=_xavier, dtype=self.dtype), x.shape[-1]
        if self.stride > 1:
            x = conv(channels, 3, self.stride, groups=channels, name="down_conv")(x)
            x = BatchNorm(epsilon=self.bn_epsilon, dtype=self.dtype, name="norm")(x, train)
        return conv(self.features, 1, name="proj")(x)


class MobileAttention(Block):
    """Multi-query attention with BatchNorm before it and a factor per channel after it."""

    num_heads: int = 4
    head_dim: int = 64
    kv_stride: int = 1
    layer_scale: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Maps `x` as described in `Block`; it has the same size and `features`."""
        y = BatchNorm(epsilon=self.bn_epsilon, dtype=self.dtype, name="norm")(x, train)
        y = MultiQueryAttention(
            self.num_heads, self.head_dim, self.kv_stride, self.bn_epsilon, self.dtype, name="attn"
        )(y, train)
        y = LayerScale(self.layer_scale, self.dtype, name="layer_scale")(y)
        y = drop_path(self, y, self.drop_path, train) + x
        return y, y


def _conv(kernel_size: int, channels: int, stride: int = 1) -> Row:
    return Row(ConvBlock, channels, 1, stride, {"kernel_size": kernel_size})


def _rows(channels: int, *blocks: Any, layer_scale: float | None = None) -> tuple[Row, ...]:
    """A stage of universal inverted residuals, the first with stride 2.

    A block is (start, middle, expansion), or for attention (its stride of keys and values,).
    """
    rows = []
    for i, block in enumerate(blocks):
        if len(block) == 1:
            rows.append(Row(MobileAttention, channels, args={"kv_stride": block[0]}))
            continue
        args = dict(zip(("start", "middle", "expansion"), block, strict=True))
        rows.append(
            Row(
                UniversalInvertedResidual,
                channels,
                1,
                2 if i == 0 else 1,
                {**args, "layer_scale": layer_scale},
            )
        )
    return tuple(rows)


_FUSED = (Row(FusedInvertedResidual, 48, 1, 2, {"expansion": 4}),)
_LAST = (_conv(1, 960),)
_A2, _A1 = (2,), (1,)  # attention
_hybrid = partial(_rows, layer_scale=1e-5)

_SIZES = {
    "small": (
        (_conv(3, 32, 2), _conv(1, 32)),
        (_conv(3, 96, 2), _conv(1, 64)),
        _rows(96, (5, 5, 3), *[(0, 3, 2)] * 4, (3, 0, 4)),
        _rows(128, (3, 3, 6), (5, 5, 4), (0, 5, 4), (0, 5, 3), (0, 3, 4), (0, 3, 4)),
        _LAST,
    ),
    "medium": (
        _FUSED,
        _rows(80, (3, 5, 4), (3, 3, 2)),
        _rows(
            160,
            *((3, 5, 6), (3, 3, 4), (3, 3, 4), (3, 5, 4), (3, 3, 4)),
            *((3, 0, 4), (0, 0, 2), (3, 0, 4)),
        ),
        _rows(
            256,
            *((5, 5, 6), (5, 5, 4), (3, 5, 4), (3, 5, 4), (0, 0, 4), (3, 0, 4)),
            *((3, 5, 2), (5, 5, 4), (0, 0, 4), (0, 0, 4), (5, 0, 2)),
        ),
        _LAST,
    ),
    "hybrid_medium": (
        _FUSED,
        _hybrid(80, (3, 5, 4), (3, 3, 2)),
        _hybrid(
            160,
            *((3, 5, 6), (0, 0, 2), (3, 3, 4), (3, 5, 4), _A2, (3, 3, 4)),
            *(_A2, (3, 0, 4), _A2, (3, 3, 4), _A2, (3, 0, 4)),
        ),
        _hybrid(
            256,
            *((5, 5, 6), (5, 5, 4), (3, 5, 4), (3, 5, 4), (0, 0, 2), (3, 5, 2), (0, 0, 2)),
            *((0, 0, 4), _A1, (3, 0, 4), _A1, (5, 5, 4), _A1, (5, 0, 4), _A1, (5, 0, 4)),
        ),
        _LAST,
    ),
}


class MobileNetV4(BlockNetwork):
    """A MobileNetV4, whose head's convolution and normalisation follow the pooling.

    `size` is "small", "medium" or, with multi-query attention, "hybrid_medium". The head has the
    same channels whatever the `width`, and so has the stem below 1. The other fields, call,
    intermediates and errors are those of `BlockNetwork`; `stage4` is what is pooled, after an
    activation.
    """

    size: str = "small"
    activation: str = "relu"

    def _stages(self) -> tuple[tuple[Row, ...], ...]:
        return _SIZES[self.size]

    def _stem_channels(self) -> int:
        return 32 if self.width < 1 else self._channels(32)

    def _pool(self, x: jax.Array, train: bool) -> jax.Array:
        x = jnp.mean(x, axis=(1, 2), keepdims=True)
        return self._conv_norm(x, 1280, 1, 1, ("conv_head", "norm_head"), train)[:, 0, 0]

    def _check(self) -> None:
        super()._check()
        if self.size not in _SIZES:
            raise errors.unknown("size", self.size, _SIZES)


VARIANTS = {
    "mobilenetv4_conv_small": Variant(MobileNetV4, {}),
    "mobilenetv4_conv_medium": Variant(MobileNetV4, {"size": "medium"}, 256),
    "mobilenetv4_hybrid_medium": Variant(MobileNetV4, {"size": "hybrid_medium"}, 256),
    # Not in timm: for the 32x32 images of CIFAR.
    "mobilenetv4_conv_small_32": Variant(
        MobileNetV4, {"stem": "cifar"}, 32, CIFAR100_MEAN, CIFAR100_STD
    ),
}
