"""Folders of images without labels: PATH/**/*.jpg."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD
from xkd_jax.data.folder import FolderExamples, path_hash
from xkd_jax.data.layout import subfolders
from xkd_jax.data.listing import list_all_images, report
from xkd_jax.data.source import canonical_split
from xkd_jax.errors import UserError


class UnlabelledFolder:
    """All images in a folder and below, whatever its subfolders are called; without labels.

    Folders directly in it that have the usual names of splits ("train", "val", ...) are its
    splits; without any, all of it is the split "train". Files are ordered by a hash of their path.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    class_names: tuple[str, ...] = ()

    def __init__(self, root: Path):
        """Lists the files without opening any, and says on standard error what is left out.

        Raises:
          UserError: there is no such folder, it has no images, or two folders for one split.
        """
        if not root.is_dir():
            raise UserError(f"there is no folder {root}; it should hold images.")
        listings = {}
        for split, folder in _find_splits(root).items():
            listings[split] = folder, list_all_images(folder)
        report(root, [listing for _, listing in listings.values()])
        self._splits: dict[str, tuple[Path, np.ndarray]] = {}
        for split, (folder, listing) in listings.items():
            files = sorted(listing.images[""], key=lambda path: (path_hash(path), path))
            self._splits[split] = folder, np.array([os.fsencode(path) for path in files])

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of examples of each named split."""
        return {name: len(files) for name, (_, files) in self._splits.items()}

    def examples(self, split: str, start: int, stop: int) -> FolderExamples:
        """The examples [start, stop) of a named split, none of them decoded; labels are 0."""
        folder, files = self._splits[split]
        return FolderExamples(folder, files[start:stop], np.zeros(stop - start, np.int32))


def _find_splits(root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in subfolders(root):
        split = canonical_split(name)
        if split in found:
            raise UserError(
                f"{root} has two folders for the split {split!r}, {found[split].name} and {name}; "
                "rename or delete one."
            )
        if split:
            found[split] = root / name
    return found or {"train": root}
