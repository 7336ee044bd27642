"""RoIAlign over a feature pyramid (He et al., "Mask R-CNN", arXiv:1703.06870, section 3)."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from xkd_jax.models.detection.boxes import area

_SAMPLES = 2  # in each direction of a bin: torchvision's sampling_ratio
_CANONICAL_SIDE, _CANONICAL_LEVEL = 224, 4  # a box of this side is read at the level of stride 2^4


def roi_align(
    pyramid: Sequence[jax.Array], boxes: jax.Array, side: tuple[int, ...], bins: int
) -> jax.Array:
    """The features inside each box, averaged over `bins` x `bins` bins: [N, R, bins, bins, C].

    torchvision's `MultiScaleRoIAlign` with sampling_ratio=2: its `roi_align` has aligned=False, so
    a feature's coordinates are those of its cell's top left corner. Every box is read from one
    level, see `map_levels`. Gradients flow to the features, not to the boxes.

    Args:
      pyramid: feature maps [N, h, w, C] of decreasing size.
      boxes: [N, R, 4], pixels of the padded images.
      side: height and width of the padded images, pixels.
      bins: the number of bins in each direction.
    """
    boxes = jax.lax.stop_gradient(boxes)
    heights, widths = ([features.shape[axis] for features in pyramid] for axis in (1, 2))
    starts = [0, *itertools.accumulate(h * w for h, w in zip(heights, widths, strict=True))][:-1]
    strides = [side[0] // height for height in heights]
    level = map_levels(boxes, strides)
    height, width, start = (
        jnp.asarray(table, jnp.int32)[level] for table in (heights, widths, starts)
    )
    corners = boxes / jnp.asarray(strides, jnp.float32)[level][..., None]
    rows, row_weights = _taps(corners[..., 1], corners[..., 3], height, bins)
    columns, column_weights = _taps(corners[..., 0], corners[..., 2], width, bins)
    rows = start[..., None, None] + rows * width[..., None, None]
    images, channels = pyramid[0].shape[0], pyramid[0].shape[-1]
    # One array of all levels, so that each box is read from one of them and not from all.
    flat = jnp.concatenate([features.reshape(images, -1, channels) for features in pyramid], 1)
    total = jnp.zeros((*boxes.shape[:2], bins, bins, channels), flat.dtype)
    for i, j in itertools.product(range(rows.shape[-1]), range(columns.shape[-1])):
        index = rows[..., i][..., :, None] + columns[..., j][..., None, :]
        weight = row_weights[..., i][..., :, None] * column_weights[..., j][..., None, :]
        features = jax.vmap(lambda image, at: image.at[at].get(mode="promise_in_bounds"))(
            flat, index
        )
        total += weight[..., None].astype(flat.dtype) * features
    return total


def map_levels(boxes: jax.Array, strides: Sequence[int]) -> jax.Array:
    """The level of the pyramid that each of `boxes` [..., 4] is read from, int32 [...].

    Equation 1 of "Feature Pyramid Networks" (arXiv:1612.03144); torchvision's `LevelMapper`.

    Args:
      boxes: pixels.
      strides: pixels of the image per feature at each level.
    """
    first, last = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
    side = jnp.sqrt(jnp.maximum(area(boxes), 0.0))
    level = jnp.floor(_CANONICAL_LEVEL + jnp.log2(side / _CANONICAL_SIDE) + 1e-6)
    return jnp.clip(level, first, last).astype(jnp.int32) - first


def _taps(
    low: jax.Array, high: jax.Array, length: jax.Array, bins: int
) -> tuple[jax.Array, jax.Array]:
    """The cells along one axis that each bin of each box reads, and their weights.

    Args:
      low: where the boxes begin [N, R], cells.
      high: where they end [N, R].
      length: the axis's length [N, R] at each box's level, cells.
      bins: the number of bins.

    Returns:
      cells int32 [N, R, bins, 4] and their weights, whose sum is 1 unless samples lie outside.
    """
    step = jnp.maximum(high - low, 1.0) / bins
    offsets = (jnp.arange(bins * _SAMPLES) + 0.5) / _SAMPLES
    at = low[..., None] + step[..., None] * offsets
    end = (length - 1)[..., None]
    used = (at >= -1.0) & (at <= end + 1)  # further outside, a sample counts as 0
    at = jnp.clip(at, 0.0, end)
    before = jnp.floor(at).astype(jnp.int32)
    after = jnp.minimum(before + 1, end)
    share = at - before
    cells = jnp.stack([before, after], -1)
    weights = jnp.where(used[..., None], jnp.stack([1 - share, share], -1), 0.0) / _SAMPLES
    shape = (*low.shape, bins, 2 * _SAMPLES)
    return cells.reshape(shape), weights.reshape(shape)
