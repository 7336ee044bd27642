"""From the heads' outputs to detections."""

import flax.struct
import jax
import jax.numpy as jnp

from xkd_jax.models.detection import boxes as box_ops
from xkd_jax.models.detection.nms import nms

WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the deltas, see `boxes.decode`
_MIN_SIZE = 1e-2  # of a detection, pixels


@flax.struct.dataclass
class Detections:
    """The objects found in N images, D each, best first; free places have class 0 and score 0.

    Attributes:
      boxes: [N, D, 4], pixels of the padded images.
      scores: probabilities [N, D].
      classes: int32 [N, D], from 1.
      masks: probabilities [N, D, 28, 28] of each pixel of the boxes; None without a mask head.
    """

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array
    masks: jax.Array | None = None


def select(
    logits: jax.Array,
    deltas: jax.Array,
    proposals: jax.Array,
    valid: jax.Array,
    sizes: jax.Array,
    *,
    min_score: float,
    threshold: float,
    count: int,
) -> Detections:
    """The best detections: torchvision's `RoIHeads.postprocess_detections` (BSD-3).

    Each proposal is one candidate for every class.

    Args:
      logits: class logits [N, R, K + 1], background first.
      deltas: box deltas of each class [N, R, K + 1, 4].
      proposals: [N, R, 4], pixels.
      valid: which of them aren't padding, bool [N, R].
      sizes: heights and widths of the images without padding [N, 2], pixels.
      min_score: probability that detections must exceed.
      threshold: intersection over union above which detections of one class are suppressed.
      count: number of detections of each image.
    """
    boxes = box_ops.decode(deltas[:, :, 1:], proposals[:, :, None], WEIGHTS)
    boxes = box_ops.clip(boxes, sizes[:, None, None])
    scores = jax.nn.softmax(logits)[..., 1:]
    kept = valid[..., None] & (scores > min_score) & box_ops.is_large(boxes, _MIN_SIZE)
    images, regions, classes = scores.shape
    groups = jnp.tile(jnp.arange(1, classes + 1, dtype=jnp.int32), regions)

    def suppress(boxes: jax.Array, scores: jax.Array) -> tuple[jax.Array, ...]:
        found = min(count, len(groups))
        index, any_left = nms(boxes, scores, groups, threshold=threshold, count=found)
        kept = (
            jnp.where(any_left[:, None], boxes[index], 0.0),
            jnp.where(any_left, scores[index], 0.0),
            jnp.where(any_left, groups[index], 0),
        )
        padding = [(0, count - found)]
        return tuple(jnp.pad(x, padding + [(0, 0)] * (x.ndim - 1)) for x in kept)

    boxes, scores = boxes.reshape(images, -1, 4), jnp.where(kept, scores, -jnp.inf)
    return Detections(*jax.vmap(suppress)(boxes, scores.reshape(images, -1)))
