"""The files of a run folder, read back with damage named."""

import json
from pathlib import Path
from typing import Any

from xkd_jax.errors import UserError

CONFIG = "config.json"
DATA = "data.json"  # what a run was trained on, see `data.Split.identity`
METRICS = "metrics.jsonl"


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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, except for a last line that a kill has truncated.

    Raises:
      UserError: another line is damaged.
    """
    path = folder / METRICS
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    read = []
    for number, line in enumerate(lines, 1):
        try:
            read.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path} is damaged at line {number} ({error}); remove that line, or choose "
                "another folder."
            ) from error
    return read
