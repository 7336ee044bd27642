"""DeiT: a distillation token learns from the teacher what the class token learns from labels.

Touvron, Cord, Douze, Massa, Sablayrolles, Jegou: Training data-efficient image transformers &
distillation through attention, arXiv:2012.12877, section 4.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from xkd_jax.errors import UserError, unknown
from xkd_jax.methods.base import Method, PairError, weighted_sum
from xkd_jax.methods.logits import softened_kl

VARIANTS = ("hard", "soft")


def hard_loss(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """The cross-entropy with the teacher's predicted class as the label (Eq. 3, second term).

    Args:
      student_logits: the distillation head's [N, K].
      teacher_logits: [N, K].

    Returns:
      The batch mean, a float32 scalar.
    """
    labels = jnp.argmax(teacher_logits, axis=-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        student_logits.astype(jnp.float32), labels
    )
    return jnp.mean(losses)


def soft_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
    """KL(teacher || student) at `temperature`, times its square (Eq. 2), divided by K.

    Eq. 2 has no such division. The released code averages over the K classes as well as over the
    batch, and gave the published results (github.com/facebookresearch/deit, issue 61).

    Args:
      student_logits: the distillation head's [N, K].
      teacher_logits: [N, K], without gradient.
      temperature: divides both before the softmax.
    """
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    divergence = softened_kl(student_logits, teacher_logits, temperature)
    return divergence / student_logits.shape[-1]


@dataclasses.dataclass(frozen=True)
class DeiT(Method):
    """DeiT's distillation, for students with a distillation token and any teacher.

    The label term uses the class token's head only. The weights, 0.5 and 0.5, are the released
    code's for both variants; section 6 of the paper has 0.9 and 0.1 for "soft".

    Attributes:
      weight: weight of this term.
      variant: "hard" or "soft".
      temperature: softmax temperature of "soft"; unused by "hard".
    """

    label_weight: float = 0.5
    weight: float = 0.5
    variant: str = "hard"
    temperature: float = 3.0

    needs_teacher = True

    @override
    def check(self, teacher_out, student_out):
        if self.variant not in VARIANTS:
            raise unknown("variant of deit", self.variant, VARIANTS)
        if self.temperature <= 0:
            raise UserError(f"method.deit.temperature={self.temperature} must be above 0.")
        if "dist_logits" not in student_out:
            raise PairError(
                "deit trains a distillation token, but this student has none, unlike "
                "deit_tiny_distilled_patch16_224"
            )

    @override
    def label_logits(self, student_out):
        return student_out["cls_logits"]

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        logits = student_out["dist_logits"], teacher_out["logits"]
        if self.variant == "hard":
            term = hard_loss(*logits)
        else:
            term = soft_loss(*logits, self.temperature)
        return weighted_sum({f"deit_{self.variant}": (self.weight, term)}, state)
