"""Decodes all examples of a split, or checks them for damage without decoding."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tqdm

from xkd_jax.data.decode import DamagedImage, decode, eval_crop
from xkd_jax.data.progress import Progress
from xkd_jax.data.source import Example, Examples, sha256
from xkd_jax.errors import UserError, unknown

ON_ERROR = ("stop", "skip")
_CHUNK = 32  # images per task of a thread
_SHOWN = 5  # images named in a message


class SizesDiffer(UserError):
    """Images that should form one array differ in size."""


@dataclasses.dataclass(frozen=True)
class ArrayExamples:
    """Examples that are already decoded.

    Attributes:
      images: uint8 [n, h, w, 3].
      labels: int32 [n].
      name: of the split, for messages.
    """

    images: np.ndarray
    labels: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self.images[index], int(self.labels[index]), f"{self.name}[{index}]")

    def faults(self) -> dict[int, str]:
        """Always empty: the images are already decoded."""
        return {}

    def digest(self, kept: np.ndarray | None = None) -> str:
        """A digest of the labels and the images' size; arrays have no names."""
        labels = self.labels if kept is None else self.labels[kept]
        return sha256(str(self.images.shape[1:]).encode(), labels.astype("<i4").tobytes())


@dataclasses.dataclass(frozen=True)
class Subset:
    """The examples at `indices`."""

    examples: Examples
    indices: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int32 [n]."""
        return self.examples.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.examples[int(self.indices[index])]

    def faults(self) -> dict[int, str]:
        """The faults of the examples that are kept."""
        found = self.examples.faults()
        return {i: found[j] for i, j in enumerate(self.indices.tolist()) if j in found}

    def digest(self, kept: np.ndarray | None = None) -> str:
        """The digest of the examples that are kept."""
        return self.examples.digest(self.indices if kept is None else self.indices[kept])


def scan(examples: Examples, on_error: str = "stop") -> Examples:
    """Finds images that can't be decoded, without decoding those that look intact.

    Args:
      examples: from a folder; other sources have nothing to check.
      on_error: "stop", or "skip" to leave such images out and report them.

    Raises:
      UserError: an image is damaged and `on_error` is "stop", or all images are damaged.
    """
    faults = examples.faults()
    report_faults(faults, len(examples), on_error)
    if not faults:
        return examples
    return Subset(examples, np.setdiff1d(np.arange(len(examples)), list(faults)))


def read(
    examples: Examples, size: int = 0, on_error: str = "stop"
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes all examples, on all cores; arguments and errors are those of `read_kept`.

    Returns:
      images uint8 [n, h, w, 3] and labels int32 [n].
    """
    return read_kept(examples, size, on_error)[:2]


def read_kept(
    examples: Examples, size: int = 0, on_error: str = "stop"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `read`, with the indices of the examples that were not damaged.

    Args:
      examples: at least one.
      size: resize the shorter side to this many pixels and crop the centre square; 0 keeps the
        images unchanged, and they must then all have the same size.
      on_error: as for `scan`.

    Returns:
      images uint8 [n, h, w, 3], labels int32 [n] and indices int64 [n].

    Raises:
      UserError: as for `scan`.
      SizesDiffer: the images differ in size.
    """
    if isinstance(examples, ArrayExamples) and not size:
        return examples.images, examples.labels, np.arange(len(examples))

    def pixels(index: int) -> tuple[np.ndarray, int]:
        image, label, name = examples[index]
        if size:
            return eval_crop(image, size, 1.0, name=name), label
        return decode(image, name=name), label

    images, labels = None, np.empty(len(examples), np.int32)
    faults: dict[int, str] = {}
    kept = 0
    for i, found in enumerate(in_threads(pixels, len(examples), "decoding")):
        if isinstance(found, DamagedImage):
            faults[i] = str(found)
            continue
        image, labels[kept] = found
        if images is None:
            images = np.empty((len(examples), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise SizesDiffer(
                f"the images differ in size ({examples[i].name} is {_size(image)} and others "
                f"{_size(images[0])}); set image_size and data.feed=host to resize them."
            )
        images[kept] = image
        kept += 1
    report_faults(faults, len(examples), on_error)
    assert images is not None  # report_faults raises if nothing is left
    indices = np.setdiff1d(np.arange(len(examples)), list(faults))
    return images[:kept], labels[:kept], indices


def in_threads(function: Callable, count: int, what: str):
    """Yields function(0), function(1), ... in order; a DamagedImage is yielded, not raised.

    Args:
      function: called with an index.
      count: the number of calls.
      what: the task's name for `Progress`.
    """

    def safe(index: int):
        try:
            return function(index)
        except DamagedImage as error:
            return error

    def chunk(start: int):
        return [safe(index) for index in range(start, min(start + _CHUNK, count))]

    with ThreadPoolExecutor() as pool, Progress(what, count, "images") as progress:
        for found in pool.map(chunk, range(0, count, _CHUNK)):
            yield from found
            progress.update(len(found))


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def report_faults(faults: Mapping[int, str], count: int, on_error: str) -> None:
    """Says which images are left out, if any.

    Args:
      faults: by index, a message that names the damaged image.
      count: the number of images.
      on_error: as for `scan`.

    Raises:
      UserError: as for `scan`.
    """
    if on_error not in ON_ERROR:
        raise unknown("data.on_error", on_error, ON_ERROR)
    if not faults:
        return
    # Drop the remedy after each ";": the message ends with one for all.
    shown = [fault.partition(";")[0] for fault in list(faults.values())[:_SHOWN]]
    more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    what = f"{len(faults)} of {count} images, which are damaged: {', '.join(shown)}{more}"
    if on_error == "stop" or len(faults) == count:
        raise UserError(
            f"found {what}; repair or delete them, or leave them out with data.on_error=skip."
        )
    tqdm.tqdm.write(f"xkd_jax: left out {what}.", file=sys.stderr)
