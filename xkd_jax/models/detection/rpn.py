"""Region proposals: Ren et al., "Faster R-CNN" (arXiv:1506.01497), section 3.

Names and numerics as in torchvision's `models.detection.rpn` (BSD-3).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xkd_jax.models.detection import anchors as layout
from xkd_jax.models.detection import boxes as box_ops
from xkd_jax.models.detection.nms import nms
from xkd_jax.models.layers import Conv

WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the deltas, see `boxes.decode`
MIN_SIZE = 1e-3  # of a proposal, pixels

_INIT = nn.initializers.normal(0.01)


class RPN(nn.Module):
    """The network of the proposals, shared by all levels; `anchors` is their number per cell."""

    anchors: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pyramid: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """The logits of being an object and the box deltas of the anchors.

        Args:
          pyramid: feature maps [N, h, w, C].

        Returns:
          for each level the logits [N, h * w * anchors] and the deltas [N, h * w * anchors, 4],
          float32.
        """
        return RPNHead(self.anchors, self.dtype, name="head")(pyramid)


class RPNHead(nn.Module):
    """A 3x3 convolution and two 1x1 ones."""

    anchors: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pyramid: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """As `RPN`."""

        def conv(features: int, kernel: int, name: str) -> Conv:
            return Conv(
                features, kernel, use_bias=True, kernel_init=_INIT, dtype=self.dtype, name=name
            )

        hidden = conv(pyramid[0].shape[-1], 3, "conv_0_0")
        cls_logits = conv(self.anchors, 1, "cls_logits")
        bbox_pred = conv(4 * self.anchors, 1, "bbox_pred")
        logits, deltas = [], []
        for features in pyramid:
            x = nn.relu(hidden(features))
            images = x.shape[0]
            logits.append(cls_logits(x).reshape(images, -1).astype(jnp.float32))
            deltas.append(bbox_pred(x).reshape(images, -1, 4).astype(jnp.float32))
        return logits, deltas


def propose(
    logits: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    anchors: Sequence[np.ndarray],
    sizes: jax.Array,
    *,
    before: int,
    after: int,
    threshold: float,
) -> tuple[jax.Array, jax.Array]:
    """The best regions, clipped to the images; no gradient flows through them.

    Args:
      logits: of each level's anchors [N, A], from `RPN`.
      deltas: of each level's anchors [N, A, 4].
      anchors: from `anchors.make_anchors`.
      sizes: heights and widths of the images without padding [N, 2], pixels.
      before: number of anchors of each level that take part in the non-maximum suppression.
      after: number of regions that are kept.
      threshold: intersection over union above which regions of a level are suppressed.

    Returns:
      boxes [N, R, 4], best first, and whether each is one, bool [N, R]; R is `after`, or the number
      of candidates if that is smaller.
    """
    boxes, scores, levels = [], [], []
    for level, (x, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
        x = jnp.where(layout.inside(anchor, sizes), jax.lax.stop_gradient(x), -jnp.inf)
        x, best = jax.lax.top_k(x, min(before, x.shape[1]))
        delta = jnp.take_along_axis(jax.lax.stop_gradient(delta), best[..., None], 1)
        boxes.append(box_ops.decode(delta, jnp.asarray(anchor)[best], WEIGHTS))
        # The order is that of probabilities, in which large logits are equal.
        scores.append(jnp.where(x > -jnp.inf, jax.nn.sigmoid(x), -jnp.inf))
        levels.append(np.full(x.shape[1], level, np.int32))
    candidates = box_ops.clip(jnp.concatenate(boxes, 1), sizes[:, None])
    large = box_ops.is_large(candidates, MIN_SIZE)
    ranks = jnp.where(large, jnp.concatenate(scores, 1), -jnp.inf)
    group = jnp.asarray(np.concatenate(levels))

    def suppress(boxes: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = min(after, len(group))
        index, valid = nms(boxes, scores, group, threshold=threshold, count=count)
        return jnp.where(valid[:, None], boxes[index], 0.0), valid

    return jax.vmap(suppress)(candidates, ranks)
