"""Losses of the proposals and of the heads, as in torchvision's references (BSD-3).

Means and sums are over the whole batch, as there.
"""

import jax
import jax.numpy as jnp
import optax

from xkd_jax.models.detection import boxes as box_ops

_BETA = 1 / 9  # where the smooth L1 loss changes from square to linear
_MASK_SAMPLES = 2  # of a mask's target, in each direction of a pixel


def proposal_losses(
    logits: jax.Array,
    deltas: jax.Array,
    targets: jax.Array,
    labels: jax.Array,
    sampled: jax.Array,
) -> dict[str, jax.Array]:
    """The losses of sampled anchors: Ren et al., "Faster R-CNN" (arXiv:1506.01497), equation 1.

    Args:
      logits: of being an object [N, S].
      deltas: [N, S, 4].
      targets: the right deltas of positive anchors [N, S, 4].
      labels: 1 for positive and 0 for negative anchors, int [N, S].
      sampled: which anchors count, bool [N, S].
    """
    count = jnp.maximum(jnp.sum(sampled), 1)
    entropy = optax.sigmoid_binary_cross_entropy(logits, labels)
    distance = jnp.sum(_smooth_l1(deltas, targets), -1)
    return {
        "rpn_objectness": jnp.sum(jnp.where(sampled, entropy, 0.0)) / count,
        "rpn_box": jnp.sum(jnp.where(sampled & (labels > 0), distance, 0.0)) / count,
    }


def box_losses(
    logits: jax.Array,
    deltas: jax.Array,
    targets: jax.Array,
    classes: jax.Array,
    sampled: jax.Array,
) -> dict[str, jax.Array]:
    """The losses of sampled regions: Girshick, "Fast R-CNN" (arXiv:1504.08083), equation 1.

    Args:
      logits: class logits [N, R, K + 1], background first.
      deltas: of each class [N, R, K + 1, 4].
      targets: the right deltas of regions with an object [N, R, 4].
      classes: 0 for background, int [N, R].
      sampled: which regions count, bool [N, R].
    """
    count = jnp.maximum(jnp.sum(sampled), 1)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    own = jnp.take_along_axis(deltas, classes[..., None, None], 2)[..., 0, :]
    distance = jnp.sum(_smooth_l1(own, targets), -1)
    return {
        "roi_class": jnp.sum(jnp.where(sampled, entropy, 0.0)) / count,
        "roi_box": jnp.sum(jnp.where(sampled & (classes > 0), distance, 0.0)) / count,
    }


def mask_loss(logits: jax.Array, targets: jax.Array, counted: jax.Array) -> jax.Array:
    """The mean cross-entropy of masks: He et al., "Mask R-CNN" (arXiv:1703.06870), section 3.

    Args:
      logits: of the right class's masks [N, R, m, m].
      targets: from `mask_targets`, [N, R, m, m].
      counted: which regions have an object, bool [N, R].
    """
    entropy = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets), (-2, -1))
    return jnp.sum(jnp.where(counted, entropy, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def delta_targets(
    boxes: jax.Array, references: jax.Array, positive: jax.Array, weights: box_ops.Weights
) -> jax.Array:
    """The deltas [..., 4] from `references` to `boxes` [..., 4], zero where not `positive` [...].

    Padding has boxes without a size, whose deltas are not finite.
    """
    unit = jnp.asarray([0.0, 0.0, 1.0, 1.0])
    references = jnp.where(positive[..., None], references, unit)
    return box_ops.encode(jnp.where(positive[..., None], boxes, unit), references, weights)


def mask_targets(masks: jax.Array, objects: jax.Array, boxes: jax.Array, side: int) -> jax.Array:
    """The objects' masks inside other boxes, in [0, 1]: [R, side, side].

    The mean of bilinear samples in each pixel of the target, as torchvision's `roi_align` of the
    mask of the whole image; the masks here only cover the objects' own boxes.

    Args:
      masks: each region's object, uint8 [R, M, M] from 0 to 255, stretched over the object's box.
      objects: the objects' boxes [R, 4], pixels.
      boxes: the regions [R, 4], pixels.
      side: height and width of the targets.
    """
    length = masks.shape[-1]
    rows, columns = (
        _resampling(objects[:, i], objects[:, i + 2], boxes[:, i], boxes[:, i + 2], length, side)
        for i in (1, 0)
    )
    return jnp.einsum("rpi,rij,rqj->rpq", rows, masks.astype(jnp.float32) / 255, columns)


def _resampling(
    low: jax.Array, high: jax.Array, begin: jax.Array, end: jax.Array, length: int, side: int
) -> jax.Array:
    """The weights [R, side, length] of a mask's pixels, along one axis, in those of its target.

    Args:
      low: where the objects begin [R], pixels of the image.
      high: where they end [R].
      begin: where the regions begin [R].
      end: where they end [R].
      length: number of the mask's pixels.
      side: number of the target's pixels.
    """
    step = jnp.maximum(end - begin, 1.0)[:, None] / side
    offsets = (jnp.arange(side * _MASK_SAMPLES) + 0.5) / _MASK_SAMPLES
    # In torchvision, the image's pixel i is at i; in the box, pixel i covers [i, i + 1].
    at = begin[:, None] + step * offsets + 0.5 - low[:, None]
    at = at * length / jnp.maximum(high - low, 1e-3)[:, None] - 0.5
    weights = jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(length)), 0.0)
    return jnp.mean(weights.reshape(-1, side, _MASK_SAMPLES, length), 2)


def _smooth_l1(x: jax.Array, y: jax.Array) -> jax.Array:
    distance = jnp.abs(x - y)
    square = 0.5 * jnp.square(distance) / _BETA
    return jnp.where(distance < _BETA, square, distance - 0.5 * _BETA)
