"""Square windows of a square map, and what Swin Transformers add to the scores in them."""

import jax
import jax.numpy as jnp
import numpy as np


def relative_position_index(window: int) -> np.ndarray:
    """The row of the bias table for each pair of positions in a window, [L, L]."""
    row, column = np.divmod(np.arange(window * window), window)
    rows = row[:, None] - row + window - 1
    columns = column[:, None] - column + window - 1
    return rows * (2 * window - 1) + columns


def find_regions(side: int, window: int, shift: int) -> np.ndarray:
    """The image region of each position of the rolled map, by window [windows, L].

    Rolling brings opposite edges of the image together in the last row and column of windows;
    positions there attend to each other only within a region.
    """
    position = np.arange(side)
    part = (position >= side - window).astype(np.int32) + (position >= side - shift)
    regions = 3 * part[:, None] + part
    count = side // window
    regions = regions.reshape(count, window, count, window).transpose(0, 2, 1, 3)
    return regions.reshape(count * count, window * window)


def score_bias(table: jax.Array, side: int, window: int, shifted: bool) -> jax.Array | None:
    """What a block adds to the scores of all pairs of positions of a map: [1, heads, T, T].

    The relative position bias, the shift mask and, for pairs in different windows, -1e9.

    Args:
      table: the block's bias by relative position, [(2 window - 1)**2, heads].
      side: of the map, which has T positions in raster order.
      window: the block's window size.
      shifted: whether its windows are shifted.

    Returns:
      The bias, or None if the map is padded to whole windows: the padding takes part in the
      attention, which no bias of the map's own positions expresses.
    """
    window = min(side, window)
    if side % window:
        return None
    shift = window // 2 if shifted and window < side else 0
    position = (np.arange(side) - shift) % side  # in the rolled map
    row, column = (x.ravel() for x in np.meshgrid(position, position, indexing="ij"))
    place = row % window * window + column % window
    number = row // window * (side // window) + column // window
    bias = table[relative_position_index(window)[place[:, None], place]].transpose(2, 0, 1)
    if shift:
        region = find_regions(side, window, shift)[number, place]
        bias = bias + np.where(region[:, None] != region, np.float32(-100), np.float32(0))
    return jnp.where(number[:, None] == number, bias, -1e9)[None]
