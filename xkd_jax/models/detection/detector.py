"""Faster R-CNN and Mask R-CNN over a feature pyramid, with static shapes.

Ren et al., "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks"
(arXiv:1506.01497); Lin et al., "Feature Pyramid Networks for Object Detection" (arXiv:1612.03144);
He et al., "Mask R-CNN" (arXiv:1703.06870). Names, numbers and rules are those of torchvision's
`fasterrcnn_resnet50_fpn` and `maskrcnn_resnet50_fpn` (BSD-3). Images are padded to one size, and
boxes to one number; what is padding is known by a mask.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xkd_jax.errors import UserError
from xkd_jax.models.detection import anchors as layout
from xkd_jax.models.detection import detections, rpn
from xkd_jax.models.detection.detections import Detections
from xkd_jax.models.detection.heads import RoIHeads
from xkd_jax.models.detection.losses import (
    box_losses,
    delta_targets,
    mask_loss,
    mask_targets,
    proposal_losses,
)
from xkd_jax.models.detection.targets import POSITIVE, match, sample

_RPN_HIGH, _RPN_LOW = 0.7, 0.3  # intersections over union of positive and negative anchors
_BOX_OVERLAP = 0.5  # from which a region is positive


class Detector(nn.Module):
    """A two-stage detector; the defaults are torchvision's.

    `backbone` is a `fpn.Backbone`. `num_classes` doesn't count the background, which is class 0;
    `mask` adds the mask head of Mask R-CNN. The numbers of proposals differ in training and
    evaluation (`train` and `test`): before the non-maximum suppression, for each level, and after
    it, for the image. `rpn_samples` anchors and `box_samples` regions of each image are trained,
    with at most the share `rpn_positive` and `box_positive` of positives.
    """

    kind: ClassVar[str] = "detector"

    backbone: nn.Module
    num_classes: int = 90
    mask: bool = False
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_pre_nms_train: int = 2000
    rpn_pre_nms_test: int = 1000
    rpn_post_nms_train: int = 2000
    rpn_post_nms_test: int = 1000
    rpn_nms: float = 0.7
    rpn_samples: int = 256
    rpn_positive: float = 0.5
    box_samples: int = 512
    box_positive: float = 0.25
    min_score: float = 0.05
    box_nms: float = 0.5
    max_detections: int = 100
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the heads."""
        self.rpn = rpn.RPN(len(self.aspect_ratios), self.dtype)
        self.roi_heads = RoIHeads(self.num_classes + 1, self.mask, self.dtype)

    def __call__(
        self, images: jax.Array, train: bool = False, sizes: jax.Array | None = None
    ) -> tuple[Detections, dict[str, Any]]:
        """Detects objects in `images` [N, H, W, 3], normalised and padded at the right and bottom.

        Args:
          images: H and W are multiples of 32.
          train: whether layers of the backbone behave as in training.
          sizes: heights and widths of the images without padding [N, 2], pixels; None: no padding.

        Returns:
          the detections, and the intermediates of the backbone.

        Raises:
          UserError: the images have another size.
        """
        pyramid, out = self.features(images, train)
        if sizes is None:
            sizes = jnp.broadcast_to(jnp.asarray(images.shape[1:3], jnp.float32), (len(images), 2))
        return self.detect(pyramid, images.shape[1:3], sizes), out

    def features(
        self, images: jax.Array, train: bool = False
    ) -> tuple[list[jax.Array], dict[str, Any]]:
        """The pyramid [N, h, w, 256] of `images` [N, H, W, 3], and the backbone's intermediates.

        Raises:
          UserError: as `__call__`.
        """
        height, width = images.shape[1:3]
        if height % layout.MULTIPLE or width % layout.MULTIPLE:
            raise UserError(
                f"a detector's images must have sides that are multiples of {layout.MULTIPLE} "
                f"pixels, not {height} x {width}."
            )
        return self.backbone(images, train)  # pyright: ignore[reportCallIssue]

    def detect(
        self, pyramid: Sequence[jax.Array], side: tuple[int, ...], sizes: jax.Array
    ) -> Detections:
        """The detections in images of which `features` made `pyramid`.

        Args:
          pyramid: feature maps [N, h, w, 256].
          side: height and width of the padded images, pixels.
          sizes: heights and widths of the images without padding [N, 2], pixels.
        """
        proposals, valid = rpn.propose(
            *self.rpn(pyramid),
            self._anchors(pyramid, side),
            sizes,
            before=self.rpn_pre_nms_test,
            after=self.rpn_post_nms_test,
            threshold=self.rpn_nms,
        )
        found = detections.select(
            *self.roi_heads.classify(pyramid, proposals, side),
            proposals,
            valid,
            sizes,
            min_score=self.min_score,
            threshold=self.box_nms,
            count=self.max_detections,
        )
        if not self.mask:
            return found
        masks = self.roi_heads.segment(pyramid, found.boxes, found.classes, side)
        return dataclasses.replace(found, masks=jax.nn.sigmoid(masks))

    def classify(
        self, images: jax.Array, boxes: jax.Array, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Class logits [N, R, K + 1] and box deltas [N, R, K + 1, 4] of given `boxes` [N, R, 4].

        Args:
          images: [N, H, W, 3], normalised and padded.
          boxes: such as another detector's proposals, pixels.
          train: whether layers of the backbone behave as in training.

        Raises:
          UserError: as `__call__`.
        """
        pyramid, _ = self.features(images, train)
        return self.roi_heads.classify(pyramid, boxes, images.shape[1:3])

    def losses(
        self,
        images: jax.Array,
        sizes: jax.Array,
        targets: Mapping[str, jax.Array],
        key: jax.Array,
        train: bool = True,
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The losses of all parts, whose sum is to be minimised.

        Args:
          images: [N, H, W, 3], normalised and padded.
          sizes: heights and widths of the images without padding [N, 2], pixels.
          targets: the images' objects: `boxes` [N, G, 4], pixels; `classes` int [N, G], 0 for
            padding; with `mask` also `masks` uint8 [N, G, M, M], from 0 to 255, each stretched over
            its object's box.
          key: a typed key, which draws the samples.
          train: whether layers of the backbone behave as in training.

        Returns:
          the losses: `rpn_objectness`, `rpn_box`, `roi_class`, `roi_box` and, with `mask`,
          `roi_mask`; and for distillation `taps`, the intermediates of the backbone, `proposals`
          [N, R, 4], the trained regions, `valid` bool [N, R], which of them are not padding, and
          `logits` [N, R, K + 1], their class logits.

        Raises:
          UserError: as `__call__`.
        """
        pyramid, out = self.features(images, train)
        side = images.shape[1:3]
        logits, deltas = self.rpn(pyramid)
        anchors = self._anchors(pyramid, side)
        rpn_key, box_key = jax.random.split(key)
        losses = self._rpn_losses(logits, deltas, anchors, sizes, targets, rpn_key)
        proposals, valid = rpn.propose(
            logits,
            deltas,
            anchors,
            sizes,
            before=self.rpn_pre_nms_train,
            after=self.rpn_post_nms_train,
            threshold=self.rpn_nms,
        )
        boxes, index, classes, sampled = self._sample_regions(proposals, valid, targets, box_key)
        objects = jnp.take_along_axis(targets["boxes"], index[..., None], 1)
        wanted = delta_targets(objects, boxes, classes > 0, detections.WEIGHTS)
        logits, deltas = self.roi_heads.classify(pyramid, boxes, side)
        losses |= box_losses(logits, deltas, wanted, classes, sampled)
        if self.mask:
            # Positives come first, and this is the largest number of them.
            few = slice(int(self.box_samples * self.box_positive))
            boxes_few, classes_few, index_few = (x[:, few] for x in (boxes, classes, index))
            masks = self.roi_heads.segment(pyramid, boxes_few, classes_few, side)
            wanted = _project(targets["masks"], index_few, objects[:, few], boxes_few, masks)
            losses["roi_mask"] = mask_loss(masks, wanted, classes_few > 0)
        return losses, {"taps": out, "proposals": boxes, "valid": sampled, "logits": logits}

    def _anchors(self, pyramid: Sequence[jax.Array], side: tuple[int, ...]) -> list[np.ndarray]:
        grids = [features.shape[1:3] for features in pyramid]
        return layout.make_anchors(side, grids, self.anchor_sizes, self.aspect_ratios)

    def _rpn_losses(
        self,
        logits: Sequence[jax.Array],
        deltas: Sequence[jax.Array],
        anchors: Sequence[np.ndarray],
        sizes: jax.Array,
        targets: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> dict[str, jax.Array]:
        """The losses of sampled anchors."""
        every = jnp.asarray(np.concatenate(anchors))

        def choose(
            key: jax.Array, usable: jax.Array, objects: jax.Array, real: jax.Array
        ) -> tuple[jax.Array, ...]:
            index, labels = match(
                every, usable, objects, real, high=_RPN_HIGH, low=_RPN_LOW, keep_best=True
            )
            chosen, sampled = sample(key, labels, self.rpn_samples, self.rpn_positive)
            labels = labels[chosen]
            positive = sampled & (labels == POSITIVE)
            wanted = delta_targets(objects[index[chosen]], every[chosen], positive, rpn.WEIGHTS)
            return chosen, wanted, positive.astype(jnp.int32), sampled

        usable = layout.inside(np.concatenate(anchors), sizes)
        keys = jax.random.split(key, len(sizes))
        real = targets["classes"] > 0
        chosen, wanted, labels, sampled = jax.vmap(choose)(keys, usable, targets["boxes"], real)
        return proposal_losses(
            jnp.take_along_axis(jnp.concatenate(logits, 1), chosen, 1),
            jnp.take_along_axis(jnp.concatenate(deltas, 1), chosen[..., None], 1),
            wanted,
            labels,
            sampled,
        )

    def _sample_regions(
        self,
        proposals: jax.Array,
        valid: jax.Array,
        targets: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> tuple[jax.Array, ...]:
        """The regions that the heads are trained on: proposals, and the objects themselves.

        Returns:
          boxes [N, R, 4], positives first; the index of each one's object, its class (0 for
          background) and whether it is sampled, [N, R].
        """

        def choose(
            key: jax.Array, boxes: jax.Array, usable: jax.Array, objects: jax.Array, of: jax.Array
        ) -> tuple[jax.Array, ...]:
            boxes = jnp.concatenate([boxes, objects])
            usable = jnp.concatenate([usable, of > 0])
            index, labels = match(
                boxes, usable, objects, of > 0, high=_BOX_OVERLAP, low=_BOX_OVERLAP, keep_best=False
            )
            chosen, sampled = sample(key, labels, self.box_samples, self.box_positive)
            positive = sampled & (labels[chosen] == POSITIVE)
            index = index[chosen]
            boxes = jnp.where(sampled[:, None], boxes[chosen], 0.0)
            return boxes, index, jnp.where(positive, of[index], 0), sampled

        keys = jax.random.split(key, len(proposals))
        return jax.vmap(choose)(keys, proposals, valid, targets["boxes"], targets["classes"])


def _project(
    masks: jax.Array, index: jax.Array, objects: jax.Array, boxes: jax.Array, like: jax.Array
) -> jax.Array:
    """The masks number `index` [N, R] of `masks` [N, G, M, M] in the pixels of `like`'s."""
    chosen = jax.vmap(lambda masks, index: masks[index])(masks, index)
    project = jax.vmap(mask_targets, (0, 0, 0, None))
    return project(chosen, objects, boxes, like.shape[-1])
