"""The layout of a folder of images: its splits, and a likely mistake in its path."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from xkd_jax.data.source import canonical_split
from xkd_jax.errors import UserError

# What an image file may be called; the decoder goes by its contents.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif"),
)
# Created by macOS, Windows and network storage, and invisible there.
_HIDDEN = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")
_DEPTH = 3  # levels below a path at which its data set is looked for


def hidden(name: str) -> bool:
    """Whether a file or folder is one that users don't see."""
    return name.startswith(".") or name.lower() in _HIDDEN


def is_image(name: str) -> bool:
    """Whether a file name has a suffix of an image that can be decoded."""
    return name.lower().endswith(SUFFIXES)


def subfolders(folder: Path) -> list[str]:
    """The sorted names of the visible folders in a folder; none if it is not a folder."""
    if not folder.is_dir():
        return []
    return sorted(x.name for x in scan_folder(folder) if x.is_dir() and not hidden(x.name))


def scan_folder(folder: str | Path) -> list[os.DirEntry]:
    """The entries of a folder.

    Raises:
      UserError: it can't be read.
    """
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"{folder} can't be read ({error.strerror}); change its permissions or delete it."
        ) from error


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of a data set's splits by canonical name: train, val, test.

    A folder such as "Training" is a split if it has subfolders. If none is, the root itself is the
    split "train".

    Raises:
      UserError: two folders are the same split, or the root is probably not the one that was meant.
    """
    found: dict[str, Path] = {}
    for name in subfolders(root):
        split = canonical_split(name)
        if split is None or not subfolders(root / name):
            continue
        if split in found:
            raise UserError(
                f"{root} has two folders for the split {split!r}, {found[split].name} and {name}; "
                f"rename or delete one."
            )
        found[split] = root / name
    if found:
        return {split: found[split] for split in ("train", "val", "test") if split in found}
    _check_root(root)
    return {"train": root}


def single_class(folder: Path, name: str, root: Path, leaf: bool) -> UserError:
    """The error for a split with a single class.

    Args:
      folder: of the split.
      name: of the class.
      root: of the data set.
      leaf: as for `ImageFolder`.
    """
    hint = f"{folder} should have one folder for each class"
    above = Path(os.path.abspath(folder)).parent
    if folder == root and canonical_split(above.name):
        hint = f"if {folder.name} is a class, use {above.parent}"
    elif not leaf and len(subfolders(folder / name)) > 1 and not _has_images(folder / name):
        hint = f"if the classes are the folders in {folder / name}, "
        hint += f"use {folder / name}" if folder == root else f"move them to {folder}"
    return UserError(
        f"{folder} has a single class, {name!r}, and a classifier needs at least two; {hint}."
    )


def no_classes(folder: Path) -> UserError:
    """The error for a split without class folders."""
    hint = f"put images in {folder}/CLASS/*.jpg, or use images:{folder} if they have no labels"
    above = Path(os.path.abspath(folder)).parent
    if canonical_split(above.name) and _has_images(folder):
        hint = f"use {above.parent}"
    return UserError(f"{folder} has no class folders; {hint}.")


def _check_root(root: Path) -> None:
    """Refuses a root without splits that is probably not the one that was meant.

    Raises:
      UserError: with the path or the layout that is right.
    """
    names = subfolders(root)
    if not names:
        return
    here = Path(os.path.abspath(root))
    if canonical_split(here.name):
        raise UserError(f"{root} is one split of a data set, not the data set; use {here.parent}.")
    if all(canonical_split(name) for name in names):
        raise UserError(
            f"{root / names[0]} is a split, but has no class folders; put its images in "
            f"{root / names[0]}/CLASS/*.jpg."
        )
    empty = {name: subfolders(root / name) for name in names if not _has_images(root / name)}
    _check_deeper(root, empty)
    splits = {split: name for name in empty for split in _mentioned(name)}
    if "train" in splits and len(splits) > 1:
        wrong = " and ".join(dict.fromkeys(splits.values()))
        raise UserError(
            f"{root} has the folders {wrong}, which are probably splits and not classes; rename "
            f"them to train, val or test."
        )


def _check_deeper(root: Path, empty: Mapping[str, Iterable[str]]) -> None:
    """Refuses a root whose folders without images, `empty`, contain splits instead of images."""
    split = {
        name: sorted(inside, key=lambda x: canonical_split(x) != "train")
        for name, inside in empty.items()
        if inside and all(canonical_split(x) for x in inside)
    }
    if len(split) > 1:
        name, inside = next(iter(split.items()))
        raise UserError(
            f"{root} has folders that are divided into splits themselves, such as {name}/"
            f"{inside[0]}; use one of them if each is a data set, or the layout "
            f"{root}/{inside[0]}/{name}/*.jpg if each is a class."
        )
    level = [root / name for name in empty]
    for _ in range(_DEPTH):
        for folder in level:
            splits = [x for x in subfolders(folder) if canonical_split(x)]
            nested = [x for x in splits if subfolders(folder / x)]
            if nested:
                named = min(nested, key=lambda x: canonical_split(x) != "train")
                raise UserError(
                    f"{root} is not the folder of a data set: {folder.relative_to(root)} has a "
                    f"folder {named}; use {folder}."
                )
        level = [
            path
            for folder in level
            for path in (folder / name for name in subfolders(folder))
            if not _has_images(path)
        ]


def _has_images(folder: Path) -> bool:
    """Whether the folder itself, without its subfolders, holds an image."""
    with os.scandir(folder) as entries:
        return any(is_image(x.name) and not hidden(x.name) and not x.is_dir() for x in entries)


def _mentioned(name: str) -> set[str]:
    """The splits that the words of a name stand for: "train" of "seg_train"."""
    return {split for word in re.split(r"[\W_]+", name) if (split := canonical_split(word))}
