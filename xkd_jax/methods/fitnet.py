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
    """The squared distance of the regressor's output and the teacher's map, both [N, h, w, C].

    Eq. 3 in section 2.2, but as the toolboxes and the published weight have it: the mean over all
    elements instead of half the sum.
    """
    return jnp.mean((prediction - jax.lax.stop_gradient(hint)) ** 2)


@dataclasses.dataclass(frozen=True)
class FitNet(Method):
    """Hint-based training.

    The regressor is RepDistiller's: a convolution (1x1, on the student's map brought to the
    teacher's grid), batch normalisation and, where the teacher is a CNN, ReLU. Towards a
    Transformer there is no ReLU, for tokens are signed.

    Section 2.3 trains in two stages: the hint alone, then the labels and the softened
    probabilities alone. The toolboxes, whose numbers are the published ones, add the hint to the
    label term throughout. `hint_epochs` chooses; the paper's second stage is "fitnet+logits".

    Attributes:
      weight: of this term, RepDistiller's.
      level: which of the levels that the networks share, 1 is the shallowest; 0 takes the middle
        one, the second of three or four.
      hint_epochs: of the paper's first stage, before the training proper; 0: one stage.
    """

    weight: float = 100.0
    level: int = 0
    hint_epochs: int = 0

    needs_teacher = True

    @property
    @override
    def first_phase(self) -> float:
        return self.hint_epochs

    @override
    def check(self, teacher_out, student_out):
        count = len(paired_levels(teacher_out, student_out))
        if not 0 <= self.level <= count:
            raise UserError(
                f"method.fitnet.level={self.level} doesn't exist; these networks share the levels "
                f"1 (the shallowest) to {count}, and 0 takes the middle one."
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
