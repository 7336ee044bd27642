"""IRG: the student imitates the graph that the examples of a batch form at each level.

Liu, Cao, Li, Yuan, Hu, Li, Duan: Knowledge Distillation via Instance Relationship Graph, CVPR 2019.
"""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from xkd_jax.methods.align import level_map, paired_levels
from xkd_jax.methods.base import Method, Outputs, weighted_sum
from xkd_jax.methods.logits import mean_squared_distance


def edges(features: jax.Array) -> jax.Array:
    """The squared distances between N points [N, D], divided by the largest of them: [N, N].

    The largest is treated as a constant in the backward pass, as in the authors' code.
    """
    distances = jnp.sum((features - features[:, None]) ** 2, -1)
    largest = jax.lax.stop_gradient(jnp.max(distances))
    return distances / jnp.where(largest > 0, largest, 1.0)


def transforms(graphs: jax.Array) -> jax.Array:
    """The squared changes of the edges from level to level, [L, N, N] -> [L - 1, N, N]."""
    return (graphs[1:] - graphs[:-1]) ** 2


@dataclasses.dataclass(frozen=True)
class IRG(Method):
    """Multi-type knowledge: vertices (the logits), edges at each level, and their transforms.

    The weights are those of AberHu's Knowledge-Distillation-Zoo; each term is a mean over its
    elements. Levels are averaged over their grid, as in the authors' code. Both implementations
    compare transforms of vertices, which requires levels of the same width; the paper's other kind,
    transforms of edges, works for any pair of networks and is used here.

    Attributes:
      vertex_weight: weight of the logits' mean squared distance; without effect where one of the
        networks has no classifier.
      edge_weight: weight of the edges' mean squared distance.
      transform_weight: weight of the mean squared distance of the edges' transforms.
    """

    vertex_weight: float = 0.1
    edge_weight: float = 5.0
    transform_weight: float = 5.0

    needs_teacher = True

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        teacher_levels, student_levels = zip(*paired_levels(teacher_out, student_out), strict=True)
        target = jax.lax.stop_gradient(_graphs(teacher_out, teacher_levels))
        graphs = _graphs(student_out, student_levels)
        terms = {}
        if "logits" in teacher_out and "logits" in student_out:
            logits = student_out["logits"], jax.lax.stop_gradient(teacher_out["logits"])
            terms["irg_vertex"] = (self.vertex_weight, mean_squared_distance(*logits))
        terms["irg_edge"] = (self.edge_weight, jnp.mean((graphs - target) ** 2))
        if len(graphs) > 1:  # a single level has no next one
            change = transforms(graphs) - transforms(target)
            terms["irg_transform"] = (self.transform_weight, jnp.mean(change**2))
        return weighted_sum(terms, state)


def _graphs(out: Outputs, names: tuple[str, ...]) -> jax.Array:
    """The edges at each level, [L, N, N]."""
    return jnp.stack([edges(jnp.mean(level_map(out, name), (1, 2))) for name in names])
