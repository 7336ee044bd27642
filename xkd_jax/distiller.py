"""The training step: from images to new weights, for every method and scale.

`train_step` is Algorithm 1 of the paper; `gradients` is one pass over a batch; `moves` (turns.py)
decides which parts are trained in a step and which are frozen. `Distiller` holds what is constant
during training, `TrainState` (state.py) what changes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from xkd_jax.augment import ops
from xkd_jax.augment.pipeline import Pipeline
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError
from xkd_jax.methods import create_method
from xkd_jax.methods.base import Method, Outputs
from xkd_jax.model import Model, merge_sources
from xkd_jax.optim import accumulate, average, scale_parts, select
from xkd_jax.reporting import nan_guard
from xkd_jax.state import TrainState, create_state, student_variables
from xkd_jax.tasks.base import Task
from xkd_jax.tasks.classification import Classification, accuracy
from xkd_jax.teacher.forward import CACHED, create_teacher_fn
from xkd_jax.turns import adversarys_turn, epochs, moves


@dataclasses.dataclass(frozen=True, eq=False)
class Distiller:
    """Everything about the training step that is constant during training.

    Attributes:
      teacher: a frozen model with weights; None for methods that don't need a teacher.
      student: the model to train; starts from its weights if it has any.
      method: a `Method`, or the name of one with its default options, such as "cakd+logits".
      optimizer: optimizer of the student and, by default, of the method's parameters.
      method_optimizer: optimizer of the method's parameters; None for `optimizer`.
      adversary_optimizer: optimizer of the adversary, for methods that have one.
      augment: the augmentation.
      steps_per_epoch: number of steps per epoch, for methods with phases or warm-ups.
      labels: labels of the training set [n], for methods with a memory bank (crd).
      accumulate: number of microbatches per batch (gradient accumulation).
      ema_decay: decay of the student's exponential moving average; 0: off.
      ema_warmup: see `optim.average`.
      view_seed: seed of the random views; below 0: they depend on the state's key.
      mesh: the devices.
      teacher_rule: "replicated", "fsdp" or "auto", see `sharding.of_teacher`.
      student_rule: "replicated" or "fsdp", see `sharding.of_state`.
      task: what the student is trained for.

    Raises:
      UserError: the method doesn't support this pair, or reads logits that the teacher lacks.
    """

    teacher: Model | None
    student: Model
    method: Method
    optimizer: optax.GradientTransformation
    method_optimizer: optax.GradientTransformation | None = None
    adversary_optimizer: optax.GradientTransformation = dataclasses.field(
        default_factory=lambda: optax.adam(1e-3)
    )
    augment: Pipeline = dataclasses.field(default_factory=Pipeline)
    steps_per_epoch: int = 1
    labels: Any = ()
    accumulate: int = 1
    ema_decay: float = 0.0
    ema_warmup: bool = False
    view_seed: int = -1
    mesh: Mesh = dataclasses.field(default_factory=sharding.create_mesh)
    teacher_rule: str = "auto"
    student_rule: str = "replicated"
    task: Task = dataclasses.field(default_factory=Classification)

    def __post_init__(self):
        if isinstance(self.method, str):
            object.__setattr__(self, "method", create_method(self.method, {}))
        if not self.method.needs_teacher:
            return
        if self.teacher is None:
            raise UserError("this method needs a teacher; pass a model with weights.")
        self.task.check(self.method, self.teacher, self.student)

    def init(self, key: jax.Array, images: Any = None) -> TrainState:
        """The state before the first step, on the mesh.

        Args:
          key: a typed key, such as `jax.random.key(0)`.
          images: example images; only their shape and dtype are checked.

        Raises:
          UserError: the images have the wrong shape or dtype.
        """
        if images is not None:
            ops.check_images(images)
        return self._init(key)

    @functools.cached_property
    def _init(self) -> Any:
        # Runs once a run: on a CPU, XLA's optimisations would take longer than the first steps.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        init = functools.partial(_init, self)
        return jax.jit(init, out_shardings=self.shardings.state, compiler_options=options)

    def step(
        self, state: TrainState, images: Any, labels: Any, index: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One training step, for custom training loops; the library's own is in `xkd_jax.train`.

        Args:
          state: from `init` or the previous step; donated.
          images: [N, H, W, 3], uint8 or float in [0, 1].
          labels: int [N]; for a detector the `size`, `boxes`, `classes` and perhaps `masks` of the
            images, see `data.detection_loader`.
          index: int [N], indices of the examples in the training set, for methods with a memory
            bank.

        Returns:
          The new state, and metrics: scalars on the device.

        Raises:
          UserError: the images have the wrong shape or dtype, or the batch can't be split evenly
            over the devices.
        """
        ops.check_images(images)
        if len(images) % (self.mesh.size * self.accumulate):
            raise UserError(
                f"a batch of {len(images)} doesn't divide evenly over {self.mesh.size} devices and "
                f"accumulate={self.accumulate}; take a multiple of "
                f"{self.mesh.size * self.accumulate}."
            )
        index = jnp.zeros(len(images), jnp.int32) if index is None else index
        labels = labels if isinstance(labels, dict) else {"label": labels}
        batch = {"image": images, "index": index, **labels}
        batch = {name: jnp.asarray(array) for name, array in batch.items()}
        batch = jax.device_put(batch, self.shardings.batch)
        state, metrics = self._step(state, self.teacher_variables, batch)
        return state, {name: value for name, value in metrics.items() if value.ndim == 0}

    @functools.cached_property
    def _step(self) -> Any:
        return jax.jit(functools.partial(train_step, self), donate_argnums=0)

    def student_model(self, state: TrainState) -> Model:
        """The current student (its moving average, if there is one), on the host."""
        variables = sharding.to_host(student_variables(state), self.mesh)
        sources = merge_sources(self.student, self.teacher)
        return dataclasses.replace(self.student, variables=variables, sources=sources)

    @property
    def optimizers(self) -> dict[str, optax.GradientTransformationExtraArgs]:
        """The optimizers of "student", "method" and "adversary"."""
        of_method = self.method_optimizer or self.optimizer
        parts = {
            "student": self.optimizer,
            "method": scale_parts(of_method, self.method.rates),
            "adversary": self.adversary_optimizer,
        }
        return {name: optax.with_extra_args_support(tx) for name, tx in parts.items()}

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        """The state as `jax.ShapeDtypeStruct`s with shardings; nothing is computed."""
        return sharding.shaped(self._shapes, self.shardings.state)

    @functools.cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(functools.partial(_init, self), jax.random.key(0))

    @functools.cached_property
    def shardings(self) -> sharding.Shardings:
        """The shardings of the state, the teacher and the batch; computed once."""
        teacher = self.teacher.shapes if self.teacher else {}
        return sharding.Shardings(
            state=sharding.of_state(self.mesh, self._shapes, self.student_rule),
            teacher=sharding.of_teacher(self.mesh, teacher, self.teacher_rule),
            batch=sharding.over_batch(self.mesh),
        )

    @functools.cached_property
    def teacher_variables(self) -> Any:
        """The teacher's variables on the mesh; empty without a teacher."""
        variables = self.teacher.variables if self.teacher else {}
        return sharding.put(variables, self.shardings.teacher)


def _init(distiller: Distiller, key: jax.Array) -> TrainState:
    return create_state(
        key, distiller.teacher, distiller.student, distiller.method, distiller.optimizers,
        distiller.labels, average=distiller.ema_decay > 0, task=distiller.task,
    )  # fmt: skip


def train_step(
    distiller: Distiller,
    state: TrainState,
    teacher_variables: Any,
    batch: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the student, the method's parameters and, in some steps, the adversary.

    Algorithm 1 of the paper.

    Args:
      distiller: everything that is constant; static.
      state: the training state.
      teacher_variables: the frozen teacher's variables.
      batch: `image` [N, H, W, 3], uint8 or float in [0, 1]; `index` [N], the examples' indices in
        the training set; `label` [N], or a detector's targets, see `data.detection_loader`. With
        fixed views, `view` [N], see `augment.fixed`. If the teacher is cached, its outputs by name
        under `teacher.CACHED`; `teacher_variables` are then the outputs that are the same for all
        images.

    Returns:
      The new state and the step's metrics: scalars, and `nan_guard.FLAGS` of the gradients.
    """
    student = sharding.gather(distiller.mesh, state.params["student"])
    whole = dataclasses.replace(state, params=state.params | {"student": student})
    teacher_fn = create_teacher_fn(distiller, teacher_variables, CACHED in batch)

    def one_part(carry: tuple, batch: dict[str, jax.Array], number: jax.Array) -> tuple:
        now = dataclasses.replace(whole, batch_stats=carry[0], method_state=carry[1])
        return gradients(distiller, now, teacher_fn, batch, number)

    carry = state.batch_stats, state.method_state
    (batch_stats, method_state), (grads, metrics) = accumulate(
        one_part, carry, batch, distiller.accumulate
    )
    moving = moves(distiller, state, grads)
    params, opt_state = {}, {}
    for part, optimizer in distiller.optimizers.items():
        old, old_opt_state = state.params[part], state.opt_state[part]
        updates, new_opt_state = optimizer.update(grads[part], old_opt_state, old, step=state.step)
        params[part] = select(moving[part], optax.apply_updates(old, updates), old, old)
        opt_state[part] = select(moving[part], new_opt_state, old_opt_state, old)
    batch_stats = select(moving["batch_stats"], batch_stats, state.batch_stats, state.batch_stats)
    ema = state.ema
    if distiller.ema_decay:
        trained = {"params": params["student"], "batch_stats": batch_stats}
        ema = average(ema, trained, distiller.ema_decay, state.step, distiller.ema_warmup)
    metrics |= {
        "gradient_norm": optax.tree.norm(grads["student"]),
        nan_guard.FLAGS: nan_guard.flags(grads),
    }
    new_state = TrainState(
        state.step + 1, state.key, params, opt_state, batch_stats, method_state, ema
    )
    return new_state, metrics


def gradients(
    distiller: Distiller,
    state: TrainState,
    teacher_fn: Callable[[jax.Array, Any], Outputs],
    batch: dict[str, jax.Array],
    number: jax.Array,
) -> tuple[tuple[Any, Any], tuple[dict[str, Any], dict[str, jax.Array]]]:
    """One forward and backward pass over a batch, or over microbatch `number`.

    Returns:
      The new running statistics and method state; and the gradients by part, with the metrics.
    """
    method, task = distiller.method, distiller.task
    view_key, dropout_key, method_key = random_keys(distiller, state, number)
    teacher_view, student_view, batch = task.create_views(distiller, view_key, batch)
    teacher_out, metrics = teacher_fn(teacher_view, batch.get(CACHED)), {}
    if "label" in batch and "logits" in batch.get(CACHED, teacher_out):
        metrics["teacher_accuracy"] = accuracy(teacher_out["logits"], batch["label"])
    progress = epochs(distiller, state)
    label_weight = method.label_weight
    if method.first_phase:
        label_weight = jnp.where(progress < 0, 0.0, label_weight)

    def loss_fn(params: dict[str, Any]) -> tuple[jax.Array, tuple]:
        variables = {"params": params["student"], "batch_stats": state.batch_stats}
        student_out, batch_stats = task.forward(
            distiller, variables, student_view, batch, dropout_key
        )
        term = method.loss(
            params["method"], state.method_state, task.teach(teacher_out, student_out), student_out,
            batch, method_key, progress, state.params["adversary"],
        )  # fmt: skip
        loss, scalars = term.value, dict(term.metrics)
        if labels := task.label_terms(method, student_out, batch):  # the data have labels
            loss = label_weight * labels["label_loss"] + term.value
            scalars |= labels
        return loss, (term, batch_stats, scalars | {"loss": loss})

    trained = {part: state.params[part] for part in ("student", "method")}
    grads, (term, batch_stats, scalars) = jax.grad(loss_fn, has_aux=True)(trained)
    grads["adversary"], of_adversary = adversary_gradient(distiller, state, term.judged)
    if distiller.student_rule == "fsdp":  # reduced to the shard that each device updates
        layout = distiller.shardings.state.params["student"]
        grads["student"] = jax.lax.with_sharding_constraint(grads["student"], layout)
    return (batch_stats, term.state), (grads, metrics | scalars | of_adversary)


def random_keys(distiller: Distiller, state: TrainState, number: jax.Array) -> list[jax.Array]:
    """The keys of the views, of dropout and of the method, for microbatch `number` of a step."""

    def split(key: jax.Array) -> list[jax.Array]:
        key = jax.random.fold_in(key, state.step)
        if distiller.accumulate > 1:
            key = jax.random.fold_in(key, number)
        return list(jax.random.split(key, 3))

    keys = split(state.key)
    if distiller.view_seed >= 0:
        keys[0] = split(jax.random.key(distiller.view_seed))[0]
    return keys


def adversary_gradient(
    distiller: Distiller, state: TrainState, judged: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """The adversary's gradient and metrics; zeros and NaN in steps that don't update it."""
    method, adversary = distiller.method, state.params["adversary"]
    if not method.adversary_period:
        return {}, {}
    judged = jax.lax.stop_gradient(judged)

    def loss_fn(adversary):
        return method.adversary_loss(adversary, judged)

    def compute(adversary):
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(adversary)
        return grads, metrics

    def skip(adversary):
        metrics = jax.eval_shape(loss_fn, adversary)[1]
        return jax.tree.map(jnp.zeros_like, adversary), dict.fromkeys(metrics, jnp.nan)

    if method.adversary_period == 1:  # XLA doesn't optimise across a conditional
        return compute(adversary)
    return jax.lax.cond(adversarys_turn(distiller, state), compute, skip, adversary)
