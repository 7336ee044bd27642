"""The files of a run folder, read back with damage named."""

import json
import os
from pathlib import Path
from typing import Any

from xkd_jax.errors import UserError

CONFIG = "config.json"
DATA = "data.json"  # what a run was trained on, see `data.Split.identity`
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"  # written last: a run with a summary is complete
STUDENT = "student.safetensors"
TEACHER = "teacher.safetensors"  # of a probe
BEST = "best.safetensors"
CARD = "model_card.md"


def write_file(path: Path, contents: bytes) -> None:
    """Writes a file atomically, by renaming a temporary one; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
      UserError: it is damaged, for example empty after a power failure.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it, or choose another folder."
        ) from error


def read_summary(folder: Path) -> dict[str, Any]:
    """The contents of a finished run's summary.json.

    Raises:
      UserError: it is damaged, or another version of xkd_jax wrote it.
    """
    summary = read_json(folder / SUMMARY)
    if not (isinstance(summary, dict) and isinstance(summary.get("student"), dict)):
        raise UserError(
            f"{folder / SUMMARY} has no 'student', so another version of xkd_jax wrote it; "
            "make the report with that version."
        )
    return summary


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, except for a last line that a kill has truncated.

    Raises:
      UserError: another line is damaged.
    """
    path = folder / METRICS
    read = []
    for number, line in enumerate(_lines(path), 1):
        try:
            read.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path} is damaged at line {number} ({error}); remove that line, or choose "
                "another folder."
            ) from error
    return read


def read_sound_metrics(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """As `read_metrics`, for a report: the sound lines, and the number of damaged ones."""
    read, damaged = [], 0
    for text in _lines(folder / METRICS):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            read.append(line)
        else:
            damaged += 1
    return read, damaged


def _lines(path: Path) -> list[str]:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    return lines
