"""Training batches for detectors: images with the boxes, classes and masks of their objects."""

import dataclasses
import sys
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from xkd_jax.data.detection_split import DetectionSplit
from xkd_jax.data.loader import Batch, Order, read_batches
from xkd_jax.data.masks import box_mask, decode
from xkd_jax.distributed import sharding

MASK_SIZE = 112  # side of the masks of training objects: four times that of a network's masks


def detection_batch_shapes(
    split: DetectionSplit, mesh: Mesh, batch_size: int, max_objects: int = 100, mask_size: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
    """The `batches` of a `DetectionLoader` with these arguments, as shapes with their shardings."""
    shapes = {
        "image": jax.ShapeDtypeStruct((batch_size, *split.images.shape[1:]), np.uint8),
        "index": jax.ShapeDtypeStruct((batch_size,), np.int32),
        "size": jax.ShapeDtypeStruct((batch_size, 2), np.float32),
        "boxes": jax.ShapeDtypeStruct((batch_size, max_objects, 4), np.float32),
        "classes": jax.ShapeDtypeStruct((batch_size, max_objects), np.int32),
    }
    if mask_size:
        masks = batch_size, max_objects, mask_size, mask_size
        shapes["masks"] = jax.ShapeDtypeStruct(masks, np.uint8)
    return sharding.shaped(shapes, sharding.over_batch(mesh))


class DetectionLoader:
    """Workers decode, resize, flip and pad, as `HostLoader` does for classes.

    Attributes:
      arrays: empty.
    """

    def __init__(
        self,
        split: DetectionSplit,
        mesh: Mesh,
        order: Order,
        max_objects: int = 100,
        mask_size: int = 0,
        flip: bool = True,
        workers: int = 0,
    ):
        """Says on standard error in how many images objects are left out; reads nothing yet.

        Args:
          split: opened for training and, for masks, with them.
          mesh: where batches go.
          order: of the examples; without fixed views.
          max_objects: objects of an image in a batch; of more, the largest are kept.
          mask_size: side of each object's mask; 0: no masks.
          flip: whether half of the images are mirrored.
          workers: processes that read; 0 reads in threads of this one.
        """
        self.arrays: dict[str, jax.Array] = {}
        self._sharding, self._workers = sharding.over_batch(mesh), workers
        self._load = _Load(split, order, max_objects, mask_size, flip)
        counts = split.count_objects()
        if np.any(counts > max_objects):
            tqdm.tqdm.write(
                f"xkd_jax: images with more than data.max_objects={max_objects} objects: "
                f"{np.sum(counts > max_objects)}, with up to {np.max(counts)}; only the largest "
                f"are kept.",
                file=sys.stderr,
            )

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches of the steps from `start` on, N images with G = `max_objects`.

        `image` uint8 [N, S, S, 3]; `index` int32 [N]; `size` float32 [N, 2], height and width of
        the image within the square; `boxes` float32 [N, G, 4] in its pixels; `classes` int32
        [N, G], 0 where there is no object; and, with masks of size M, `masks` uint8 [N, G, M, M],
        see `masks.box_mask`.
        """
        return read_batches(
            self._load, self._load.order.batch_size, self._sharding, self._workers, start
        )


@dataclasses.dataclass(frozen=True)
class _Load:
    """From a step and a place in its batch to the example, mirrored at random."""

    split: DetectionSplit
    order: Order
    max_objects: int
    mask_size: int
    flip: bool

    def __call__(self, step: int, place: int) -> dict[str, np.ndarray]:
        index = int(self.order.indices(step)[place])
        mirrored = self.flip and self.order.generator(step, place).random() < 0.5
        size, pixels = self.split.sizes[index], self.split.read(index)
        if mirrored:
            pixels = pixels[:, ::-1]
        return {
            "image": self.split.pad(pixels),
            "index": np.asarray(index, np.int32),
            "size": size,
            **self._targets(index, size, mirrored),
        }

    def _targets(self, index: int, size: np.ndarray, mirrored: bool) -> dict[str, np.ndarray]:
        objects, original = self.split.objects(index), self.split.original_sizes[index]
        sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
        kept = np.argsort(-np.prod(sides, axis=1), kind="stable")[: self.max_objects]
        kept = np.sort(kept)
        scaled = objects.boxes[kept] * np.tile(size / original, 2)[[1, 0, 3, 2]]
        if mirrored:
            scaled[:, [0, 2]] = size[1] - scaled[:, [2, 0]]
        boxes = np.zeros((self.max_objects, 4), np.float32)
        boxes[: len(kept)] = scaled
        classes = np.zeros(self.max_objects, np.int32)
        classes[: len(kept)] = objects.classes[kept]
        if not self.mask_size:
            return {"boxes": boxes, "classes": classes}
        masks = np.zeros((self.max_objects, self.mask_size, self.mask_size), np.uint8)
        for place, (row, box) in enumerate(
            zip(objects.rows[kept], objects.boxes[kept], strict=True)
        ):
            mask = decode(self.split.run_lengths(index, row))
            masks[place] = box_mask(mask, box, self.mask_size)
        return {"boxes": boxes, "classes": classes, "masks": masks[..., :: -1 if mirrored else 1]}
