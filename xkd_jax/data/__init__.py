"""Data sets: found at once or refused in one sentence, sliced, then decoded into memory as uint8.

Nothing here imports JAX or TensorFlow.
"""

from pathlib import Path

from xkd_jax.data.source import Source, Split, parse_split
from xkd_jax.errors import UserError, unknown

__all__ = ["Source", "Split", "check", "load", "open_source", "parse_split"]


def load(name: str, split: str, data_dir: str = "") -> Split:
    """Finds a data set and decodes one split of it.

    Args:
      name: "fashion_mnist_mini" (packaged), "idx:FOLDER" (MNIST's file format), or "tfds:NAME" (an
        image-classification set of TensorFlow Datasets, prepared as array_record, whose images all
        have one size, e.g. "tfds:cifar100").
      split: in TFDS's slicing syntax, e.g. "train", "train[45000:]", "test[:10%]".
      data_dir: where TFDS keeps its data; "" is TFDS's own default. Others ignore it.

    Returns:
      The split, in the order in which the data set holds it.

    Raises:
      UserError: the name or the split is unknown, or the data are missing or damaged.
    """
    source = open_source(name, data_dir)
    return source.read(*parse_split(split, source.sizes))


def check(name: str, split: str, data_dir: str = "") -> int:
    """The number of examples of a split; `load`'s errors, without decoding an image.

    Args:
      name: as for `load`.
      split: as for `load`.
      data_dir: as for `load`.

    Raises:
      UserError: the name or the split is unknown, or the data are missing.
    """
    _, start, stop = parse_split(split, open_source(name, data_dir).sizes)
    return stop - start


def open_source(name: str, data_dir: str = "") -> Source:
    """Finds a data set on disk, without decoding it and without the network.

    Args:
      name: as for `load`.
      data_dir: as for `load`.

    Raises:
      UserError: the name is unknown, or the data are missing or damaged.
    """
    from xkd_jax.data import idx, packaged, tfds_source

    kind, _, rest = name.partition(":")
    if name == packaged.NAME:
        return packaged.Packaged()
    if kind == "idx" and rest:
        return idx.IdxFolder(Path(rest).expanduser())
    if kind == "tfds" and rest:
        return tfds_source.TfdsFolder(rest, data_dir)
    if kind in ("idx", "tfds"):
        raise UserError(f"the data set {name!r} lacks its second half, as in 'tfds:cifar100'.")
    raise unknown("data set", name, (packaged.NAME, "idx:FOLDER", "tfds:cifar10", "tfds:cifar100"))
