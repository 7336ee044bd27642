"""The training loop, for teachers, baselines and every method, at every scale.

The step itself is in `xkd_jax/distiller.py`.
"""

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from xkd_jax import dispatch
from xkd_jax.analysis import memory
from xkd_jax.analysis.flops import count_flops
from xkd_jax.checkpoint import Checkpoints, place
from xkd_jax.data.loader import DeviceLoader, resident_shapes
from xkd_jax.distiller import train_step
from xkd_jax.distributed import sharding
from xkd_jax.distributed.processes import StopSignal
from xkd_jax.experiment import Experiment
from xkd_jax.probing.monitor import create_evaluator
from xkd_jax.reporting import nan_guard
from xkd_jax.reporting.logger import Reporter, say
from xkd_jax.reporting.summary import Best
from xkd_jax.state import TrainState, student_variables


def init_state(experiment: Experiment) -> TrainState:
    """The initial state, from the config's seed."""
    return experiment.distiller.init(jax.random.key(experiment.config.seed))


def experiment_step(
    experiment: Experiment,
    state: TrainState,
    teacher_variables: Any,
    resident: dict[str, jax.Array],
    batch: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`distiller.train_step` on the examples given by `batch`.

    Args:
      experiment: everything that is constant; static.
      state: the training state; donated.
      teacher_variables: as for `distiller.train_step`.
      resident: the training split as `image`, uint8 [n, H, W, 3], and `label` [n]; or empty.
      batch: `index` [N], the step's examples; if the split isn't resident, also their `image`,
        uint8 [N, H, W, 3], and `label` [N]; and, as for `distiller.train_step`, `view` and the
        cached rows.
    """
    batch = batch | sharding.take(experiment.mesh, resident, batch["index"])
    new_state, metrics = train_step(experiment.distiller, state, teacher_variables, batch)
    return new_state, metrics | {"learning_rate": experiment.learning_rate_fn(state.step)}


def compile_step(
    experiment: Experiment,
    state: Any,
    teacher_variables: Any,
    resident: Any,
    donate: bool = True,
    size: int = 1,
) -> jax.stages.Compiled:
    """`experiment_step`, compiled ahead of time for the batches of the experiment's loader.

    Args:
      experiment: as for `experiment_step`.
      state: arrays, or `jax.ShapeDtypeStruct`s with shardings; the same holds for the next two.
      teacher_variables: as for `experiment_step`.
      resident: as for `experiment_step`.
      donate: whether to donate the old state's buffers to the new one.
      size: above 1, the program is `dispatch.repeat`'s.

    Raises:
      UserError: the compiler reports that the step doesn't fit into memory.
    """
    shardings, mesh = experiment.distiller.shardings, experiment.mesh
    step = functools.partial(experiment_step, experiment)
    step, batches = dispatch.prepare(step, experiment.batch_shapes(), size)
    step_fn = jax.jit(
        step,
        donate_argnums=(0,) if donate else (),
        out_shardings=(shardings.state, sharding.replicated(mesh)),
    )
    return compile_lowered(step_fn.lower(state, teacher_variables, resident, *batches))


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a training step.

    Raises:
      UserError: the compiler reports that it doesn't fit into memory.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise memory.too_large(f"a step doesn't fit in device memory ({reason})") from error


class Stepper:
    """An experiment's compiled step, with the teacher and the data on the devices.

    Attributes:
      loader: the training batches.
      compiled: the program, of one step or of several.
      size: the number of steps that it takes, at most.
    """

    def __init__(
        self, experiment: Experiment, state: TrainState, donate: bool = True, size: int = 1
    ):
        """Copies the teacher and the data to the devices and compiles the step, if it is new.

        Args:
          experiment: the experiment to train.
          state: a training state of the experiment.
          donate: see `compile_step`.
          size: see `compile_step`.

        Raises:
          UserError: the step doesn't fit into memory.
        """
        self.loader, self.size = experiment.create_loader(), size
        self._teacher = experiment.teacher_arrays()
        self._resident = self.loader.arrays
        arrays = state, self._teacher, self._resident
        if (donate, size) not in experiment.compiled_steps:
            compiled = compile_step(experiment, *arrays, donate, size)
            experiment.compiled_steps[donate, size] = compiled
        self.compiled = experiment.compiled_steps[donate, size]
        self._sizes = memory.parts(*arrays)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step on a batch of the loader: the new state and the metrics."""
        return self.compiled(state, self._teacher, self._resident, batch)

    def dispatches(
        self, state: TrainState, start: int, end_after: Callable[[int], int]
    ) -> Iterator[tuple[range, TrainState, dict[str, jax.Array]]]:
        """Trains from step `start` on, without end.

        Args:
          state: after `start` steps; donated, as is each state that this yields.
          start: the number of steps so far.
          end_after: gives, for a step, the first later one whose state the caller needs.

        Yields:
          the steps of a dispatch, the state after them and their metrics, [steps] if `size` is
          above 1.
        """
        if self.size == 1:
            for step, batch in enumerate(self.loader.batches(start), start + 1):
                state, metrics = self(state, batch)
                yield range(step, step + 1), state, metrics
        while True:
            count = min(self.size, end_after(start) - start)
            assert isinstance(self.loader, DeviceLoader)
            batches = self.loader.stack(range(start, start + count), self.size)
            arguments = self._teacher, self._resident, batches, np.int32(count)
            state, metrics = self.compiled(state, *arguments)
            yield range(start + 1, start + count + 1), state, metrics
            start += count

    def describe_memory(self) -> str:
        """One line about the memory used on each device.

        Raises:
          UserError: the step doesn't fit.
        """
        temporaries = memory.temporaries(self.compiled)
        sizes = self._sizes | {"temporaries": temporaries}
        return memory.describe(sizes, memory.device_limit())


class Alone:
    """An experiment that is trained by itself; seeds.py has another group, of several seeds.

    Attributes:
      experiments: it alone.
      stacked: whether states and metrics have an axis of experiments.
    """

    stacked = False

    def __init__(self, experiment: Experiment):
        self.experiments = (experiment,)

    def init(self) -> TrainState:
        """The initial state."""
        return init_state(self.experiments[0])

    def compile(self, state: TrainState) -> Stepper:
        """The compiled step.

        Raises:
          UserError: the step doesn't fit into memory.
        """
        experiment = self.experiments[0]
        return Stepper(experiment, state, size=steps_per_dispatch(experiment))

    def students(self, state: TrainState) -> list[Any]:
        """The variables of each experiment's student."""
        return [student_variables(state)]


def run(experiment: Experiment, folder: Path) -> tuple[TrainState, signal.Signals | None]:
    """Trains to the end or until a signal, resuming from the newest checkpoint if there is one.

    Args:
      experiment: the experiment to train.
      folder: the run's folder, for metrics and checkpoints.

    Returns:
      The last state, which has been saved, and the signal that stopped training early, if any.

    Raises:
      UserError: as for `run_group`.
      OSError: another file can't be written.
    """
    saved_in = place(folder, experiment.config.checkpoint_dir)
    return run_group(Alone(experiment), [folder], saved_in)


def run_group(
    group: Any, folders: Sequence[Path], saved_in: epath.Path
) -> tuple[TrainState, signal.Signals | None]:
    """As `run`, for a group of experiments that share a state and a step.

    Args:
      group: an `Alone` or a `seeds.SideBySide`.
      folders: each run's folder.
      saved_in: the folder of the group's checkpoints.

    Raises:
      UserError: a loss or gradient isn't finite, or a checkpoint can't be written or was saved with
        another teacher.
      OSError: another file can't be written.
    """
    first = group.experiments[0]
    with contextlib.ExitStack() as stack:
        teacher = first.distiller.teacher
        fingerprint = teacher.fingerprint if teacher else ""
        checkpoints = Checkpoints(saved_in, first.config.keep_checkpoints, fingerprint)
        stack.callback(checkpoints.close)
        state = group.init()
        state = checkpoints.restore(state) or state
        start = int(state.step)
        if start == first.total_steps:
            return state, None
        if first.cache is not None:
            first.cache.fill()  # a signal ends it at once: it continues from its own record
        names = nan_guard.names(state.params)
        runs = []
        for number, (experiment, folder) in enumerate(zip(group.experiments, folders, strict=True)):
            column = number if group.stacked else None
            runs.append(Run(experiment, folder, start, names, column))
            stack.callback(runs[-1].reporter.close)
        stop = stack.enter_context(StopSignal())
        state = _loop(group, runs, state, start, checkpoints, stop)
    return state, stop.received


class Run:
    """A run in training: reports its progress, evaluates its student and keeps the best one.

    Attributes:
      reporter: of its metrics.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        start: int,
        names: list[str],
        column: int | None,
    ):
        """Opens the run's files.

        Args:
          experiment: what is trained.
          folder: the run's.
          start: step to resume from.
          names: the trained parameters', see `nan_guard.names`.
          column: see `Reporter`.
        """
        config, total = experiment.config, experiment.total_steps
        check = nan_guard.Guard(folder, names, experiment.order).check
        size, every = config.batch_size, config.log_every
        self.reporter = Reporter(folder, start, total, size, every, check, column)
        self._best, self._evaluator = Best(experiment, folder), create_evaluator(experiment)

    def evaluate(self, step: int, variables: Any) -> float:
        """Evaluates the student's `variables` on the evaluation split; returns the seconds."""
        begun = time.monotonic()
        scores = self._evaluator(variables)
        self._best.update(step, variables, scores)
        seconds = time.monotonic() - begun
        self.reporter.evaluated(step, scores, seconds)
        return seconds


def _loop(
    group: Any,
    runs: Sequence[Run],
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    stop: StopSignal,
) -> TrainState:
    experiment = group.experiments[0]
    config, total = experiment.config, experiment.total_steps
    say("compiling the training step ...")
    begun = time.monotonic()
    step_fn = group.compile(state)
    say(f"compiled in {time.monotonic() - begun:.0f} s. {step_fn.describe_memory()}")
    eval_every = config.eval_every * experiment.distiller.steps_per_epoch

    def end_after(step: int) -> int:
        return min(total, *(step - step % n + n for n in (eval_every, config.checkpoint_every)))

    def flush() -> None:
        for member in runs:
            member.reporter.flush()

    dispatches = step_fn.dispatches(state, start, end_after)
    for number, (steps, state, metrics) in enumerate(dispatches, start + 1):
        # Fetch the previous steps' metrics while the device computes these.
        flush()
        for member in runs:
            member.reporter.take(steps, metrics)
        step = steps[-1]
        last = step == total
        if last or step % eval_every == 0:
            flush()
            students = zip(runs, group.students(state), strict=True)
            took = [member.evaluate(step, variables) for member, variables in students]
            for member, own in zip(runs, took, strict=True):
                member.reporter.pause(sum(took) - own)
        stopping = stop.asked(number)
        if last or stopping or step % config.checkpoint_every == 0:
            flush()
            checkpoints.save(step, state)
        if last or stopping:
            break
    return state


def steps_per_dispatch(experiment: Experiment) -> int:
    """The number of steps that one program takes, see `dispatch.choose`."""
    resident = resident_shapes(experiment.train, experiment.mesh)

    def flops() -> float:
        step = functools.partial(experiment_step, experiment)
        state, batch = experiment.distiller.state_shapes, experiment.batch_shapes()
        inputs = experiment.teacher_shapes(), resident, batch
        return 2 * count_flops(step, state, *inputs) / experiment.mesh.size

    fed = not resident or experiment.cache is not None
    return dispatch.choose(experiment.config.steps_per_dispatch, fed, flops)


if __name__ == "__main__":
    import sys

    from xkd_jax.cli.train import main

    sys.exit(main())
