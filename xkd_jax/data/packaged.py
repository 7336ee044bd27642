"""The packaged data set: a class-balanced subset of Fashion-MNIST.

Made by `scripts/make_fashion_mnist_mini.py`; MIT licence, see assets/fashion_mnist_mini.LICENSE.
"""

import json
import lzma
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xkd_jax.augment.normalization import FASHION_MNIST_MEAN, FASHION_MNIST_STD
from xkd_jax.data import idx
from xkd_jax.data.examples import ArrayExamples
from xkd_jax.errors import UserError

NAME = "fashion_mnist_mini"
_ASSETS = Path(__file__).parent.parent / "assets"


class Packaged:
    """2,000 training, 2,000 validation (disjoint) and 9,600 test images.

    Classes alternate (0, 1, ..., 9, 0, ...), so that slices are class-balanced too.
    """

    mean = FASHION_MNIST_MEAN
    std = FASHION_MNIST_STD

    def __init__(self, assets: Path = _ASSETS):
        """Reads the metadata.

        Args:
          assets: the folder with the packaged files.

        Raises:
          UserError: a packaged file is missing or damaged.
        """
        self._assets = assets
        try:
            meta = json.loads((assets / f"{NAME}.json").read_text())
            with np.load(assets / f"{NAME}_indices.npz", allow_pickle=False) as arrays:
                # [class, image] -> alternating classes.
                self._indices = {split: arrays[split].T.ravel() for split in meta["splits"]}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise _damaged(assets / f"{NAME}.json") from error
        self.class_names: tuple[str, ...] = tuple(meta["class_names"])
        self._shape: tuple[int, int] = (meta["width"], meta["height"])

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of examples of each named split."""
        return {split: len(indices) for split, indices in self._indices.items()}

    def original_indices(self, split: str) -> np.ndarray:
        """The index of each example of a split in the original idx files: uint16 [n]."""
        return self._indices[split]

    def examples(self, split: str, start: int, stop: int) -> ArrayExamples:
        """The examples [start, stop) of a named split.

        Raises:
          UserError: a packaged file is missing or damaged.
        """
        path = self._assets / f"{NAME}_{split}.xz"
        classes = len(self.class_names)
        try:
            raw = lzma.decompress(path.read_bytes())
            pixels = np.frombuffer(raw, np.uint8).reshape(classes, -1, *self._shape)
        except (OSError, lzma.LZMAError, ValueError) as error:
            raise _damaged(path) from error
        # Stored as [class, image, x, y], which compresses best.
        images = pixels.transpose(1, 0, 3, 2).reshape(-1, *self._shape[::-1])[start:stop]
        labels = (np.arange(start, stop) % classes).astype(np.int32)
        return ArrayExamples(idx.to_rgb(images), labels, f"{NAME} {split}")


def _damaged(path: Path) -> UserError:
    return UserError(f"the packaged file {path} is missing or damaged; reinstall xkd_jax.")
