"""Non-maximum suppression with static shapes."""

from functools import partial

import jax
import jax.numpy as jnp

from xkd_jax.models.detection.boxes import iou


@partial(jax.jit, static_argnames=("threshold", "count"))
def nms(
    boxes: jax.Array, scores: jax.Array, groups: jax.Array, *, threshold: float, count: int
) -> tuple[jax.Array, jax.Array]:
    """The first `count` boxes that greedy non-maximum suppression keeps, best first.

    Each turn of the loop keeps the best box that is left and suppresses the boxes of its group
    that overlap it by more than `threshold`: what torchvision's `batched_nms` computes, in memory
    proportional to the number of boxes. Boxes of equal scores are taken in their order.

    Args:
      boxes: [n, 4], pixels.
      scores: [n]; boxes with a score of -inf are never kept.
      groups: int [n], such as levels or classes; boxes only suppress others of their group.
      threshold: intersection over union above which a box is suppressed.
      count: number of boxes to keep.

    Returns:
      the indices of the kept boxes, int32 [count], and whether there is one, bool [count].
    """

    def keep_best(left: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        best = jnp.argmax(left)
        found = left[best] > -jnp.inf
        overlap = iou(boxes[best], boxes) > threshold
        left = jnp.where(overlap & (groups == groups[best]), -jnp.inf, left)
        # An empty box doesn't overlap itself.
        left = left.at[best].set(-jnp.inf)
        return left, (best.astype(jnp.int32), found)

    _, (indices, valid) = jax.lax.scan(keep_best, scores, None, length=count)
    return indices, valid
