"""A run folder has one owner: the process (or, of several, process 0) that trains in it."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xkd_jax.errors import UserError

NAME = ".lock"
HEARTBEAT = 15.0  # seconds between two touches of the lock
SILENCE = 8 * HEARTBEAT  # after which a lock of another machine counts as stale


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Inside, no other process trains in `folder`.

    The lock is a file with its owner's host and process. It is stale, and replaced, if that process
    has ended; on another machine, where this can't be seen, if its owner hasn't touched it for
    `SILENCE` seconds.

    Raises:
      UserError: another process trains in `folder`.
    """
    path = folder / NAME
    _take(path)
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a disk that is away for a moment
                os.utime(path)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def check(folder: Path) -> None:
    """Refuses a folder in which another process trains.

    Raises:
      UserError: with the other one's host and process number.
    """
    path = folder / NAME
    owner = _read(path)
    if owner is not None and not _is_stale(path, owner):
        raise UserError(
            f"{folder} is in use by process {owner.get('pid')} on {owner.get('host')}; wait until "
            "it has finished, or choose another --workdir."
        )


def _take(path: Path) -> None:
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    while True:
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            file.write(json.dumps(mine))
            return
        check(path.parent)
        _remove_stale(path)


def _remove_stale(path: Path) -> None:
    """Removes a stale lock, but not one that another process has put in its place meanwhile."""
    aside = path.with_name(f"{NAME}.stale.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        owner = _read(aside)
        if owner is not None and not _is_stale(aside, owner):
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    """The owner; None if there is no lock, {} if it is damaged or about to be written."""
    try:
        owner = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_stale(path: Path, owner: dict[str, Any]) -> bool:
    if owner.get("host") == socket.gethostname() and isinstance(owner.get("pid"), int):
        return not _is_alive(owner["pid"]) or _started(owner["pid"]) != owner.get("started")
    try:
        return time.time() - path.stat().st_mtime > SILENCE
    except FileNotFoundError:
        return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _started(pid: int) -> str:
    """When process `pid` started, where Linux tells: numbers of processes are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
