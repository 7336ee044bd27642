"""OFD: the student imitates the teacher's responses before the activation, except redundant ones.

Heo, Kim, Yun, Park, Kwak, Choi: A Comprehensive Overhaul of Feature Distillation, arXiv:1904.01866.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from xkd_jax.methods.align import paired_maps
from xkd_jax.methods.base import Method, Outputs, Tree, apply, weighted_sum
from xkd_jax.methods.layers import ConvNorm

Pair = tuple[jax.Array, jax.Array]  # the teacher's map and the student's, of one shape


def update_negatives(negatives: Tree, teacher: jax.Array) -> Tree:
    """Adds a batch to the statistics of the teacher's negative responses.

    Args:
      negatives: `sum` and `share`, each [C]: the sums over all batches so far of the mean of
        min(F_T, 0) and of the fraction of negative responses. Their quotient is the mean of the
        negative responses; both stay within what float32 can represent.
      teacher: F_T, [N, h, w, C].
    """
    axes = (0, 1, 2)
    return {
        "sum": negatives["sum"] + jnp.mean(jnp.minimum(teacher, 0), axes),
        "share": negatives["share"] + jnp.mean(teacher < 0, axes),
    }


def margin(negatives: Tree) -> jax.Array:
    """m_C = E[F_T | F_T < 0] (section 3.2), [C]; 0 for channels that were never negative."""
    return negatives["sum"] / jnp.maximum(negatives["share"], 1e-12)


def partial_distance(teacher: jax.Array, student: jax.Array, margin: jax.Array) -> jax.Array:
    """d_p(max(F_T, m), F_S): the partial L2 distance (section 3.2).

    Where the teacher's response is not positive and the student's is below it, neither would pass
    a ReLU, and the distance is 0.

    Args:
      teacher: F_T, [N, h, w, C].
      student: F_S in the teacher's channels, [N, h, w, C].
      margin: m_C, [C].

    Returns:
      The batch mean of the sums over h * w * C, a float32 scalar.
    """
    target = jnp.maximum(teacher, margin)
    counts = (student > target) | (target > 0)
    return jnp.sum(jnp.where(counts, (student - target) ** 2, 0.0)) / len(teacher)


@dataclasses.dataclass(frozen=True)
class OFD(Method):
    """Margin ReLU and partial L2 distance at every level, each half the weight of the next.

    The released code computes the margins from the parameters of the teacher's batch normalisation,
    assuming Gaussian outputs. A method has no access to those, and Transformers have none: here the
    margins are the sample means that section 3.2 allows, over all the teacher's responses so far,
    including this batch. A Transformer's responses are its standardised tokens.

    Attributes:
      weight: weight of the sum over levels.
      teacher_batch_stats: whether a CNN teacher's batch normalisation uses the statistics of the
        batch, as in the authors' runs, which keep the teacher in training mode (issue 37 of
        clovaai/overhaul-distillation). False uses its running statistics. A Transformer has none.
    """

    weight: float = 1e-3
    teacher_batch_stats: bool = True

    needs_teacher = True
    detection = True
    imagenet: ClassVar = {"weight": 1e-4}

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        """A connector and the statistics of the negative responses for every level."""
        params, state = {}, {}
        for level, (teacher, student) in paired_maps(teacher_out, student_out).items():
            key, level_key = jax.random.split(key)
            width = teacher.shape[-1]
            params[level] = ConvNorm(width).init(level_key, student)
            state[level] = {"sum": jnp.zeros(width), "share": jnp.zeros(width)}
        return params, state

    def connected_maps(
        self, params: Tree, teacher_out: Outputs, student_out: Outputs
    ) -> dict[str, Pair]:
        """`align.paired_maps`, with connectors applied to the student's maps."""
        return {
            level: (teacher, apply(ConvNorm(teacher.shape[-1]), params[level], student))
            for level, (teacher, student) in paired_maps(teacher_out, student_out).items()
        }

    def distance(self, state: Tree, maps: dict[str, Pair]) -> tuple[jax.Array, Tree]:
        """The weighted sum of the partial distances of `connected_maps`, and the new state."""
        total, new_state = jnp.zeros(()), {}
        for level, (teacher, student) in maps.items():
            new_state[level] = update_negatives(state[level], teacher)
            total = total / 2 + partial_distance(teacher, student, margin(new_state[level]))
        return total, new_state

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        maps = self.connected_maps(params, teacher_out, student_out)
        distance, state = self.distance(state, maps)
        return weighted_sum({"partial_distance": (self.weight, distance)}, state)
