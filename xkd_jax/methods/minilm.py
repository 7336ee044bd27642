"""MiniLM: the student's last self-attention imitates how the teacher's relates tokens.

Wang, Wei, Dong, Bao, Yang, Zhou: MiniLM: Deep Self-Attention Distillation for Experiment-Agnostic
Compression of Pre-Trained Transformers, arXiv:2002.10957, section 3, is "v1"; Wang, Bao, Huang,
Dong, Wei: MiniLMv2, arXiv:2012.15828, section 3, is "v2".
"""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from xkd_jax.errors import UserError, unknown
from xkd_jax.methods.align import why_no_attention
from xkd_jax.methods.base import Method, Outputs, PairError, weighted_sum
from xkd_jax.methods.logits import softened_kl

# The two factors of the relation in each term.
RELATIONS = {
    "v1": {"minilm_attention": ("query", "key"), "minilm_value": ("value", "value")},
    "v2": {
        "minilm_query": ("query", "query"),
        "minilm_key": ("key", "key"),
        "minilm_value": ("value", "value"),
    },
}


def relation(a: jax.Array, b: jax.Array) -> jax.Array:
    """A B^T / sqrt(d) per head, before the softmax: [N, H, T, d] twice -> [N, H, T, T]."""
    return jnp.einsum("nhqd,nhkd->nhqk", a, b) / a.shape[-1] ** 0.5


def relation_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(teacher || student) of the relations' rows after a softmax, the mean over rows.

    L_AT and L_VR of v1's sections 3.1 and 3.2, and each of v2's terms.

    Args:
      student: its relation [N, H, T, T]; see `relation`.
      teacher: the teacher's [N, H, T, T], without gradient.
    """
    return softened_kl(student, jax.lax.stop_gradient(teacher), temperature=1.0)


def regroup(x: jax.Array, heads: int) -> jax.Array:
    """Joins all heads and splits them into `heads` relation heads, as in v2.

    [N, H, T, d] -> [N, heads, T, H * d / heads].
    """
    n, _, tokens, _ = x.shape
    return x.swapaxes(1, 2).reshape(n, tokens, heads, -1).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class MiniLM(Method):
    """Deep self-attention distillation from the teacher's last block to the student's.

    Both must be Transformers with the same grid of tokens. The relations are between all tokens:
    the patches and, if both networks have one, the class token. DeiT's distillation token is left
    out. Attention includes a Swin's position bias.

    Attributes:
      weight: weight of each term.
      variant: "v1" compares attention and value relations, head by head; "v2" compares relations
        of queries, keys and values, for any numbers of heads.
      relation_heads: number of relation heads of "v2", which must divide both networks' widths; its
        authors use 48 for teachers of width 768.
    """

    weight: float = 1.0
    variant: str = "v1"
    relation_heads: int = 48

    needs_teacher = True

    @override
    def check(self, teacher_out, student_out):
        if self.variant not in RELATIONS:
            raise unknown("variant of minilm", self.variant, RELATIONS)
        for role, out in (("teacher", teacher_out), ("student", student_out)):
            if "query" not in out:
                raise PairError(
                    f"minilm compares the attention of two Transformers, but this {role} "
                    f"{why_no_attention(out)}"
                )
        grids = ["x".join(map(str, out["grid"])) for out in (teacher_out, student_out)]
        if grids[0] != grids[1]:
            raise PairError(
                f"minilm compares token by token, but the teacher's grid is {grids[0]} and the "
                f"student's is {grids[1]}"
            )
        teacher, student = (out["query"].shape for out in (teacher_out, student_out))
        if self.variant == "v1" and teacher[1] != student[1]:
            raise UserError(
                f"minilm's v1 compares head by head, but the teacher has {teacher[1]} heads and "
                f"the student {student[1]}; set method.minilm.variant to 'v2'."
            )
        if self.variant == "v2":
            self._check_relation_heads(teacher[1] * teacher[-1], student[1] * student[-1])

    def _check_relation_heads(self, *widths: int) -> None:
        if self.relation_heads < 1 or any(width % self.relation_heads for width in widths):
            raise UserError(
                f"method.minilm.relation_heads={self.relation_heads} must divide the teacher's "
                f"width, {widths[0]}, and the student's, {widths[1]}."
            )

    def _relations(self, out: Outputs, with_class: bool) -> dict[str, jax.Array]:
        """The relations [N, H, T, T] of one network, by the name of the term."""
        taps = {name: out[name].astype(jnp.float32) for name in ("query", "key", "value")}
        if with_class:
            taps = {
                name: jnp.concatenate([out[f"prefix_{name}"][:, :, :1].astype(tap.dtype), tap], 2)
                for name, tap in taps.items()
            }
        if self.variant == "v2":
            taps = {name: regroup(tap, self.relation_heads) for name, tap in taps.items()}
        relations = {
            name: relation(taps[a], taps[b]) for name, (a, b) in RELATIONS[self.variant].items()
        }
        bias = out.get("prefix_bias" if with_class else "bias")
        if self.variant == "v1" and bias is not None:
            relations["minilm_attention"] += bias
        return relations

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        # Without a class token, the prefix consists of registers.
        needed = {"cls", "prefix_query"}
        with_class = all(out.keys() >= needed for out in (teacher_out, student_out))
        teacher, student = (self._relations(out, with_class) for out in (teacher_out, student_out))
        terms = {
            name: (self.weight, relation_loss(student[name], teacher[name])) for name in teacher
        }
        return weighted_sum(terms, state)
