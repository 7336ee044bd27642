"""AB: the student's neurons are active where the teacher's are.

Heo, Lee, Yun, Choi: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
Neurons, AAAI 2019, arXiv:1811.03233.
"""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from xkd_jax.errors import UserError
from xkd_jax.methods.align import paired_maps
from xkd_jax.methods.base import Method, apply, weighted_sum
from xkd_jax.methods.layers import ConvNorm


def boundary_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The squared hinge loss of student neurons that are not on the teacher's side of 0.

    The piecewise differentiable loss, Eq. 4, with margin 1, summed over the neurons.

    Args:
      student: before the activation, through the connector, [N, h, w, C].
      teacher: before the activation, [N, h, w, C]; only the signs matter.

    Returns:
      The batch mean of the sums over h * w * C, a float32 scalar.
    """
    side = jnp.where(jax.lax.stop_gradient(teacher) > 0, 1.0, -1.0)
    return jnp.sum(jax.nn.relu(1 - side * student) ** 2) / len(student)


@dataclasses.dataclass(frozen=True)
class AB(Method):
    """Activation boundaries initialise the student, which then trains without its teacher.

    After the first phase only the label term remains, as in RepDistiller's results; "ab+logits"
    adds the softened probabilities, which the authors use in that phase. The levels are weighted 1,
    1/2, 1/4, ... from the deepest. The student's maps are resized to the teacher's grids; where the
    widths differ, a connector (1x1 convolution and batch normalisation) follows, as in the authors'
    code.

    The paper's neurons end in a ReLU, so maps are tapped before it. The counterpart in a
    Transformer would be the units before the GELU of its MLPs, which are not among its outputs:
    here the signs are those of its standardised tokens.

    Attributes:
      weight: weight of the sum over levels; the authors' 3 / 1000.
      first_epochs: length of the first phase in epochs.
    """

    weight: float = 0.003
    first_epochs: int = 30

    needs_teacher = True

    @property
    @override
    def first_phase(self) -> float:
        return self.first_epochs

    @override
    def moves(self, progress):
        return {"student": True, "method": progress < 0}  # the connectors are not used afterwards

    @override
    def check(self, teacher_out, student_out):
        if self.first_epochs < 1:
            raise UserError(
                f"method.ab.first_epochs={self.first_epochs} must be at least 1: ab learns from "
                "its teacher in the first phase only."
            )

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        """One connector for each level that needs it."""
        params = {}
        for name, (teacher, student) in paired_maps(teacher_out, student_out).items():
            if student.shape != teacher.shape:
                key, level_key = jax.random.split(key)
                params[name] = ConvNorm(teacher.shape[-1]).init(level_key, student)
        return params, {}

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        total = jnp.zeros(())
        for name, (teacher, student) in paired_maps(teacher_out, student_out).items():
            if name in params:
                student = apply(ConvNorm(teacher.shape[-1]), params[name], student)
            total = total / 2 + boundary_loss(student, teacher)
        weight = jnp.where(progress < 0, self.weight, 0.0)
        return weighted_sum({"boundaries": (weight, total)}, state)
