"""Anchors of the region proposals, as torchvision's `AnchorGenerator` (BSD-3) lays them out.

Ren et al., "Faster R-CNN" (arXiv:1506.01497), section 3.1.1; one size a level as in Lin et al.,
"Feature Pyramid Networks for Object Detection" (arXiv:1612.03144), section 4.1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xkd_jax.errors import UserError

MULTIPLE = 32  # the sides of images: the stride of the backbone's last stage


def make_anchors(
    side: tuple[int, ...],
    grids: Sequence[tuple[int, ...]],
    sizes: Sequence[int],
    ratios: Sequence[float],
) -> list[np.ndarray]:
    """The anchors of each level, float32 [h * w * len(ratios), 4]; ratios vary fastest.

    Args:
      side: height and width of the padded images, pixels.
      grids: height and width (h, w) of each level's feature map.
      sizes: the square root of the anchors' area at each level, pixels.
      ratios: heights divided by widths.

    Raises:
      UserError: there isn't one size for each level.
    """
    if len(sizes) != len(grids):
        raise UserError(
            f"anchor_sizes must have {len(grids)} entries, one for each level of the pyramid, not "
            f"{len(sizes)}."
        )
    levels = []
    for (rows, columns), size in zip(grids, sizes, strict=True):
        # Integers, as in torchvision: 800 pixels of 13 cells lie 61 apart.
        ys = np.arange(rows) * (side[0] // rows)
        xs = np.arange(columns) * (side[1] // columns)
        top, left = np.meshgrid(ys, xs, indexing="ij")
        corners = np.stack([left, top, left, top], -1).reshape(-1, 1, 4)
        anchors = corners.astype(np.float32) + _around_zero(size, ratios)
        levels.append(anchors.reshape(-1, 4))
    return levels


def _around_zero(size: int, ratios: Sequence[float]) -> np.ndarray:
    """Anchors [len(ratios), 4] centred at 0, rounded to whole pixels."""
    roots = np.sqrt(np.asarray(ratios, np.float32))
    height, width = roots * np.float32(size), 1 / roots * np.float32(size)
    return np.round(np.stack([-width, -height, width, height], -1) / 2)


def inside(anchors: np.ndarray, sizes: jax.Array) -> jax.Array:
    """Whether each anchor's cell lies in an image or in its own padding, bool [N, A].

    An image of any size is padded to a multiple of 32 pixels. Anchors beyond that are in padding
    that only the batch's fixed size adds; without them, an image's proposals and training samples
    don't depend on it.

    Args:
      anchors: from `make_anchors`, [A, 4].
      sizes: heights and widths of the images without padding [N, 2], pixels.
    """
    # An anchor's centre is its cell's top left corner.
    centre_x, centre_y = jnp.asarray((anchors[:, :2] + anchors[:, 2:]) / 2).T
    end = jnp.ceil(sizes / MULTIPLE) * MULTIPLE
    return (centre_y < end[:, :1]) & (centre_x < end[:, 1:])
