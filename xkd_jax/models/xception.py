"""Xception, with timm's names, weights and numerics, at any width.

Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions" (arXiv:1610.02357). The
layout follows `legacy_xception` in timm (Ross Wightman, Apache-2.0; ported from Keras by
tstandley and Cadene).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import HALF_MEAN, HALF_STD
from xkd_jax.models.layers import BatchNorm, Conv, add_logits, max_pool, recomputed
from xkd_jax.models.variant import Variant

# Channels and stride of block1 ... block12.
_BLOCKS = ((128, 2), (256, 2), (728, 2), *((728, 1),) * 8, (1024, 2))
_STAGE_ENDS = {1: "stage1", 2: "stage2", 11: "stage3"}
_SMALLEST = 7  # the unpadded stem reduces it to one pixel


class SeparableConv(nn.Module):
    """A depthwise 3x3 convolution, then a pointwise (1x1) one."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h, w, features]."""
        x = Conv(x.shape[-1], 3, groups=x.shape[-1], dtype=self.dtype, name="conv1")(x)
        return Conv(self.features, 1, dtype=self.dtype, name="pointwise")(x)


class Block(nn.Module):
    """Separable convolutions and a shortcut; returns the sum, without an activation.

    A ReLU precedes each convolution, except the first without `start_with_relu`. Without
    `grow_first` only the last one changes the channel count. A stride is a max-pool at the end.
    """

    features: int
    stride: int = 1
    start_with_relu: bool = True
    grow_first: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, features]."""
        shortcut, channels = x, x.shape[-1]
        if channels != self.features or self.stride != 1:
            shortcut = Conv(self.features, 1, self.stride, dtype=self.dtype, name="skip")(x)
            shortcut = BatchNorm(dtype=self.dtype, name="skipbn")(shortcut, train)
        depth = 3 if self.stride == 1 else 2
        for i in range(depth):
            if i > 0 or self.start_with_relu:
                x = nn.relu(x)
            # The published names count ReLUs too.
            index = 3 * i + int(self.start_with_relu)
            features = self.features if self.grow_first or i == depth - 1 else channels
            x = SeparableConv(features, self.dtype, name=f"rep_{index}")(x)
            x = BatchNorm(dtype=self.dtype, name=f"rep_{index + 1}")(x, train)
        if self.stride != 1:
            x = max_pool(x, 3, self.stride, padding=1)
        return x + shortcut


class Xception(nn.Module):
    """Xception of twelve blocks; `width` multiplies every channel count.

    Training updates the collection `batch_stats`; with `drop_rate` above 0 it needs
    `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"

    num_classes: int = 1000
    width: float = 1.0
    drop_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, H, W, 3], already normalised, at least 7 pixels a side.

        The stages are timm's features at reductions 4, 8, 16 and 32: blocks 1, 2 and 11, and
        the last convolution. A block ends in a sum without an activation, `stage1_pre` ...
        `stage3_pre`; `stage1` ... `stage3` are that sum after the ReLU with which the next
        block's convolutions start (its shortcut bypasses that ReLU).

        Returns:
          logits [N, num_classes] float32, and the intermediates: `stage1` ... `stage4`
          [N, h, w, C] after the activation, `stage1_pre` ... before it, `pooled` [N, C],
          `logits`.

        Raises:
          UserError: `images` is smaller, or `width` leaves a layer without channels.
        """
        self._check(images.shape)
        out: dict[str, Any] = {}
        x = self._stem(images, train)
        block = recomputed(Block, self.remat and train)
        for i, (features, stride) in enumerate(_BLOCKS, start=1):
            x = block(
                self._channels(features),
                stride,
                start_with_relu=i > 1,
                grow_first=i < len(_BLOCKS),
                dtype=self.dtype,
                name=f"block{i}",
            )(x, train)
            if i in _STAGE_ENDS:
                out[f"{_STAGE_ENDS[i]}_pre"] = x
                out[_STAGE_ENDS[i]] = nn.relu(x)
        x = SeparableConv(self._channels(1536), self.dtype, name="conv3")(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn3")(x, train))
        x = SeparableConv(self._channels(2048), self.dtype, name="conv4")(x)
        out["stage4_pre"] = x = BatchNorm(dtype=self.dtype, name="bn4")(x, train)
        out["stage4"] = x = nn.relu(x)
        out["pooled"] = jnp.mean(x, axis=(1, 2))
        return add_logits(out, self.num_classes, self.drop_rate, train, "fc")

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        for i, (features, stride) in enumerate(((32, 2), (64, 1)), start=1):
            features = self._channels(features)
            x = Conv(features, 3, stride, padding=0, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f"bn{i}")(x, train))
        return x

    def _channels(self, features: int) -> int:
        return round(features * self.width)

    def _check(self, shape: tuple[int, ...]) -> None:
        if min(shape[1:3]) < _SMALLEST:
            raise errors.UserError(
                f"Xception needs images of at least {_SMALLEST} pixels a side, not "
                f"{shape[1]}x{shape[2]}; it was designed for 299x299."
            )
        if self._channels(32) < 1:
            raise errors.UserError(
                f"width must leave at least one channel of the stem's 32, not {self.width}."
            )


VARIANTS = {
    "legacy_xception": Variant(Xception, {}, 299, HALF_MEAN, HALF_STD),
    # Not in timm: the paper's Xceptionx2.
    "legacy_xception_x2": Variant(Xception, {"width": 2.0}, 299, HALF_MEAN, HALF_STD),
}
