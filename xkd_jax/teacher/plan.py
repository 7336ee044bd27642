"""Which of a teacher's outputs a method reads: found by tracing its loss."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from xkd_jax.errors import UserError
from xkd_jax.methods.base import Outputs, apply, arrays_of, split_static
from xkd_jax.methods.reads import example_batch
from xkd_jax.model import Model

if TYPE_CHECKING:
    from xkd_jax.distiller import Distiller

_IMAGES = 2  # traced at once, to distinguish outputs with a row per image from constant ones


@dataclasses.dataclass(frozen=True)
class Plan:
    """The outputs of a teacher that a method reads, as they are stored.

    Attributes:
      rows: outputs with a row per image: the shape of one row, and the dtype in the cache.
      constants: outputs that are the same for all images, such as a Swin's attention bias.
    """

    rows: dict[str, jax.ShapeDtypeStruct]
    constants: dict[str, jax.ShapeDtypeStruct]

    @property
    def bytes_per_view(self) -> int:
        """Bytes of one view of one image."""
        return sum(row_bytes(row) for row in self.rows.values())


def row_bytes(row: jax.ShapeDtypeStruct) -> int:
    """Bytes of one row."""
    return math.prod(row.shape) * row.dtype.itemsize


def plan(distiller: "Distiller") -> Plan:
    """The outputs of the teacher that the distiller's method reads; nothing is computed.

    Raises:
      UserError: they can't be cached.
    """
    teacher = distiller.teacher
    assert teacher is not None
    if distiller.method.teacher_batch_stats and teacher.shapes.get("batch_stats"):
        raise UserError(
            "teacher.cache can't store outputs that depend on the other images of a batch; set the "
            "method's teacher_batch_stats=False, or teacher.cache=''."
        )
    rows, constants = {}, {}
    for name, shape in read_outputs(distiller)[0].items():
        single = teacher.output_shapes[name]
        if shape.shape == (_IMAGES, *single.shape[1:]):
            rows[name] = jax.ShapeDtypeStruct(single.shape[1:], stored_dtype(shape.dtype))
        elif shape.shape == single.shape:
            constants[name] = jax.ShapeDtypeStruct(single.shape, np.dtype(np.float32))
        else:
            raise UserError(
                f"teacher.cache can't store the teacher's {name}, which has no row per image; set "
                "teacher.cache=''."
            )
    return Plan(rows, constants)


def stored_dtype(dtype: Any) -> np.dtype:
    """float16 for floating-point outputs; others keep their dtype."""
    return np.dtype(np.float16) if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)


def read_outputs(distiller: "Distiller") -> tuple[Outputs, Outputs]:
    """The teacher's and the student's outputs that influence the method's loss.

    They are shapes for a batch of two images. An output of which only the name or the shape is read
    doesn't count.
    """
    assert distiller.teacher is not None
    teacher_out = _outputs(distiller.teacher, train=False)
    student_out = _outputs(distiller.student, train=True)
    arrays, static = split_static(teacher_out)
    of_student, student_static = split_static(student_out)
    batch = example_batch(_IMAGES, distiller.student.num_classes)
    state = distiller.state_shapes
    key = jax.eval_shape(lambda: jax.random.key(0))

    def loss(arrays: Outputs, of_student: Outputs, params, method_state, *rest):
        outs = arrays | static, of_student | student_static
        term = distiller.method.loss(params, method_state, *outs, *rest)
        return term.value, term.state, term.metrics, term.judged

    jaxpr = jax.make_jaxpr(loss)(
        arrays, of_student, state.params["method"], state.method_state, batch, key,
        jax.ShapeDtypeStruct((), jnp.float32), state.params["adversary"],
    ).jaxpr  # fmt: skip
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    found, flags = [], iter(used)
    for outputs in (arrays, of_student):
        # A dict is flattened in the order of its sorted names.
        found.append({name: outputs[name] for name in sorted(outputs) if next(flags)})
    return found[0], found[1]


def _outputs(model: Model, train: bool) -> Outputs:
    """`out` for `_IMAGES` images: arrays as shapes, other entries with their values."""
    static: dict[str, Any] = {"side": model.image_size}

    def forward(variables: Any, images: jax.Array, key: jax.Array) -> Outputs:
        (_, out), _ = apply(
            model.module, variables, images, train=train, mutable=["batch_stats"],
            rngs={"dropout": key},
        )  # fmt: skip
        return out

    images = jax.ShapeDtypeStruct((_IMAGES, model.image_size, model.image_size, 3), jnp.float32)
    arrays = arrays_of(forward, static)
    return jax.eval_shape(arrays, model.shapes, images, jax.random.key(0)) | static
