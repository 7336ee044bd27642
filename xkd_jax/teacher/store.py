"""The files of a cache: one float16 array per output and view, and their description."""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xkd_jax.errors import UserError
from xkd_jax.teacher.plan import Plan, row_bytes
from xkd_jax.weights import npy_header, write_file

RECIPE = "recipe.json"
_RECORD = "progress.json"
_LOCK = ".lock"
_POLL = 2.0  # seconds between two looks at a lock
_SYNC = 10.0  # seconds between two records of how far the files are written


class Store:
    """A folder with the outputs of one teacher for the views of one data set.

    NAME.v00.npy holds the output NAME for view 0, [n, ...]; NAME.npy one that is the same for all
    images. A file under its own name is complete; an unfinished one ends in `.part`, and
    progress.json tells how many of its rows have reached the disk.
    """

    def __init__(self, folder: Path, count: int):
        """Reads nothing yet.

        Args:
          folder: the folder.
          count: the number of images, n.
        """
        self.folder, self.count = folder, count

    def path(self, name: str, view: int | None = None) -> Path:
        """The file of an output; `view` None is a constant."""
        return self.folder / (f"{name}.npy" if view is None else f"{name}.v{view:02d}.npy")

    def missing(self, plan: Plan, views: int) -> dict[int, list[str]]:
        """The outputs that aren't complete, by view."""
        names = {v: [n for n in plan.rows if not self.path(n, v).exists()] for v in range(views)}
        return {view: absent for view, absent in names.items() if absent}

    def missing_constants(self, plan: Plan) -> list[str]:
        """The outputs of `plan.constants` that aren't stored."""
        return [name for name in plan.constants if not self.path(name).exists()]

    def bytes_to_write(self, plan: Plan, views: int) -> int:
        """Bytes that the missing outputs will add to the disk."""
        total = 0
        for view, names in self.missing(plan, views).items():
            for name in names:
                part = _part(self.path(name, view))
                present = part.stat().st_size if part.exists() else 0
                total += max(0, self.count * row_bytes(plan.rows[name]) - present)
        return total

    def create(self, recipe: dict[str, Any]) -> None:
        """Creates the folder, or checks that it was created with the same `recipe`.

        Raises:
          UserError: the folder holds another cache, or can't be written.
        """
        path = self.folder / RECIPE
        if path.exists():
            try:
                same = json.loads(path.read_text()) == json.loads(json.dumps(recipe))
            except ValueError:
                same = False
            if not same:
                raise UserError(
                    f"{path} doesn't describe the cache that its folder is named for; delete the "
                    "folder."
                )
            return
        try:
            write_file(path, (json.dumps(recipe, indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(
                f"teacher.cache: {self.folder} can't be written ({error.strerror}); choose another "
                "folder."
            ) from error

    @contextlib.contextmanager
    def lock(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Inside, no other process writes; the lock ends with the process that holds it.

        Args:
          waiting: called once if another process has to finish first.
        """
        with (self.folder / _LOCK).open("w") as file:
            begun = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not begun:
                        waiting()
                    begun = True
                    time.sleep(_POLL)
                except OSError:  # a file system without locks: both write the same
                    break
            yield

    def write_constant(self, name: str, array: np.ndarray) -> None:
        """Stores an output that is the same for all images."""
        part = _part(self.path(name))
        with part.open("wb") as file:
            np.save(file, array)
        part.replace(self.path(name))

    def constants(self, plan: Plan) -> dict[str, np.ndarray]:
        """The outputs of `plan.constants`."""
        return {name: self._open(self.path(name), None) for name in plan.constants}

    def arrays(self, plan: Plan, views: int) -> dict[str, list[np.ndarray]]:
        """Memory maps [n, ...] for every view, by output.

        Raises:
          UserError: a file is damaged.
        """
        return {
            name: [self._open(self.path(name, view), row) for view in range(views)]
            for name, row in plan.rows.items()
        }

    def _open(self, path: Path, row: Any) -> np.ndarray:
        try:
            array = np.load(path, mmap_mode=None if row is None else "r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it.") from error
        if row is not None and (array.shape, array.dtype) != ((self.count, *row.shape), row.dtype):
            raise UserError(
                f"{path} is damaged (it holds {array.dtype} {list(array.shape)}); delete it."
            )
        return array

    def record(self) -> dict[str, int]:
        """The number of rows that have reached the disk, by unfinished file."""
        try:
            return json.loads((self.folder / _RECORD).read_text())
        except (OSError, ValueError):
            return {}

    def write_record(self, rows: dict[str, int]) -> None:
        """Updates `record`; 0 removes a file from it."""
        record = {name: count for name, count in (self.record() | rows).items() if count}
        if record:
            write_file(self.folder / _RECORD, (json.dumps(record, indent=2) + "\n").encode())
        else:
            (self.folder / _RECORD).unlink(missing_ok=True)


class ViewWriter:
    """Writes some outputs for one view, from the row where an earlier call stopped.

    Attributes:
      done: the number of rows that are written.
    """

    def __init__(self, store: Store, plan: Plan, names: list[str], view: int):
        """Opens the files.

        Args:
          store: the cache.
          plan: with the rows of the outputs.
          names: the outputs to write.
          view: the view.
        """
        self._store, self._paths = store, {name: store.path(name, view) for name in names}
        self._rows = {name: plan.rows[name] for name in names}
        record = store.record()
        heads = {
            name: npy_header(row.dtype, (store.count, *row.shape))
            for name, row in self._rows.items()
        }
        self.done = min(
            _intact(path, len(heads[name]), row_bytes(self._rows[name]), record.get(path.name, 0))
            for name, path in self._paths.items()
        )
        self._files: dict[str, BinaryIO] = {}
        for name, path in self._paths.items():
            file = _part(path).open("r+b" if self.done else "wb")
            self._files[name] = file
            if self.done:
                end = len(heads[name]) + self.done * row_bytes(self._rows[name])
                file.truncate(end)
                file.seek(end)
            else:
                file.write(heads[name])
        self._synced = time.monotonic()

    def write(self, arrays: dict[str, np.ndarray]) -> None:
        """Appends rows [k, ...] by output.

        Raises:
          OSError: for example because the disk is full; rows that were recorded stay valid.
        """
        for name, array in arrays.items():
            self._files[name].write(np.ascontiguousarray(array, self._rows[name].dtype).data)
        self.done += len(next(iter(arrays.values())))
        if time.monotonic() > self._synced + _SYNC:
            self.sync()

    def sync(self) -> None:
        """Makes the rows so far survive a crash."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._store.write_record({path.name: self.done for path in self._paths.values()})
        self._synced = time.monotonic()

    def finish(self) -> None:
        """Gives the complete files their names."""
        self.sync()
        for path in self._paths.values():
            _part(path).replace(path)
        self._store.write_record({path.name: 0 for path in self._paths.values()})

    def close(self) -> None:
        """Closes the files; unfinished ones are resumed from the last `sync`."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk, which `write` reports
                file.close()


def is_full(error: OSError) -> bool:
    """Whether a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _intact(path: Path, header: int, row: int, recorded: int) -> int:
    """How many of the recorded rows an unfinished file holds."""
    part = _part(path)
    if not part.exists() or part.stat().st_size < header + recorded * row:
        return 0
    return recorded
