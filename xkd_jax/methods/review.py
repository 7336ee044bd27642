"""ReviewKD: the student's levels, each fused with all the deeper ones, imitate the teacher's.

Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, arXiv:2104.09044.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from typing_extensions import override

from xkd_jax.errors import UserError
from xkd_jax.methods.align import level_map, paired_levels, resize_map
from xkd_jax.methods.base import Method, Outputs, apply, weighted_sum
from xkd_jax.methods.layers import ConvNorm
from xkd_jax.models.layers import Conv, torch_default

MAX_WIDTH = 512  # of the fused maps, whose width is by default that of the student's deepest level


class Fusion(nn.Module):
    """ABF: attention-based fusion of a level with the deeper ones (section 3.3)."""

    width: int  # of the fused maps
    teacher: tuple[int, ...]  # the shape of the teacher's map, [h, w, C]

    @nn.compact
    def __call__(self, level: jax.Array, deeper: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Two maps on the teacher's grid: the imitation of its map, the next fusion's input.

        Args:
          level: the student's map, [N, h', w', C'].
          deeper: the deeper levels' fusion, [N, *, *, width]; None at the deepest level.
        """
        fused = ConvNorm(self.width, name="reduce")(level)
        if deeper is not None:
            repeated = jax.image.resize(deeper, fused.shape, "nearest")
            both = jnp.concatenate([fused, repeated], axis=-1)
            scores = Conv(2, 1, use_bias=True, kernel_init=torch_default, name="attention")(both)
            attention = nn.sigmoid(scores)
            fused = fused * attention[..., :1] + repeated * attention[..., 1:]
        # Before the 3x3 kernels, as in the released code: a ViT's grid is much smaller than the
        # maps of a CNN's first stages.
        fused = resize_map(fused, self.teacher[:2])
        return ConvNorm(self.teacher[2], 3, name="expand")(fused), fused


class Review(nn.Module):
    """The residual learning framework (section 3.2): fusions from the deepest level up."""

    teacher: tuple[tuple[int, ...], ...]  # the shapes of the teacher's maps, shallow to deep
    fused_width: int = 0  # see `ReviewKD`

    @nn.compact
    def __call__(self, levels: list[jax.Array]) -> list[jax.Array]:
        """The student's maps, shallow to deep -> imitations of the teacher's, of their shapes."""
        width = self.fused_width or min(levels[-1].shape[-1], MAX_WIDTH)
        reviewed, fused = [], None
        for i in reversed(range(len(levels))):
            fusion = Fusion(width, self.teacher[i], name=f"fusion{i + 1}")
            imitation, fused = fusion(levels[i], fused)
            reviewed.insert(0, imitation)
        return reviewed


def context_loss(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """HCL: the hierarchical context loss (section 3.3) of two maps [N, h, w, C].

    The mean squared distances of the maps and of their averages on 4x4, 2x2 and 1x1 grids, if
    smaller, with the weights 1, 1/2, 1/4, 1/8 divided by their sum, as in the released code.
    """
    difference = student - teacher
    loss, weight, weights = jnp.mean(difference**2), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(difference.shape[1:3]):
            weight = weight / 2
            weights = weights + weight
            loss = loss + weight * jnp.mean(resize_map(difference, (size, size)) ** 2)
    return loss / weights


def _maps(
    teacher_out: Outputs, student_out: Outputs, before_activation: bool
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The teacher's and the student's maps, each on its own grid, shallow to deep."""
    pairs = [*paired_levels(teacher_out, student_out), ("pooled", "pooled")]
    student = [level_map(student_out, name, before_activation) for _, name in pairs]
    teacher = [level_map(teacher_out, name, before_activation=True) for name, _ in pairs]
    return jax.lax.stop_gradient(teacher), student


@dataclasses.dataclass(frozen=True)
class ReviewKD(Method):
    """The context losses of all levels and of the pooled features, which are the deepest level.

    As in the released code, the teacher's maps are taken before the activation, deeper fusions are
    upsampled by repetition, and each fusion is brought to the teacher's grid. There, ours averages
    or interpolates, where theirs takes the nearest position.

    Attributes:
      weight: weight of the sum over levels. The authors use, for CIFAR-100, 0.6 for ResNet-56 ->
        20, 1 for ResNet-110 -> 32, 5 for ResNet-32x4 -> 8x4 and WRN-40-2 -> 16-2 and 40-1, 8 for
        ResNet-32x4 -> ShuffleNetV2; for ImageNet, 1 for ResNet-34 -> 18, 8 for ResNet-50 ->
        MobileNet.
      warmup_epochs: number of epochs over which the weight grows linearly to its full value.
      before_activation: whether the student's maps are taken before the activation, as in the
        released code for ImageNet, and not after it, as in that for CIFAR-100.
      fused_width: number of channels of the fused maps. 0: those of the student's deepest level, up
        to 512. The authors use 256 for MobileNet on ImageNet.
    """

    weight: float = 1.0
    warmup_epochs: int = 20
    before_activation: bool = False
    fused_width: int = 0

    needs_teacher = True
    detection = True
    imagenet: ClassVar = {"warmup_epochs": 1, "before_activation": True}

    @override
    def check(self, teacher_out, student_out):
        if self.warmup_epochs < 0:
            raise UserError(f"method.review.warmup_epochs={self.warmup_epochs} must be at least 0.")
        if self.fused_width < 0:
            raise UserError(f"method.review.fused_width={self.fused_width} must be at least 0.")

    def _module(self, teacher: list[jax.Array]) -> Review:
        return Review(tuple(x.shape[1:] for x in teacher), self.fused_width)

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        teacher, student = _maps(teacher_out, student_out, self.before_activation)
        return self._module(teacher).init(key, student), {}

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        teacher, student = _maps(teacher_out, student_out, self.before_activation)
        reviewed = apply(self._module(teacher), params, student)
        losses = map(context_loss, teacher, reviewed)
        weight = self.weight
        if self.warmup_epochs:
            weight = weight * jnp.minimum(progress / self.warmup_epochs, 1.0)
        return weighted_sum({"review": (weight, sum(losses, jnp.zeros(())))}, state)
