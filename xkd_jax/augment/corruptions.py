"""Corruptions for noisy evaluation; training uses none of them."""

import jax
import jax.numpy as jnp

from xkd_jax.augment import ops


def noisy(key: jax.Array, images: jax.Array) -> jax.Array:
    """Corrupts each image in one of four ways that training never uses, for Fig. 3(a).

    The four are equally likely for each image: a 5x5 Gaussian blur with a sigma of 1 pixel, salt
    and pepper on 10% of the pixels, a gamma log-uniform in [0.4, 2.5], or a black bar across the
    image, as thick as a quarter of its side. The same key gives the same result.

    `validation.validate` refuses to combine this with training on `augment.blur`. The closest that
    training augmentation gets are the sharpness of RandAugment and TrivialAugment, which blends
    with a 3x3 smoothing for factors below 1, their linear brightness, the black borders of crops
    and warps, and erasing, which leaves noise.

    Args:
      key: a typed key.
      images: float32 [N, H, W, C] in [0, 1].
    """
    n, h, w, _ = images.shape
    kind_key, pixel_key = jax.random.split(key)
    draws = jax.random.uniform(kind_key, (n, 3, 1, 1, 1))
    kind = jnp.floor(4 * draws[:, 0])
    speck = jax.random.uniform(pixel_key, (n, h, w, 1))
    specked = jnp.where(speck < 0.05, 0.0, jnp.where(speck >= 0.95, 1.0, images))
    gamma = 0.4 * (2.5 / 0.4) ** draws[:, 1]
    # The derivative is infinite at 0 for gamma below 1, but this is never differentiated.
    brightened = images**gamma
    corrupted = jnp.where(kind == 0, ops.blur(images), specked)
    corrupted = jnp.where(kind == 2, brightened, corrupted)
    return jnp.where(kind == 3, _bar(draws[:, 1], draws[:, 2], images), corrupted)


def _bar(direction: jax.Array, place: jax.Array, images: jax.Array) -> jax.Array:
    """Adds a black bar, horizontal if `direction` < 0.5; it and `place` are [N, 1, 1, 1]."""
    h, w = images.shape[1:3]

    def covered(size: int) -> jax.Array:
        thick = max(1, size // 4)
        start = jnp.floor(place * (size - thick + 1))
        position = jnp.arange(size, dtype=jnp.float32)[None, :, None, None]
        return (position >= start) & (position < start + thick)

    horizontal, vertical = covered(h), covered(w).swapaxes(1, 2)
    return jnp.where(jnp.where(direction < 0.5, horizontal, vertical), 0.0, images)
