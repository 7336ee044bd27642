"""A training step, its limit and its parts, each as a program of its own."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xkd_jax.analysis import memory
from xkd_jax.analysis.flops import count_flops
from xkd_jax.augment import fixed
from xkd_jax.bench.timing import Program, compile_program
from xkd_jax.distiller import Distiller, adversary_gradient
from xkd_jax.distributed import sharding
from xkd_jax.experiment import Experiment
from xkd_jax.methods.base import Outputs, apply, arrays_of, split_static
from xkd_jax.methods.label import label_term
from xkd_jax.state import TrainState
from xkd_jax.tasks.classification import create_views
from xkd_jax.teacher.forward import CACHED, create_teacher_fn
from xkd_jax.teacher.plan import read_outputs
from xkd_jax.train import Stepper, experiment_step, init_state
from xkd_jax.turns import epochs


def whole_step(experiment: Experiment) -> Program:
    """The training step, whose state goes on from call to call as in training."""
    holder = [init_state(experiment)]
    begun = time.perf_counter()
    step_fn = Stepper(experiment, holder[0])
    seconds = time.perf_counter() - begun
    batch = next(iter(step_fn.loader.batches(0)))
    traced = functools.partial(experiment_step, experiment)
    inputs = experiment.teacher_arrays(), step_fn.loader.arrays, batch
    flops = 2 * count_flops(traced, holder[0], *inputs)

    def run() -> Any:
        holder[0], metrics = step_fn(holder[0], batch)
        return metrics

    return Program(run, flops, seconds, memory.temporaries(step_fn.compiled))


def teacher_forward(experiment: Experiment) -> Program:
    """The teacher's classifier, or without one its pooled features, for a batch of its views."""
    distiller = experiment.distiller
    teacher = distiller.teacher
    assert teacher is not None
    side, count = teacher.image_size, experiment.config.batch_size
    images = np.random.default_rng(0).normal(size=(count, side, side, 3)).astype(np.float32)
    images = jax.device_put(images, distiller.shardings.batch)

    def forward(variables: Any, images: jax.Array) -> jax.Array:
        logits, out = teacher.forward(sharding.gather(distiller.mesh, variables), images)
        return out["pooled"] if logits is None else logits

    return compile_program(forward, distiller.teacher_variables, images)


def breakdown(experiment: Experiment) -> dict[str, Program]:
    """The parts of a step, on the same arrays as in a step.

    "data" is the wait for the next batch on the host. "method" is the method's loss with its
    projectors, forward and backward, down to the networks' outputs that it reads; "adversary" its
    gradient in a step that updates it. A fused step can be faster than the sum of its parts.
    """
    distiller, state = experiment.distiller, init_state(experiment)
    loader = experiment.create_loader()
    batches = iter(loader.batches(0))
    batch = _examples(experiment, loader.arrays, next(batches))
    view_key, dropout_key, method_key = jax.random.split(jax.random.key(0), 3)

    def views(batch: dict[str, jax.Array]) -> tuple:
        keys = fixed.view_keys(batch["view"], batch["index"]) if "view" in batch else None
        return create_views(distiller, view_key, batch["image"], batch["label"], keys)

    programs = {"data": Program(lambda: next(batches)), "views": compile_program(views, batch)}
    teacher_view, student_view, targets = programs["views"].run()
    read_of_teacher, read_of_student = {}, {}
    teacher_out: Outputs = {}
    if distiller.teacher is not None:
        read_of_teacher, read_of_student = read_outputs(distiller)
        programs["teacher"], teacher_out = _teacher(
            experiment, teacher_view, batch.get(CACHED), list(read_of_teacher)
        )
    programs["student"] = _student(distiller, state, student_view, targets, dropout_key)
    if distiller.teacher is not None:
        student_out = _student_outputs(distiller, state, student_view, dropout_key)
        rest = batch | {"target": targets}
        of_method = _Method(distiller, state, teacher_out, student_out, rest, method_key)
        programs["method"] = of_method.program(list(read_of_student))
        if distiller.method.adversary_period:
            programs["adversary"] = of_method.adversary()
    programs["optimizer"] = _optimizer(distiller, state)
    return programs


def _examples(experiment: Experiment, resident: Any, batch: Any) -> dict[str, jax.Array]:
    """The batch with its images and labels, if it only has their indices."""

    def take(resident: Any, batch: Any) -> Any:
        return batch | sharding.take(experiment.mesh, resident, batch["index"])

    return jax.jit(take)(resident, batch)


def _teacher(
    experiment: Experiment, view: jax.Array, rows: Any, read: list[str]
) -> tuple[Program, Outputs]:
    """The outputs that the method reads; and all outputs, of which the others are zero."""
    static: dict[str, Any] = {}
    variables = experiment.teacher_arrays()

    def forward(variables: Any, view: jax.Array, rows: Any) -> Outputs:
        return create_teacher_fn(experiment.distiller, variables, rows is not None)(view, rows)

    arrays = arrays_of(forward, static)
    shapes = jax.eval_shape(arrays, variables, view, rows)

    def needed(*args: Any) -> Outputs:
        out = arrays(*args)
        return {name: out[name] for name in read}

    program = compile_program(needed, variables, view, rows)
    zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    return program, zeros | program.run() | static


def _forward(distiller: Distiller, params: Any, state: TrainState, view: jax.Array, key: Any):
    """The student's outputs in training."""
    params = sharding.gather(distiller.mesh, params)
    variables = {"params": params, "batch_stats": state.batch_stats}
    (_, out), updates = apply(
        distiller.student.module, variables, view, train=True,
        mutable=["batch_stats"], rngs={"dropout": key},
    )  # fmt: skip
    return out | {"side": view.shape[1]}, updates


def _student(
    distiller: Distiller, state: TrainState, view: jax.Array, targets: jax.Array, key: Any
) -> Program:
    """Forward and backward pass of the label term."""

    def loss(params: Any, view: jax.Array, targets: jax.Array) -> tuple[jax.Array, Any]:
        out, updates = _forward(distiller, params, state, view, key)
        return label_term(distiller.method, out, targets), updates

    gradient = jax.value_and_grad(loss, has_aux=True)
    return compile_program(gradient, state.params["student"], view, targets)


def _student_outputs(distiller: Distiller, state: TrainState, view: jax.Array, key: Any) -> Outputs:
    static: dict[str, Any] = {}

    def forward(params: Any, view: jax.Array) -> Outputs:
        return _forward(distiller, params, state, view, key)[0]

    return jax.jit(arrays_of(forward, static))(state.params["student"], view) | static


class _Method:
    """The method's loss on given outputs of both networks."""

    def __init__(
        self,
        distiller: Distiller,
        state: TrainState,
        teacher_out: Outputs,
        student_out: Outputs,
        batch: dict[str, jax.Array],
        key: jax.Array,
    ):
        self.distiller, self.state, self.key = distiller, state, key
        self.teacher, self.teacher_static = split_static(teacher_out)
        self.student, self.student_static = split_static(student_out)
        self.batch = {name: batch[name] for name in ("label", "index", "target")}

    def _loss(self, params: Any, student: Outputs, rest: Any) -> tuple[jax.Array, Any]:
        """The loss, and what else a step keeps of it; all but the static entries are arguments."""
        teacher, method_state, adversary, batch = rest
        term = self.distiller.method.loss(
            params, method_state, teacher | self.teacher_static, student | self.student_static,
            batch, self.key, epochs(self.distiller, self.state), adversary,
        )  # fmt: skip
        return term.value, (term.state, term.metrics, term.judged)

    @property
    def _rest(self) -> Any:
        state = self.state
        return self.teacher, state.method_state, state.params["adversary"], self.batch

    def program(self, read: list[str]) -> Program:
        """The loss, and its gradients by the method's parameters and by the outputs it reads."""

        def loss(params: Any, wanted: Outputs, others: Outputs, rest: Any) -> tuple:
            return self._loss(params, wanted | others, rest)

        wanted = {name: self.student[name] for name in read}
        others = {name: leaf for name, leaf in self.student.items() if name not in wanted}
        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return compile_program(gradient, self.state.params["method"], wanted, others, self._rest)

    def adversary(self) -> Program:
        """The adversary's gradient, in a step that updates it."""
        judged = jax.jit(self._loss)(self.state.params["method"], self.student, self._rest)[1][2]

        def gradient(adversary: Any, judged: Any) -> Any:
            params = self.state.params | {"adversary": adversary}
            state = dataclasses.replace(self.state, params=params)
            return adversary_gradient(self.distiller, state, judged)

        return compile_program(gradient, self.state.params["adversary"], judged)


def _optimizer(distiller: Distiller, state: TrainState) -> Program:
    """The updates of all parts, from gradients of ones."""

    def update(grads: Any, opt_state: Any, params: Any, step: jax.Array) -> tuple:
        new, new_state = {}, {}
        for part, optimizer in distiller.optimizers.items():
            updates, new_state[part] = optimizer.update(
                grads[part], opt_state[part], params[part], step=step
            )
            new[part] = optax.apply_updates(params[part], updates)
        return new, new_state

    grads = jax.tree.map(jnp.ones_like, state.params)
    return compile_program(update, grads, state.opt_state, state.params, state.step)
