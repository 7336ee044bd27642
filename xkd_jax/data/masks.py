"""Masks of objects: COCO's polygons and run lengths, bitmaps of boxes, and masks of a network.

Rasterising and encoding take pycocotools, whose pixels COCO's results are defined by.
"""

import array
import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from xkd_jax.errors import UserError

# As in a COCO file: a list of polygons [x, y, x, y, ...] in pixels, or run lengths.
Segmentation = list[list[float]] | dict[str, Any]

NONE, POLYGONS, COUNTS = range(3)  # kinds of segmentation
LARGEST = 1e6  # coordinate that is taken seriously, in pixels; pycocotools would need much memory
_FEWEST = 6  # numbers of a polygon: three points


def require_pycocotools() -> None:
    """Checks that pycocotools is installed.

    Raises:
      UserError: it isn't.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError(
            "masks and the evaluation of detectors need pycocotools: pip install "
            "'xkd_jax[detection]'."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """Many segmentations in a few arrays, which are small and quick to send to workers.

    Attributes:
      kinds: uint8 [n], `NONE` (no mask), `POLYGONS` or `COUNTS`.
      parts: int64 [n + 1]; the parts of segmentation i are parts[i] to parts[i + 1].
      offsets: int64 [parts + 1] into `numbers`, in bytes.
      numbers: float64 for polygons, uint32 for run lengths.
    """

    kinds: np.ndarray
    parts: np.ndarray
    offsets: np.ndarray
    numbers: bytes

    def get(self, index: int, height: int, width: int) -> Segmentation | None:
        """One segmentation, its run lengths not compressed; None if it has no mask.

        Args:
          index: of the segmentation.
          height: of its image, in pixels.
          width: of its image, in pixels.
        """
        first, last = self.parts[index : index + 2]
        spans = zip(self.offsets[first:last], self.offsets[first + 1 : last + 1], strict=True)
        found = [self.numbers[start:stop] for start, stop in spans]
        if self.kinds[index] == NONE:
            return None
        if self.kinds[index] == POLYGONS:
            return [np.frombuffer(part).tolist() for part in found]
        return {"size": [height, width], "counts": np.frombuffer(found[0], np.uint32).tolist()}


def join(packed: Sequence[tuple[int, list[bytes]]]) -> Segments:
    """`Segments` of the results of `pack`."""
    kinds = np.array([kind for kind, _ in packed], np.uint8)
    parts = np.cumsum([0, *(len(parts) for _, parts in packed)], dtype=np.int64)
    chunks = [part for _, parts in packed for part in parts]
    offsets = np.cumsum([0, *map(len, chunks)], dtype=np.int64)
    return Segments(kinds, parts, offsets, b"".join(chunks))


def pack(segmentation: Any, height: int, width: int) -> tuple[int, list[bytes]]:
    """The kind and the parts of a segmentation from a file.

    Polygons of fewer than three points are left out.

    Args:
      segmentation: as the file has it.
      height: of its image, in pixels.
      width: of its image, in pixels.

    Raises:
      ValueError: it is neither polygons nor run lengths of this size; the message says why.
    """
    if not segmentation:
        return NONE, []
    try:
        if isinstance(segmentation, list):
            parts = [array.array("d", polygon) for polygon in segmentation]
            if any(len(part) % 2 for part in parts):
                raise ValueError("a polygon has an odd number of coordinates")
            if any(len(part) and not np.max(np.abs(part)) < LARGEST for part in parts):
                raise ValueError(f"a polygon has a coordinate of {LARGEST:.0f} pixels or more")
            found = [part.tobytes() for part in parts if len(part) >= _FEWEST]
            return (POLYGONS, found) if found else (NONE, [])
        size, counts = segmentation["size"], segmentation["counts"]
        if list(size) != [height, width]:
            raise ValueError(f"its run lengths are for {size}, but the image is {[height, width]}")
        if isinstance(counts, str):
            counts = _expand(counts)
        if sum(counts) != height * width:
            raise ValueError(f"its run lengths add up to {sum(counts)}, not {height * width}")
        return COUNTS, [np.array(counts, np.uint32).tobytes()]
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError("it is neither a list of polygons nor run lengths") from error


def _expand(text: str) -> list[int]:
    """Run lengths from pycocotools' compressed form.

    Each is a sequence of characters with 5 bits, the lowest first, a sixth bit in all but the last
    and a sign; from the fourth on, the difference to the one before the previous one.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def to_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """The compressed run lengths of a segmentation, as pycocotools computes with them.

    Args:
      segmentation: from `Segments.get`.
      height: of the image, in pixels.
      width: of the image, in pixels.
    """
    from pycocotools import mask

    functions: Any = mask
    found = functions.frPyObjects(segmentation, height, width)
    return functions.merge(found) if isinstance(segmentation, list) else found


def decode(run_lengths: dict[str, Any]) -> np.ndarray:
    """The pixels of compressed run lengths, from `to_rle` or `encode`: uint8 [h, w] of 0 and 1."""
    from pycocotools import mask

    functions: Any = mask
    return functions.decode(run_lengths)


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Compressed run lengths of a mask, as in a COCO file; can be saved as JSON.

    Args:
      mask: bool or uint8 [h, w].
    """
    from pycocotools import mask as functions

    found: Any = functions.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode("ascii")}


def box_mask(mask: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """The mask within a box that is divided into size x size cells.

    Args:
      mask: uint8 [h, w] of 0 and 1.
      box: x1, y1, x2, y2 in pixels, with a positive area and within the mask.
      size: number of cells along each side.

    Returns:
      uint8 [size, size]: the share of each cell that the object covers, 255 for all of it.
    """
    x1, y1, x2, y2 = (float(side) for side in box)
    left, right, top, bottom = int(x1), math.ceil(x2), int(y1), math.ceil(y2)
    inside = mask[top:bottom, left:right].astype(np.float32)
    rows = _shares(y1 - top, y2 - top, size, bottom - top)
    columns = _shares(x1 - left, x2 - left, size, right - left)
    return np.rint(255 * (rows @ inside @ columns.T)).astype(np.uint8)


def _shares(low: float, high: float, cells: int, pixels: int) -> np.ndarray:
    """The share of each pixel in each of the cells between `low` and `high`: [cells, pixels]."""
    edges, pixel = np.linspace(low, high, cells + 1), np.arange(pixels)
    shared = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (np.maximum(shared, 0) * cells / (high - low)).astype(np.float32)


def paste_mask(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """A network's mask of a box in the whole image, as torchvision's `paste_masks_in_image`.

    Args:
      mask: probabilities, float [m, m].
      box: x1, y1, x2, y2 in pixels of the image.
      height: of the image, in pixels.
      width: of the image, in pixels.

    Returns:
      float32 [height, width], 0 outside the box; a pixel belongs to the object above 0.5.
    """
    # A border of zeros, so that the object's edge is interpolated at the edge of the box, too.
    padded = np.pad(np.asarray(mask, np.float32), 1)
    grow = np.float32(len(padded) / len(mask) / 2)
    x1, y1, x2, y2 = np.asarray(box, np.float32)
    across, down = (x2 - x1) * grow, (y2 - y1) * grow
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    left, top, right, bottom = map(int, (x - across, y - down, x + across, y + down))
    size = max(right - left + 1, 1), max(bottom - top + 1, 1)
    resized = cv2.resize(padded, size, interpolation=cv2.INTER_LINEAR)
    pasted = np.zeros((height, width), np.float32)
    rows = slice(max(top, 0), max(bottom + 1, 0))
    columns = slice(max(left, 0), max(right + 1, 0))
    part = resized[max(0, -top) :, max(0, -left) :]
    target = pasted[rows, columns]
    target[:] = part[: target.shape[0], : target.shape[1]]
    return pasted
