"""The training loop, for teachers, baselines and every method, at every scale.

The step itself is in `xkd_jax/distiller.py`.
"""

import contextlib
import functools
import signal
import time
from pathlib import Path
from typing import Any

import jax

from xkd_jax.analysis import memory
from xkd_jax.checkpoint import Checkpoints, place
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
    experiment: Experiment, state: Any, teacher_variables: Any, resident: Any, donate: bool = True
) -> jax.stages.Compiled:
    """`experiment_step`, compiled ahead of time for the batches of the experiment's loader.

    Args:
      experiment: as for `experiment_step`.
      state: arrays, or `jax.ShapeDtypeStruct`s with shardings; the same holds for the next two.
      teacher_variables: as for `experiment_step`.
      resident: as for `experiment_step`.
      donate: whether to donate the old state's buffers to the new one.

    Raises:
      UserError: the compiler reports that the step doesn't fit into memory.
    """
    shardings, mesh = experiment.distiller.shardings, experiment.mesh
    step_fn = jax.jit(
        functools.partial(experiment_step, experiment),
        donate_argnums=(0,) if donate else (),
        out_shardings=(shardings.state, sharding.replicated(mesh)),
    )
    lowered = step_fn.lower(state, teacher_variables, resident, experiment.batch_shapes())
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
      compiled: the step.
    """

    def __init__(self, experiment: Experiment, state: TrainState, donate: bool = True):
        """Copies the teacher and the data to the devices and compiles the step, if it is new.

        Args:
          experiment: the experiment to train.
          state: a training state of the experiment.
          donate: see `compile_step`.

        Raises:
          UserError: the step doesn't fit into memory.
        """
        self.loader = experiment.create_loader()
        self._teacher = experiment.teacher_arrays()
        self._resident = self.loader.arrays
        arrays = state, self._teacher, self._resident
        if donate not in experiment.compiled_steps:
            experiment.compiled_steps[donate] = compile_step(experiment, *arrays, donate)
        self.compiled = experiment.compiled_steps[donate]
        self._sizes = memory.parts(*arrays)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step on a batch of the loader: the new state and the metrics."""
        return self.compiled(state, self._teacher, self._resident, batch)

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
    config, distiller = experiment.config, experiment.distiller
    if start == experiment.total_steps:
        return state
    evaluator = create_evaluator(experiment)
    say("compiling the training step ...")
    begun = time.monotonic()
    step_fn = Stepper(experiment, state)
    say(f"compiled in {time.monotonic() - begun:.0f} s. {step_fn.describe_memory()}")
    steps = range(start + 1, experiment.total_steps + 1)
    for step, batch in zip(steps, step_fn.loader.batches(start), strict=False):
        state, metrics = step_fn(state, batch)
        # Fetch the previous step's metrics while the device computes this one.
        reporter.flush()
        reporter.take(step, metrics)
        last = step == experiment.total_steps
        if last or step % (config.eval_every * distiller.steps_per_epoch) == 0:
            reporter.flush()
            begun = time.monotonic()
            variables = student_variables(state)
            scores = evaluator(variables)
            best.update(step, variables, scores)
            reporter.evaluated(step, scores, time.monotonic() - begun)
        stopping = stop.asked(step)
        if last or stopping or step % config.checkpoint_every == 0:
            reporter.flush()
            checkpoints.save(step, state)
        if stopping:
            break
    return state


if __name__ == "__main__":
    import sys

    from xkd_jax.cli.train import main

    sys.exit(main())
