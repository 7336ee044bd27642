"""Logs a run to the terminal, metrics.jsonl and TensorBoard."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from xkd_jax.distributed import processes
from xkd_jax.reporting.files import CONFIG, METRICS, read_metrics
from xkd_jax.reporting.scores import MAIN, main_score

# The bar's values, the most important ones first, and the columns that each leaves at least to the
# bar itself: a narrow terminal has no room for the last ones.
_BAR_VALUES = {
    "loss": 1,
    "eval top-1": 1,
    "eval mask AP": 1,
    "eval AP": 1,
    "accuracy": 3,
    "images/s": 3,
}
_LONGEST_NAME = 12  # characters of a run's name in the bar


class RunLog:
    """Writes metrics to `metrics.jsonl` and TensorBoard, from the first process only.

    Args:
      folder: the run's folder.
      step: step to resume from; lines of later steps, left by a run that was killed after its last
        checkpoint, are dropped, because they will be written again.
    """

    def __init__(self, folder: Path, step: int):
        writes = processes.is_first()
        path, part = folder / METRICS, folder / f"{METRICS}.part"
        if writes:
            kept = [line for line in read_metrics(folder) if line["step"] <= step]
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(path)
        self._file = (path if writes else Path(os.devnull)).open("a")
        board = str(folder / "tensorboard")
        # With a bounded queue, a full disk would stop TensorBoard's writer and block training.
        self._board = _summary_writer()(
            board, purge_step=step + 1, max_queue=0, write_to_disk=writes
        )
        config = folder / CONFIG
        if step == 0 and config.exists():
            self._board.add_text("config", f"```\n{config.read_text()}\n```", 0)

    def write(self, step: int, metrics: dict[str, float], prefix: str = "") -> None:
        """Writes a line, and a point of every TensorBoard curve.

        Args:
          step: the step.
          metrics: by name.
          prefix: of the names in metrics.jsonl, such as "eval_"; TensorBoard shows the metrics in
            the group "eval", and those without a prefix in "train".
        """
        line = {"step": step} | {f"{prefix}{name}": value for name, value in metrics.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        group = prefix.rstrip("_") or "train"
        for name, value in metrics.items():
            self._board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        self._board.close()


def log_images(folder: Path, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Adds images to the TensorBoard of a run, in the group "pictures".

    Args:
      folder: the run's folder.
      step: the step that they belong to.
      images: by name, uint8 [H, W, 3].
    """
    board = _summary_writer()(str(folder / "tensorboard"), max_queue=0)
    for name, image in images.items():
        board.add_image(f"pictures/{name}", image, step, dataformats="HWC")
    board.close()


def _summary_writer() -> Any:
    """tensorboardX's writer, without PyTorch: it imports that where it is installed, for 6 s."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]: `import torch` fails
    try:
        from tensorboardX import SummaryWriter
    finally:
        if absent:
            del sys.modules["torch"]
    return SummaryWriter


class Averages:
    """Means of the training metrics since the last report."""

    def __init__(self):
        self._values: dict[str, list[float]] = {}

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds one step's metrics, which are scalars."""
        for name, value in metrics.items():
            # The adversary's metrics are NaN in steps that don't update it.
            if not math.isnan(value):
                self._values.setdefault(name, []).append(float(value))

    def take(self) -> dict[str, float]:
        """Returns the means and resets them."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values = {}
        return means


class Progress:
    """A progress bar in a terminal; occasional lines in a pipe or file.

    Args:
      name: the run's name.
      start: step to resume from.
      total: the last step.
      batch_size: images per step.
      shown: whether anything is shown.
    """

    def __init__(self, name: str, start: int, total: int, batch_size: int, shown: bool = True):
        self._is_shown = shown
        self._name, self._total, self._batch_size = name, total, batch_size
        # Speed is measured from the end of the first dispatch, which includes compilation.
        self._first = 0  # unknown yet
        self._begun = 0.0
        self._shown: dict[str, str] = {}
        short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 2]}.."
        self._bar = tqdm.tqdm(
            total=total,
            initial=start,
            desc=short,
            unit="step",
            disable=not (shown and sys.stderr.isatty() and processes.is_first()),
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}",
        )

    def update(self, step: int) -> None:
        """Records that `step` has finished, at the same time as the steps since the last call."""
        if not self._first:
            self._first, self._begun = step, time.monotonic()
            self._bar.unpause()  # or the time left would include compilation at every step
        self._bar.update(step - self._bar.n)

    def pause(self, seconds: float) -> None:
        """Excludes time that wasn't spent on training from the speed."""
        self._begun += seconds
        self._bar.unpause()

    def images_per_second(self, step: int) -> float:
        """Training speed since the first dispatch; 0 before the second one."""
        if not 0 < self._first < step:
            return 0.0
        return (step - self._first) * self._batch_size / (time.monotonic() - self._begun)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Shows the step, the speed, the time left and `values`."""
        shown = {
            name: f"{value:.3f}" if name == "loss" else f"{100 * value:.1f}%"
            for name, value in values.items()
        }
        speed = self.images_per_second(step)
        if not self._bar.disable:
            self._shown |= shown | {"images/s": f"{speed:.0f} images/s"}
            self._bar.set_postfix_str(self._fitting())
            return
        if not self._is_shown:
            return
        left = f"{(self._total - step) * self._batch_size / speed:.0f}" if speed else "?"
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        say(f"{self._name}: step {step}/{self._total}  {speed:.0f} images/s  {left} s left  {text}")

    def _fitting(self) -> str:
        """The latest values, as many as fit into the terminal's width."""
        columns = self._bar.format_dict["ncols"] or 80
        fixed = f"{self._bar.desc}100%|| {self._total}/{self._total} 1:23:45 left"
        text = ""
        for name, bar in _BAR_VALUES.items():
            if name not in self._shown:
                continue
            value = self._shown[name]
            longer = f"{text}, {value}" if name == "images/s" else f"{text}, {name} {value}"
            if len(fixed) + bar + len(longer) > columns:
                break
            text = longer
        return text.removeprefix(", ")

    def close(self) -> None:
        """Ends the bar's line."""
        self._bar.close()


class Reporter:
    """Reports a run's metrics and scores to the log and the progress bar.

    Args:
      folder: the run's folder, whose name is shown.
      start: step to resume from.
      total: the last step.
      batch_size: images per step.
      every: number of steps between two lines.
      check: called with each step's metrics, on the host, before they are reported.
      column: the run's place in metrics that several runs share, which have an axis of runs; None
        for a run's own. Only the first of them shows its progress.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        total: int,
        batch_size: int,
        every: int,
        check: Callable[[int, dict[str, Any]], None],
        column: int | None = None,
    ):
        self._check, self._column = check, column
        self._log = RunLog(folder, start)
        self._progress = Progress(folder.name, start, total, batch_size, shown=not column)
        self._averages = Averages()
        self._total, self._every = total, every
        self._pending: tuple[range, Any] | None = None
        self._evaluated: dict[str, float] = {}

    def take(self, steps: range, metrics: Any) -> None:
        """Keeps the metrics of the `steps` of a dispatch, on the device, until the next `flush`.

        They are those of one step, or have an axis of steps, which can be longer than `steps`.
        """
        self._pending = steps, metrics

    def flush(self) -> None:
        """Fetches the metrics kept by `take`, if any, and reports them every `every` steps."""
        if self._pending is None:
            return
        steps, metrics = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)
        several = np.ndim(metrics["loss"]) > (self._column is not None)
        self._progress.update(steps[-1])
        for i, step in enumerate(steps):
            one = {name: value[i] for name, value in metrics.items()} if several else metrics
            if self._column is not None:
                one = {name: value[self._column] for name, value in one.items()}
            self._report(step, one)

    def _report(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        self._check(step, metrics)
        self._averages.add({name: value for name, value in metrics.items() if value.ndim == 0})
        if step % self._every == 0 or step == self._total:
            means = self._averages.take()
            speed = self._progress.images_per_second(step)
            self._log.write(step, means | {"images_per_second": speed})
            shown = {name: means[name] for name in ("loss", "accuracy") if name in means}
            self._progress.show(step, shown | self._evaluated)

    def pause(self, seconds: float) -> None:
        """Excludes time that wasn't spent on training from the speed."""
        self._progress.pause(seconds)

    def evaluated(self, step: int, scores: dict[str, float], seconds: float) -> None:
        """Writes an evaluation's scores and shows the main one, now and in the following lines."""
        self._progress.pause(seconds)
        if not scores:
            return
        self._log.write(step, scores, prefix="eval_")
        name = main_score(scores)
        shown = MAIN[name] if name == "probe_top1" else f"eval {MAIN[name]}"
        self._evaluated = {shown: scores[name]}
        self._progress.show(step, self._evaluated)

    def close(self) -> None:
        """Closes the progress bar and the log."""
        self._progress.close()
        self._log.close()


def say(text: str) -> None:
    """Prints a line to standard error without breaking a progress bar."""
    if processes.is_first():
        tqdm.tqdm.write(text, file=sys.stderr)
