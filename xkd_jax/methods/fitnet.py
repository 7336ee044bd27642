"""FitNet: a regressor predicts the teacher's map at one middle level from the student's.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, arXiv:1412.6550.
"""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from xkd_jax.errors import UserError
from xkd_jax.methods.align import is_transformer, level_map, paired_levels, resize_map
from xkd_jax.methods.base import Method, Outputs, apply, weighted_sum
from xkd_jax.methods.layers import ConvNorm


def hint_loss(prediction: jax.Array, hint: jax.Array) -> jax.Array:
    """The mean squared distance of the regressor's output and the teacher's map, both [N, h, w, C].

    Eq. 3 in section 2.2 has half the sum over elements; the mean is the toolboxes', for which the
    published weight was chosen.
    """
    return jnp.mean((prediction - jax.lax.stop_gradient(hint)) ** 2)


@dataclasses.dataclass(frozen=True)
class FitNet(Method):
    """Hint-based training.

    The regressor is RepDistiller's: a convolution (1x1, on the student's map resized to the
    teacher's grid), batch normalisation and, for a CNN teacher, ReLU. For a Transformer teacher
    there is no ReLU, because tokens are signed.

    Section 2.3 trains in two stages: first the hint only, then labels and softened probabilities
    only. The toolboxes that produced the published results add the hint to the label term
    throughout. `hint_epochs` selects between them; "fitnet+logits" gives the paper's second stage.

    Attributes:
      weight: weight of this term, RepDistiller's.
      level: which shared level to use, 1 being the shallowest; 0 selects the middle one, the second
        of three or four.
      hint_epochs: length of the paper's first stage in epochs; 0 trains in one stage.
    """

    weight: float = 100.0
    level: int = 0
    hint_epochs: int = 0

    needs_teacher = True
    detection = True

    @property
    @override
    def first_phase(self) -> float:
        return self.hint_epochs

    @override
    def moves(self, progress):
        return {"student": True, "method": progress < 0 if self.hint_epochs else True}

    @override
    def check(self, teacher_out, student_out):
        count = len(paired_levels(teacher_out, student_out))
        if not 0 <= self.level <= count:
            raise UserError(
                f"method.fitnet.level={self.level} doesn't exist; these networks share the levels "
                f"1 (the shallowest) to {count}, and 0 selects the middle one."
            )
        if self.hint_epochs < 0:
            raise UserError(f"method.fitnet.hint_epochs={self.hint_epochs} must be at least 0.")

    def _maps(self, teacher_out: Outputs, student_out: Outputs) -> tuple[jax.Array, jax.Array]:
        """The teacher's map [N, h, w, C] and the student's on the same grid, [N, h, w, c]."""
        levels = paired_levels(teacher_out, student_out)
        names = levels[self.level - 1 if self.level else (len(levels) - 1) // 2]
        hint, guided = level_map(teacher_out, names[0]), level_map(student_out, names[1])
        return hint, resize_map(guided, hint.shape[1:3])

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        hint, guided = self._maps(teacher_out, student_out)
        return ConvNorm(hint.shape[-1]).init(key, guided), {}

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        hint, guided = self._maps(teacher_out, student_out)
        prediction = apply(ConvNorm(hint.shape[-1]), params, guided)
        if not is_transformer(teacher_out):
            prediction = jax.nn.relu(prediction)
        weight = self.weight
        if self.hint_epochs:
            weight = jnp.where(progress < 0, weight, 0.0)
        return weighted_sum({"hint": (weight, hint_loss(prediction, hint))}, state)
