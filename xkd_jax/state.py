"""All that changes while training: what it is, how it starts, and how it lies on the mesh."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from xkd_jax import ema
from xkd_jax.distributed import sharding
from xkd_jax.experiment import Experiment


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


def init_state(experiment: Experiment) -> TrainState:
    """The state before the first step, laid out on the mesh."""
    # It runs once: on a CPU, compiling it well would take longer than the first training steps.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = sharding.shardings(state_shapes(experiment))
    init = jax.jit(partial(_init, experiment), out_shardings=shardings, compiler_options=options)
    return init(jax.random.key(experiment.config.seed))


def state_shapes(experiment: Experiment) -> TrainState:
    """The state as shapes with their places on the mesh; nothing is computed."""
    shapes = jax.eval_shape(partial(_init, experiment), jax.random.key(0))
    split = ("params", "opt_state", "ema") if experiment.config.mesh.student == "fsdp" else ()
    return sharding.shaped(shapes, sharding.of_state(experiment.mesh, shapes, split))


def _init(experiment: Experiment, key: jax.Array) -> TrainState:
    student_out, teacher_out = experiment.student.output_shapes(), {}
    if experiment.teacher:
        teacher_out = experiment.teacher.output_shapes()

    def zeros(out):
        is_shape = jax.ShapeDtypeStruct
        return {k: jnp.zeros_like(v) if isinstance(v, is_shape) else v for k, v in out.items()}

    student_key, method_key, adversary_key, train_key = jax.random.split(key, 4)
    variables = experiment.student.variables or experiment.student.init(student_key)
    outs = zeros(teacher_out), zeros(student_out)
    params, method_state = experiment.method.init(method_key, *outs, experiment.train.labels)
    adversary = {}
    if experiment.method.adversary_period:
        adversary = experiment.method.init_adversary(adversary_key, *outs)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=train_key,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=experiment.optimizers["student"].init(variables["params"]),
        method_params=params,
        method_opt_state=experiment.optimizers["method"].init(params),
        method_state=method_state,
        adversary=adversary,
        adversary_opt_state=experiment.optimizers["adversary"].init(adversary),
        ema=ema.init(_trained(variables)) if experiment.config.ema.decay else {},
    )


def student_variables(state: TrainState) -> dict[str, Any]:
    """The student alone, as its module takes it: its average, where there is one."""
    return state.ema or {"params": state.params, "batch_stats": state.batch_stats}


def _trained(variables: Any) -> dict[str, Any]:
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
