"""Splits that stay encoded until a batch needs them, and the choice between them and memory."""

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from xkd_jax.data import open_source
from xkd_jax.data.decode import DamagedImage, eval_crop, image_size
from xkd_jax.data.examples import SizesDiffer, read, scan
from xkd_jax.data.source import Examples, Split, parse_split
from xkd_jax.errors import UserError

FEEDS = ("auto", "resident", "host")
CROP_PCT = 0.875  # "resize 256, crop 224"
MEMORY_LIMIT = 2**30  # bytes of uint8 that lie on the device without being asked to
_PEEKS = 16  # images whose size is looked at


class EncodedImages:
    """The images of a split, decoded when they are asked for: `images[indices]`.

    Stands where a `Split` in memory has its array. Each image is resized and its centre cropped,
    as networks are evaluated; for training, `examples` has them as they are.

    Attributes:
      examples: random access to the encoded images.
      shape: (n, size, size, 3), as of an array.
    """

    def __init__(self, examples: Examples, size: int, crop_pct: float):
        """Nothing is decoded yet.

        Args:
          examples: of `Source.examples`.
          size: the side of what comes out, pixels.
          crop_pct: the side of the crop as a part of the resized image's shorter side.
        """
        self.examples = examples
        self.shape = (len(examples), size, size, 3)
        self._size, self._crop_pct = size, crop_pct
        self._pool = ThreadPoolExecutor(os.cpu_count())  # decoders let go of Python's lock

    def __getitem__(self, indices: Sequence[int] | slice) -> np.ndarray:
        """uint8 [len(indices), size, size, 3].

        Raises:
          UserError: an image is damaged.
        """
        wanted = np.arange(len(self.examples))[indices]
        return np.stack(list(self._pool.map(self._read, wanted)))

    def _read(self, index: int) -> np.ndarray:
        image, _, name = self.examples[int(index)]
        return eval_crop(image, self._size, self._crop_pct, name=name)


class EncodedLabels:
    """The labels of a split, read when one is asked for: a TFDS set has them in every record."""

    def __init__(self, examples: Examples):
        """Nothing is read yet."""
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, indices: Any) -> Any:
        return self._examples.labels[indices]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._examples.labels, dtype)


def open_split(
    name: str, split: str, data_dir: str, size: int, feed: str, on_error: str, crop_pct: float
) -> Split:
    """A split in memory, or with `EncodedImages`.

    Args:
      name: of the data set, as for `data.load`.
      split: as for `data.load`.
      data_dir: as for `data.load`.
      size: the side of the images that networks see, pixels; 0: the data's own.
      feed: "resident" (in memory), "host" (encoded), or "auto": in memory where the images have
        one size, as far as that is known before all are decoded, and take less than `MEMORY_LIMIT`.
      on_error: what to do about damaged images, as for `data.load`.
      crop_pct: what evaluation cuts out, in (0, 1]; 0: `CROP_PCT` of `EncodedImages`, and images
        in memory whole.

    Raises:
      UserError: as `data.load`, or `size` is missing where it is needed.
    """
    source = open_source(name, data_dir)
    examples = source.examples(*parse_split(split, source.sizes))
    sides = sizes_of_images(examples)
    choice = choose_feed(feed, len(examples), sides)
    about = source.class_names, source.mean, source.std
    if choice == "resident":
        try:
            pair = read(examples, size if len(sides) > 1 else 0, on_error)
            return Split(*pair, *about, crop_pct)
        except SizesDiffer:
            if feed == "resident" or not size:
                raise
    if not size:
        raise UserError(
            f"the images of {name} are decoded batch by batch, for which they need one size; set "
            "image_size, such as image_size=224."
        )
    examples = scan(examples, on_error)
    images: Any = EncodedImages(examples, size, crop_pct or CROP_PCT)  # as far as it goes, an array
    labels: Any = EncodedLabels(examples)
    return Split(images, labels, *about)


def choose_feed(feed: str, count: int, sides: set[tuple[int, int]]) -> str:
    """ "resident" or "host".

    Args:
      feed: one of `FEEDS`.
      count: how many images there are.
      sides: the sizes (w, h) that they have.
    """
    if feed != "auto":
        return feed
    total = count * max((w * h for w, h in sides), default=0) * 3
    return "resident" if len(sides) == 1 and total <= MEMORY_LIMIT else "host"


def sizes_of_images(examples: Examples) -> set[tuple[int, int]]:
    """The sizes (w, h) of a few of the images, from first to last."""
    found = set()
    for index in np.linspace(0, len(examples) - 1, min(len(examples), _PEEKS)).astype(int):
        image, _, name = examples[int(index)]
        # A damaged one is for `read` and `scan` to report, or to leave out.
        with contextlib.suppress(DamagedImage):
            found.add(image_size(image, name=name))
    return found
