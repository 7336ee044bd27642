"""Cross-architecture knowledge distillation: a Transformer teaches a CNN or a Transformer.

Liu, Cao, Li, Hu, Ding, Li: Cross-Architecture Knowledge Distillation, ACCV 2022. All
equations of the paper except the multi-view generator's (`xkd_jax/augment/multiview.py`) are here,
in the paper's order; docs/method.md maps them. N images, a grid of T = h * w tokens, H heads of
width d, D = H * d; the student's tapped map has C channels.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from typing_extensions import override

from xkd_jax import backend
from xkd_jax.errors import UserError, unknown
from xkd_jax.methods import align
from xkd_jax.methods.align import level_grid, level_map, match_stage, resize_map
from xkd_jax.methods.base import Method, Outputs, PairError, Tree, apply, weighted_sum
from xkd_jax.methods.taps import block_numbers, block_prefix, teacher_bias, teacher_taps

TILE = 4  # each tile of 4x4 tokens shares one linear layer


def _conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution of stride 1: [N, h, w, C], [3, 3, C, F] -> [N, h, w, F]."""
    if backend.current() != "cpu":
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    # On a CPU, XLA's convolution and its gradients on maps this small take 1.5 times as long as
    # one matrix product over the nine shifted copies of the map.
    n, h, w, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    columns = jnp.concatenate(shifts, axis=-1).reshape(n * h * w, 9 * channels)
    return (columns @ kernel.reshape(9 * channels, -1)).reshape(n, h, w, -1)


class PCAProjector(nn.Module):
    """Proj_1 (Eq. 1): three 3x3 convolutions map the student's features to Q_S, K_S and V_S."""

    heads: int
    head_dim: int

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[N, h, w, C] -> Q, K, V, each [N, H, T, d]."""
        n, h, w, channels = features.shape
        width = self.heads * self.head_dim
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2))
        names = ("query", "key", "value")
        kernels = [self.param(f"{m}_kernel", init, (3, 3, channels, width)) for m in names]
        biases = [self.param(f"{m}_bias", nn.initializers.zeros, (width,)) for m in names]
        # All three have the same input: one convolution with three times the filters.
        projected = _conv3x3(features, jnp.concatenate(kernels, -1)) + jnp.concatenate(biases)
        q, k, v = jnp.moveaxis(projected.reshape(n, h * w, 3, self.heads, -1), (2, 3), (0, 2))
        return q, k, v


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | float = 0.0
) -> jax.Array:
    """Self-attention (Eq. 2): softmax(Q K^T / sqrt(d) + bias) V per head, all [N, H, T, d].

    `bias` is a Swin's, [1, H, T, T]; other networks, and the student's projections, have none.
    """
    return jnp.einsum("nhqk,nhkd->nhqd", attention_weights(query, key, bias), value)


def attention_weights(query: jax.Array, key: jax.Array, bias: jax.Array | float = 0.0) -> jax.Array:
    """softmax(Q K^T / sqrt(d) + bias) per head: two [N, H, T, d] -> [N, H, T, T]."""
    scores = jnp.einsum("nhqd,nhkd->nhqk", query, key) / query.shape[-1] ** 0.5 + bias
    return jax.nn.softmax(scores)


def partly_replace(key: jax.Array, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """g (Eq. 3): each element is the teacher's with probability 1/2, else the student's.

    Args:
      key: must differ for every matrix and step.
      student: Q_S, K_S or V_S, any shape.
      teacher: the teacher's, of the same shape; it receives no gradient.
    """
    # One random bit per element: 32 times fewer random numbers than a uniform draw.
    words = jax.random.bits(key, (-(-student.size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)) & 1
    mask = bits.reshape(-1)[: student.size].reshape(student.shape).astype(bool)
    return jnp.where(mask, jax.lax.stop_gradient(teacher), student)


def value_relation(value: jax.Array) -> jax.Array:
    """V V^T / sqrt(d) per head: [N, H, T, d] -> [N, H, T, T]."""
    return jnp.einsum("nhqd,nhkd->nhqk", value, value) / value.shape[-1] ** 0.5


def pca_losses(
    key: jax.Array,
    student: tuple[jax.Array, ...],
    teacher: tuple[jax.Array, ...],
    bias: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """The two terms of L_proj1 (Eq. 4), attention and value relation: means over elements.

    Args:
      key: for the partial replacement.
      student: Q_S, K_S, V_S, each [N, H, T, d].
      teacher: Q_T, K_T, V_T, of the same shape; they receive no gradient.
      bias: of the teacher's scores, see `attention`.
    """
    teacher = jax.lax.stop_gradient(teacher)
    keys = jax.random.split(key, 3)
    mixed = (partly_replace(k, s, t) for k, s, t in zip(keys, student, teacher, strict=True))
    attention_loss = jnp.mean((attention(*teacher, bias=bias) - attention(*mixed)) ** 2)
    relation_loss = jnp.mean((value_relation(teacher[2]) - value_relation(student[2])) ** 2)
    return attention_loss, relation_loss


class GLProjector(nn.Module):
    """Proj_2 (Eq. 5): each 4x4 tile of the map has its own linear layer, all in one einsum.

    A 14x14 grid has 16 tiles, with a smaller last row and column; 7x7 has 4, 24x24 has 36.
    """

    width: int
    dropout: float = 0.1

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = True) -> jax.Array:
        """h_S [N, h, w, C] -> h'_S [N, T, width]."""
        n, h, w, channels = features.shape
        rows, columns = -(-h // TILE), -(-w // TILE)
        features = nn.Dropout(self.dropout)(features, deterministic=not train)
        padding = ((0, 0), (0, rows * TILE - h), (0, columns * TILE - w), (0, 0))
        tiles = jnp.pad(features, padding).reshape(n, rows, TILE, columns, TILE, channels)
        tiles = tiles.swapaxes(2, 3).reshape(n, rows * columns, TILE * TILE, channels)
        init = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=(0,))
        kernel = self.param("kernel", init, (rows * columns, channels, self.width))
        bias = self.param("bias", nn.initializers.zeros, (rows * columns, self.width))
        projected = jnp.einsum("ngpc,gcd->ngpd", tiles, kernel) + bias[:, None]
        grid = projected.reshape(n, rows, columns, TILE, TILE, self.width).swapaxes(2, 3)
        grid = grid.reshape(n, rows * TILE, columns * TILE, self.width)
        return grid[:, :h, :w].reshape(n, h * w, self.width)


def token_loss(teacher_tokens: jax.Array, student_tokens: jax.Array) -> jax.Array:
    """L_proj2 (Eq. 6): the mean squared distance between h_T and h'_S, both [N, T, D]."""
    return jnp.mean((jax.lax.stop_gradient(teacher_tokens) - student_tokens) ** 2)


def pooled_loss(teacher_pooled: jax.Array, prediction: jax.Array) -> jax.Array:
    """The mean squared distance of pooled features [N, D], in units of the teacher's variance.

    Not in the paper. Divided by the variance over the batch, the weight means the same for every
    teacher: predicting the mean of the teacher's features costs 1.
    """
    teacher_pooled = jax.lax.stop_gradient(teacher_pooled)
    variance = jnp.mean((teacher_pooled - jnp.mean(teacher_pooled, axis=0)) ** 2)
    return jnp.mean((teacher_pooled - prediction) ** 2) / jnp.maximum(variance, 1e-6)


class Discriminator(nn.Module):
    """D: three fully connected layers on each token, their logits averaged to one per image.

    A positive logit means "teacher".
    """

    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[N, T, D] -> logits [N], D(h) before the sigmoid."""
        for _ in range(2):
            tokens = nn.leaky_relu(nn.Dense(self.width)(tokens), 0.2)
        return jnp.mean(nn.Dense(1)(tokens), axis=(1, 2))


def discriminator_loss(teacher_logits: jax.Array, student_logits: jax.Array) -> jax.Array:
    """L_MAD (Eq. 8): -log D(h_T) - log(1 - D(h'_S)), from the logits of D [N]."""
    return -jnp.mean(jax.nn.log_sigmoid(teacher_logits) + jax.nn.log_sigmoid(-student_logits))


GENERATORS = {
    "saturating": lambda logits: jnp.mean(jax.nn.log_sigmoid(-logits)),
    "non_saturating": lambda logits: -jnp.mean(jax.nn.log_sigmoid(logits)),
}


def generator_loss(student_logits: jax.Array, kind: str = "saturating") -> jax.Array:
    """L_MVG (Eq. 9): log(1 - D(h'_S)) as in the paper, or -log D(h'_S), from the logits [N]."""
    return GENERATORS[kind](student_logits)


def judge(
    discriminator: nn.Module, params: Tree, teacher: jax.Array, student: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The discriminator's loss on the teacher's and the student's features, and its accuracy."""
    teacher_logits = apply(discriminator, params, teacher)
    student_logits = apply(discriminator, params, student)
    loss = discriminator_loss(teacher_logits, student_logits)
    accuracy = (jnp.mean(teacher_logits > 0) + jnp.mean(student_logits < 0)) / 2
    return loss, {"discriminator": loss, "discriminator_accuracy": accuracy}


class Projected(NamedTuple):
    """The student's features in the teacher's two spaces, and the teacher's own."""

    teacher_qkv: tuple[jax.Array, ...]  # Q_T, K_T, V_T, each [N, H, T, d]
    student_qkv: tuple[jax.Array, ...]  # Q_S, K_S, V_S, each [N, H, T, d]
    bias: jax.Array | float  # of the teacher's scores, see `attention`
    teacher_tokens: jax.Array  # h_T [N, T, D]
    student_tokens: jax.Array  # h'_S [N, T, D]


@dataclasses.dataclass(frozen=True)
class CAKD(Method):
    """The paper's method.

    Attributes:
      attention_weight: weight of the attention term of L_proj1.
      value_weight: weight of the value-relation term of L_proj1.
      token_weight: weight of L_proj2.
      adversarial_weight: lambda. The paper doesn't state it; docs/quickstart.md has the sweep. With
        0 there is no adversary.
      pooled_weight: weight of `pooled_loss`, which the paper doesn't have: the student's last stage
        learns from the teacher too. A linear map of `pooled` predicts the teacher's.
      generator: "saturating", as in the paper, or "non_saturating".
      token_dropout: dropout rate on the input of Proj_2.
      adversary_every: the 5 in Algorithm 1's "e % 5 = 0".
      adversary_clock: what e counts, "step" or "epoch".
      student_stage: where the student is tapped; see `align.choose_stage`.
      teacher_block: where the teacher is tapped; see `taps.teacher_taps`.
    """

    multi_view: bool = True
    attention_weight: float = 1.0
    value_weight: float = 1.0
    token_weight: float = 1.0
    adversarial_weight: float = 0.1
    pooled_weight: float = 0.0
    generator: str = "saturating"
    token_dropout: float = 0.1
    adversary_every: int = 5
    adversary_clock: str = "step"
    student_stage: str = "auto"
    teacher_block: int = -1

    needs_teacher = True
    detection = True

    @property
    @override
    def adversary_period(self) -> int:
        return self.adversary_every if self.adversarial_weight else 0

    @override
    def check(self, teacher_out, student_out):
        if "query" not in teacher_out:
            raise PairError(
                "cakd taps a Transformer's query, key and value, but this teacher "
                f"{align.why_no_attention(teacher_out)}"
            )
        self._stage(teacher_out, student_out)
        if self.generator not in GENERATORS:
            raise unknown("generator loss", self.generator, GENERATORS)
        if self.adversary_clock not in ("step", "epoch"):
            raise unknown("adversary clock", self.adversary_clock, ("step", "epoch"))
        self._check_block(teacher_out)
        if self.adversary_every < 1:
            raise UserError(f"adversary_every={self.adversary_every} must be at least 1.")

    def _check_block(self, teacher_out: Outputs) -> None:
        blocks = len(block_numbers(teacher_out))
        if not -blocks <= self.teacher_block <= -1:
            raise UserError(
                f"teacher_block={self.teacher_block} doesn't exist; this teacher has the blocks "
                f"-1 (the last) to -{blocks} (the first)."
            )
        prefix = block_prefix(teacher_out, self.teacher_block)
        if "stage1" not in teacher_out:
            return
        last = teacher_out["query"].shape
        if teacher_out[f"{prefix}query"].shape != last:
            count = sum(
                teacher_out[f"block{number:02d}_query"].shape == last
                for number in block_numbers(teacher_out)
            )
            raise UserError(
                f"teacher_block={self.teacher_block} is in an earlier stage of this Swin, which "
                f"has another grid; take -1 (the last) to -{count} (the last stage's first)."
            )
        if f"{prefix}bias" not in teacher_out:
            grid = "x".join(map(str, teacher_out["grid"]))
            raise PairError(
                f"cakd imitates the teacher's attention, but this Swin pads its last map, {grid}, "
                "to whole windows, so that part of its attention is on the padding"
            )

    def _modules(self, teacher_out: Outputs) -> tuple[PCAProjector, GLProjector, Discriminator]:
        _, heads, _, head_dim = teacher_out["query"].shape
        width = teacher_out["tokens"].shape[-1]
        return (
            PCAProjector(heads, head_dim),
            GLProjector(width, self.token_dropout),
            Discriminator(width),
        )

    def _student_map(self, teacher_out: Outputs, student_out: Outputs) -> jax.Array:
        """h_S on the teacher's grid, [N, h, w, C]."""
        stage, _ = self._stage(teacher_out, student_out)
        return resize_map(level_map(student_out, stage, standardize=False), teacher_out["grid"])

    def _stage(self, teacher_out: Outputs, student_out: Outputs) -> tuple[str, str]:
        """Where the student is tapped, and why."""
        sides = teacher_out.get("side", 0), student_out.get("side", 0)
        return match_stage(student_out, teacher_out["grid"], self.student_stage, sides)

    @override
    def describe(self, teacher_out, student_out):
        stage, why = self._stage(teacher_out, student_out)
        of_student, of_teacher = (
            "x".join(map(str, grid))
            for grid in (level_grid(student_out, stage), teacher_out["grid"])
        )
        block = max(block_numbers(teacher_out)) + 1 + self.teacher_block
        return (
            f"the student is tapped at {stage}, {of_student}, and the teacher at block {block}, "
            f"{of_teacher} tokens: {why}"
        )

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        pca, gl, _ = self._modules(teacher_out)
        features = self._student_map(teacher_out, student_out)
        keys = jax.random.split(key, 3) if self.pooled_weight else jax.random.split(key)
        params = {
            "pca": pca.init(keys[0], features),
            "gl": gl.init(keys[1], features, train=False),
        }
        if self.pooled_weight:
            linear = nn.Dense(teacher_out["pooled"].shape[-1])
            params["pooled"] = linear.init(keys[2], student_out["pooled"].astype(jnp.float32))
        return params, {}

    @override
    def init_adversary(self, key, teacher_out, student_out):
        return self._modules(teacher_out)[2].init(key, teacher_out["tokens"].astype(jnp.float32))

    def project(self, params: Tree, teacher_out: Outputs, student_out: Outputs) -> Projected:
        """The projections after training, without dropout and without g; arguments as `loss`."""
        pca, gl, _ = self._modules(teacher_out)
        features = self._student_map(teacher_out, student_out)
        teacher_qkv, teacher_tokens = teacher_taps(teacher_out, self.teacher_block)
        return Projected(
            teacher_qkv,
            apply(pca, params["pca"], features),
            teacher_bias(teacher_out, self.teacher_block),
            teacher_tokens,
            apply(gl, params["gl"], features, train=False),
        )

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        """L_total (Eq. 10): L_proj1 + L_proj2 + lambda L_MVG; the loop adds the label term."""
        pca, gl, discriminator = self._modules(teacher_out)
        teacher_qkv, teacher_tokens = teacher_taps(teacher_out, self.teacher_block)
        features = self._student_map(teacher_out, student_out)
        replace_key, dropout_key = jax.random.split(key)
        # Without the barrier, XLA fuses the projection into each of its consumers on a CPU.
        student_qkv = jax.lax.optimization_barrier(apply(pca, params["pca"], features))
        tokens = apply(gl, params["gl"], features, rngs={"dropout": dropout_key})
        bias = teacher_bias(teacher_out, self.teacher_block)
        attention_loss, relation_loss = pca_losses(replace_key, student_qkv, teacher_qkv, bias)
        terms = {
            "attention": (self.attention_weight, attention_loss),
            "value_relation": (self.value_weight, relation_loss),
            "tokens": (self.token_weight, token_loss(teacher_tokens, tokens)),
        }
        if adversary:
            logits = apply(discriminator, jax.lax.stop_gradient(adversary), tokens)
            loss = generator_loss(logits, self.generator)
            terms["generator"] = self.adversarial_weight, loss
        if "pooled" in params:
            target = teacher_out["pooled"].astype(jnp.float32)
            source = student_out["pooled"].astype(jnp.float32)
            prediction = apply(nn.Dense(target.shape[-1]), params["pooled"], source)
            terms["pooled"] = (self.pooled_weight, pooled_loss(target, prediction))
        return weighted_sum(terms, state, judged=(teacher_tokens, tokens) if adversary else None)

    @override
    def adversary_loss(self, adversary, judged):
        """L_MAD of h_T and h'_S."""
        teacher_tokens, tokens = jax.lax.stop_gradient(judged)
        return judge(Discriminator(tokens.shape[-1]), adversary, teacher_tokens, tokens)
