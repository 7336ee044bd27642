"""Layers that methods put between the two networks; they are discarded after training."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax.models.layers import Conv, normalize_batch


class ConvNorm(nn.Module):
    """A convolution without bias, then `batch_norm`: from one network's width to another's."""

    features: int
    kernel_size: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, C] -> [N, h, w, features]."""
        return batch_norm(self, Conv(self.features, self.kernel_size, name="conv")(x))


def batch_norm(module: nn.Module, x: jax.Array) -> jax.Array:
    """Normalises `x` [..., C] over the batch, with the parameters `scale` and `bias` of `module`.

    There are no running statistics, since methods' layers are never evaluated.
    """
    scale = module.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = module.param("bias", nn.initializers.zeros, x.shape[-1:])
    normalized: Any = normalize_batch(x, scale, bias, 1e-5)  # custom_vjp hides the type
    return normalized[0]


def unit(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """Scales vectors along `axis` to Euclidean length 1; zeros stay zero, with finite gradients."""
    square = jnp.sum(x**2, axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
