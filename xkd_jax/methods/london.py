"""LONDON: OFD, and the student's Lipschitz constants between adjacent levels match the teacher's.

Shang, Duan, Zong, Nie, Yan: Lipschitz Continuity Guided Knowledge Distillation, arXiv:2108.12905.
"""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from xkd_jax.methods.align import on_smaller_grid, paired_levels
from xkd_jax.methods.base import PairError, weighted_sum
from xkd_jax.methods.layers import unit
from xkd_jax.methods.ofd import OFD, Pair

ITERATIONS = 10  # the authors' for CIFAR-100; 5 for ImageNet


def top_singular_value(shallow: jax.Array, deep: jax.Array, start: jax.Array) -> jax.Array:
    """The spectral norm of each image's transmitting matrix F_i^T F_(i+1) / (h w).

    It bounds the Lipschitz constant of the layers between the two levels (section 3), and is found
    by power iteration.

    Args:
      shallow: F_i, [N, h, w, C].
      deep: F_(i+1), [N, h', w', D]; the finer of the two is averaged down to the other's grid.
      start: the initial vector of the power iteration, [C].

    Returns:
      [N], float32; the gradient flows through the iterations, as in the released code.
    """
    shallow, deep = on_smaller_grid(shallow, deep)
    n, h, w, channels = shallow.shape
    shallow, deep = (x.reshape(n, h * w, -1) for x in (shallow, deep))

    # Applied factor by factor: the matrix itself would cost more than many networks.
    def transposed(vector: jax.Array) -> jax.Array:
        return jnp.einsum("ntc,ntd,nc->nd", shallow, deep, vector) / (h * w)

    def iterate(_, vector: jax.Array) -> jax.Array:
        image = unit(transposed(vector))
        return unit(jnp.einsum("ntc,ntd,nd->nc", shallow, deep, image))

    vector = jnp.broadcast_to(start, (n, channels))
    vector = jax.lax.fori_loop(0, ITERATIONS, iterate, vector)
    return jnp.sqrt(jnp.maximum(jnp.sum(transposed(vector) ** 2, -1), 1e-24))


def spectral_distance(key: jax.Array, maps: list[Pair]) -> jax.Array:
    """The weighted sum of the mean squared differences of the top singular values.

    Levels i and i + 1 of n, counted from 1, have the weight 2^-(n - i).

    Args:
      key: for the initial vectors of the power iterations, the same for both networks.
      maps: the teacher's and the student's maps [N, h, w, C] of each level, shallow to deep.
    """
    total = jnp.zeros(())
    for i, (shallow, deep) in enumerate(itertools.pairwise(maps)):
        start = jax.random.normal(jax.random.fold_in(key, i), shallow[0].shape[-1:])
        teacher, student = (
            top_singular_value(*pair, start) for pair in zip(shallow, deep, strict=True)
        )
        total = (total + jnp.mean((teacher - student) ** 2)) / 2
    return total


@dataclasses.dataclass(frozen=True)
class LONDON(OFD):
    """OFD's options, state and loss, and the spectral distance of the same maps.

    The authors' scripts for CIFAR-100 weight the spectral distance by 0.8/200 (WRN-28-4 ->
    WRN-16-4; reduced to a quarter after 60% of the epochs, which is not done here) or 0.25/200
    (-> WRN-16-2).

    Attributes:
      weight: weight of OFD's loss.
      teacher_batch_stats: as for OFD, whose code the authors' builds on.
      spectral_weight: weight of the spectral distance.
    """

    spectral_weight: float = 0.8 / 200

    detection = False  # its spectra are those of whole images
    # 2000 / (batch * 10^4), with the authors' batches of 96.
    imagenet: ClassVar = {"weight": 1e-4, "spectral_weight": 0.2 / 96}

    @override
    def check(self, teacher_out, student_out):
        if len(paired_levels(teacher_out, student_out)) < 2:
            raise PairError("london compares adjacent levels, but this pair has only one level")

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        maps = self.connected_maps(params, teacher_out, student_out)
        distance, state = self.distance(state, maps)
        spectral = spectral_distance(key, list(maps.values()))
        terms = {
            "partial_distance": (self.weight, distance),
            "spectral_distance": (self.spectral_weight, spectral),
        }
        return weighted_sum(terms, state)
