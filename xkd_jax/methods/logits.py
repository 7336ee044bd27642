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
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float,
    valid: jax.Array | None = None,
) -> jax.Array:
    """KL(teacher || student) of the softened probabilities, times the squared temperature.

    Args:
      student_logits: [N, K].
      teacher_logits: [N, K].
      temperature: divides both before the softmax.
      valid: which rows count, bool [N]; None: all.

    Returns:
      The mean over the rows, a float32 scalar.
    """
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return temperature**2 * _mean(divergence, valid)


def mean_squared_distance(
    student_logits: jax.Array, teacher_logits: jax.Array, valid: jax.Array | None = None
) -> jax.Array:
    """The mean over all N * K logits, or those of the rows that `valid` [N] says; float32."""
    difference = student_logits.astype(jnp.float32) - teacher_logits.astype(jnp.float32)
    if valid is None:
        return jnp.mean(difference**2)
    return _mean(jnp.mean(difference**2, axis=-1), valid)


def _mean(values: jax.Array, valid: jax.Array | None) -> jax.Array:
    if valid is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


@dataclasses.dataclass(frozen=True)
class Logits(Method):
    """Hinton's distillation.

    Section 2 of the paper with RepDistiller's weights; `variant="mse"` is what the released code of
    the cross-architecture paper calls "Logits": the mean squared distance of the logits. For
    detectors the logits are the class scores of the same proposals, those of the student.

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
    detection = True
    imagenet: ClassVar = {"label_weight": 0.5, "weight": 0.5, "temperature": 1.0}

    @override
    def check(self, teacher_out, student_out):
        if self.variant not in VARIANTS:
            raise unknown("variant of logits", self.variant, VARIANTS)
        if self.temperature <= 0:
            raise UserError(f"method.logits.temperature={self.temperature} must be above 0.")

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        logits, valid = (student_out["logits"], teacher_out["logits"]), student_out.get("valid")
        if self.variant == "mse":
            term = mean_squared_distance(*logits, valid)
        else:
            term = softened_kl(*logits, self.temperature, valid)
        return weighted_sum({f"logits_{self.variant}": (self.weight, term)}, state)
