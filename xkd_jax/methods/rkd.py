"""RKD: the student copies how the examples of a batch lie relative to each other.

Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068, section 3.2.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from xkd_jax.methods.base import Method, weighted_sum


def relations(features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distances and the angles among N points [N, D].

    The angles cost the most: N^2 (D + N) numbers of memory and N^3 D multiplications a network.

    Returns:
      Distances over the mean of those that aren't 0 (psi_D in section 3.2.1), float32 [N, N]; and
      the cosine of the angle at point j between i and k as element [j, i, k] (psi_A in section
      3.2.2), float32 [N, N, N], where equal points make 0.
    """
    features = features.astype(jnp.float32)
    # Not from inner products: where points are far from the origin, those cancel.
    differences = features - features[:, None]
    squares = jnp.sum(differences**2, -1)
    # XLA may compute the features once for each side of a difference, rounded in two ways: then a
    # point's distance from itself isn't 0.
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

    The weights are RepDistiller's, and so are the means over all pairs and triples where the paper
    has sums. What counts is the batch that is computed at once: over all devices, but with
    `config.accumulate` each part by itself.

    Attributes:
      distance_weight: of the distances' term.
      angle_weight: of the angles' term.
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
