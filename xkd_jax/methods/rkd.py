"""RKD: the student imitates the distances and angles between the examples of a batch.

Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068, section 3.2.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from xkd_jax.methods.base import Method, weighted_sum


def relations(features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distances and angles between N points [N, D].

    The angles cost most: N^2 (D + N) numbers in memory and N^3 D multiplications per network.

    Returns:
      Distances divided by the mean of the nonzero ones (psi_D in section 3.2.1), float32 [N, N];
      and the cosine of the angle at point j between i and k as element [j, i, k] (psi_A in section
      3.2.2), float32 [N, N, N], which is 0 for equal points.
    """
    features = features.astype(jnp.float32)
    # Not from inner products, which cancel numerically if points are far from the origin.
    differences = features - features[:, None]
    squares = jnp.sum(differences**2, -1)
    # XLA may compute the features once for each side of a difference, with different rounding: then
    # a point's distance from itself isn't 0.
    apart = (squares > 0) & ~jnp.eye(len(features), dtype=bool)
    length = jnp.sqrt(jnp.where(apart, squares, 1.0))  # the root's gradient at 0 is infinite
    distances = jnp.where(apart, length, 0.0)
    mean = jnp.sum(distances) / jnp.maximum(jnp.sum(apart), 1)
    directions = differences / length[..., None]
    angles = jnp.einsum("jid,jkd->jik", directions, directions)
    return distances / jnp.where(mean > 0, mean, 1.0), angles


def smooth_l1(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The mean of the Huber loss with delta 1 (l_delta in section 3.2.1), a float32 scalar."""
    return jnp.mean(optax.huber_loss(student, teacher))


@dataclasses.dataclass(frozen=True)
class RKD(Method):
    """Relational distillation of the pooled features, RKD-DA.

    The weights are RepDistiller's, as are the means over all pairs and triples where the paper has
    sums. Relations are between all examples of one forward pass: the batch over all devices, or one
    part of it with `config.accumulate`.

    Attributes:
      distance_weight: weight of the distance term.
      angle_weight: weight of the angle term.
    """

    distance_weight: float = 25.0
    angle_weight: float = 50.0

    needs_teacher = True

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        distances, angles = relations(student_out["pooled"])
        targets = relations(jax.lax.stop_gradient(teacher_out["pooled"]))
        terms = {
            "rkd_distance": (self.distance_weight, smooth_l1(distances, targets[0])),
            "rkd_angle": (self.angle_weight, smooth_l1(angles, targets[1])),
        }
        return weighted_sum(terms, state)
