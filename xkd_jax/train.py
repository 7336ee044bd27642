"""The training loop: teachers, baselines and every method, at every scale."""

import dataclasses
import functools
import signal
import time
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from xkd_jax import partition, views
from xkd_jax.checkpoint import Checkpoints, StopSignal
from xkd_jax.data.order import batch_indices
from xkd_jax.evaluate import create_eval_step, evaluate
from xkd_jax.methods.base import apply
from xkd_jax.metrics import Reporter
from xkd_jax.task import Network, Task

AUXILIARY_WEIGHT = 0.4  # of Inception's second classifier, as TF-Slim and torchvision train it


@flax.struct.dataclass
class TrainState:
    """All that changes while training, and all that a checkpoint holds.

    The teacher is not in it, and neither is the data's position: the order of the examples is a
    function of the seed and the step.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    method_params: Any
    method_opt_state: Any
    method_state: Any
    adversary: Any
    adversary_opt_state: Any


def init_state(task: Task) -> TrainState:
    """The state before the first step, replicated over the mesh."""
    student_out, teacher_out = task.student.output_shapes(), {}
    if task.teacher:
        teacher_out = task.teacher.output_shapes()

    def zeros(out):
        is_shape = jax.ShapeDtypeStruct
        return {k: jnp.zeros_like(v) if isinstance(v, is_shape) else v for k, v in out.items()}

    def init(key):
        student_key, method_key, adversary_key, train_key = jax.random.split(key, 4)
        variables = task.student.variables or task.student.init(student_key)
        outs = zeros(teacher_out), zeros(student_out)
        params, method_state = task.method.init(method_key, *outs)
        adversary = {}
        if task.method.adversary_period:
            adversary = task.method.init_adversary(adversary_key, *outs)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            key=train_key,
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=task.optimizers["student"].init(variables["params"]),
            method_params=params,
            method_opt_state=task.optimizers["method"].init(params),
            method_state=method_state,
            adversary=adversary,
            adversary_opt_state=task.optimizers["adversary"].init(adversary),
        )

    key = jax.random.key(task.config.seed)
    # It runs once: on a CPU, compiling it well would take longer than the first training steps.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    everywhere = partition.replicated(task.mesh)
    return jax.jit(init, out_shardings=everywhere, compiler_options=options)(key)


def label_loss(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross-entropy of logits [N, K] with labels [N], the batch mean in float32."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits.astype(jnp.float32), targets))


def create_views(task: Task, key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the teacher and the student see of uint8 images [N, H, W, 3], each normalised."""
    augment_key, view_key = jax.random.split(key)
    pixels = images.astype(jnp.float32) / 255
    augment = task.config.augment
    pixels = views.random_crop_flip(augment_key, pixels, augment.crop_padding, augment.flip)
    teacher_view, student_view = pixels, pixels
    if task.method.multi_view:
        teacher_view, student_view = views.multi_view(view_key, pixels, task.views)

    def prepare(network: Network, view: jax.Array) -> jax.Array:
        view = views.resize(view, network.image_size)
        return views.normalize(view, network.mean, network.std)

    return prepare(task.teacher or task.student, teacher_view), prepare(task.student, student_view)


def train_step(
    task: Task,
    state: TrainState,
    teacher_variables: Any,
    images: jax.Array,
    labels: jax.Array,
    indices: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the student and the method's modules and, when it is its turn, the adversary.

    Args:
      task: what stays the same; static.
      state: donated.
      teacher_variables: frozen.
      images: the whole training split, uint8 [n, H, W, 3].
      labels: [n].
      indices: this step's examples, [N].

    Returns:
      The new state and the step's metrics, scalars.
    """
    batch = {"index": indices, "label": labels[indices]}
    step_key = jax.random.fold_in(state.key, state.step)
    view_key, dropout_key, method_key = jax.random.split(step_key, 3)
    teacher_view, student_view = create_views(task, view_key, images[indices])
    teacher_out, metrics = {}, {"learning_rate": task.learning_rate_fn(state.step)}
    if task.teacher:
        teacher_out = apply(task.teacher.module, teacher_variables, teacher_view, train=False)[1]
        metrics["teacher_accuracy"] = _accuracy(teacher_out["logits"], batch["label"])

    def loss_fn(params, method_params):
        return student_loss(
            task, state, params, method_params, teacher_out, student_view, batch,
            dropout_key, method_key,
        )  # fmt: skip

    gradients = jax.grad(loss_fn, (0, 1), has_aux=True)
    (grads, method_grads), aux = gradients(state.params, state.method_params)
    adversary, adversary_opt_state, adversary_metrics = _update_adversary(
        task, state, teacher_out, aux["student_out"], method_key
    )
    params, opt_state = _update(task, "student", grads, state.opt_state, state.params)
    method_params, method_opt_state = _update(
        task, "method", method_grads, state.method_opt_state, state.method_params
    )
    metrics |= aux["metrics"] | adversary_metrics | {"gradient_norm": optax.tree.norm(grads)}
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        batch_stats=aux["batch_stats"],
        opt_state=opt_state,
        method_params=method_params,
        method_opt_state=method_opt_state,
        method_state=aux["method_state"],
        adversary=adversary,
        adversary_opt_state=adversary_opt_state,
    )
    return state, metrics


def student_loss(
    task: Task,
    state: TrainState,
    params: Any,
    method_params: Any,
    teacher_out: dict[str, Any],
    view: jax.Array,
    batch: dict[str, jax.Array],
    dropout_key: jax.Array,
    method_key: jax.Array,
) -> tuple[jax.Array, dict[str, Any]]:
    """The label term plus the method's, a scalar; and all else that the forward pass yields."""
    (logits, out), updates = apply(
        task.student.module,
        {"params": params, "batch_stats": state.batch_stats},
        view,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": dropout_key},
    )
    label = label_loss(logits, batch["label"], task.config.label_smoothing)
    if "aux_logits" in out:
        auxiliary = label_loss(out["aux_logits"], batch["label"], task.config.label_smoothing)
        label = label + AUXILIARY_WEIGHT * auxiliary
    progress = state.step / task.steps_per_epoch
    extra, method_state, metrics = task.method.loss(
        method_params, state.method_state, teacher_out, out, batch, method_key, progress,
        state.adversary,
    )  # fmt: skip
    loss = task.config.label_weight * label + extra
    accuracy = _accuracy(logits, batch["label"])
    metrics = metrics | {"loss": loss, "label_loss": label, "accuracy": accuracy}
    return loss, {
        "student_out": out,
        "batch_stats": updates.get("batch_stats", {}),
        "method_state": method_state,
        "metrics": metrics,
    }


def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits, -1) == labels)


def _update(task: Task, part: str, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    updates, opt_state = task.optimizers[part].update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _update_adversary(task, state, teacher_out, student_out, key):
    """The adversary's own step, on what the student's step saw; most steps leave it as it is."""
    if not task.method.adversary_period:
        return state.adversary, state.adversary_opt_state, {}

    def loss_fn(adversary):
        return task.method.adversary_loss(
            adversary, state.method_params, teacher_out, student_out, key
        )

    def update(adversary, opt_state):
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(adversary)
        adversary, opt_state = _update(task, "adversary", grads, opt_state, adversary)
        return adversary, opt_state, metrics

    def keep(adversary, opt_state):
        shapes = jax.eval_shape(loss_fn, adversary)[1]
        return adversary, opt_state, {name: jnp.full((), jnp.nan) for name in shapes}

    if task.method.adversary_period == 1:  # a conditional hides the update from XLA's optimizer
        return update(state.adversary, state.adversary_opt_state)
    clock = state.step
    if task.method.adversary_clock == "epoch":
        clock = state.step // task.steps_per_epoch
    turn = clock % task.method.adversary_period == 0
    return jax.lax.cond(turn, update, keep, state.adversary, state.adversary_opt_state)


def run(task: Task, folder: Path) -> tuple[TrainState, signal.Signals | None]:
    """Trains from the newest checkpoint in `folder`, or from the start, to the end or a signal.

    Args:
      task: what to train.
      folder: the run's; metrics and checkpoints go there.

    Returns:
      The last state, which is saved, and the signal that ended the loop early, if one did.

    Raises:
      UserError: the loss is not finite, or the checkpoint belongs to another teacher.
    """
    config = task.config
    fingerprint = task.teacher.fingerprint if task.teacher else ""
    checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints, fingerprint)
    state = init_state(task)
    state = checkpoints.restore(state) or state
    start = int(state.step)
    reporter = Reporter(folder, start, task.total_steps, config.batch_size, config.log_every)
    try:
        with StopSignal() as stop:
            state = _loop(task, state, start, reporter, checkpoints, stop)
    finally:
        reporter.close()
        checkpoints.close()
    return state, stop.received


def _loop(
    task: Task,
    state: TrainState,
    start: int,
    reporter: Reporter,
    checkpoints: Checkpoints,
    stop: StopSignal,
) -> TrainState:
    config, everywhere = task.config, partition.replicated(task.mesh)
    teacher_variables = partition.put(task.teacher.variables, everywhere) if task.teacher else {}
    images, labels = partition.put((task.train.images, task.train.labels), everywhere)
    eval_step = create_eval_step(task.student)
    step_fn = jax.jit(functools.partial(train_step, task), donate_argnums=0)
    for step in range(start + 1, task.total_steps + 1):
        indices = batch_indices(len(task.train), config.batch_size, config.seed, step - 1)
        indices = partition.put(indices, partition.over_batch(task.mesh))
        state, metrics = step_fn(state, teacher_variables, images, labels, indices)
        # The metrics of the step before: the device is already busy with this one.
        reporter.flush()
        reporter.take(step, metrics)
        last = step == task.total_steps
        if last or step % (config.eval_every * task.steps_per_epoch) == 0:
            reporter.flush()
            begun = time.monotonic()
            scores = evaluate(eval_step, student_variables(state), task.evaluation, task.mesh)
            reporter.evaluated(step, scores, time.monotonic() - begun)
        if last or stop.received or step % config.checkpoint_every == 0:
            reporter.flush()
            checkpoints.save(step, state)
        if stop.received:
            break
    return state


def student_variables(state: TrainState) -> dict[str, Any]:
    """The student alone, as its module takes it."""
    return {"params": state.params, "batch_stats": state.batch_stats}
