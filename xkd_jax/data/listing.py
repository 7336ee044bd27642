"""The image files of a split, by class, and what is left out of it."""

import collections
import dataclasses
import os
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import tqdm

from xkd_jax.data.layout import SUFFIXES, hidden, is_image, no_classes, scan_folder, subfolders
from xkd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a split's folder.

    Attributes:
      images: for each class, the paths of its images relative to the folder, with "/".
      unread: how many files have a suffix that isn't read, by suffix.
      stray: how many images are outside of class folders.
      links: how many links to folders were not followed, because they are listed elsewhere.
    """

    images: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    unread: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    stray: int = 0
    links: int = 0


def list_images(folder: Path, leaf: bool) -> Listing:
    """Lists a folder with one subfolder per class, links to folders included.

    Class names are in Unicode's composed form, NFC. A folder that was listed already, or that
    contains `folder`, is not entered again through a link.

    Args:
      folder: of a split.
      leaf: as for `ImageFolder`.

    Raises:
      UserError: there is no class, a class has no images, two class folders have equal names or
        are the same folder, or a folder can't be read.
    """
    walk = _Walk(folder, leaf)
    names = subfolders(folder)
    if not names:
        raise no_classes(folder)
    classes: dict[str, str] = {}
    if not leaf:
        for name in names:
            label = normal_form(name)
            if label in classes:
                raise UserError(
                    f"{folder} has two class folders that are both called {label!r} but are "
                    f"encoded differently (Unicode NFC and NFD); move the images of one to the "
                    f"other."
                )
            classes[label] = name
            walk.images[label] = []
    walk.walk(names)
    for label, images in walk.images.items():
        if not images:
            found = walk.unread_of[label]
            has = f" but {_count(found)}" if found else ""
            raise UserError(
                f"{folder / classes[label]} has no images ({', '.join(SUFFIXES)}){has}; add some "
                f"or delete the folder."
            )
    if not walk.images:
        raise no_classes(folder)
    return walk.listing()


def list_all_images(folder: Path) -> Listing:
    """Lists a folder and all folders below it, as images of one class, "".

    Args:
      folder: of a split.

    Raises:
      UserError: there is no image, or a folder can't be read.
    """
    walk = _Walk(folder, leaf=True)
    walk.walk(subfolders(folder))
    listing, entries = walk.listing(), scan_folder(folder)
    here = [x.name for x in entries if not x.is_dir() and not hidden(x.name) and is_image(x.name)]
    images = sum(listing.images.values(), here)
    if not images:
        has = f" but {_count(listing.unread)}" if listing.unread else ""
        raise UserError(f"{folder} has no images ({', '.join(SUFFIXES)}){has}; give another one.")
    return dataclasses.replace(listing, images={"": images}, stray=0)


def count_files(folder: Path) -> collections.Counter[str]:
    """The visible files of a folder itself, by suffix."""
    files = (x.name for x in scan_folder(folder) if not x.is_dir() and not hidden(x.name))
    return collections.Counter(map(_suffix, files))


def report(root: Path, listings: Iterable[Listing]) -> None:
    """Says on standard error, in one line, what is left out of a data set."""
    unread: collections.Counter[str] = collections.Counter()
    stray = links = 0
    for listing in listings:
        unread += listing.unread
        stray, links = stray + listing.stray, links + listing.links
    parts = [f"{_count(unread)} (not read)"] if unread else []
    if stray:
        parts.append(f"{stray} image{'s' * (stray > 1)} outside class folders")
    if links:
        what = "links to folders that are" if links > 1 else "link to a folder that is"
        parts.append(f"{links} {what} read already")
    if parts:
        tqdm.tqdm.write(f"xkd_jax: left out of {root}: {', '.join(parts)}.", file=sys.stderr)


def normal_form(text: str) -> str:
    """Unicode's composed form, NFC, to compare names by; macOS stores them decomposed."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class _Walk:
    """Walks the class folders of a split: first all real folders, then the links in them."""

    def __init__(self, folder: Path, leaf: bool):
        self.images: dict[str, list[str]] = {}
        self.unread_of: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self._folder, self._leaf, self._skipped = folder, leaf, 0
        self._seen: dict[object, str] = {}
        for path in (folder.absolute(), folder.resolve()):
            self._seen |= {_identity(above): "" for above in (path, *path.parents)}

    def walk(self, names: list[str]) -> None:
        """Lists all class folders.

        Args:
          names: of the class folders.
        """
        roots = [name for name in names if self._is_new(name, name)]
        links = [link for name in roots for link in self._enter(name, name)]
        while links:
            name, path = links.pop(0)
            if self._is_new(name, path):
                links += self._enter(name, path)

    def listing(self) -> Listing:
        """What was found."""
        unread = sum(self.unread_of.values(), collections.Counter())
        here = count_files(self._folder)
        stray = sum(count for suffix, count in here.items() if is_image(suffix))
        unread += collections.Counter({x: n for x, n in here.items() if not is_image(x)})
        return Listing(self.images, unread, stray, self._skipped)

    def _enter(self, name: str, start: str) -> list[tuple[str, str]]:
        """Lists the real folders below `start`, of the class `name`; returns the links."""
        links, stack = [], [start]
        while stack:
            inside = stack.pop()
            label = normal_form(os.path.basename(inside) if self._leaf else name)
            for entry in sorted(scan_folder(self._folder / inside), key=lambda x: x.name):
                path = f"{inside}/{entry.name}"
                if hidden(entry.name):
                    continue
                if entry.is_dir():
                    if entry.is_symlink():
                        links.append((name, path))
                    elif self._is_new(name, path):
                        stack.append(path)
                elif is_image(entry.name):
                    self.images.setdefault(label, []).append(path)
                else:
                    self.unread_of[label][_suffix(entry.name)] += 1
        return links

    def _is_new(self, name: str, path: str) -> bool:
        """Whether the folder was not listed yet, and marks it.

        Raises:
          UserError: it is the class folder `name`, and another class folder as well.
        """
        key = _identity(self._folder / path)
        if key not in self._seen:
            self._seen[key] = path
            return True
        if path == name and not self._leaf and self._seen[key]:
            raise UserError(
                f"{self._folder} has the classes {self._seen[key]!r} and {name!r}, which are one "
                f"folder (by a link); delete one."
            )
        self._skipped += 1
        return False


def _identity(folder: Path) -> object:
    """The device and inode of a folder."""
    try:
        found = os.stat(folder)
    except OSError:
        return str(folder)
    # Some file systems have no inodes.
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(folder)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def _count(files: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in files.most_common())
