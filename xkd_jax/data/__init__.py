"""Data sets: found on disk, sliced, and decoded to uint8.

Only `data.loader`, which moves batches to the devices, imports JAX; importing `data` loads neither
JAX nor TensorFlow.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from xkd_jax.data.examples import read, read_kept, scan
from xkd_jax.data.source import Example, Examples, Source, Split, check_classes, parse_split
from xkd_jax.errors import UserError, unknown

__all__ = [
    "SOURCES",
    "Example",
    "Examples",
    "Source",
    "Split",
    "load",
    "open_source",
    "parse_split",
    "read",
    "scan",
]

# Data sources that are added from outside: for "KIND:REST", a function of REST, by KIND.
SOURCES: dict[str, Callable[[str], Source]] = {}


def load(name: str, split: str, data_dir: str = "", size: int = 0, on_error: str = "stop") -> Split:
    """Finds a data set and decodes one split of it.

    Args:
      name: "folder:PATH" (PATH/train/CLASS/*.jpg), "leaf:PATH" (the same, but the class is the
        name of the innermost folder), "images:PATH" (PATH/**/*.jpg, without labels), "tfds:NAME"
        (an image-classification set of TensorFlow Datasets, prepared as array_record, e.g.
        "tfds:cifar100"), "idx:FOLDER" (MNIST's file format), "fashion_mnist_mini" (packaged) or a
        kind that `SOURCES` adds.
      split: in TFDS's slicing syntax, e.g. "train", "train[45000:]", "test[:10%]".
      data_dir: TFDS's data folder; "" is TFDS's default. Other sources ignore it.
      size: resize the shorter side to this many pixels and crop the centre square; 0 keeps the
        images unchanged, and they must then all have the same size.
      on_error: what to do about damaged images: "stop", or "skip" to leave them out.

    Returns:
      The split, in the data set's own order.

    Raises:
      UserError: the name or the split is unknown, or the data are missing or damaged.
    """
    source = open_source(name, data_dir)
    check_classes(name, source.class_names)
    examples = source.examples(*parse_split(split, source.sizes))
    images, labels, kept = read_kept(examples, size, on_error)
    digest = functools.partial(examples.digest, kept)
    return Split(
        images, labels, source.class_names, source.mean, source.std, examples_digest=digest
    )


def open_source(name: str, data_dir: str = "") -> Source:
    """Finds a data set on disk, without decoding it or using the network.

    Args:
      name: as for `load`.
      data_dir: as for `load`.

    Raises:
      UserError: the name is unknown, or the data are missing or damaged.
    """
    from xkd_jax.data import folder, idx, images, packaged, tfds_source

    kind, _, rest = name.partition(":")
    if kind in SOURCES:
        return SOURCES[kind](rest)
    if name == packaged.NAME:
        return packaged.Packaged()
    if kind == "idx" and rest:
        return idx.IdxFolder(Path(rest).expanduser())
    if kind == "tfds" and rest:
        return tfds_source.TfdsFolder(rest, data_dir)
    if kind in ("folder", "leaf") and rest:
        return folder.ImageFolder(Path(rest).expanduser(), leaf=kind == "leaf")
    if kind == "images" and rest:
        return images.UnlabelledFolder(Path(rest).expanduser())
    if kind == "coco":
        raise UserError(
            f"{name} is a data set of objects, for detectors; take a recipe such as "
            "configs/coco_frcnn_r50.py."
        )
    if kind in ("folder", "leaf", "images", "idx", "tfds"):
        raise UserError(
            f"the data set {name!r} lacks the part after the colon, as in 'tfds:cifar100'."
        )
    known = ("folder:PATH", "tfds:cifar10", "tfds:cifar100", "tfds:imagenet2012")
    known += (packaged.NAME, "idx:FOLDER", "leaf:PATH", "images:PATH", *SOURCES)
    raise unknown("data set", name, known)
