"""Several seeds of an experiment in one program (`config.seeds`).

Their states are stacked, and each step updates all of them, each as if it was alone. With
`config.data.seed` they see the same images, and the teacher sees these once for all of them. On an
accelerator the step is mapped over the seeds (`jax.vmap`), so that small networks fill it; several
devices share the seeds out. On a CPU, where XLA has no fast convolution with a kernel for each
seed, the program has the steps one after another.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xkd_jax import backend, dispatch
from xkd_jax.analysis import memory
from xkd_jax.data.encoded import EncodedImages
from xkd_jax.data.loader import DeviceLoader, Order
from xkd_jax.data.source import Split
from xkd_jax.distributed import processes, sharding
from xkd_jax.errors import UserError
from xkd_jax.experiment import Experiment
from xkd_jax.state import TrainState, student_variables
from xkd_jax.train import Stepper, compile_lowered, experiment_step, init_state, steps_per_dispatch

AXIS = "seed"


def _fields(step: Any, others: Any) -> TrainState:
    """A prefix of stacked states: the step is common to all, everything else has an axis."""
    return TrainState(step, others, others, others, others, others, others)


def stack(states: Sequence[TrainState]) -> TrainState:
    """The states as one, with an axis of seeds in front of all but the step."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return dataclasses.replace(stacked, step=states[0].step)


def take(states: TrainState, number: int) -> TrainState:
    """One of stacked states."""
    one = jax.tree.map(lambda leaf: leaf[number], dataclasses.replace(states, step=()))
    return dataclasses.replace(one, step=states.step)


def create_mesh(count: int) -> Mesh:
    """The devices that `count` seeds can be shared out to evenly, as many as possible."""
    devices = jax.devices()
    number = max(n for n in range(1, min(count, len(devices)) + 1) if count % n == 0)
    return jax.make_mesh((number,), (AXIS,), (AxisType.Auto,), devices=devices[:number])


def side_by_side(step: dispatch.Step, count: int, shared: bool) -> dispatch.Step:
    """`step` for `count` stacked states; the metrics get an axis of seeds.

    Args:
      step: of one seed.
      count: the number of seeds.
      shared: whether all have the same batch; otherwise it has an axis of seeds.
    """

    def mapped(states: TrainState, teacher: Any, resident: Any, batch: Any) -> Any:
        def one(state: TrainState, batch: Any) -> Any:
            return step(state, teacher, resident, batch)

        axes = _fields(None, 0)
        return jax.vmap(one, (axes, None if shared else 0), (axes, 0))(states, batch)

    def unrolled(states: TrainState, teacher: Any, resident: Any, batch: Any) -> Any:
        results = []
        for i in range(count):
            own = batch if shared else jax.tree.map(lambda leaf: leaf[i], batch)  # noqa: B023
            results.append(step(take(states, i), teacher, resident, own))
        new, metrics = zip(*results, strict=True)
        return stack(new), jax.tree.map(lambda *leaves: jnp.stack(leaves), *metrics)

    return unrolled if backend.current() == "cpu" else mapped


class SeedsLoader(DeviceLoader):
    """The batches of all seeds, stacked; or, if these share their images, those of the first."""

    def __init__(self, split: Split, mesh: Mesh, orders: Sequence[Order], shared: bool):
        """Copies the split to every device of `mesh`."""
        self._orders, self._shared = orders, shared
        self._sharding = NamedSharding(mesh, PartitionSpec(None if shared else AXIS))
        arrays = {"image": np.asarray(split.images), "label": np.asarray(split.labels)}
        self.arrays = sharding.put(arrays, sharding.replicated(mesh))

    def _read(self, step: int) -> dict[str, np.ndarray]:
        rows = [{"index": order.indices(step)} for order in self._orders]
        if self._orders[0].views:
            rows = [r | {"view": o.view(step)} for r, o in zip(rows, self._orders, strict=True)]
        if self._shared:
            return rows[0]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def shapes(self) -> dict[str, Any]:
        """The batches as shapes with their shardings."""
        return sharding.shaped(self._read(0), self._sharding)


class SeedsStepper(Stepper):
    """The compiled step of several seeds; a dispatch's metrics have an axis of seeds."""

    def __init__(self, experiments: Sequence[Experiment], mesh: Mesh, state: TrainState):
        """Copies teacher and data to every device of `mesh` and compiles the step.

        Args:
          experiments: one for each seed, on a mesh of one device.
          mesh: from `create_mesh`.
          state: from `stack`.

        Raises:
          UserError: the step doesn't fit into memory.
        """
        first, shared = experiments[0], experiments[0].config.data.seed >= 0
        orders = [experiment.order for experiment in experiments]
        self.loader = SeedsLoader(first.train, mesh, orders, shared)
        self.size = steps_per_dispatch(first)
        everywhere, teacher = sharding.replicated(mesh), first.distiller.teacher
        self._teacher = sharding.put(teacher.variables if teacher else {}, everywhere)
        self._resident = self.loader.arrays
        self._sizes = memory.parts(state, self._teacher, self._resident)
        step = functools.partial(experiment_step, first)
        step = side_by_side(step, len(experiments) // mesh.size, shared)
        if mesh.size > 1:
            one, split = PartitionSpec(), PartitionSpec(AXIS)
            states = _fields(one, split)
            step = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(states, one, one, one if shared else split),
                out_specs=(states, split),
                check_vma=False,
            )
        step, batches = dispatch.prepare(step, self.loader.shapes(), self.size)
        step_fn = jax.jit(step, donate_argnums=0, out_shardings=(_layout(mesh), everywhere))
        lowered = step_fn.lower(state, self._teacher, self._resident, *batches)
        self.compiled = compile_lowered(lowered)


def _layout(mesh: Mesh) -> TrainState:
    """The shardings of stacked states."""
    one, split = PartitionSpec(), PartitionSpec(AXIS)
    return _fields(NamedSharding(mesh, one), NamedSharding(mesh, split))


class SideBySide:
    """Experiments that differ in nothing but their seed, trained by one program.

    Attributes:
      experiments: one for each seed, on a mesh of one device.
      stacked: whether states and metrics have an axis of experiments.
    """

    stacked = True

    def __init__(self, experiments: Sequence[Experiment]):
        self.experiments = tuple(experiments)
        self._mesh = create_mesh(len(experiments))

    def init(self) -> TrainState:
        """The initial states, stacked."""
        states = stack([init_state(experiment) for experiment in self.experiments])
        return jax.device_put(states, _layout(self._mesh))

    def compile(self, state: TrainState) -> Stepper:
        """The compiled step of all seeds.

        Raises:
          UserError: the step doesn't fit into memory.
        """
        return SeedsStepper(self.experiments, self._mesh, state)

    def students(self, state: TrainState) -> list[Any]:
        """The variables of each experiment's student, on its device."""
        host = jax.device_get(student_variables(state))
        layout = sharding.replicated(self.experiments[0].mesh)
        return [
            sharding.put(jax.tree.map(lambda leaf: leaf[i], host), layout)  # noqa: B023
            for i in range(len(self.experiments))
        ]


def check(experiment: Experiment) -> None:
    """Checks that the seeds of an experiment can be trained side by side.

    Raises:
      UserError: images or teacher come from the host, or there are several processes.
    """
    if processes.several():
        raise UserError("seeds need a single process; set seeds=() and train them one by one.")
    if isinstance(experiment.train.images, EncodedImages) or experiment.cache is not None:
        raise UserError(
            "seeds need images and teacher on the devices, but these come from the host; set "
            'data.feed="resident" and leave teacher.cache empty, or set seeds=() and train them '
            "one by one."
        )
