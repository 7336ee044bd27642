"""AT: the student's spatial attention imitates the teacher's.

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
    """The energy at each position, F_sum^2 in section 3.1, normalised to unit length.

    Args:
      features: [N, h, w, C].

    Returns:
      [N, h * w], unit vectors.
    """
    energy = jnp.mean(features**2, axis=-1)
    return unit(energy.reshape(len(energy), -1))


def attention_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The mean squared distance of the attention maps of [N, h, w, c] and [N, h', w', C].

    Eq. 2 sums half the unsquared distance, divided by positions and batch size (section 4.1). The
    authors' code uses the squared distance without the half, as do the toolboxes that produced the
    published results. Both maps are first averaged to the smaller of the two grids.
    """
    student, teacher = on_smaller_grid(student, jax.lax.stop_gradient(teacher))
    return jnp.mean((attention_map(student) - attention_map(teacher)) ** 2)


@dataclasses.dataclass(frozen=True)
class AT(Method):
    """Activation-based attention transfer at every level that the networks share.

    Attributes:
      weight: beta, the weight of the sum over levels.
    """

    weight: float = 1000.0

    needs_teacher = True

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        total = jnp.zeros(())
        for of_teacher, of_student in paired_levels(teacher_out, student_out):
            # Standardised tokens would all have the same energy.
            teacher = level_map(teacher_out, of_teacher, standardize=False)
            student = level_map(student_out, of_student, standardize=False)
            total += attention_loss(student, teacher)
        return weighted_sum({"attention_maps": (self.weight, total)}, state)
