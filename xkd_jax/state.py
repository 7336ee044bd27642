"""The training state: fields and initialisation."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from xkd_jax.methods.base import Method
from xkd_jax.model import Model
from xkd_jax.tasks.base import Task


@flax.struct.dataclass
class TrainState:
    """The training state, all of which is checkpointed.

    Neither the teacher nor the position in the data is part of it: the order of the examples is a
    function of the seed and the step.

    Attributes:
      step: number of steps so far, int32.
      key: the run's random key; every step folds its number into it.
      params: parameters by part: "student", "method" (such as projectors), "adversary".
      opt_state: optimizer states by part.
      batch_stats: the student's running statistics (BatchNorm).
      method_state: the method's state, such as a memory bank.
      ema: moving averages of the student's `params` and `batch_stats`; empty if off.
    """

    step: jax.Array
    key: jax.Array
    params: dict[str, Any]
    opt_state: dict[str, Any]
    batch_stats: Any
    method_state: Any
    ema: Any


def create_state(
    key: jax.Array,
    teacher: Model | None,
    student: Model,
    method: Method,
    optimizers: Mapping[str, optax.GradientTransformation],
    labels: Any,
    average: bool,
    task: Task,
) -> TrainState:
    """The state before the first step.

    Args:
      key: a typed key.
      teacher: the teacher, if there is one.
      student: the student.
      method: the method, which initialises its parameters, its state and the adversary.
      optimizers: optimizers by part.
      labels: labels of the training set [n], for methods with a memory bank.
      average: whether to keep a moving average of the student.
      task: the task, which initialises the student.
    """
    student_key, method_key, adversary_key, train_key = jax.random.split(key, 4)
    variables = task.initial(student, student_key)
    outs = teacher.zero_outputs() if teacher else {}, student.zero_outputs()
    of_method, method_state = method.init(method_key, *outs, labels)
    adversary = method.init_adversary(adversary_key, *outs) if method.adversary_period else {}
    params = {"student": variables["params"], "method": of_method, "adversary": adversary}
    trained = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=train_key,
        params=params,
        opt_state={part: tx.init(params[part]) for part, tx in optimizers.items()},
        batch_stats=trained["batch_stats"],
        method_state=method_state,
        # A copy, so that both can be donated.
        ema=jax.tree.map(jnp.copy, trained) if average else {},
    )


def student_variables(state: TrainState) -> dict[str, Any]:
    """The student's variables for `module.apply`: the moving average, if there is one."""
    return state.ema or {"params": state.params["student"], "batch_stats": state.batch_stats}
