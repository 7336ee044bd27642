"""Folders of images: PATH/train/CLASS/*.jpg, as in torchvision and timm."""

import functools
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD
from xkd_jax.data.decode import DamagedImage, decode
from xkd_jax.data.examples import in_threads
from xkd_jax.data.source import Example
from xkd_jax.errors import UserError

SPLITS = ("train", "val", "validation", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_TAIL = 64  # bytes at the end of a file that contain its end marker


class ImageFolder:
    """A folder PATH/SPLIT/CLASS/..., or PATH/CLASS/..., which is a single split, "train".

    The order of a split spreads every class evenly, so that a slice such as train[:90%] is
    stratified; within a class, files are ordered by a hash of their path.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, root: Path, leaf: bool = False):
        """Lists the files without opening any.

        Args:
          root: the folder.
          leaf: whether the class is the name of the innermost folder (CelebA-Spoof:
            train/SUBJECT/live/*.jpg) instead of the split's subfolder.

        Raises:
          UserError: there is no such folder, no class, a class without images, or a split whose
            classes differ from those of the first split.
        """
        if not root.is_dir():
            raise UserError(f"there is no folder {root}; it should hold train/CLASS/*.jpg.")
        folders = {name: root / name for name in SPLITS if _subfolders(root / name)}
        folders = folders or {"train": root}
        found = {name: _list(folder, leaf) for name, folder in folders.items()}
        first = next(iter(found))
        self.class_names = tuple(sorted(found[first]))
        self._splits = {}
        for name, files in found.items():
            if set(files) != set(self.class_names):
                raise _other_classes(folders[name], folders[first], set(files), self.class_names)
            self._splits[name] = folders[name], *_spread(files)

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
        """Files that are empty, truncated or not images, judged by their first and last bytes.

        A file of another format is decoded; damage in the middle of a file is found only later.
        """
        found = enumerate(in_threads(self._check, len(self), "checking files"))
        return {i: str(error) for i, error in found if error}

    def _check(self, index: int) -> None:
        path = self._path(index)
        try:
            with open(path, "rb") as file:
                head = file.read(16)
                size = file.seek(0, io.SEEK_END)
                file.seek(max(0, size - _TAIL))
                if _looks_whole(head, file.read(), size):
                    return
        except OSError as error:
            raise DamagedImage(f"{path} can't be read ({error.strerror}).") from error
        decode(self[index].image, name=path)

    def _path(self, index: int) -> str:
        return os.path.join(self._folder, os.fsdecode(self._files[index]))


def _looks_whole(head: bytes, tail: bytes, size: int) -> bool:
    if head.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" in tail
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" in tail
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return size >= 8 + int.from_bytes(head[4:8], "little")
    return False


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(x.name for x in os.scandir(folder) if x.is_dir() and x.name[0] != ".")


@functools.lru_cache(maxsize=8)
def _list(folder: Path, leaf: bool) -> dict[str, list[str]]:
    """The images of each class, as paths relative to `folder`."""
    files: dict[str, list[str]] = {} if leaf else {name: [] for name in _subfolders(folder)}
    for first in _subfolders(folder):
        for path, subfolders, names in os.walk(folder / first, followlinks=True):
            subfolders[:] = [name for name in subfolders if name[0] != "."]
            inside = os.path.relpath(path, folder)
            images = [
                os.path.join(inside, name)
                for name in names
                if name.lower().endswith(EXTENSIONS) and name[0] != "."
            ]
            if images:
                files.setdefault(os.path.basename(path) if leaf else first, []).extend(images)
    if not files:
        raise UserError(f"{folder} has no class folders; put images in {folder}/CLASS/*.jpg.")
    empty = sorted(name for name, images in files.items() if not images)
    if empty:
        raise UserError(
            f"{folder / empty[0]} has no images ({', '.join(EXTENSIONS)}); add some or delete the "
            f"folder."
        )
    return files


def _spread(files: Mapping[str, list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """All paths, and int32 labels, in the order described in `ImageFolder`."""
    paths, labels, places = [], [], []
    for label, name in enumerate(sorted(files)):
        ordered = sorted(files[name], key=_hash)
        paths += [os.fsencode(path) for path in ordered]
        labels += [label] * len(ordered)
        places += [(i + 0.5) / len(ordered) for i in range(len(ordered))]
    order = np.argsort(places, kind="stable")
    return np.array(paths)[order], np.array(labels, np.int32)[order]


def _hash(path: str) -> bytes:
    return hashlib.blake2b(os.fsencode(path), digest_size=8).digest()


def _other_classes(folder: Path, train: Path, has: set[str], wanted: tuple[str, ...]) -> UserError:
    extra, missing = sorted(has.difference(wanted)), sorted(set(wanted) - has)
    what = f"a class {extra[0]!r} that {train} lacks" if extra else f"no class {missing[0]!r}"
    return UserError(
        f"{folder} has {what}; every split needs the same class folders ({len(wanted)} in {train})."
    )
