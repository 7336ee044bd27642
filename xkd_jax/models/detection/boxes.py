"""Operations on boxes, float32 [..., 4]: left, top, right and bottom in pixels.

The formulas are those of torchvision's `ops.boxes` and `models.detection._utils` (BSD-3).
"""

import math

import jax
import jax.numpy as jnp

Weights = tuple[float, float, float, float]

# The largest logarithm of a side's growth that is decoded: from 16 pixels to 1000.
MAX_GROWTH = math.log(1000 / 16)


def encode(boxes: jax.Array, references: jax.Array, weights: Weights) -> jax.Array:
    """The deltas [..., 4] that `decode` turns into `boxes`.

    Girshick et al., "Rich feature hierarchies for accurate object detection and semantic
    segmentation" (arXiv:1311.2524), appendix C: the shift of the centre relative to the
    reference's size, and the logarithm of the ratio of the sizes.

    Args:
      boxes: the wanted boxes [..., 4], of positive size.
      references: anchors or proposals [..., 4], of positive size.
      weights: factors of the deltas in x, y, width and height.
    """
    centre, size = _centre_and_size(references)
    wanted_centre, wanted_size = _centre_and_size(boxes)
    shift, growth = (wanted_centre - centre) / size, jnp.log(wanted_size / size)
    return jnp.concatenate([shift, growth], -1) * jnp.asarray(weights, jnp.float32)


def decode(deltas: jax.Array, references: jax.Array, weights: Weights) -> jax.Array:
    """The boxes [..., 4] that `deltas` [..., 4] lead to; the inverse of `encode`.

    Args:
      deltas: as a network predicts them; a growth beyond 62.5 times is cut off.
      references: anchors or proposals [..., 4].
      weights: as in `encode`.
    """
    centre, size = _centre_and_size(references)
    deltas = deltas / jnp.asarray(weights, jnp.float32)
    centre = deltas[..., :2] * size + centre
    half = 0.5 * jnp.exp(jnp.minimum(deltas[..., 2:], MAX_GROWTH)) * size
    return jnp.concatenate([centre - half, centre + half], -1)


def clip(boxes: jax.Array, sizes: jax.Array) -> jax.Array:
    """The parts of `boxes` [..., 4] inside images of `sizes` [..., 2], height and width."""
    height, width = sizes[..., 0], sizes[..., 1]
    return jnp.clip(boxes, 0.0, jnp.stack([width, height, width, height], -1))


def area(boxes: jax.Array) -> jax.Array:
    """The areas [...] of `boxes` [..., 4], in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(first: jax.Array, second: jax.Array) -> jax.Array:
    """Intersection over union [...] of two arrays of boxes [..., 4]; they are broadcast.

    0 where both boxes are empty.
    """
    top_left = jnp.maximum(first[..., :2], second[..., :2])
    bottom_right = jnp.minimum(first[..., 2:], second[..., 2:])
    sides = jnp.maximum(bottom_right - top_left, 0.0)
    intersection = sides[..., 0] * sides[..., 1]
    union = area(first) + area(second) - intersection
    return jnp.where(union > 0, intersection / jnp.where(union > 0, union, 1.0), 0.0)


def is_large(boxes: jax.Array, min_size: float) -> jax.Array:
    """Whether both sides of `boxes` [..., 4] are at least `min_size` pixels, bool [...].

    torchvision's `remove_small_boxes`.
    """
    return jnp.all(boxes[..., 2:] - boxes[..., :2] >= min_size, -1)


def _centre_and_size(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size
