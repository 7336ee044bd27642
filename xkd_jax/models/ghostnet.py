"""GhostNet, with timm's names, weights and numerics.

Han et al., "GhostNet: More Features from Cheap Operations" (arXiv:1911.11907). The layout follows
`GhostNet` in timm (Ross Wightman, Apache-2.0) and its authors' code (Huawei, Apache-2.0).
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD
from xkd_jax.models.layers import BatchNorm, Conv, add_logits, recomputed, torch_default
from xkd_jax.models.variant import Variant

# timm leaves PyTorch's initialisation, except that biases start at zero here.
_Conv = partial(Conv, kernel_init=torch_default)

_HEAD_CHANNELS = 1280
# Of the stem and the strided stages; "cifar" drops the first two, so that 32x32 images end at 4x4.
_STRIDES = {"imagenet": (2, 2, 2, 2, 2), "cifar": (1, 1, 2, 2, 2)}

# The stages, each a list of blocks: kernel size, expanded channels, channels, squeeze-excite.
# Stages 1, 3, 5 and 7 are strided.
_Block = tuple[int, int, int, bool]
_STAGES: tuple[tuple[_Block, ...], ...] = (
    ((3, 16, 16, False),),
    ((3, 48, 24, False),),
    ((3, 72, 24, False),),
    ((5, 72, 40, True),),
    ((5, 120, 40, True),),
    ((3, 240, 80, False),),
    (
        (3, 200, 80, False),
        (3, 184, 80, False),
        (3, 184, 80, False),
        (3, 480, 112, True),
        (3, 672, 112, True),
    ),
    ((5, 672, 160, True),),
    ((5, 960, 160, False), (5, 960, 160, True), (5, 960, 160, False), (5, 960, 160, True)),
)
# The last stage at each resolution except the highest.
_TAPS = {2: "stage1", 4: "stage2", 6: "stage3", 8: "stage4"}


def round_channels(channels: float) -> int:
    """`channels` rounded to a multiple of 4, but never down by more than 10%."""
    rounded = max(4, int(channels + 2) // 4 * 4)
    return rounded + 4 if rounded < 0.9 * channels else rounded


class SqueezeExcite(nn.Module):
    """Scales channels by gates computed from the whole image (Hu et al., arXiv:1709.01507).

    The gate is a hard sigmoid, and a quarter of the channels are between the two convolutions.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales `x` [N, h, w, C]."""
        channels = x.shape[-1]
        conv = partial(_Conv, kernel_size=1, use_bias=True, dtype=self.dtype)
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = nn.relu(conv(round_channels(channels / 4), name="conv_reduce")(gate))
        return x * nn.hard_sigmoid(conv(channels, name="conv_expand")(gate))


class GhostModule(nn.Module):
    """A 1x1 convolution for one half of the channels, and a depthwise one of these for the other.

    Both are normalised, and rectified if `activation`.
    """

    features: int
    activation: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h, w, features]."""
        half = -(-self.features // 2)
        conv, norm = partial(_Conv, half, dtype=self.dtype), partial(BatchNorm, dtype=self.dtype)
        x = norm(name="primary_conv_1")(conv(1, name="primary_conv_0")(x), train)
        x = nn.relu(x) if self.activation else x
        ghosts = conv(3, groups=half, name="cheap_operation_0")(x)
        ghosts = norm(name="cheap_operation_1")(ghosts, train)
        ghosts = nn.relu(ghosts) if self.activation else ghosts
        return jnp.concatenate([x, ghosts], axis=-1)[..., : self.features]


class GhostBottleneck(nn.Module):
    """Two ghost modules, which expand and project, and a shortcut.

    With `depthwise` there is a depthwise convolution of this `stride` between them, and another in
    the shortcut, whose convolutions also are there where the channel count changes.
    """

    features: int
    hidden: int
    kernel_size: int
    depthwise: bool
    stride: int
    squeeze_excite: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, features], without activation."""
        norm, channels = partial(BatchNorm, dtype=self.dtype), x.shape[-1]

        def depthwise(x: jax.Array, name: str) -> jax.Array:
            channels = x.shape[-1]
            return _Conv(
                channels,
                self.kernel_size,
                self.stride,
                groups=channels,
                dtype=self.dtype,
                name=name,
            )(x)

        y = GhostModule(self.hidden, True, self.dtype, name="ghost1")(x, train)
        if self.depthwise:
            y = norm(name="bn_dw")(depthwise(y, "conv_dw"), train)
        if self.squeeze_excite:
            y = SqueezeExcite(self.dtype, name="se")(y)
        y = GhostModule(self.features, False, self.dtype, name="ghost2")(y, train)
        if self.depthwise or channels != self.features:
            x = norm(name="shortcut_1")(depthwise(x, "shortcut_0"), train)
            x = _Conv(self.features, 1, dtype=self.dtype, name="shortcut_2")(x)
            x = norm(name="shortcut_3")(x, train)
        return y + x


class ConvNorm(nn.Module):
    """A 1x1 convolution, batch normalisation and ReLU."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h, w, features]."""
        x = _Conv(self.features, 1, dtype=self.dtype, name="conv")(x)
        return nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train))


class GhostNet(nn.Module):
    """A GhostNet of nine stages.

    `width` multiplies every channel count except the head's 1280, rounded to multiples of 4. The
    stem is "imagenet" (stride 2) or, for 32x32 images, "cifar" (stride 1, in the second stage
    too). Training updates the collection `batch_stats`; with `drop_rate` above 0, such as timm's
    0.2, it needs `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"
    stages: ClassVar[tuple[tuple[_Block, ...], ...]] = _STAGES

    num_classes: int = 1000
    width: float = 1.0
    stem: str = "imagenet"
    drop_rate: float = 0.0
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
          tensors, because a block ends without an activation; `pooled` [N, 1280], `logits`.

        Raises:
          UserError: `width` or `stem` has an invalid value.
        """
        if self.stem not in _STRIDES:
            raise errors.unknown("stem", self.stem, _STRIDES)
        if not self.width > 0:
            raise errors.UserError(f"width must be above 0, not {self.width}.")
        stem_stride, *strides = _STRIDES[self.stem]
        x = _Conv(self._scale(16), 3, stem_stride, dtype=self.dtype, name="conv_stem")(images)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        out: dict[str, Any] = {}
        block = recomputed(GhostBottleneck, self.remat and train)
        for stage, blocks in enumerate(self.stages):
            for i, (kernel_size, hidden, features, squeeze_excite) in enumerate(blocks):
                strided = stage % 2 == 1
                x = block(
                    self._scale(features),
                    self._scale(hidden),
                    kernel_size,
                    strided,
                    strides[stage // 2] if strided else 1,
                    squeeze_excite,
                    self.dtype,
                    name=f"blocks_{stage}_{i}",
                )(x, train)
            if stage in _TAPS:
                out[_TAPS[stage]] = out[f"{_TAPS[stage]}_pre"] = x
        hidden, last = self.stages[-1][-1][1], len(self.stages)
        x = ConvNorm(self._scale(hidden), self.dtype, name=f"blocks_{last}_0")(x, train)
        x = jnp.mean(x, axis=(1, 2), keepdims=True)
        x = _Conv(_HEAD_CHANNELS, 1, use_bias=True, dtype=self.dtype, name="conv_head")(x)
        out["pooled"] = nn.relu(x)[:, 0, 0]
        return add_logits(out, self.num_classes, self.drop_rate, train, "classifier")

    def _scale(self, channels: int) -> int:
        return round_channels(channels * self.width)


VARIANTS = {
    "ghostnet_100": Variant(GhostNet, {}),
    # Not in timm: for the 32x32 images of CIFAR.
    "ghostnet_100_32": Variant(GhostNet, {"stem": "cifar"}, 32, CIFAR100_MEAN, CIFAR100_STD),
}
