"""Logits: the student imitates the teacher's softened class probabilities.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2.
"""

import dataclasses

import jax
import jax.numpy as jnp

from xkd_jax.methods.base import Method


def soft_cross_entropy(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
    """KL(teacher || student) of the softened probabilities, times the squared temperature.

    Args:
      student_logits: [N, K].
      teacher_logits: [N, K].
      temperature: what both are divided by before the softmax.

    Returns:
      The batch mean, a float32 scalar.
    """
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1))


@dataclasses.dataclass(frozen=True)
class Logits(Method):
    """Hinton's distillation.

    Attributes:
      weight: of this term, beside the label term's own weight (`config.label_weight`).
      temperature: published with 4 on CIFAR-100 and 1 on ImageNet.
    """

    weight: float = 1.0
    temperature: float = 4.0

    needs_teacher = True

    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        """See `Method.loss`."""
        kl = soft_cross_entropy(student_out["logits"], teacher_out["logits"], self.temperature)
        return self.weight * kl, state, {"logits_kl": kl}
