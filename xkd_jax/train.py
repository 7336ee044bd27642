"""The training loop, for teachers, baselines and every method, at every scale.

The step itself is in `xkd_jax/distiller.py`.
"""

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
    step, batch = functools.partial(experiment_step, experiment), experiment.batch_shapes()
    arguments = state, teacher_variables, resident, batch
    if size > 1:
        step = dispatch.repeat(step, size)
        stacked = sharding.stacked(batch, size), jax.ShapeDtypeStruct((), np.int32)
        arguments = (*arguments[:3], *stacked)
    step_fn = jax.jit(
        step,
        donate_argnums=(0,) if donate else (),
        out_shardings=(shardings.state, sharding.replicated(mesh)),
    )
    return compile_lowered(step_fn.lower(*arguments))


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


def run(experiment: Experiment, folder: Path) -> tuple[TrainState, signal.Signals | None]:
    """Trains to the end or until a signal, resuming from the newest checkpoint if there is one.

    Args:
      experiment: the experiment to train.
      folder: the run's folder, for metrics and checkpoints.

    Returns:
      The last state, which has been saved, and the signal that stopped training early, if any.

    Raises:
      UserError: a loss or gradient isn't finite, or a checkpoint can't be written or was saved with
        another teacher.
      OSError: another file can't be written.
    """
    config, teacher = experiment.config, experiment.distiller.teacher
    saved_in = place(folder, config.checkpoint_dir)
    with contextlib.ExitStack() as stack:
        fingerprint = teacher.fingerprint if teacher else ""
        checkpoints = Checkpoints(saved_in, config.keep_checkpoints, fingerprint)
        stack.callback(checkpoints.close)
        state = init_state(experiment)
        state = checkpoints.restore(state) or state
        start = int(state.step)
        guard = nan_guard.Guard(folder, nan_guard.names(state.params), experiment.order)
        reporter = Reporter(
            folder, start, experiment.total_steps, config.batch_size, config.log_every, guard.check
        )
        stack.callback(reporter.close)
        if experiment.cache is not None and start < experiment.total_steps:
            experiment.cache.fill()  # a signal ends it at once: it continues from its own record
        stop = stack.enter_context(StopSignal())
        best = Best(experiment, folder)
        state = _loop(experiment, state, start, reporter, checkpoints, best, stop)
    return state, stop.received


def _loop(
    experiment: Experiment,
    state: TrainState,
    start: int,
    reporter: Reporter,
    checkpoints: Checkpoints,
    best: Best,
    stop: StopSignal,
) -> TrainState:
    config, total = experiment.config, experiment.total_steps
    if start == total:
        return state
    evaluator = create_evaluator(experiment)
    say("compiling the training step ...")
    begun = time.monotonic()
    step_fn = Stepper(experiment, state, size=steps_per_dispatch(experiment))
    say(f"compiled in {time.monotonic() - begun:.0f} s. {step_fn.describe_memory()}")
    eval_every = config.eval_every * experiment.distiller.steps_per_epoch

    def end_after(step: int) -> int:
        return min(total, *(step - step % n + n for n in (eval_every, config.checkpoint_every)))

    dispatches = step_fn.dispatches(state, start, end_after)
    for number, (steps, state, metrics) in enumerate(dispatches, start + 1):
        # Fetch the previous steps' metrics while the device computes these.
        reporter.flush()
        reporter.take(steps, metrics)
        step = steps[-1]
        last = step == total
        if last or step % eval_every == 0:
            reporter.flush()
            begun = time.monotonic()
            variables = student_variables(state)
            scores = evaluator(variables)
            best.update(step, variables, scores)
            reporter.evaluated(step, scores, time.monotonic() - begun)
        stopping = stop.asked(number)
        if last or stopping or step % config.checkpoint_every == 0:
            reporter.flush()
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
