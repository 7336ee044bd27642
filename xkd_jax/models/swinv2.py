"""Swin Transformers V2, with timm's names, weight layout and numerics.

Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution" (arXiv:2111.09883). The layout
follows `SwinTransformerV2` in timm (Ross Wightman, Apache-2.0). The parts that both versions share
are in `swin`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.models import swin
from xkd_jax.models.layers import drop_path, layer_norm
from xkd_jax.models.variant import Variant
from xkd_jax.models.vit_layers import Mlp

_weight_init = nn.initializers.normal(0.02)  # as in `swin`
# Every block starts as the identity.
_layer_norm = partial(layer_norm, epsilon=1e-5, scale_init=nn.initializers.zeros)

_LARGEST_SCALE = 100.0  # of the cosines
_LARGEST_BIAS = 16.0
_HIDDEN = 512  # channels between the two layers that make the position bias


def log_coordinates(window: int, pretrained: int) -> np.ndarray:
    """The log-spaced coordinates of all relative positions in a window (section 3.3, equation 4).

    Args:
      window: the side of the window.
      pretrained: the side of the window whose coordinates reach from -1.06 to 1.06, and beyond that
        in larger ones; 0: `window`.

    Returns:
      The vertical and the horizontal coordinate, [(2 window - 1)**2, 2] float32.
    """
    line = 8 * np.arange(1 - window, window) / max((pretrained or window) - 1, 1)
    line = np.sign(line) * np.log2(np.abs(line) + 1) / np.log2(8)
    plane = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1)
    return plane.reshape(-1, 2).astype(np.float32)


def _position_layers(heads: int, **args: Any) -> list[nn.Dense]:
    # They map few rows: full precision is almost free, and keeps rounding out of all the scores.
    dense = partial(nn.Dense, kernel_init=_weight_init, precision="highest", **args)
    return [dense(_HIDDEN, name="cpb_mlp_0"), dense(heads, use_bias=False, name="cpb_mlp_2")]


def position_table(layers: Sequence[Callable[..., Any]], window: int, pretrained: int) -> jax.Array:
    """The continuous bias of the scores by relative position (section 3.3).

    Args:
      layers: the two layers from coordinates, [P, 2], to one number per head.
      window: the side of the windows.
      pretrained: the side of the windows that the layers were trained with; 0: the same.

    Returns:
      Numbers from 0 to 16, [(2 window - 1)**2, heads] float32.
    """
    first, second = layers
    numbers = second(nn.relu(first(log_coordinates(window, pretrained))))
    return _LARGEST_BIAS * nn.sigmoid(numbers)


class WindowAttention(swin.WindowAttention):
    """Attention within (shifted) windows by the cosine of query and key (section 3.2).

    The returned query and key have unit length times the square root of s sqrt(d), where s is the
    head's learned scale. So the scores are, as in other networks, their product over sqrt(d).

    Attributes:
      pretrained_window: the side of the windows that the position bias was trained with; 0: that of
        the windows here.
    """

    pretrained_window: int = 0

    def _project(self, x: jax.Array) -> jax.Array:
        rows, dim = x.shape
        heads, head_dim = self.num_heads, dim // self.num_heads
        qkv = nn.Dense(
            3 * dim, use_bias=False, dtype=self.dtype, kernel_init=_weight_init, name="qkv"
        )(x)
        if self.qkv_bias:
            zeros = nn.initializers.zeros
            query, value = (self.param(name, zeros, (dim,)) for name in ("q_bias", "v_bias"))
            bias = jnp.concatenate([query, jnp.zeros_like(query), value])
            qkv = qkv + bias.astype(self.dtype)

        initial = nn.initializers.constant(math.log(10))
        scale = self.param("logit_scale", initial, (heads, 1, 1))[:, 0]
        scale = jnp.exp(jnp.minimum(scale, math.log(_LARGEST_SCALE))) * head_dim**0.5
        qkv = qkv.reshape(rows, 3, heads, head_dim)
        squares = jnp.square(qkv[:, :2].astype(jnp.float32)).sum(-1, keepdims=True)
        factors = jnp.sqrt(scale) * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
        factors = jnp.concatenate([factors, jnp.ones_like(factors[:, :1])], axis=1)
        return (qkv * factors).astype(self.dtype).reshape(rows, 3 * dim)

    def _position_table(self, window: int) -> jax.Array:
        return position_table(_position_layers(self.num_heads), window, self.pretrained_window)


class Block(swin.Block):
    """A Transformer block that normalises the output of each branch (section 3.2).

    `pretrained_window` is that of its `WindowAttention`.
    """

    pretrained_window: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, rate: float | jax.Array = 0.0
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Maps `x` [N, T, C] to [N, T, C]; also returns query, key and value.

        `rate` is the probability that a branch is dropped, per sample.
        """
        y, qkv = WindowAttention(
            self.num_heads,
            self.window_size,
            self.shifted,
            self.qkv_bias,
            self.dtype,
            self.pretrained_window,
            name="attn",
        )(x)
        y = _layer_norm("norm1", dtype=self.dtype)(y)
        x = x + drop_path(self, y, rate, train)
        y = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(x)
        y = _layer_norm("norm2", dtype=self.dtype)(y)
        return x + drop_path(self, y, rate, train), qkv


class Stage(swin.Stage):
    """The blocks at one resolution; `pretrained_window` is that of each `WindowAttention`."""

    post_norm: ClassVar[bool] = True

    pretrained_window: int = 0

    def _block(self) -> tuple[type[nn.Module], dict[str, Any]]:
        return Block, {**super()._block()[1], "pretrained_window": self.pretrained_window}


class SwinTransformerV2(swin.SwinTransformer):
    """timm's `SwinTransformerV2`, with its names and, except for drop_path_rate, its defaults.

    `img_size` and `window_size` may be set freely, as in `SwinTransformer`: no tensor depends on
    them, because a small network makes the position bias of the coordinates.

    Attributes:
      pretrained_window_sizes: the side of the windows that each stage's position bias was trained
        with; 0: that of the windows here. Where it is given, weights from other windows keep the
        biases of near neighbours.
    """

    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)

    def _stage(self, i: int) -> Stage:
        pretrained = self.pretrained_window_sizes[i]
        return Stage(**self._stage_fields(i), pretrained_window=pretrained)

    def _position_table(self, attn: Mapping[str, Any], window: int) -> jax.Array:
        layers = [
            partial(layer.apply, {"params": attn[str(layer.name)]})
            for layer in _position_layers(self.num_heads[3], parent=None)
        ]
        return position_table(layers, window, self.pretrained_window_sizes[3])

    def _check(self, shape: tuple[int, ...]) -> None:
        super()._check(shape)
        sizes = self.pretrained_window_sizes
        if len(sizes) != 4 or min(sizes) < 0:
            raise errors.UserError(
                f"pretrained_window_sizes {sizes} must be four numbers, one per stage, and none "
                "below 0; 0 stands for the windows of the network itself."
            )


def _variant(size: str, window: int, img: int, pretrained: tuple[int, ...] = ()) -> Variant:
    args = {"img_size": img, "patch_size": 4, "window_size": window, **swin.SIZES[size]}
    if pretrained:
        args["pretrained_window_sizes"] = pretrained
    return Variant(SwinTransformerV2, args, img)


VARIANTS = {
    f"swinv2_{size}_window{window}_256": _variant(size, window, 256)
    for size in ("tiny", "base")
    for window in (8, 16)
}
VARIANTS["swinv2_base_window12_192"] = _variant("base", 12, 192)
VARIANTS |= {
    f"swinv2_base_window12to{window}_192to{img}": _variant("base", window, img, (12, 12, 12, 6))
    for window, img in ((16, 256), (24, 384))
}
# Not in timm: for the 32x32 images of CIFAR.
VARIANTS["swinv2_tiny_patch2_window4_32"] = Variant(
    SwinTransformerV2, {"img_size": 32, "patch_size": 2, "window_size": 4, **swin.SIZES["tiny"]}, 32
)
