"""What training cost: speed, time, parameters and FLOPs, as a table."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xkd_jax.reporting.document import Lines, drop_empty


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run cost; a field is None where the run's files don't have it.

    Attributes:
      speed: images/s, as last logged.
      hours: the time of all steps at that speed.
      parameters: of the student.
      extra: parameters that only training needs.
      flops: multiply-adds of the student's forward pass over one image.
      devices: their number and kind.
    """

    speed: float | None = None
    hours: float | None = None
    parameters: int | None = None
    extra: int | None = None
    flops: int | None = None
    devices: str | None = None


def read_cost(
    summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], batch_size: int | None
) -> Cost:
    """The cost of a finished run.

    Args:
      summary: the contents of its summary.json.
      lines: the lines of its metrics.jsonl.
      batch_size: images per step, if known.
    """
    speeds = [line["images_per_second"] for line in lines if line.get("images_per_second")]
    speed, steps, hours = speeds[-1] if speeds else None, summary.get("steps"), None
    if speed and steps and batch_size:
        hours = steps * batch_size / speed / 3600
    student = summary["student"]
    return Cost(
        speed,
        hours,
        student.get("parameters"),
        summary.get("extra_parameters"),
        student.get("flops"),
        summary.get("devices"),
    )


def list_costs(costs: Mapping[str, Sequence[Cost]], fields: Sequence[str]) -> list[list[str]]:
    """A table of costs, the header first; columns that no run has are left out.

    Args:
      costs: the costs of runs by row; a row shows their mean.
      fields: the columns, which are fields of `Cost`.
    """
    lines = [["", *(_COLUMNS[field][0] for field in fields)]]
    for name, runs in costs.items():
        means = ((mean_cost(runs, field), _COLUMNS[field][1]) for field in fields)
        lines.append([name, *("" if mean is None else form(mean) for mean, form in means)])
    return drop_empty(lines)


def explain(lines: Lines) -> list[str]:
    """What the columns of `list_costs` mean."""
    notes = {
        "images/s": "images/s: training speed, without compilation and evaluation.",
        "hours": "hours: the time of all training steps at that speed.",
        "extra parameters": "extra parameters: the method's, such as projectors; only training "
        "needs them.",
    }
    return [note for title, note in notes.items() if title in lines[0]]


def mean_cost(costs: Sequence[Cost], field: str) -> Any:
    """The mean of a field over the runs that have it, or all names; None if no run has it."""
    values = [getattr(cost, field) for cost in costs if getattr(cost, field) is not None]
    if not values:
        return None
    return ", ".join(dict.fromkeys(values)) if field == "devices" else statistics.mean(values)


def format_hours(hours: float) -> str:
    """Hours with two or more significant digits."""
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def format_mflops(flops: float) -> str:
    """FLOPs in millions."""
    mflops = flops / 1e6
    return f"{mflops:,.{1 if mflops < 1000 else 0}f}"


def _count(number: float) -> str:
    return f"{number:,.0f}"


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "speed": ("images/s", _count),
    "hours": ("hours", format_hours),
    "parameters": ("parameters", _count),
    "extra": ("extra parameters", _count),
    "flops": ("MFLOPs", format_mflops),
    "devices": ("devices", str),
}
