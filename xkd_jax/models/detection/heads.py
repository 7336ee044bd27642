"""The heads that classify, refine and segment regions, with torchvision's names (BSD-3).

Lin et al., "Feature Pyramid Networks" (arXiv:1612.03144), section 4.2, and He et al., "Mask R-CNN"
(arXiv:1703.06870), section 3 and figure 4.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax.models.detection.roi_align import roi_align
from xkd_jax.models.layers import Conv, kaiming_fan_out, torch_default

BOX_BINS, MASK_BINS = 7, 14
_HIDDEN = 1024  # of the box head
_MASK_CONVOLUTIONS = 4


class BoxHead(nn.Module):
    """torchvision's `TwoMLPHead`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps regions [R, bins, bins, C] to [R, 1024]."""
        # PyTorch flattens channels first.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for name in ("fc6", "fc7"):
            x = nn.relu(
                nn.Dense(_HIDDEN, dtype=self.dtype, kernel_init=torch_default, name=name)(x)
            )
        return x


class BoxPredictor(nn.Module):
    """torchvision's `FastRCNNPredictor`; `outputs` counts the classes and the background."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Class logits [R, outputs] and box deltas [R, outputs, 4] of `x` [R, C], float32."""

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=jnp.float32, kernel_init=torch_default, name=name)

        deltas = dense(4 * self.outputs, "bbox_pred")(x)
        return dense(self.outputs, "cls_score")(x), deltas.reshape(-1, self.outputs, 4)


class MaskHead(nn.Module):
    """torchvision's `MaskRCNNHeads`: 3x3 convolutions that keep the number of channels."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps regions `x` [R, bins, bins, C] to the same shape."""
        for i in range(_MASK_CONVOLUTIONS):
            x = nn.relu(Conv(x.shape[-1], 3, use_bias=True, dtype=self.dtype, name=f"{i}_0")(x))
        return x


class MaskPredictor(nn.Module):
    """torchvision's `MaskRCNNPredictor`; `outputs` counts the classes and the background."""

    outputs: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps regions `x` [R, bins, bins, C] to logits [R, 2 bins, 2 bins, outputs], float32."""
        # With transpose_kernel, a kernel is stored and applied as in PyTorch.
        x = nn.ConvTranspose(
            x.shape[-1],
            (2, 2),
            strides=(2, 2),
            padding="VALID",
            transpose_kernel=True,
            kernel_init=kaiming_fan_out,
            dtype=self.dtype,
            name="conv5_mask",
        )(x)
        logits = Conv(self.outputs, 1, use_bias=True, dtype=self.dtype, name="mask_fcn_logits")
        return logits(nn.relu(x)).astype(jnp.float32)


class RoIHeads(nn.Module):
    """All heads; `outputs` counts the classes and the background, `mask` adds the mask's."""

    outputs: int
    mask: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the heads."""
        self.box_head = BoxHead(self.dtype)
        self.box_predictor = BoxPredictor(self.outputs)
        if self.mask:
            self.mask_head = MaskHead(self.dtype)
            self.mask_predictor = MaskPredictor(self.outputs, self.dtype)

    def classify(
        self, pyramid: Sequence[jax.Array], boxes: jax.Array, side: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Class logits [N, R, outputs] and box deltas [N, R, outputs, 4] of `boxes` [N, R, 4].

        Args:
          pyramid: feature maps [N, h, w, C]; the last level is only for proposals.
          boxes: pixels.
          side: height and width of the padded images, pixels.
        """
        regions = roi_align(pyramid[:-1], boxes, side, BOX_BINS)
        logits, deltas = self.box_predictor(self.box_head(_merge(regions)))
        return logits.reshape(*boxes.shape[:2], -1), deltas.reshape(*boxes.shape[:2], -1, 4)

    def segment(
        self,
        pyramid: Sequence[jax.Array],
        boxes: jax.Array,
        classes: jax.Array,
        side: tuple[int, ...],
    ) -> jax.Array:
        """The logits of the masks [N, R, 28, 28] in `boxes` [N, R, 4], of their `classes` [N, R].

        The other arguments are those of `classify`.
        """
        regions = roi_align(pyramid[:-1], boxes, side, MASK_BINS)
        logits = self.mask_predictor(self.mask_head(_merge(regions)))
        chosen = jnp.take_along_axis(logits, classes.reshape(-1, 1, 1, 1), -1)
        return chosen.reshape(*boxes.shape[:2], *logits.shape[1:3])


def _merge(regions: jax.Array) -> jax.Array:
    return regions.reshape(-1, *regions.shape[2:])
