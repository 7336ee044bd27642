"""Where the student is tapped, and how its map is brought to the teacher's grid."""

import jax
import jax.numpy as jnp
import numpy as np

from xkd_jax.errors import UserError
from xkd_jax.methods.base import Outputs

STAGES = ("stage1", "stage2", "stage3", "stage4")


def choose_stage(student_out: Outputs, grid: tuple[int, int], stage: str) -> str:
    """The student's stage that meets a teacher whose tokens lie on `grid`.

    Args:
      student_out: outputs of a CNN; `stage*` are [N, h, w, C]. Shapes are enough.
      grid: rows and columns of the teacher's tokens.
      stage: "auto" takes the stage with the same grid or, if there is none, the nearest finer one;
        any other value names the stage itself.

    Raises:
      UserError: the student has no such stage, or no stages at all.
    """
    stages = [name for name in STAGES if name in student_out]
    if not stages:
        raise UserError(
            "this method taps the stages of a CNN student, and this student has none; "
            "choose a CNN such as resnet18, or method.name=logits."
        )
    if stage == "auto":
        fine = [s for s in stages if min(np.subtract(student_out[s].shape[1:3], grid)) >= 0]
        return fine[-1] if fine else stages[0]
    if stage not in stages:
        raise UserError(
            f"the student has no stage {stage!r}; it has {', '.join(stages)}, or 'auto'."
        )
    return stage


def _average_matrix(size: int, target: int) -> np.ndarray:
    """[target, size]: row i averages the cells that target cell i covers, at least in part.

    The same bins as PyTorch's adaptive average pooling.
    """
    matrix = np.zeros((target, size), np.float32)
    for i in range(target):
        start, stop = i * size // target, -(-(i + 1) * size // target)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def resize_map(features: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Brings a map [N, h, w, C] to [N, *grid, C]: averages down, interpolates bilinearly up."""
    for axis, target in ((1, grid[0]), (2, grid[1])):
        size = features.shape[axis]
        if size > target:
            matrix = jnp.asarray(_average_matrix(size, target), features.dtype)
            moved = jnp.tensordot(features, matrix, axes=(axis, 1))
            features = jnp.moveaxis(moved, -1, axis)
        elif size < target:
            shape = list(features.shape)
            shape[axis] = target
            features = jax.image.resize(features, shape, "linear")
    return features
