"""Feature pyramids: Lin et al., "Feature Pyramid Networks" (arXiv:1612.03144).

Names as in torchvision's `BackboneWithFPN` and `FeaturePyramidNetwork` (BSD-3).
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax.models.layers import Conv, frozen_batch_norm

# torchvision's kaiming_uniform_ with a=1.
_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class FeaturePyramid(nn.Module):
    """Top-down pathway and lateral connections, and a last level by subsampling.

    `features` is the number of channels of every level.
    """

    features: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, stages: Sequence[jax.Array]) -> list[jax.Array]:
        """Turns the stages [N, h, w, C] into levels [N, h, w, features], and one of half the size.

        Each stage is at most as large as the one before, and so are the levels.
        """
        levels: list[jax.Array] = []
        above = None
        for i in reversed(range(len(stages))):
            lateral = self._conv(f"inner_blocks_{i}_0", 1)(stages[i])
            above = lateral if above is None else lateral + _enlarge(above, lateral.shape[1:3])
            levels.insert(0, self._conv(f"layer_blocks_{i}_0", 3)(above))
        # torchvision's LastLevelMaxPool: max-pooling with windows of 1 and stride 2.
        return [*levels, levels[-1][:, ::2, ::2]]

    def _conv(self, name: str, kernel: int) -> Conv:
        return Conv(
            self.features, kernel, use_bias=True, kernel_init=_INIT, dtype=self.dtype, name=name
        )


def _enlarge(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """The nearest of the pixels of `x` [N, H, W, C], for [N, *size, C]; PyTorch's "nearest"."""
    if all(new == 2 * old for new, old in zip(size, x.shape[1:3], strict=True)):
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    rows, columns = (
        jnp.arange(new) * old // new for new, old in zip(size, x.shape[1:3], strict=True)
    )
    return x[:, rows][:, :, columns]


class Backbone(nn.Module):
    """A CNN without a classifier, and a feature pyramid over its four stages.

    With `frozen_norm`, BatchNorm in `body` is a constant affine map (torchvision's
    `FrozenBatchNorm2d`): running statistics in training too, and no gradients of scale and bias.
    `width` is the number of channels of the pyramid.
    """

    body: nn.Module
    frozen_norm: bool = True
    width: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[list[jax.Array], dict[str, Any]]:
        """The pyramid of `images` [N, H, W, 3], five levels, and the intermediates of `body`."""
        with frozen_batch_norm() if self.frozen_norm else contextlib.nullcontext():
            _, out = self.body(images, train=train)  # pyright: ignore[reportCallIssue]
        stages = [out[f"stage{i}"] for i in range(1, 5)]
        return FeaturePyramid(self.width, self.dtype, name="fpn")(stages), out
