"""Layers that methods put between the two networks; they are discarded after training."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax.models.layers import Conv, normalize_batch


class ConvNorm(nn.Module):
    """A convolution without bias, then batch normalisation: from one network's width to another's.

    There are no running statistics, since it is never evaluated.
    """

    features: int
    kernel_size: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, C] -> [N, h, w, features]."""
        x = Conv(self.features, self.kernel_size, name="conv")(x)
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        normalized: Any = normalize_batch(x, scale, bias, 1e-5)  # custom_vjp hides the type
        return normalized[0]


def unit(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """Scales vectors along `axis` to Euclidean length 1; zeros stay zero, with finite gradients."""
    square = jnp.sum(x**2, axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
