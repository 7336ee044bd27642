"""The training loop: teachers, baselines and every method, at every scale."""

import contextlib
import dataclasses
import functools
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xkd_jax import ema
from xkd_jax.analysis import memory
from xkd_jax.augment import multiview, ops
from xkd_jax.augment.mixup import mix
from xkd_jax.augment.policies import augment
from xkd_jax.checkpoint import Checkpoints, place
from xkd_jax.data.loader import batch_shapes, create_feed
from xkd_jax.distributed import sharding
from xkd_jax.distributed.processes import StopSignal
from xkd_jax.evaluate import create_eval_step, evaluate
from xkd_jax.experiment import Experiment, Network
from xkd_jax.methods.base import apply
from xkd_jax.optim import accumulate
from xkd_jax.reporting import nan_guard
from xkd_jax.reporting.logger import Reporter, say
from xkd_jax.reporting.summary import Best
from xkd_jax.state import TrainState, init_state, student_variables

AUXILIARY_WEIGHT = 0.4  # of Inception's second classifier, as TF-Slim and torchvision train it


def label_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of logits [N, K] with probabilities [N, K], the batch mean in float32."""
    return jnp.mean(optax.softmax_cross_entropy(logits.astype(jnp.float32), targets))


def create_views(
    experiment: Experiment, key: jax.Array, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the networks see of uint8 images [N, H, W, 3] with labels [N].

    Returns:
      The teacher's and the student's view, each normalised, and the targets [N, K].
    """
    crop_key, view_key = jax.random.split(key)
    augment_key, mix_key = jax.random.split(jax.random.fold_in(key, 1))
    pixels = images.astype(jnp.float32) / 255
    crop = experiment.config.augment
    pixels = ops.random_crop_flip(crop_key, pixels, crop.crop_padding, crop.flip)
    pixels = augment(augment_key, pixels, experiment.augment)
    targets = jax.nn.one_hot(labels, experiment.train.num_classes)
    targets = optax.smooth_labels(targets, experiment.config.label_smoothing)
    alphas = experiment.augment.mixup, experiment.augment.cutmix
    pixels, targets = mix(mix_key, pixels, targets, *alphas)
    teacher_view, student_view = pixels, pixels
    if experiment.method.multi_view:
        teacher_view, student_view = multiview.multi_view(view_key, pixels, experiment.views)

    def prepare(network: Network, view: jax.Array) -> jax.Array:
        view = ops.resize(view, network.image_size)
        return ops.normalize(view, network.mean, network.std)

    teacher_view = prepare(experiment.teacher or experiment.student, teacher_view)
    return teacher_view, prepare(experiment.student, student_view), targets


def train_step(
    experiment: Experiment,
    state: TrainState,
    teacher_variables: Any,
    resident: dict[str, jax.Array],
    batch: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the student and the method's modules and, when it is its turn, the adversary.

    Args:
      experiment: what stays the same; static.
      state: donated.
      teacher_variables: frozen.
      resident: the training split as `image`, uint8 [n, H, W, 3], and `label` [n]; or nothing.
      batch: `index` [N], this step's examples; where the split isn't resident also their `image`,
        uint8 [N, H, W, 3], and `label` [N].

    Returns:
      The new state and the step's metrics: scalars, and `nan_guard.FLAGS` of the gradients.
    """
    batch = batch | sharding.take(experiment.mesh, resident, batch["index"])
    layout = sharding.of_teacher(experiment.mesh, teacher_variables, experiment.config.mesh.teacher)
    teacher_gather = _block_gather(experiment, teacher_variables, layout)
    teacher_variables = sharding.gather(experiment.mesh, teacher_variables)
    whole = dataclasses.replace(state, params=sharding.gather(experiment.mesh, state.params))
    parts = experiment.config.accumulate
    step_key = jax.random.fold_in(state.key, state.step)

    def part(carry: tuple, batch: dict[str, jax.Array], number: jax.Array) -> tuple:
        key = jax.random.fold_in(step_key, number) if parts > 1 else step_key
        now = dataclasses.replace(whole, batch_stats=carry[0], method_state=carry[1])
        return gradients(experiment, now, teacher_variables, batch, key, teacher_gather)

    carry = state.batch_stats, state.method_state
    (batch_stats, method_state), (grads, metrics) = accumulate(part, carry, batch, parts)
    student_stays, method_stays = experiment.method.freeze(epochs_so_far(experiment, state))
    params, opt_state = _update(
        experiment, "student", grads["student"], state.opt_state, state.params
    )
    old = state.params, state.opt_state, state.batch_stats
    params, opt_state, batch_stats = _keep(student_stays, old, (params, opt_state, batch_stats))
    method_params, method_opt_state = _update(
        experiment, "method", grads["method"], state.method_opt_state, state.method_params
    )
    method_params = _keep(method_stays, state.method_params, method_params)
    adversary, adversary_opt_state = _update_adversary(experiment, state, grads["adversary"])
    metrics |= {"learning_rate": experiment.learning_rate_fn(state.step)}
    norm = optax.tree.norm(grads["student"])
    metrics |= {"gradient_norm": norm, nan_guard.FLAGS: nan_guard.flags(grads)}
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
        ema=_average(experiment, state, {"params": params, "batch_stats": batch_stats}),
    )
    return state, metrics


def _block_gather(
    experiment: Experiment, variables: Any, shardings: Any
) -> sharding.BlockGather | None:
    """For a sharded teacher whose blocks may be a scan; None if there is nothing to gather."""
    teacher = experiment.teacher
    if teacher is None or teacher.module.kind != "transformer":
        return None
    if all(s.is_fully_replicated for s in jax.tree.leaves(shardings)):
        return None
    return sharding.BlockGather(variables["params"], shardings["params"])


def gradients(
    experiment: Experiment,
    state: TrainState,
    teacher_variables: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    teacher_gather: sharding.BlockGather | None = None,
) -> tuple[tuple[Any, Any], tuple[dict[str, Any], dict[str, jax.Array]]]:
    """One pass over a batch, or over a part of one.

    Returns:
      The running statistics and the method's state after it; and the gradients of "student",
      "method" and "adversary", with the metrics.
    """
    view_key, dropout_key, method_key = jax.random.split(key, 3)
    teacher_view, student_view, targets = create_views(
        experiment, view_key, batch["image"], batch["label"]
    )
    batch = batch | {"target": targets}
    teacher_out, metrics = {}, {}
    if experiment.teacher:
        options = {"gather": teacher_gather} if teacher_gather else {}
        teacher_out = apply(
            experiment.teacher.module, teacher_variables, teacher_view, train=False, **options
        )[1]
        metrics["teacher_accuracy"] = _accuracy(teacher_out["logits"], batch["label"])

    def loss_fn(params, method_params):
        return student_loss(
            experiment, state, params, method_params, teacher_out, student_view, batch,
            dropout_key, method_key,
        )  # fmt: skip

    gradient = jax.grad(loss_fn, (0, 1), has_aux=True)
    (grads, method_grads), aux = gradient(state.params, state.method_params)
    adversary_grads, adversary_metrics = _adversary_gradient(
        experiment, state, teacher_out, aux["student_out"], method_key
    )
    if experiment.config.mesh.student == "fsdp":  # summed where its share of the weights is
        split = sharding.split_large(experiment.mesh, grads)
        grads = jax.lax.with_sharding_constraint(grads, split)
    all_grads = {"student": grads, "method": method_grads, "adversary": adversary_grads}
    metrics |= aux["metrics"] | adversary_metrics
    return (aux["batch_stats"], aux["method_state"]), (all_grads, metrics)


def student_loss(
    experiment: Experiment,
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
        experiment.student.module,
        {"params": params, "batch_stats": state.batch_stats},
        view,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": dropout_key},
    )
    label = label_loss(experiment.method.label_logits(out), batch["target"])
    if "aux_logits" in out:
        label = label + AUXILIARY_WEIGHT * label_loss(out["aux_logits"], batch["target"])
    progress = epochs_so_far(experiment, state)
    extra, method_state, metrics = experiment.method.loss(
        method_params, state.method_state, teacher_out, out, batch, method_key, progress,
        state.adversary,
    )  # fmt: skip
    weight = experiment.method.label_weight
    if experiment.method.first_phase:
        weight = jnp.where(progress < 0, 0.0, weight)
    loss = weight * label + extra
    accuracy = _accuracy(logits, batch["label"])
    metrics = metrics | {"loss": loss, "label_loss": label, "accuracy": accuracy}
    return loss, {
        "student_out": out,
        "batch_stats": updates.get("batch_stats", {}),
        "method_state": method_state,
        "metrics": metrics,
    }


def epochs_so_far(experiment: Experiment, state: TrainState) -> jax.Array:
    """Since the training proper began, fractional; negative in the method's first phase."""
    return state.step / experiment.steps_per_epoch - experiment.method.first_phase


def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits, -1) == labels)


def _update(
    experiment: Experiment, part: str, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    updates, opt_state = experiment.optimizers[part].update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _keep(stays: Any, old: Any, new: Any) -> Any:
    """`new`, but `old` where `stays`, one boolean or a prefix of the trees, is true."""

    def choose(stays: Any, old: Any, new: Any) -> Any:
        if stays is False:
            return new
        return jax.tree.map(lambda a, b: jnp.where(stays, a, b), old, new)

    return jax.tree.map(choose, stays, old, new)


def _average(experiment: Experiment, state: TrainState, trained: Any) -> Any:
    options = experiment.config.ema
    if not options.decay:
        return state.ema
    return ema.update(state.ema, trained, options.decay, state.step, options.warmup)


def _adversarys_turn(experiment: Experiment, state: TrainState) -> jax.Array:
    clock = state.step
    if experiment.method.adversary_clock == "epoch":
        clock = state.step // experiment.steps_per_epoch
    return clock % experiment.method.adversary_period == 0


def _adversary_gradient(experiment, state, teacher_out, student_out, key):
    """The adversary's gradient, on what the student's step saw; of most steps, zeros."""
    if not experiment.method.adversary_period:
        return {}, {}

    def loss_fn(adversary):
        return experiment.method.adversary_loss(
            adversary, state.method_params, teacher_out, student_out, key
        )

    def compute(adversary):
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(adversary)
        return grads, metrics

    def skip(adversary):
        metrics = jax.eval_shape(loss_fn, adversary)[1]
        return jax.tree.map(jnp.zeros_like, adversary), dict.fromkeys(metrics, jnp.nan)

    if experiment.method.adversary_period == 1:  # a conditional hides the work from XLA's optimizer
        return compute(state.adversary)
    return jax.lax.cond(_adversarys_turn(experiment, state), compute, skip, state.adversary)


def _update_adversary(experiment: Experiment, state: TrainState, grads: Any) -> tuple[Any, Any]:
    """The adversary's own step; most steps leave it as it is."""
    old = state.adversary, state.adversary_opt_state
    if not experiment.method.adversary_period:
        return old

    def update(adversary, opt_state):
        return _update(experiment, "adversary", grads, opt_state, adversary)

    if experiment.method.adversary_period == 1:
        return update(*old)
    return jax.lax.cond(_adversarys_turn(experiment, state), update, lambda *old: old, *old)


def compile_step(
    experiment: Experiment, state: Any, teacher_variables: Any, resident: Any
) -> jax.stages.Compiled:
    """`train_step`, compiled ahead of time for a batch as the experiment's feed yields it.

    Args:
      experiment: as for `train_step`.
      state: an array or a shape with its sharding for each leaf, as everything that follows.
      teacher_variables: as for `train_step`.
      resident: as for `train_step`.

    Raises:
      UserError: the compiler says that it doesn't fit.
    """
    out_shardings = sharding.shardings(state), sharding.replicated(experiment.mesh)
    step_fn = jax.jit(
        functools.partial(train_step, experiment), donate_argnums=0, out_shardings=out_shardings
    )
    lowered = step_fn.lower(state, teacher_variables, resident, batch_shapes(experiment))
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise memory.too_large(f"a step doesn't fit on the devices ({reason})") from error


def run(experiment: Experiment, folder: Path) -> tuple[TrainState, signal.Signals | None]:
    """Trains from the newest checkpoint in `folder`, or from the start, to the end or a signal.

    Args:
      experiment: what to train.
      folder: the run's; metrics and checkpoints go there.

    Returns:
      The last state, which is saved, and the signal that ended the loop early, if one did.

    Raises:
      UserError: a step is not finite, a checkpoint can't be written, or it belongs to another
        teacher.
      OSError: something else can't be written.
    """
    config = experiment.config
    fingerprint = experiment.teacher.fingerprint if experiment.teacher else ""
    saved_in = place(folder, config.checkpoint_dir)
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(saved_in, config.keep_checkpoints, fingerprint)
        stack.callback(checkpoints.close)
        state = init_state(experiment)
        state = checkpoints.restore(state) or state
        start = int(state.step)
        check = nan_guard.create_guard(experiment, state, folder).check
        reporter = Reporter(
            folder, start, experiment.total_steps, config.batch_size, config.log_every, check
        )
        stack.callback(reporter.close)
        stop = stack.enter_context(StopSignal())
        state = _loop(
            experiment, state, start, reporter, checkpoints, Best(experiment, folder), stop
        )
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
    config, feed, teacher = experiment.config, create_feed(experiment), {}
    if start == experiment.total_steps:
        return state
    if experiment.teacher:
        variables = experiment.teacher.variables
        shardings = sharding.of_teacher(experiment.mesh, variables, config.mesh.teacher)
        teacher = sharding.put(variables, shardings)
    eval_step = create_eval_step(experiment.student, experiment.evaluation.crop_pct)
    step_fn = compile_step(experiment, state, teacher, feed.arrays)
    sizes = memory.parts(state, teacher, feed.arrays)
    sizes["temporaries"] = memory.temporaries(step_fn)
    say(memory.describe(sizes, memory.device_limit()))
    steps = range(start + 1, experiment.total_steps + 1)
    for step, batch in zip(steps, feed.batches(start), strict=False):
        state, metrics = step_fn(state, teacher, feed.arrays, batch)
        # The metrics of the step before: the device is already busy with this one.
        reporter.flush()
        reporter.take(step, metrics)
        last = step == experiment.total_steps
        if last or step % (config.eval_every * experiment.steps_per_epoch) == 0:
            reporter.flush()
            begun = time.monotonic()
            scores = evaluate(
                eval_step, student_variables(state), experiment.evaluation, experiment.mesh
            )
            best.update(step, student_variables(state), scores)
            reporter.evaluated(step, scores, time.monotonic() - begun)
        stopping = stop.asked(step)
        if last or stopping or step % config.checkpoint_every == 0:
            reporter.flush()
            checkpoints.save(step, state)
        if stopping:
            break
    return state
