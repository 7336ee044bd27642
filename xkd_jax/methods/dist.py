"""DIST: the student's probabilities correlate with the teacher's, by image and by class.

Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022,
arXiv:2205.10536, section 3; code: github.com/hunto/DIST_KD (Apache-2.0).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from xkd_jax.errors import UserError
from xkd_jax.methods.base import Method, weighted_sum


def pearson(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Pearson's correlation of two float32 arrays along `axis`, which is reduced.

    The 1e-8 in the denominator is the authors'; the correlation with a constant is 0.
    """
    a, b = (x - jnp.mean(x, axis, keepdims=True) for x in (a, b))
    # Not below 1e-24, because the root's gradient at 0 is infinite.
    squares = [jnp.maximum(jnp.sum(x**2, axis), 1e-24) for x in (a, b)]
    return jnp.sum(a * b, axis) / (jnp.sqrt(squares[0]) * jnp.sqrt(squares[1]) + 1e-8)


def relation_losses(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """One minus the mean correlation of the softened probabilities, times temperature squared.

    Args:
      student_logits: [N, K].
      teacher_logits: [N, K], without gradient.
      temperature: divides both before the softmax.

    Returns:
      The inter-class loss, from the correlation over the classes of each image, and the intra-class
      loss, from the correlation over the images for each class; float32 scalars.
    """
    student, teacher = (
        jax.nn.softmax(logits.astype(jnp.float32) / temperature)
        for logits in (student_logits, jax.lax.stop_gradient(teacher_logits))
    )
    inter, intra = (1 - jnp.mean(pearson(student, teacher, axis)) for axis in (1, 0))
    return temperature**2 * inter, temperature**2 * intra


@dataclasses.dataclass(frozen=True)
class DIST(Method):
    """Relational matching of the class probabilities.

    The squared temperature is not in the paper but in the code. Correlations over images are over
    those of one forward pass: the batch over all devices, or one part of it with
    `config.accumulate`. The weights are the paper's; the code also has 1 and 1.

    Attributes:
      inter_weight: beta, the weight of the inter-class term.
      intra_weight: gamma, the weight of the intra-class term.
      temperature: temperature of both softmaxes.
    """

    inter_weight: float = 2.0
    intra_weight: float = 2.0
    temperature: float = 4.0

    needs_teacher = True
    imagenet: ClassVar = {"temperature": 1.0}

    @override
    def check(self, teacher_out, student_out):
        if self.temperature <= 0:
            raise UserError(f"method.dist.temperature={self.temperature} must be above 0.")

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        logits = student_out["logits"], teacher_out["logits"]
        inter, intra = relation_losses(*logits, self.temperature)
        terms = {"dist_inter": (self.inter_weight, inter), "dist_intra": (self.intra_weight, intra)}
        return weighted_sum(terms, state)
