"""FT: the student reproduces factors that a paraphraser extracts from the teacher's last map.

Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer,
arXiv:1802.04977.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from typing_extensions import override

from xkd_jax.errors import UserError, unknown
from xkd_jax.methods.align import level_grid, level_map, levels, on_smaller_grid
from xkd_jax.methods.at import attention_map
from xkd_jax.methods.base import Method, Outputs, apply, weighted_sum
from xkd_jax.methods.layers import ConvNorm, unit
from xkd_jax.models.layers import Conv, torch_default

VARIANTS = ("energy", "factor")


class Convolutions(nn.Module):
    """3x3 convolutions, each followed by a leaky ReLU of slope 0.1.

    With `normalized`, batch normalisation takes the place of the convolution's bias.
    """

    widths: tuple[int, ...]
    normalized: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, h, w, C] -> [N, h, w, widths[-1]]."""
        for width in self.widths:
            conv = ConvNorm(width, 3) if self.normalized else _biased(width)
            x = nn.leaky_relu(conv(x), 0.1)
        return x


def _biased(width: int) -> Conv:
    return Conv(width, 3, use_bias=True, kernel_init=torch_default)


class Paraphraser(nn.Module):
    """A convolutional auto-encoder of the teacher's map (section 3.1), without normalisation.

    The original's transposed convolutions of stride 1 are equivalent to convolutions.
    """

    factors: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[N, h, w, C] -> factors [N, h, w, factors] and the reconstruction [N, h, w, C]."""
        width = x.shape[-1]
        encode, decode = (width, self.factors, self.factors), (self.factors, width, width)
        factors = Convolutions(encode, normalized=False, name="encoder")(x)
        return factors, Convolutions(decode, normalized=False, name="decoder")(factors)


def factor_distance(student: jax.Array, teacher: jax.Array, variant: str, p: int) -> jax.Array:
    """The mean p-th power of the difference of the normalised factors (section 3.2).

    Args:
      student: its factors [N, h, w, F].
      teacher: the teacher's [N, h', w', F], without gradient; the finer grid is averaged down.
      variant: "factor" normalises all h * w * F values of an image as one vector, as in the paper;
        "energy" first averages their squares over the channels.
      p: 1 or 2.
    """
    maps = on_smaller_grid(student, jax.lax.stop_gradient(teacher))
    if variant == "energy":
        a, b = (attention_map(factors) for factors in maps)
    else:
        a, b = (unit(factors.reshape(len(factors), -1)) for factors in maps)
    return jnp.mean(jnp.abs(a - b) ** p)


@dataclasses.dataclass(frozen=True)
class FT(Method):
    """Factor transfer in two phases: first the paraphraser, then the student and its translator.

    "energy" is what RepDistiller computes, with the weight 200, for the published CIFAR-100
    results. The weight for ImageNet is the paper's, for the paper's "factor".

    Attributes:
      weight: weight of the distance between the factors.
      variant: "energy" or "factor"; see `factor_distance`.
      p: the power of the differences, 1 or 2.
      k: the paraphrase rate, the number of factors relative to the teacher's channels.
      first_epochs: length of the first phase in epochs, which trains only the paraphraser.
      paraphraser_rate: the paraphraser's learning rate, relative to the run's highest one; a fifth
        is RepDistiller's 0.01 for a run at 0.05.
    """

    weight: float = 200.0
    variant: str = "energy"
    p: int = 1
    k: float = 0.5
    first_epochs: int = 30
    paraphraser_rate: float = 0.2

    needs_teacher = True
    imagenet: ClassVar = {"weight": 1000.0, "variant": "factor"}

    @property
    @override
    def first_phase(self) -> float:
        return self.first_epochs

    @property
    @override
    def rates(self) -> Any:
        """The translator is trained with the student's rate."""
        return {"paraphraser": self.paraphraser_rate, "translator": 1.0}

    @override
    def moves(self, progress):
        parts = {"paraphraser": progress < 0, "translator": progress >= 0}
        return {"student": progress >= 0, "method": parts}

    @override
    def check(self, teacher_out, student_out):
        if self.variant not in VARIANTS:
            raise unknown("variant of ft", self.variant, VARIANTS)
        if self.p not in (1, 2):
            raise UserError(f"method.ft.p={self.p} must be 1 or 2.")
        if self.k <= 0:
            raise UserError(f"method.ft.k={self.k} must be above 0.")
        if not self.paraphraser_rate > 0:
            raise UserError(f"method.ft.paraphraser_rate={self.paraphraser_rate} must be above 0.")
        if self.first_epochs < 1:
            raise UserError(
                f"method.ft.first_epochs={self.first_epochs} must be at least 1: the paraphraser "
                "is trained in these epochs only."
            )
        grids = [level_grid(out, levels(out)[-1]) for out in (teacher_out, student_out)]
        if self.variant == "energy" and (1, 1) in grids:
            raise UserError(
                "ft's variant 'energy' compares positions, but one network's last map has only "
                "one; set method.ft.variant to 'factor'."
            )

    def _modules(self, teacher: jax.Array, student: jax.Array) -> tuple[Paraphraser, Convolutions]:
        factors = max(1, int(self.k * teacher.shape[-1]))
        return Paraphraser(factors), Convolutions((student.shape[-1], factors, factors))

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        maps = _last_map(teacher_out), _last_map(student_out)
        paraphraser, translator = self._modules(*maps)
        keys = jax.random.split(key)
        params = {
            "paraphraser": paraphraser.init(keys[0], maps[0]),
            "translator": translator.init(keys[1], maps[1]),
        }
        return params, {}

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        teacher, student = jax.lax.stop_gradient(_last_map(teacher_out)), _last_map(student_out)
        paraphraser, translator = self._modules(teacher, student)
        factors, reconstruction = apply(paraphraser, params["paraphraser"], teacher)
        translation = apply(translator, params["translator"], student)
        distance = factor_distance(translation, factors, self.variant, self.p)
        first = progress < 0
        terms = {
            "ft_reconstruction": (
                jnp.where(first, 1.0, 0.0),
                jnp.mean((teacher - reconstruction) ** 2),
            ),
            "ft_factors": (jnp.where(first, 0.0, self.weight), distance),
        }
        return weighted_sum(terms, state)


def _last_map(out: Outputs) -> jax.Array:
    return level_map(out, levels(out)[-1])
