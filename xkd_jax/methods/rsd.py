"""RSD: each of the student's projected pooled features correlates with one of the teacher's only.

Zhang, Liu, Ran, Ma: Cross-Architecture Distillation Made Simple with Redundancy Suppression, ICCV
2025, arXiv:2507.21844; code: github.com/spacewanderx/RSD, whose README states no licence: only its
formulas and settings are used.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from typing_extensions import override

from xkd_jax.errors import UserError
from xkd_jax.methods.base import Method, Outputs, apply, weighted_sum
from xkd_jax.methods.layers import batch_norm

_normal = nn.initializers.normal(0.02)


class Projector(nn.Module):
    """Decouples the loss from the student's own features: linear, BatchNorm, GELU, linear."""

    expansion: int  # of the hidden width
    features: int  # the teacher's width

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, C] -> [N, features]."""
        hidden = self.expansion * x.shape[-1]
        x = nn.Dense(hidden, use_bias=False, kernel_init=_normal, name="expand")(x)
        x = nn.gelu(batch_norm(self, x), approximate=False)
        return nn.Dense(self.features, use_bias=False, kernel_init=_normal, name="project")(x)


def cross_correlation(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """The correlation over the batch of each feature of one network with each of the other.

    Args:
      teacher: float32 [N, D].
      student: float32 [N, d].

    Returns:
      [D, d], slightly smaller than Pearson's, because of the authors' 1e-5, which is added to each
      standard deviation; 0 for a feature that is the same for all images.
    """
    centred = [x - jnp.mean(x, axis=0) for x in (teacher, student)]
    # Not below 1e-24, because the root's gradient at 0 is infinite.
    variances = [jnp.maximum(jnp.mean(x**2, axis=0), 1e-24) for x in centred]
    teacher, student = (
        x / (jnp.sqrt(variance) + 1e-5) for x, variance in zip(centred, variances, strict=True)
    )
    return teacher.T @ student / len(teacher)


def redundancy_losses(correlation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The squared distance of a matrix [D, D] from the identity, in two parts.

    Returns:
      The sum over the diagonal, which maximises invariance, and the sum over the rest, which
      decorrelates features; float32 scalars.
    """
    square = (correlation - jnp.eye(len(correlation))) ** 2
    invariance = jnp.trace(square)
    return invariance, jnp.sum(square) - invariance


@dataclasses.dataclass(frozen=True)
class RSD(Method):
    """Redundancy suppression of the pooled features, with the settings of the authors' code.

    Their loss is the label term plus this one, without a logit term. The losses are sums, so that
    they grow with the teacher's width. Correlations are over the images of one forward pass: the
    batch over all devices, or one part of it with `config.accumulate`.

    "rsd+logits" adds one; set `label_weight` of `logits` to 1, because its own default of 0.1 would
    be that of the sum.

    Attributes:
      weight: lambda, the weight of both parts.
      decorrelation: kappa, the weight of the second part relative to the first.
      expansion: the projector's hidden width, as a multiple of the student's width.
    """

    weight: float = 0.1
    decorrelation: float = 0.01
    expansion: int = 2

    needs_teacher = True

    @override
    def check(self, teacher_out, student_out):
        if self.decorrelation < 0:
            raise UserError(f"method.rsd.decorrelation={self.decorrelation} must be at least 0.")
        if self.expansion < 1:
            raise UserError(f"method.rsd.expansion={self.expansion} must be at least 1.")

    def _projector(self, teacher_out: Outputs) -> Projector:
        return Projector(self.expansion, teacher_out["pooled"].shape[-1])

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        pooled = student_out["pooled"].astype(jnp.float32)
        return self._projector(teacher_out).init(key, pooled), {}

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        teacher = jax.lax.stop_gradient(teacher_out["pooled"]).astype(jnp.float32)
        student = student_out["pooled"].astype(jnp.float32)
        projected = apply(self._projector(teacher_out), params, student)
        invariance, redundancy = redundancy_losses(cross_correlation(teacher, projected))
        terms = {
            "rsd_invariance": (self.weight, invariance),
            "rsd_redundancy": (self.weight, self.decorrelation * redundancy),
        }
        return weighted_sum(terms, state)
