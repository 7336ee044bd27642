"""What a method reads of the teacher's outputs, found out by tracing its loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xkd_jax.methods.base import Method, Outputs


def needs_logits(method: Method, teacher_out: Outputs, student_out: Outputs) -> bool:
    """Whether the method's loss needs the teacher's logits, rather than features only.

    Nothing is computed: initialisation and loss are traced on outputs without logits.

    Args:
      method: with its options; supports these networks.
      teacher_out: the teacher's outputs for one image; shapes suffice, except for static values.
      student_out: the student's.
    """

    class Features(dict):
        def __missing__(self, key: str) -> Any:
            if key.endswith("logits"):
                raise _LogitsRead
            raise KeyError(key)

    def trace(teacher: Outputs, student: Outputs, key: jax.Array) -> jax.Array:
        teacher, student = Features(teacher | static[0]), student | static[1]
        params, state = method.init(key, teacher, student, np.arange(2))
        adversary = method.init_adversary(key, teacher, student) if method.adversary_period else {}
        batch = {"label": jnp.zeros(1, jnp.int32), "index": jnp.zeros(1, jnp.int32)}
        progress = jnp.zeros(())
        return method.loss(params, state, teacher, student, batch, key, progress, adversary).value

    outs = _features(teacher_out), student_out
    is_array = lambda value: hasattr(value, "shape")  # noqa: E731
    arrays = [{k: v for k, v in out.items() if is_array(v)} for out in outs]
    static = [{k: v for k, v in out.items() if not is_array(v)} for out in outs]
    try:
        jax.eval_shape(trace, *arrays, jax.random.key(0))
    except _LogitsRead:
        return True
    return False


class _LogitsRead(Exception):
    """A loss has read logits."""


def _features(out: Outputs) -> Outputs:
    return {key: value for key, value in out.items() if not key.endswith("logits")}
