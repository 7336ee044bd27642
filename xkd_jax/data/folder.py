"""Folders of images: PATH/train/CLASS/*.jpg, as in torchvision and timm."""

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD
from xkd_jax.data.decode import DamagedImage, decode
from xkd_jax.data.examples import in_threads
from xkd_jax.data.intact import looks_intact
from xkd_jax.data.layout import find_splits, is_image, single_class, subfolders
from xkd_jax.data.listing import Listing, count_files, list_images, normal_form, report
from xkd_jax.data.source import Example, canonical_split, sha256
from xkd_jax.errors import UserError


class ImageFolder:
    """A folder PATH/SPLIT/CLASS/..., or PATH/CLASS/..., which is a single split, "train".

    Splits are called train, val and test, whichever of the usual names their folders have
    ("Training", "valid", ...). Classes are sorted by name, as in torchvision: "10" before "2".

    The order of a split spreads every class evenly, so that a slice such as train[:90%] is
    stratified; within a class, files are ordered by a hash of their path.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, root: Path, leaf: bool = False):
        """Lists the files without opening any, and says on standard error what is left out.

        Args:
          root: the folder.
          leaf: whether the class is the name of the innermost folder (CelebA-Spoof:
            train/SUBJECT/live/*.jpg) instead of the split's subfolder.

        Raises:
          UserError: there is no such folder, no class or only one, a class without images, a split
            whose classes differ from those of the first split, two folders for one split or class,
            or the path is one level too high or too low.
        """
        if not root.is_dir():
            raise UserError(f"there is no folder {root}; it should hold train/CLASS/*.jpg.")
        found = _list(root, leaf)
        first, images = next(iter(found.values()))
        self.class_names = tuple(sorted(images))
        self._splits = {}
        for name, (folder, files) in found.items():
            if set(files) != set(self.class_names):
                raise _other_classes(folder, first, set(files), self.class_names)
            self._splits[name] = folder, *_spread(files)

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of examples of each named split."""
        return {name: len(labels) for name, (_, _, labels) in self._splits.items()}

    def examples(self, split: str, start: int, stop: int) -> "FolderExamples":
        """The examples [start, stop) of a named split, none of them decoded."""
        folder, files, labels = self._splits[split]
        return FolderExamples(folder, files[start:stop], labels[start:stop])


class FolderExamples:
    """Image files, read on access."""

    def __init__(self, folder: Path, files: np.ndarray, labels: np.ndarray):
        """Reads nothing.

        Args:
          folder: the folder of the split.
          files: bytes [n], paths relative to `folder`; one array is quick to send to workers.
          labels: int32 [n].
        """
        self._folder, self._files, self.labels = folder, files, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        path = self._path(index)
        try:
            with open(path, "rb") as file:
                return Example(file.read(), int(self.labels[index]), path)
        except OSError as error:
            raise DamagedImage(f"{path} can't be read ({error.strerror}).") from error

    def faults(self) -> dict[int, str]:
        """Files that are empty, truncated or not images, judged by their header and last bytes.

        An image of an unusual kind is decoded; damage in the middle of a file is found only later.
        """
        found = enumerate(in_threads(self._check, len(self), "checking files"))
        return {i: str(error) for i, error in found if error}

    def digest(self, kept: np.ndarray | None = None) -> str:
        """A digest of the labels and the files' paths, relative to the split's folder."""
        files, labels = self._files, self.labels
        if kept is not None:
            files, labels = files[kept], labels[kept]
        names = normal_form(os.fsdecode(b"\0".join(files.tolist())))
        return sha256(os.fsencode(names), labels.astype("<i4").tobytes())

    def _check(self, index: int) -> None:
        path = self._path(index)
        try:
            with open(path, "rb") as file:
                if looks_intact(file):
                    return
        except OSError as error:
            raise DamagedImage(f"{path} can't be read ({error.strerror}).") from error
        decode(self[index].image, name=path)

    def _path(self, index: int) -> str:
        return os.path.join(self._folder, os.fsdecode(self._files[index]))


@functools.lru_cache(maxsize=8)
def _list(root: Path, leaf: bool) -> dict[str, tuple[Path, dict[str, list[str]]]]:
    """The folder of each split, and the images of each class as paths relative to it."""
    splits, found, listings = find_splits(root), {}, []
    for split, folder in splits.items():
        listing = list_images(folder, leaf)
        if not found and len(listing.images) == 1:
            raise single_class(folder, next(iter(listing.images)), root, leaf)
        found[split] = folder, listing.images
        listings.append(listing)
    for name in subfolders(root):
        # Such as a test split without labels.
        if canonical_split(name) and root / name not in (root, *splits.values()):
            files = count_files(root / name)
            images = sum(count for suffix, count in files.items() if is_image(suffix))
            listings.append(Listing(stray=images))
    report(root, listings)
    return found


def _spread(files: Mapping[str, list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """All paths, and int32 labels, in the order described in `ImageFolder`."""
    paths, labels, places = [], [], []
    for label, name in enumerate(sorted(files)):
        ordered = sorted(files[name], key=lambda path: (path_hash(path), path))
        paths += [os.fsencode(path) for path in ordered]
        labels += [label] * len(ordered)
        places += [(i + 0.5) / len(ordered) for i in range(len(ordered))]
    order = np.argsort(places, kind="stable")
    return np.array(paths)[order], np.array(labels, np.int32)[order]


def path_hash(path: str) -> bytes:
    """The order of files within a class: scattered, and the same on every machine."""
    # Normalised, so that a copy made by macOS has the same order.
    return hashlib.blake2b(os.fsencode(normal_form(path)), digest_size=8).digest()


def _other_classes(folder: Path, train: Path, has: set[str], wanted: tuple[str, ...]) -> UserError:
    extra, missing = sorted(has.difference(wanted)), sorted(set(wanted) - has)
    what = f"a class {extra[0]!r} that {train} lacks" if extra else f"no class {missing[0]!r}"
    return UserError(
        f"{folder} has {what}; every split needs the same class folders ({len(wanted)} in {train})."
    )
