"""Feature maps of networks of different kinds: corresponding levels and matching grids.

A CNN's maps are its stages. A Transformer's maps are its patch tokens on their grid, without the
class token.
"""

import jax
import jax.numpy as jnp
import numpy as np

from xkd_jax.errors import UserError
from xkd_jax.methods.base import Outputs, PairError

STAGES = ("stage1", "stage2", "stage3", "stage4")
# Relative depths of a ViT's levels: blocks 2, 4, 10 and 12 of 12, as ReviewKD's authors advise.
_DEPTHS = (1 / 6, 1 / 3, 5 / 6, 1)


def levels(out: Outputs) -> list[str]:
    """The names of a network's maps from shallow to deep; see `level_map`.

    They are the stages of a CNN or a Swin, except a first stage that is only the stem (as in CIFAR
    ResNets), or four blocks of a ViT. Shapes suffice.
    """
    stages = [name for name in STAGES if name in out]
    if stages:
        stem = len(stages) > 1 and out["stage1"].shape[1:3] == out["stage2"].shape[1:3]
        return stages[1:] if stem else stages
    depth = sum(name.startswith("block") and name[5:].isdigit() for name in out)
    return list(dict.fromkeys(f"block{max(1, round(part * depth)):02d}" for part in _DEPTHS))


def paired_levels(teacher_out: Outputs, student_out: Outputs) -> list[tuple[str, str]]:
    """Pairs of the teacher's and the student's levels, shallow to deep.

    Levels are matched from the deepest up; if one network has more, its shallowest are left out.
    """
    teacher, student = levels(teacher_out), levels(student_out)
    n = min(len(teacher), len(student))
    return list(zip(teacher[-n:], student[-n:], strict=True))


def level_grid(out: Outputs, name: str) -> tuple[int, int]:
    """Rows and columns of one of a network's `levels`. Shapes suffice."""
    shape = out[name].shape
    return tuple(shape[1:3]) if len(shape) == 4 else tuple(out["grid"])


def level_map(
    out: Outputs, name: str, before_activation: bool = False, standardize: bool = True
) -> jax.Array:
    """One of a network's `levels`, or "pooled", as a map, float32 [N, h, w, C].

    Args:
      out: the network's outputs.
      name: the level.
      before_activation: whether to take a CNN's stage before its last activation; a Transformer's
        tokens have none.
      standardize: whether to give each token of a Transformer mean 0 and variance 1, as the next
        LayerNorm would: the residual stream grows with depth and is dominated by a few channels.
    """
    if before_activation:
        name = f"{name}_pre" if f"{name}_pre" in out else name
    features = out[name].astype(jnp.float32)
    if features.ndim == 3:
        features = features.reshape(len(features), *out["grid"], -1)
    if features.ndim == 2:
        features = features[:, None, None]
    if standardize and is_transformer(out):
        features = jax.nn.standardize(features, epsilon=1e-6)
    return features


def paired_maps(
    teacher_out: Outputs, student_out: Outputs
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The teacher's and the student's map at each of the `paired_levels`, by the student's level.

    Both are taken before the activation and are on the teacher's grid: [N, h, w, C], without
    gradient, and [N, h, w, c].
    """
    maps = {}
    for of_teacher, of_student in paired_levels(teacher_out, student_out):
        teacher = level_map(teacher_out, of_teacher, before_activation=True)
        teacher = jax.lax.stop_gradient(teacher)
        student = level_map(student_out, of_student, before_activation=True)
        maps[of_student] = teacher, resize_map(student, teacher.shape[1:3])
    return maps


def on_smaller_grid(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Averages two maps [N, h, w, C] and [N, h', w', C'] down to the smaller of their grids."""
    grid = min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2])
    return resize_map(a, grid), resize_map(b, grid)


def is_transformer(out: Outputs) -> bool:
    """Whether these are a Transformer's outputs."""
    return "tokens" in out


def why_no_attention(out: Outputs) -> str:
    """Why these outputs have no query, key and value, to end a sentence about their network."""
    return "is an MLP without attention" if is_transformer(out) else "is a CNN"


def choose_stage(
    student_out: Outputs, grid: tuple[int, int], stage: str, sides: tuple[int, int] = (0, 0)
) -> str:
    """The student's map to compare with a teacher whose tokens form `grid`.

    Args:
      student_out: its outputs; `stage*` are [N, h, w, C]. Shapes suffice.
      grid: rows and columns of the teacher's tokens.
      stage: "auto", or the name of a stage. For a student with stages, "auto" takes, if the
        teacher's images are larger, the stage at the same place in the network, whose stride in
        pixels is nearest to the teacher's, by less than a factor of the square root of 2.
        Otherwise, or without such a stage, it takes the stage with the same grid or, if there is
        none, the nearest finer one. For a Transformer without stages it takes the final tokens.
      sides: of the teacher's and the student's images, pixels; 0 if unknown.

    Raises:
      UserError: the student has no such stage.
    """
    return match_stage(student_out, grid, stage, sides)[0]


def match_stage(
    student_out: Outputs, grid: tuple[int, int], stage: str, sides: tuple[int, int]
) -> tuple[str, str]:
    """`choose_stage`, and in a few words why it is this one."""
    stages = {name: student_out[name].shape[1:3] for name in STAGES if name in student_out}
    if not stages and stage == "auto" and is_transformer(student_out):
        return "tokens", "the student has no stages"
    if not stages:
        tap = "a stage" if stage == "auto" else stage
        raise PairError(f"{tap} of the student would be tapped, but this student has no stages")
    if stage != "auto":
        if stage not in stages:
            raise UserError(
                f"the student has no stage {stage!r}; it has {', '.join(stages)}, or 'auto'."
            )
        return stage, "as configured"
    if 0 < sides[1] < sides[0]:
        place = np.multiply(grid, sides[1] / sides[0])  # the teacher's grid on smaller images
        octaves = {s: np.abs(np.log2(np.divide(g, place))).max() for s, g in stages.items()}
        nearest = min(octaves, key=lambda name: octaves[name])
        if octaves[nearest] < 0.5:
            return nearest, "the same place in the network"
    fine = [name for name, of_stage in stages.items() if min(np.subtract(of_stage, grid)) >= 0]
    chosen = fine[-1] if fine else next(iter(stages))
    if tuple(stages[chosen]) == tuple(grid):
        return chosen, "the same grid"
    return chosen, "the nearest finer grid" if fine else "all grids are coarser"


def _average_matrix(size: int, target: int) -> np.ndarray:
    """[target, size]: row i averages the cells that target cell i covers, at least in part.

    The same bins as PyTorch's adaptive average pooling.
    """
    matrix = np.zeros((target, size), np.float32)
    for i in range(target):
        start, stop = i * size // target, -(-(i + 1) * size // target)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def resize_map(features: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """Resizes a map [N, h, w, C] to [N, *grid, C]: averages down, interpolates bilinearly up."""
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
