"""OFA: small branches at the student's levels predict the teacher's class probabilities.

Hao, Guo, Han, Tang, Hu, Wang, Xu: One-for-All: Bridge the Gap Between Heterogeneous Architectures
in Knowledge Distillation, NeurIPS 2023, arXiv:2310.19444, section 3; code:
github.com/Hao840/OFAKD, whose README states no licence: only its formulas and settings are used.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from typing_extensions import override

from xkd_jax.errors import UserError
from xkd_jax.methods.align import level_map, levels
from xkd_jax.methods.base import Method, Outputs, apply, weighted_sum
from xkd_jax.methods.layers import ConvNorm
from xkd_jax.models.layers import Conv


class SeparableConv(nn.Module):
    """Two depthwise separable 3x3 convolutions with BatchNorm and ReLU, the first of stride 2."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, C] -> [N, ceil(h / 2), ceil(w / 2), features]."""
        channels = x.shape[-1]
        x = Conv(channels, 3, stride=2, groups=channels, name="depthwise1")(x)
        x = nn.relu(ConvNorm(channels, name="pointwise1")(x))
        x = Conv(channels, 3, groups=channels, name="depthwise2")(x)
        return nn.relu(ConvNorm(self.features, name="pointwise2")(x))


class Branch(nn.Module):
    """Logits from one of the student's maps.

    `halvings` separable convolutions, each of which halves the grid and doubles the width, except
    that the last one has `width` channels; or, if there are none, a 1x1 convolution. Then the mean
    over the grid and a linear layer.
    """

    halvings: int
    width: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, C] -> [N, classes]."""
        for i in range(1, self.halvings + 1):
            width = self.width if i == self.halvings else 2 * x.shape[-1]
            x = SeparableConv(width, name=f"halving{i}")(x)
        if not self.halvings:
            x = Conv(self.width, 1, use_bias=True, name="conv")(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.02), name="head")(x)


def enhanced_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    gamma: float,
    temperature: float,
) -> jax.Array:
    """Cross-entropy with the teacher's probabilities p, the target's enhanced by `gamma`.

    The target class has the weight (1 + p)^gamma - 1, every other class p^gamma, as in the released
    code. The paper's loss includes the label term, so that the target's weight is (1 + p)^gamma
    there, and raises the target's only. For `gamma` 1 this is the ordinary cross-entropy, with the
    gradient of KL(teacher || student); a larger one favours targets that the teacher is sure of.

    Args:
      student_logits: [N, K].
      teacher_logits: [N, K], without gradient.
      labels: the target classes, int [N].
      gamma: the exponent.
      temperature: divides both before the softmax.

    Returns:
      The batch mean, a float32 scalar.
    """
    teacher_logits = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
    log_student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    target = jax.nn.one_hot(labels, student_logits.shape[-1])
    enhanced = (jax.nn.softmax(teacher_logits / temperature) + target) ** gamma - target
    return -jnp.mean(jnp.sum(enhanced * log_student, axis=-1))


@dataclasses.dataclass(frozen=True)
class OFA(Method):
    """One branch at each of the student's levels, and the same loss for its own logits.

    The label term, the loss of the student's logits and the sum over branches have weight 1, as in
    the authors' code; for MobileNetV2 on CIFAR-100 they set `weight` to 0.1 (issue 32 there).

    Branches are the authors' for CNN students with four levels. A student with fewer levels has
    fewer branches: the deepest has no separable convolution, the next one has one, and so on. The
    tokens of Transformer students become feature maps with the same branches; the authors merge
    patches and append Transformer blocks instead. The teacher may be any network with logits.

    Attributes:
      weight: weight of the sum over branches.
      logits_weight: weight of the loss of the student's own logits.
      gamma: strength of the target's enhancement; the authors set 1 to 1.5 for each pair.
      level_gammas: gamma of each branch, shallow to deep, if they differ; (): `gamma` for all.
      temperature: temperature of all softmaxes.
    """

    weight: float = 1.0
    logits_weight: float = 1.0
    gamma: float = 1.0
    level_gammas: tuple[float, ...] = ()
    temperature: float = 1.0

    needs_teacher = True
    hard_labels = True
    # From the command in the authors' README, for DeiT-Tiny -> ResNet-18.
    imagenet: ClassVar = {"gamma": 1.5}

    @override
    def check(self, teacher_out, student_out):
        found = levels(student_out)
        if self.level_gammas and len(self.level_gammas) != len(found):
            raise UserError(
                f"method.ofa.level_gammas={self.level_gammas} must have one number for each of "
                f"this student's levels: {', '.join(found)}."
            )
        for name, values in (
            ("gamma", (self.gamma,)),
            ("level_gammas", self.level_gammas),
            ("temperature", (self.temperature,)),
        ):
            if not all(value > 0 for value in values):
                raise UserError(f"method.ofa.{name}={getattr(self, name)} must be above 0.")

    @override
    def describe(self, teacher_out, student_out):
        return f"ofa has branches at the student's {', '.join(levels(student_out))}"

    def _branches(self, teacher_out: Outputs, student_out: Outputs) -> dict[str, Branch]:
        """The branches by level, shallow to deep."""
        width = max(out["pooled"].shape[-1] for out in (teacher_out, student_out))
        classes = student_out["logits"].shape[-1]
        names = levels(student_out)
        return {name: Branch(len(names) - 1 - i, width, classes) for i, name in enumerate(names)}

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        branches = self._branches(teacher_out, student_out)
        keys = jax.random.split(key, len(branches))
        params = {
            name: branch.init(branch_key, level_map(student_out, name))
            for branch_key, (name, branch) in zip(keys, branches.items(), strict=True)
        }
        return params, {}

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        rest = teacher_out["logits"], batch["label"]
        branches = self._branches(teacher_out, student_out)
        gammas = self.level_gammas or (self.gamma,) * len(branches)
        total = jnp.zeros(())
        for gamma, (name, branch) in zip(gammas, branches.items(), strict=True):
            logits = apply(branch, params[name], level_map(student_out, name))
            total += enhanced_loss(logits, *rest, gamma, self.temperature)
        own = enhanced_loss(student_out["logits"], *rest, self.gamma, self.temperature)
        terms = {"ofa_branches": (self.weight, total), "ofa_logits": (self.logits_weight, own)}
        return weighted_sum(terms, state)
