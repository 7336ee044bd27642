"""Keys and random images for the tests of augmentation."""

import jax
import numpy as np


def key(seed: int = 0) -> jax.Array:
    return jax.random.key(seed)


def images_of(n: int = 16, h: int = 12, w: int = 10) -> np.ndarray:
    return np.random.default_rng(0).random((n, h, w, 3), np.float32)
