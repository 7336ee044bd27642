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

from xkd_jax import ema, partition, views
from xkd_jax.augment import augment
from xkd_jax.checkpoint import Checkpoints, StopSignal
from xkd_jax.evaluate import create_eval_step, evaluate
from xkd_jax.feed import create_feed
from xkd_jax.methods.base import apply
from xkd_jax.metrics import Reporter
from xkd_jax.mixing import mix
from xkd_jax.optimizer import accumulate
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
    ema: Any


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
            ema=ema.init(_trained(variables)) if task.config.ema.decay else {},
        )

    key = jax.random.key(task.config.seed)
    # It runs once: on a CPU, compiling it well would take longer than the first training steps.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    everywhere = partition.replicated(task.mesh)
    return jax.jit(init, out_shardings=everywhere, compiler_options=options)(key)


def label_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of logits [N, K] with probabilities [N, K], the batch mean in float32."""
    return jnp.mean(optax.softmax_cross_entropy(logits.astype(jnp.float32), targets))


def create_views(
    task: Task, key: jax.Array, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the networks see of uint8 images [N, H, W, 3] with labels [N].

    Returns:
      The teacher's and the student's view, each normalised, and the targets [N, K].
    """
    crop_key, view_key = jax.random.split(key)
    augment_key, mix_key = jax.random.split(jax.random.fold_in(key, 1))
    pixels = images.astype(jnp.float32) / 255
    crop = task.config.augment
    pixels = views.random_crop_flip(crop_key, pixels, crop.crop_padding, crop.flip)
    pixels = augment(augment_key, pixels, task.augment)
    targets = jax.nn.one_hot(labels, task.train.num_classes)
    targets = optax.smooth_labels(targets, task.config.label_smoothing)
    alphas = task.augment.mixup, task.augment.cutmix
    pixels, targets = mix(mix_key, pixels, targets, *alphas)
    teacher_view, student_view = pixels, pixels
    if task.method.multi_view:
        teacher_view, student_view = views.multi_view(view_key, pixels, task.views)

    def prepare(network: Network, view: jax.Array) -> jax.Array:
        view = views.resize(view, network.image_size)
        return views.normalize(view, network.mean, network.std)

    teacher_view = prepare(task.teacher or task.student, teacher_view)
    return teacher_view, prepare(task.student, student_view), targets


def train_step(
    task: Task,
    state: TrainState,
    teacher_variables: Any,
    resident: dict[str, jax.Array],
    batch: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the student and the method's modules and, when it is its turn, the adversary.

    Args:
      task: what stays the same; static.
      state: donated.
      teacher_variables: frozen.
      resident: the training split as `image`, uint8 [n, H, W, 3], and `label` [n]; or nothing.
      batch: `index` [N], this step's examples; where the split isn't resident also their `image`,
        uint8 [N, H, W, 3], and `label` [N].

    Returns:
      The new state and the step's metrics, scalars.
    """
    batch = batch | {name: array[batch["index"]] for name, array in resident.items()}
    parts = task.config.accumulate
    step_key = jax.random.fold_in(state.key, state.step)

    def part(carry: tuple, batch: dict[str, jax.Array], number: jax.Array) -> tuple:
        key = jax.random.fold_in(step_key, number) if parts > 1 else step_key
        now = dataclasses.replace(state, batch_stats=carry[0], method_state=carry[1])
        return gradients(task, now, teacher_variables, batch, key)

    carry = state.batch_stats, state.method_state
    (batch_stats, method_state), (grads, metrics) = accumulate(part, carry, batch, parts)
    params, opt_state = _update(task, "student", grads["student"], state.opt_state, state.params)
    method_params, method_opt_state = _update(
        task, "method", grads["method"], state.method_opt_state, state.method_params
    )
    adversary, adversary_opt_state = _update_adversary(task, state, grads["adversary"])
    metrics |= {"learning_rate": task.learning_rate_fn(state.step)}
    metrics |= {"gradient_norm": optax.tree.norm(grads["student"])}
    average, config = state.ema, task.config.ema
    if config.decay:
        trained = {"params": params, "batch_stats": batch_stats}
        average = ema.update(average, trained, config.decay, state.step, config.warmup)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        method_params=method_params,
        method_opt_state=method_opt_state,
        method_state=method_state,
        adversary=adversary,
        adversary_opt_state=adversary_opt_state,
        ema=average,
    )
    return state, metrics


def gradients(
    task: Task,
    state: TrainState,
    teacher_variables: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
) -> tuple[tuple[Any, Any], tuple[dict[str, Any], dict[str, jax.Array]]]:
    """One pass over a batch, or over a part of one.

    Returns:
      The running statistics and the method's state after it; and the gradients of "student",
      "method" and "adversary", with the metrics.
    """
    view_key, dropout_key, method_key = jax.random.split(key, 3)
    teacher_view, student_view, targets = create_views(
        task, view_key, batch["image"], batch["label"]
    )
    batch = batch | {"target": targets}
    teacher_out, metrics = {}, {}
    if task.teacher:
        teacher_out = apply(task.teacher.module, teacher_variables, teacher_view, train=False)[1]
        metrics["teacher_accuracy"] = _accuracy(teacher_out["logits"], batch["label"])

    def loss_fn(params, method_params):
        return student_loss(
            task, state, params, method_params, teacher_out, student_view, batch,
            dropout_key, method_key,
        )  # fmt: skip

    gradient = jax.grad(loss_fn, (0, 1), has_aux=True)
    (grads, method_grads), aux = gradient(state.params, state.method_params)
    adversary_grads, adversary_metrics = _adversary_gradient(
        task, state, teacher_out, aux["student_out"], method_key
    )
    all_grads = {"student": grads, "method": method_grads, "adversary": adversary_grads}
    metrics |= aux["metrics"] | adversary_metrics
    return (aux["batch_stats"], aux["method_state"]), (all_grads, metrics)


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
    label = label_loss(logits, batch["target"])
    if "aux_logits" in out:
        label = label + AUXILIARY_WEIGHT * label_loss(out["aux_logits"], batch["target"])
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


def _adversarys_turn(task: Task, state: TrainState) -> jax.Array:
    clock = state.step
    if task.method.adversary_clock == "epoch":
        clock = state.step // task.steps_per_epoch
    return clock % task.method.adversary_period == 0


def _adversary_gradient(task, state, teacher_out, student_out, key):
    """The adversary's gradient, on what the student's step saw; of most steps, zeros."""
    if not task.method.adversary_period:
        return {}, {}

    def loss_fn(adversary):
        return task.method.adversary_loss(
            adversary, state.method_params, teacher_out, student_out, key
        )

    def compute(adversary):
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(adversary)
        return grads, metrics

    def skip(adversary):
        metrics = jax.eval_shape(loss_fn, adversary)[1]
        return jax.tree.map(jnp.zeros_like, adversary), dict.fromkeys(metrics, jnp.nan)

    if task.method.adversary_period == 1:  # a conditional hides the work from XLA's optimizer
        return compute(state.adversary)
    return jax.lax.cond(_adversarys_turn(task, state), compute, skip, state.adversary)


def _update_adversary(task: Task, state: TrainState, grads: Any) -> tuple[Any, Any]:
    """The adversary's own step; most steps leave it as it is."""
    old = state.adversary, state.adversary_opt_state
    if not task.method.adversary_period:
        return old

    def update(adversary, opt_state):
        return _update(task, "adversary", grads, opt_state, adversary)

    if task.method.adversary_period == 1:
        return update(*old)
    return jax.lax.cond(_adversarys_turn(task, state), update, lambda *old: old, *old)


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
    feed = create_feed(task)
    eval_step = create_eval_step(task.student)
    step_fn = jax.jit(functools.partial(train_step, task), donate_argnums=0)
    steps = range(start + 1, task.total_steps + 1)
    for step, batch in zip(steps, feed.batches(start), strict=False):
        state, metrics = step_fn(state, teacher_variables, feed.arrays, batch)
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
    """The student alone, as its module takes it: its average, where there is one."""
    return state.ema or {"params": state.params, "batch_stats": state.batch_stats}


def _trained(variables: Any) -> dict[str, Any]:
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
