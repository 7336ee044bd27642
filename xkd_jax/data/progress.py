"""How far a long task has come: a bar in a terminal, occasional lines in a pipe or file."""

import sys
import time

import tqdm

_DELAY = 2.0  # seconds before anything is shown
_EVERY = 10.0  # seconds between lines in a pipe or file


class Progress:
    """Shows the progress of a task on standard error; a context manager.

    A terminal gets a tqdm bar. A pipe or file gets a line every 10 s and one at the end. A task
    that takes less than 2 s shows nothing.

    Args:
      what: the task, such as "decoding".
      total: the number of items; None if unknown.
      unit: of the items, such as "images"; "B" for bytes.
    """

    def __init__(self, what: str, total: int | None, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._lines = not sys.stderr.isatty()
        self._begun = time.monotonic()
        self._next = self._begun + _EVERY
        self._bar = tqdm.tqdm(
            total=total,
            desc=what,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            delay=_DELAY,
            leave=False,
            disable=self._lines,
        )

    def __enter__(self) -> "Progress":
        return self

    def update(self, count: int) -> None:
        """Adds `count` finished items."""
        self._done += count
        self._bar.update(count)
        is_last = self._done == self._total  # `__exit__` reports it
        if self._lines and not is_last and time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY
            self._write()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if self._lines and error is None and time.monotonic() >= self._begun + _DELAY:
            self._write()

    def _write(self) -> None:
        of = "" if self._total is None else f"/{self._format(self._total)}"
        seconds = time.monotonic() - self._begun
        text = f"{self._what}: {self._format(self._done)}{of} {self._unit} in {seconds:.0f} s"
        print(text, file=sys.stderr, flush=True)

    def _format(self, count: int) -> str:
        return tqdm.tqdm.format_sizeof(count) if self._unit == "B" else f"{count:,}"
