"""Logits: the student imitates the teacher's softened class probabilities.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from xkd_jax.errors import UserError, unknown
from xkd_jax.methods.base import Method, weighted_sum

VARIANTS = ("kl", "mse")


def softened_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
    """KL(teacher || student) of the softened probabilities, times the squared temperature.

    Args:
      student_logits: [N, K].
      teacher_logits: [N, K].
      temperature: divides both before the softmax.

    Returns:
      The batch mean, a float32 scalar.
    """
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1))


def mean_squared_distance(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """The mean over all N * K logits, a float32 scalar."""
    difference = student_logits.astype(jnp.float32) - teacher_logits.astype(jnp.float32)
    return jnp.mean(difference**2)


@dataclasses.dataclass(frozen=True)
class Logits(Method):
    """Hinton's distillation.

    Section 2 of the paper with RepDistiller's weights; `variant="mse"` is what the released code of
    the cross-architecture paper calls "Logits": the mean squared distance of the logits.

    Attributes:
      weight: weight of this term.
      temperature: temperature of both softmaxes; unused by "mse".
      variant: "kl" or "mse".
    """

    label_weight: float = 0.1
    weight: float = 0.9
    temperature: float = 4.0
    variant: str = "kl"

    needs_teacher = True
    imagenet: ClassVar = {"label_weight": 0.5, "weight": 0.5, "temperature": 1.0}

    @override
    def check(self, teacher_out, student_out):
        if self.variant not in VARIANTS:
            raise unknown("variant of logits", self.variant, VARIANTS)
        if self.temperature <= 0:
            raise UserError(f"method.logits.temperature={self.temperature} must be above 0.")

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        logits = student_out["logits"], teacher_out["logits"]
        if self.variant == "mse":
            term = mean_squared_distance(*logits)
        else:
            term = softened_kl(*logits, self.temperature)
        return weighted_sum({f"logits_{self.variant}": (self.weight, term)}, state)
