"""The frozen teacher in a training step: its forward pass, or its cached outputs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from xkd_jax.distributed import sharding
from xkd_jax.methods.base import Outputs, apply
from xkd_jax.model import Model

if TYPE_CHECKING:
    from xkd_jax.distiller import Distiller

CACHED = "teacher"  # key of the cached outputs in a batch


def create_teacher_fn(
    distiller: "Distiller", variables: Any, cached: bool = False
) -> Callable[..., Outputs]:
    """The frozen teacher, from its view and the cached rows to its outputs ({} without a teacher).

    Args:
      distiller: everything that is constant.
      variables: as for `train_step`.
      cached: whether the outputs are restored from cached rows, instead of a forward pass.
    """
    teacher, layout = distiller.teacher, distiller.shardings.teacher
    if teacher is None:
        return lambda view, rows=None: {}
    if cached:
        return lambda view, rows: restore(teacher, variables, rows, len(view))
    options = {}
    if getattr(teacher.module, "kind", "") == "transformer" and not sharding.is_replicated(layout):
        options["gather"] = sharding.BlockGather(variables["params"], layout["params"])
    gathered = sharding.gather(distiller.mesh, variables)
    if teacher.is_detector:
        return create_detector_fn(teacher, gathered)
    use_batch = distiller.method.teacher_batch_stats

    def teacher_fn(view: jax.Array, rows: Any = None) -> Outputs:
        del rows
        _, out = teacher.forward(gathered, view, batch_statistics=use_batch, **options)
        return out | {"side": view.shape[1]}

    return teacher_fn


def create_detector_fn(teacher: Model, variables: Any) -> Callable[..., Outputs]:
    """A detector, from its view to its backbone's outputs.

    `classify` is another output, a function from proposals [N, R, 4] to class logits [N, R, K + 1].
    Batch normalisation uses the running statistics, as when the detector was trained.
    """

    def teacher_fn(view: jax.Array, rows: Any = None) -> Outputs:
        del rows
        _, out = apply(teacher.module, variables, view, method="features")

        def classify(proposals: jax.Array) -> jax.Array:
            return apply(teacher.module, variables, view, proposals, method="classify")[0]

        return out | {"side": view.shape[1], "classify": classify}

    return teacher_fn


def restore(
    teacher: Model,
    constants: dict[str, jax.Array],
    rows: dict[str, jax.Array],
    count: int,
) -> Outputs:
    """The outputs of the teacher for a batch, in the network's own dtypes.

    Outputs that aren't cached are zero: the method reads at most their names or shapes.

    Args:
      teacher: the teacher; its variables aren't used.
      constants: outputs that are the same for all images, by name.
      rows: cached outputs [N, ...] by name.
      count: N.
    """
    out: Outputs = {}
    for name, shape in teacher.output_shapes.items():
        if not isinstance(shape, jax.ShapeDtypeStruct):
            out[name] = shape  # such as the grid
        elif name in constants:
            out[name] = constants[name].astype(shape.dtype)
        elif name in rows:
            out[name] = rows[name].astype(shape.dtype)
        else:
            out[name] = jnp.zeros((count, *shape.shape[1:]), shape.dtype)
    return out
