"""Folders of idx files, the format of MNIST, Fashion-MNIST, KMNIST, ..."""

import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xkd_jax.augment.normalization import (
    FASHION_MNIST_MEAN,
    FASHION_MNIST_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
)
from xkd_jax.data.examples import ArrayExamples
from xkd_jax.errors import UserError

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_STEMS = {"train": "train", "test": "t10k"}


class IdxFolder:
    """The four idx files of a folder; greyscale is repeated into three channels."""

    def __init__(self, folder: Path):
        """Finds the files and reads the labels.

        Args:
          folder: contains train-images-idx3-ubyte, train-labels-idx1-ubyte,
            t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each plain or with .gz.

        Raises:
          UserError: a file is missing or damaged.
        """
        self._folder = folder
        for stem in _STEMS.values():
            _find(folder, f"{stem}-images-idx3-ubyte")
        labels = {
            split: _read(_find(folder, f"{stem}-labels-idx1-ubyte"), dimensions=1)
            for split, stem in _STEMS.items()
        }
        self._sizes = {split: len(values) for split, values in labels.items()}
        num_classes = 1 + max(int(values.max(initial=0)) for values in labels.values())
        fashion = "fashion" in folder.resolve().name.lower() and num_classes == 10
        self.class_names = FASHION_CLASSES if fashion else tuple(str(c) for c in range(num_classes))
        self.mean = FASHION_MNIST_MEAN if fashion else IMAGENET_MEAN
        self.std = FASHION_MNIST_STD if fashion else IMAGENET_STD

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of examples of each named split."""
        return self._sizes

    def examples(self, split: str, start: int, stop: int) -> ArrayExamples:
        """The examples [start, stop) of a named split.

        Raises:
          UserError: a file is damaged.
        """
        images, labels = read_pair(self._folder, split)
        return ArrayExamples(
            to_rgb(images[start:stop]),
            labels[start:stop].astype(np.int32),
            f"{self._folder} {split}",
        )


def read_pair(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads all images and labels of a split.

    Args:
      folder: the folder of the idx files.
      split: "train" or "test".

    Returns:
      uint8 [n, H, W] and uint8 [n].

    Raises:
      UserError: a file is missing or damaged, or the numbers of images and labels differ.
    """
    images_path = _find(folder, f"{_STEMS[split]}-images-idx3-ubyte")
    images = _read(images_path, dimensions=3)
    labels = _read(_find(folder, f"{_STEMS[split]}-labels-idx1-ubyte"), dimensions=1)
    if len(images) != len(labels):
        raise UserError(
            f"{images_path} has {len(images)} images, but its label file has {len(labels)} labels; "
            f"download both again."
        )
    return images, labels


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Repeats greyscale images [n, H, W] into three channels [n, H, W, 3]."""
    return np.repeat(images[..., None], 3, axis=-1)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UserError(
        f"no {name} (plain or .gz) in {folder}; an idx folder contains "
        f"{{train,t10k}}-images-idx3-ubyte and {{train,t10k}}-labels-idx1-ubyte, e.g. "
        f"/usr/share/datasets/fashion-mnist after `apt-get install dataset-fashion-mnist`."
    )


def _read(path: Path, dimensions: int) -> np.ndarray:
    """Reads one idx file of unsigned bytes (format: yann.lecun.com/exdb/mnist)."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); download it again.") from error
    header = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < header:
        raise UserError(
            f"{path} is not an idx file of unsigned bytes with {dimensions} dimension(s); "
            f"download it again."
        )
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, offset=4))
    pixels = np.frombuffer(data, np.uint8, offset=header)
    expected = math.prod(shape)
    if pixels.size != expected:
        raise UserError(
            f"{path} is damaged: its header announces {expected} bytes but {pixels.size} follow; "
            f"download it again."
        )
    return pixels.reshape(shape)
