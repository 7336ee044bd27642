"""A split of images with objects: decoded on access, resized and padded to a square."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD
from xkd_jax.data.annotations import Annotations
from xkd_jax.data.decode import DamagedImage, check_size, decode_resize
from xkd_jax.data.frame import Frame
from xkd_jax.data.intact import looks_intact
from xkd_jax.data.masks import to_rle
from xkd_jax.data.source import sha256

COLOUR = np.rint(255 * np.array(IMAGENET_MEAN)).astype(np.uint8)  # of the padding


class Objects(NamedTuple):
    """The m objects of an image, without regions of crowds.

    Attributes:
      boxes: x1, y1, x2, y2 in pixels of the file, clipped to the image, float64 [m, 4].
      classes: int32 [m], from 1.
      rows: the position of each in `DetectionSplit.annotations`, int64 [m].
    """

    boxes: np.ndarray
    classes: np.ndarray
    rows: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class DetectionSplit:
    """The n images of a split, decoded on access, and their objects.

    Attributes:
      folder: of the image files.
      annotations: of the whole file.
      rows: int64 [n], the position of each image in `annotations`.
      usable: whether an annotation of the file counts, bool [a].
      frame: of the networks' input.
      mean: per channel, in units of [0, 1].
      std: per channel, in the same units.
    """

    folder: Path
    annotations: Annotations
    rows: np.ndarray
    usable: np.ndarray
    frame: Frame
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, indexed by label - 1: label 0 is the background."""
        return self.annotations.class_names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The file's id of each class, indexed by label - 1."""
        return self.annotations.category_ids

    @property
    def num_classes(self) -> int:
        """The number of classes, without the background."""
        return len(self.class_names)

    @functools.cached_property
    def image_ids(self) -> np.ndarray:
        """The file's ids of the images, int64 [n]."""
        return self.annotations.image_ids[self.rows]

    @functools.cached_property
    def original_sizes(self) -> np.ndarray:
        """Height and width of the image files in pixels, int64 [n, 2]."""
        return self.annotations.sizes[self.rows]

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Height and width of the images within the frame in pixels, float32 [n, 2]."""
        return np.array(
            [self.frame.fit(*size) for size in self.original_sizes.tolist()], np.float32
        )

    @functools.cached_property
    def images(self) -> "PaddedImages":
        """The images as the networks' input."""
        return PaddedImages(self)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """As `Split.identity`: the digest is of file names, sizes, boxes, classes and crowds."""
        rows = np.concatenate([self.annotations_of(i) for i in range(len(self))])
        about = self.annotations
        digest = sha256(
            b"\0".join(about.files[self.rows].tolist()),
            self.original_sizes.astype("<i8").tobytes(),
            *(part[rows].tobytes() for part in (about.boxes, about.classes, about.crowd)),
        )
        return {"class_names": list(self.class_names), "examples": len(self), "digest": digest}

    def name(self, index: int) -> str:
        """The path of an image file."""
        return os.path.join(self.folder, self.annotations.file(self.rows[index]))

    def annotations_of(self, index: int) -> np.ndarray:
        """The positions of an image's annotations that count, crowds included: int64 [m]."""
        start, stop = self.annotations.starts[self.rows[index] :][:2]
        return start + np.flatnonzero(self.usable[start:stop])

    def count_objects(self) -> np.ndarray:
        """The number of objects of each image, without regions of crowds: int64 [n]."""
        about = self.annotations
        owners = about.owners[self.usable & ~about.crowd]
        return np.bincount(owners, minlength=len(about.files))[self.rows]

    def objects(self, index: int) -> Objects:
        """The objects of an image."""
        about, rows = self.annotations, self.annotations_of(index)
        rows = rows[~about.crowd[rows]]
        return Objects(about.corners[rows], about.classes[rows], rows)

    def run_lengths(self, index: int, row: int) -> dict[str, Any]:
        """The mask of one of an image's annotations, as pycocotools computes with it.

        Args:
          index: of the image.
          row: from `annotations_of`, of a split that was opened with masks.
        """
        height, width = self.original_sizes[index].tolist()
        segmentation = self.annotations.segments.get(row, height, width)
        assert segmentation is not None  # others aren't usable
        return to_rle(segmentation, height, width)

    def read(self, index: int) -> np.ndarray:
        """An image, resized but not padded: uint8 [h, w, 3].

        Raises:
          DamagedImage: it can't be decoded, or has another size than its annotations say.
        """
        height, width = self.original_sizes[index].tolist()
        size = self.frame.fit(height, width)
        return decode_resize(self._bytes(index), (height, width), size, name=self.name(index))

    def pad(self, pixels: np.ndarray) -> np.ndarray:
        """Pads a resized image, uint8 [h, w, 3], with the mean colour: uint8 [side, side, 3]."""
        return self.frame.pad(pixels, COLOUR)

    def check(self, index: int) -> None:
        """Looks for damage of an image file, by its header and last bytes if these are usual.

        Raises:
          DamagedImage: the file is missing, damaged, or has another size than its annotations say.
        """
        path, (height, width) = self.name(index), self.original_sizes[index].tolist()
        try:
            with open(path, "rb") as file:
                if looks_intact(file):
                    file.seek(0)
                    with Image.open(file) as opened:
                        if opened.size == (width, height):
                            return
                    check_size(self._bytes(index), (height, width), name=path)
                    return
        except OSError as error:
            raise DamagedImage(f"{path} can't be read ({error.strerror or error}).") from error
        self.read(index)

    def _bytes(self, index: int) -> bytes:
        path = self.name(index)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise DamagedImage(f"{path} can't be read ({error.strerror}).") from error

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "images"}


class PaddedImages:
    """The images of a split as the networks' input, decoded on access: `images[indices]`.

    Attributes:
      shape: (n, side, side, 3), like an array's.
    """

    def __init__(self, split: DetectionSplit):
        """Decodes nothing yet."""
        self._split = split
        self.shape = (len(split), split.frame.side, split.frame.side, 3)
        self._pool = ThreadPoolExecutor(os.cpu_count())  # decoders release the GIL

    def __getitem__(self, indices: Sequence[int] | slice) -> np.ndarray:
        """uint8 [len(indices), side, side, 3].

        Raises:
          DamagedImage: an image is damaged.
        """
        wanted = np.arange(len(self._split))[indices]
        return np.stack(list(self._pool.map(self._read, wanted.tolist())))

    def _read(self, index: int) -> np.ndarray:
        return self._split.pad(self._split.read(index))
