"""AT: the student looks where the teacher looks.

Zagoruyko, Komodakis: Paying More Attention to Attention: Improving the Performance of Convolutional
Neural Networks via Attention Transfer, arXiv:1612.03928.
"""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from xkd_jax.methods.align import level_map, on_smaller_grid, paired_levels
from xkd_jax.methods.base import Method, weighted_sum
from xkd_jax.methods.layers import unit


def attention_map(features: jax.Array) -> jax.Array:
    """The energy of each place, F_sum^2 in section 3.1, scaled to length 1.

    Args:
      features: [N, h, w, C].

    Returns:
      [N, h * w], each row of Euclidean length 1.
    """
    energy = jnp.mean(features**2, axis=-1)
    return unit(energy.reshape(len(energy), -1))


def attention_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The mean squared distance of the attention maps of [N, h, w, c] and [N, h', w', C].

    Eq. 2's sum has half the unsquared distance, divided by the places and the batch (section 4.1).
    The authors' code has the squared distance without the half, and so have the toolboxes and
    their numbers. Both maps come to the smaller of the two grids first.
    """
    student, teacher = on_smaller_grid(student, jax.lax.stop_gradient(teacher))
    return jnp.mean((attention_map(student) - attention_map(teacher)) ** 2)


@dataclasses.dataclass(frozen=True)
class AT(Method):
    """Activation-based attention transfer at every level that the networks share.

    Attributes:
      weight: beta, of the sum over the levels.
    """

    weight: float = 1000.0

    needs_teacher = True

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        total = jnp.zeros(())
        for of_teacher, of_student in paired_levels(teacher_out, student_out):
            # A standardised token would have the same energy everywhere.
            teacher = level_map(teacher_out, of_teacher, standardize=False)
            student = level_map(student_out, of_student, standardize=False)
            total += attention_loss(student, teacher)
        return weighted_sum({"attention_maps": (self.weight, total)}, state)
