"""Which objects anchors and proposals are trained to find, and which of them are sampled.

The rules are those of torchvision's `Matcher` and `BalancedPositiveNegativeSampler` (BSD-3), which
follow Ren et al., "Faster R-CNN" (arXiv:1506.01497), section 3.1.2 and 3.1.3.
"""

import jax
import jax.numpy as jnp

from xkd_jax.models.detection.boxes import iou

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


def match(
    boxes: jax.Array,
    usable: jax.Array,
    objects: jax.Array,
    real: jax.Array,
    *,
    high: float,
    low: float,
    keep_best: bool,
) -> tuple[jax.Array, jax.Array]:
    """The object that overlaps each box most, and whether that is enough.

    Args:
      boxes: anchors or proposals of one image [A, 4], pixels.
      usable: which of them take part, bool [A].
      objects: the image's objects [G, 4], pixels.
      real: which of them aren't padding, bool [G].
      high: intersection over union from which a box is positive.
      low: intersection over union below which a box is negative; between them it is ignored.
      keep_best: whether the boxes that overlap an object most are positive in any case.

    Returns:
      the index of the object, int32 [A], and `POSITIVE`, `NEGATIVE` or `IGNORED`, int32 [A].
    """

    # One object at a time: the matrix of all overlaps takes gigabytes for a batch of images.
    def compare(state: tuple, item: tuple) -> tuple[tuple, None]:
        most, index, is_best = state
        number, box, exists = item
        overlap = jnp.where(usable & exists, iou(box, boxes), -1.0)
        peak = jnp.max(overlap)
        more = overlap > most
        is_best = is_best | ((overlap == peak) & (peak > 0))
        return (jnp.where(more, overlap, most), jnp.where(more, number, index), is_best), None

    count = boxes.shape[0]
    start = jnp.full(count, -1.0), jnp.zeros(count, jnp.int32), jnp.zeros(count, bool)
    numbers = jnp.arange(objects.shape[0], dtype=jnp.int32)
    (most, index, is_best), _ = jax.lax.scan(compare, start, (numbers, objects, real))
    label = jnp.where(most >= high, POSITIVE, jnp.where(most < low, NEGATIVE, IGNORED))
    if keep_best:
        label = jnp.where(is_best, POSITIVE, label)
    return index, jnp.where(usable, label, IGNORED)


def sample(
    key: jax.Array, labels: jax.Array, size: int, positive: float
) -> tuple[jax.Array, jax.Array]:
    """A random sample with at most the share `positive` of positives; negatives fill it up.

    Args:
      key: a typed key.
      labels: `NEGATIVE`, `IGNORED` or positive numbers, int [A].
      size: number of boxes to sample.
      positive: the largest share of positives.

    Returns:
      indices int32 [size], positives first, and whether each is sampled, bool [size]; less than
      `size` boxes are if there aren't enough. `size` is at most A.
    """
    size, most = min(size, len(labels)), min(int(size * positive), len(labels))
    chance = jax.random.uniform(key, labels.shape)
    _, positives = jax.lax.top_k(jnp.where(labels > 0, chance, -1.0), most)
    _, negatives = jax.lax.top_k(jnp.where(labels == NEGATIVE, chance, -1.0), size)
    found = jnp.minimum(jnp.sum(labels > 0), most)
    slot = jnp.arange(size)
    index = jnp.concatenate([positives, negatives])[
        jnp.where(slot < found, slot, slot - found + most)
    ]
    return index.astype(jnp.int32), slot - found < jnp.sum(labels == NEGATIVE)
