"""A table of results: its cells, how each is tuned, and over how many seeds it is measured.

A recipe for `python -m xkd_jax.sweep` has, besides `get_config(variant)`, a `get_table(variant)`
that returns a `Table`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

Fields = Mapping[str, Any]  # a config's fields by name, such as {"method.name": "logits"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One result: the recipe with other values of some fields.

    Attributes:
      fields: the values, for all runs of the cell.
      stages: what is chosen on the evaluation split, one stage after the other: the alternatives of
        a stage are tried with the fields that the stages before it have chosen.
      paper: the published top-1 in percent, if there is one.
      baseline: the cell that this one is compared with, seed by seed; None for the table's.
    """

    fields: Fields
    stages: tuple[tuple[Fields, ...], ...] = ()
    paper: float | None = None
    baseline: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells that are trained with the same budget.

    Attributes:
      cells: by name, which is also the name of the cell's folder.
      baseline: the cell that the others are compared with, seed by seed, unless they name another.
      seeds: of the runs that are measured on the test split.
      tuning_seeds: of the runs that are measured on the evaluation split, to choose among
        alternatives.
      flat: a cell's only run is in the cell's own folder, as in a comparison of methods; otherwise
        there is a folder for each seed in it.
      together: whether the seeds of a cell are trained side by side, see seeds.py.
    """

    cells: Mapping[str, Cell]
    baseline: str
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (0,)
    flat: bool = False
    together: bool = False

    def baseline_of(self, name: str) -> str:
        """The cell that the cell `name` is compared with; its own name if it is a baseline."""
        return self.cells[name].baseline or self.baseline

    def folder(self, name: str, seed: int) -> str:
        """The folder of a measured run, below the table's."""
        return name if self.flat else f"{name}/seed{seed}"

    def count(self, cell: Cell) -> int:
        """The number of runs of a cell, at most."""
        return len(self.tuning_seeds) * sum(map(len, cell.stages)) + len(self.seeds)


def grid(**axes: tuple[Any, ...]) -> tuple[Fields, ...]:
    """All combinations of values; `__` in a name stands for a dot: `optimizer__learning_rate`."""
    names = [name.replace("__", ".") for name in axes]
    return tuple(
        dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())
    )


def scaled(factors: tuple[float, ...], **weights: float) -> tuple[Fields, ...]:
    """Alternatives in which all `weights` are multiplied by the same factor; names as in `grid`."""
    return tuple(
        {name.replace("__", "."): factor * weight for name, weight in weights.items()}
        for factor in factors
    )


def label(fields: Fields) -> str:
    """A folder's name for some fields: their last parts and values."""

    def parts() -> Iterator[str]:
        for name, value in fields.items():
            text = f"{value:g}" if isinstance(value, float) else str(value)
            yield f"{name.rpartition('.')[2]}={text}".replace("/", "_")

    return ",".join(parts())
