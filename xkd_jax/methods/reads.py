"""What a method reads of the teacher's outputs, found out by tracing its loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xkd_jax.errors import UserError
from xkd_jax.methods.base import Method, Outputs, split_static


def needs_logits(method: Method, teacher_out: Outputs, student_out: Outputs) -> bool:
    """Whether the method's loss needs the teacher's logits, rather than features only.

    Nothing is computed: initialisation and loss are traced on outputs without logits. If
    the student has none either, reading the student's counts too.

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
        teacher, student = Features(teacher | static[0]), Features(student | static[1])
        params, state = method.init(key, teacher, student, np.arange(2))
        adversary = method.init_adversary(key, teacher, student) if method.adversary_period else {}
        classes = student["logits"].shape[-1] if "logits" in student else 0
        shapes = example_batch(1, classes)
        batch = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        progress = jnp.zeros(())
        return method.loss(params, state, teacher, student, batch, key, progress, adversary).value

    arrays, static = zip(*map(split_static, (_features(teacher_out), student_out)), strict=True)
    try:
        jax.eval_shape(trace, *arrays, jax.random.key(0))
    except _LogitsRead:
        return True
    return False


def example_batch(count: int, classes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The entries of a batch that methods read, as shapes; without `classes` there is one target.

    Args:
      count: the number of images.
      classes: of the student.
    """
    integers = jax.ShapeDtypeStruct((count,), jnp.int32)
    target = jax.ShapeDtypeStruct((count, max(classes, 1)), jnp.float32)
    return {"label": integers, "index": integers, "target": target}


def check_logits(method: Method, teacher_out: Outputs, student_out: Outputs) -> None:
    """Checks that the teacher has logits if the method reads them; arguments as `needs_logits`.

    Raises:
      UserError: it has none.
    """
    if "logits" not in teacher_out and needs_logits(method, teacher_out, student_out):
        raise UserError(
            "this method reads the teacher's logits, but the teacher has no classifier; take a "
            "method that reads features, such as cakd."
        )


class _LogitsRead(Exception):
    """A loss has read logits."""


def _features(out: Outputs) -> Outputs:
    return {key: value for key, value in out.items() if not key.endswith("logits")}
