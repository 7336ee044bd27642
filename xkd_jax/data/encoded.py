"""Splits whose images are decoded on demand, and the choice between them and decoded splits."""

import contextlib
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from xkd_jax.data import open_source
from xkd_jax.data.decode import DamagedImage, eval_crop, image_size
from xkd_jax.data.examples import SizesDiffer, read_kept, scan
from xkd_jax.data.source import Examples, Split, check_classes, parse_split
from xkd_jax.errors import UserError

FEEDS = ("auto", "resident", "host")
CROP_PCT = 0.875  # "resize 256, crop 224"
MEMORY_LIMIT = 2**30  # bytes of uint8 images that "auto" keeps in device memory
_PEEKS = 16  # images whose size is read


class EncodedImages:
    """The images of a split, decoded on access: `images[indices]`.

    Takes the place of the array in a decoded `Split`. Images are resized and centre-cropped, as
    for evaluation; training crops the encoded images from `examples` itself.

    Attributes:
      examples: random access to the encoded images.
      shape: (n, size, size, 3), like an array's.
      crop_pct: the share of the shorter side that is cropped.
    """

    def __init__(self, examples: Examples, size: int, crop_pct: float):
        """Decodes nothing yet.

        Args:
          examples: from `Source.examples`.
          size: side of the decoded images, in pixels.
          crop_pct: side of the crop divided by the shorter side of the resized image.
        """
        self.examples = examples
        self.shape = (len(examples), size, size, 3)
        self._size, self.crop_pct = size, crop_pct
        self._pool = ThreadPoolExecutor(os.cpu_count())  # decoders release the GIL

    def __getitem__(self, indices: Sequence[int] | slice) -> np.ndarray:
        """uint8 [len(indices), size, size, 3].

        Raises:
          UserError: an image is damaged.
        """
        wanted = np.arange(len(self.examples))[indices]
        return np.stack(list(self._pool.map(self._read, wanted)))

    def _read(self, index: int) -> np.ndarray:
        image, _, name = self.examples[int(index)]
        return eval_crop(image, self._size, self.crop_pct, name=name)


class EncodedLabels:
    """The labels of a split, read on first access: TFDS stores them in the records."""

    def __init__(self, examples: Examples):
        """Reads nothing yet."""
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, indices: Any) -> Any:
        return self._examples.labels[indices]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._examples.labels, dtype)


def open_split(
    name: str,
    split: str,
    data_dir: str,
    size: int,
    feed: str,
    on_error: str,
    crop_pct: float,
    labelled: bool = True,
) -> Split:
    """Opens a split, decoded in memory or as `EncodedImages`.

    Args:
      name: the data set, as for `data.load`.
      split: as for `data.load`.
      data_dir: as for `data.load`.
      size: side of the networks' input, in pixels; 0 keeps the size of the images.
      feed: "resident" (in memory), "host" (encoded), or "auto": in memory if the images take at
        most `MEMORY_LIMIT` and, as far as a sample shows, all have the same size.
      on_error: what to do about damaged images, as for `data.load`.
      crop_pct: the share of the shorter side that evaluation crops, in (0, 1]; 0 is `CROP_PCT` for
        `EncodedImages` and no crop for images in memory.
      labelled: whether to keep the labels; without them there are no classes, and labels are 0.

    Raises:
      UserError: as for `data.load`, or `size` is 0 but required.
    """
    source = open_source(name, data_dir)
    names = source.class_names if labelled else ()
    check_classes(name, names)
    examples = source.examples(*parse_split(split, source.sizes))
    sides = sizes_of_images(examples)
    choice = choose_feed(feed, len(examples), sides)
    about = names, source.mean, source.std
    if choice == "resident":
        try:
            resize = size if len(sides) > 1 else 0
            images, labels, kept = read_kept(examples, resize, on_error)
            digest = functools.partial(examples.digest, kept)
            labels = labels if names else np.zeros_like(labels)
            return Split(images, labels, *about, crop_pct, digest)
        except SizesDiffer:
            if feed == "resident" or not size:
                raise
    if not size:
        raise UserError(
            f"the images of {name} are decoded batch by batch, which requires a fixed size; set "
            "image_size, such as image_size=224."
        )
    examples = scan(examples, on_error)
    encoded: Any = EncodedImages(examples, size, crop_pct or CROP_PCT)  # used like an array
    encoded_labels: Any = EncodedLabels(examples) if names else np.zeros(len(examples), np.int32)
    return Split(encoded, encoded_labels, *about, examples_digest=examples.digest)


def crop_share(split: Split) -> float:
    """The share of the shorter side that evaluation crops from the images of `split`, in (0, 1]."""
    if isinstance(split.images, EncodedImages):
        return split.images.crop_pct
    return split.crop_pct or 1.0


def choose_feed(feed: str, count: int, sides: set[tuple[int, int]]) -> str:
    """ "resident" or "host".

    Args:
      feed: one of `FEEDS`.
      count: the number of images.
      sides: the sizes (w, h) found among them.
    """
    if feed != "auto":
        return feed
    total = count * max((w * h for w, h in sides), default=0) * 3
    return "resident" if len(sides) == 1 and total <= MEMORY_LIMIT else "host"


def sizes_of_images(examples: Examples) -> set[tuple[int, int]]:
    """The sizes (w, h) of a few images, spread evenly over the split."""
    found = set()
    for index in np.linspace(0, len(examples) - 1, min(len(examples), _PEEKS)).astype(int):
        image, _, name = examples[int(index)]
        # `read` and `scan` report or skip damaged images.
        with contextlib.suppress(DamagedImage):
            found.add(image_size(image, name=name))
    return found
