"""DKD: logit distillation with the target class and the other classes weighted separately.

Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679,
section 3; code: github.com/megvii-research/mdistiller (MIT).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.nn import log_softmax, logsumexp
from typing_extensions import override

from xkd_jax.errors import UserError
from xkd_jax.methods.base import Method, weighted_sum

_EXCLUDED = -1e30  # a logit with probability 0; unlike -inf, differences of two are finite


def decoupled_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """The two parts of KL(teacher || student), each times the squared temperature.

    With p_T the teacher's softened probability of the target class, the divergence is
    TCKD + (1 - p_T) NCKD for each image. DKD drops the factor (1 - p_T).

    Args:
      student_logits: [N, K], K at least 2.
      teacher_logits: [N, K], without gradient.
      labels: the target classes, int [N].
      temperature: divides both before the softmax.

    Returns:
      TCKD, the divergence of the probabilities of target and non-target, and NCKD, the divergence
      of the probabilities of the other classes among themselves; batch means, float32 scalars.
    """
    target = jax.nn.one_hot(labels, student_logits.shape[-1], dtype=bool)
    binary, others = [], []  # log probabilities: the teacher's, the student's
    for logits in (jax.lax.stop_gradient(teacher_logits), student_logits):
        scaled = logits.astype(jnp.float32) / temperature
        excluded = jnp.where(target, _EXCLUDED, scaled)
        of_target = jnp.sum(jnp.where(target, scaled, 0.0), axis=-1)
        binary.append(log_softmax(jnp.stack([of_target, logsumexp(excluded, axis=-1)], axis=-1)))
        others.append(log_softmax(excluded))
    tckd, nckd = (
        temperature**2 * jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1))
        for teacher, student in (binary, others)
    )
    return tckd, nckd


@dataclasses.dataclass(frozen=True)
class DKD(Method):
    """Decoupled distillation of the logits.

    The authors choose beta for each pair. Their configs for CIFAR-100 have 2 for ResNet-56 -> 20
    and ResNet-110 -> 32, 6 for WRN-40-2 -> 16-2, and 8 for ResNet-32x4 -> 8x4; for ImageNet 0.5 for
    ResNet-34 -> 18 and 2 for ResNet-50 -> MobileNet.

    Attributes:
      target_weight: alpha, the weight of TCKD.
      non_target_weight: beta, the weight of NCKD.
      temperature: temperature of both softmaxes.
      warmup_epochs: number of epochs over which both weights grow linearly to their full values.
    """

    target_weight: float = 1.0
    non_target_weight: float = 8.0
    temperature: float = 4.0
    warmup_epochs: int = 20

    needs_teacher = True
    hard_labels = True
    imagenet: ClassVar = {"non_target_weight": 0.5, "temperature": 1.0, "warmup_epochs": 1}

    @override
    def check(self, teacher_out, student_out):
        if self.temperature <= 0:
            raise UserError(f"method.dkd.temperature={self.temperature} must be above 0.")
        if self.warmup_epochs < 0:
            raise UserError(f"method.dkd.warmup_epochs={self.warmup_epochs} must be at least 0.")

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        logits = student_out["logits"], teacher_out["logits"]
        tckd, nckd = decoupled_kl(*logits, batch["label"], self.temperature)
        ramp = 1.0
        if self.warmup_epochs:
            ramp = jnp.minimum(progress / self.warmup_epochs, 1.0)
        terms = {
            "dkd_target": (ramp * self.target_weight, tckd),
            "dkd_non_target": (ramp * self.non_target_weight, nckd),
        }
        return weighted_sum(terms, state)
