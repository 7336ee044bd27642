"""AFD: the student imitates the teacher's maps, with attention over the channels.

Wang, Gao, Zhao, Li, Dou, Xu: Pay Attention to Features, Transfer Learn Faster CNNs, ICLR 2020
(openreview.net/forum?id=ryxyCeHtPB), section 3. The paper calls it attentive feature
distillation; "Show, Attend and Distill" (arXiv:2102.02973), also called AFD, is another method.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from typing_extensions import override

from xkd_jax.methods.align import level_map, on_smaller_grid, paired_levels
from xkd_jax.methods.base import Method, Outputs, apply, weighted_sum
from xkd_jax.methods.layers import ConvNorm, unit
from xkd_jax.models.layers import kaiming_fan_out


class ChannelAttention(nn.Module):
    """rho: the attention to each of the teacher's channels for an image, from their means.

    Squeeze-and-excitation with its sigmoids divided by their sum, as in the code behind the
    published CIFAR-100 result (AberHu's Knowledge-Distillation-Zoo), whose author found the paper's
    own attention unstable.
    """

    @nn.compact
    def __call__(self, teacher: jax.Array) -> jax.Array:
        """[N, h, w, C] -> [N, C], positive, with sum 1."""
        channels = teacher.shape[-1]
        x = jnp.mean(teacher, axis=(1, 2))
        x = nn.relu(nn.Dense(channels, kernel_init=kaiming_fan_out)(x))
        x = nn.Dense(channels, kernel_init=kaiming_fan_out)(x)
        # Sigmoids divided by their sum, but finite when all of them underflow.
        return nn.softmax(nn.log_sigmoid(x))


def attended_distance(student: jax.Array, teacher: jax.Array, rho: jax.Array) -> jax.Array:
    """sum_c rho_c (f_S,c - f_T,c)^2, the mean over positions and images.

    Each channel of an image is first scaled to unit length over its positions, as in the same code;
    a map with a single position is thereby reduced to signs, and gives the student no gradient.

    Args:
      student: [N, h, w, C].
      teacher: [N, h, w, C], without gradient.
      rho: [N, C].
    """
    difference = unit(student, (1, 2)) - unit(jax.lax.stop_gradient(teacher), (1, 2))
    return jnp.mean(jnp.sum(rho * jnp.mean(difference**2, axis=(1, 2)), axis=-1))


@dataclasses.dataclass(frozen=True)
class AFD(Method):
    """Attentive feature distillation, averaged over all levels.

    Where the widths differ, a 1x1 convolution with batch normalisation maps the student's channels
    to the teacher's.

    Attributes:
      weight: weight of this term.
    """

    weight: float = 500.0

    needs_teacher = True

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        params = {}
        for name, teacher, student in _maps(teacher_out, student_out):
            key, attention_key, regressor_key = jax.random.split(key, 3)
            params[name] = {"attention": ChannelAttention().init(attention_key, teacher)}
            if teacher.shape[-1] != student.shape[-1]:
                regressor = ConvNorm(teacher.shape[-1])
                params[name]["regressor"] = regressor.init(regressor_key, student)
        return params, {}

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        maps = _maps(teacher_out, student_out)
        total = jnp.zeros(())
        for name, teacher, student in maps:
            rho = apply(ChannelAttention(), params[name]["attention"], teacher)
            if "regressor" in params[name]:
                student = apply(ConvNorm(teacher.shape[-1]), params[name]["regressor"], student)
            total += attended_distance(student, teacher, rho)
        return weighted_sum({"afd": (self.weight, total / len(maps))}, state)


def _maps(teacher_out: Outputs, student_out: Outputs) -> list[tuple[str, jax.Array, jax.Array]]:
    """Each level's name, the teacher's map without gradient and the student's, on one grid."""
    found = []
    for teacher_name, student_name in paired_levels(teacher_out, student_out):
        maps = level_map(teacher_out, teacher_name), level_map(student_out, student_name)
        teacher, student = on_smaller_grid(*maps)
        found.append((teacher_name, jax.lax.stop_gradient(teacher), student))
    return found
