"""The method as in the first author's released PyTorch code, which departs from the paper.

Source: github.com/yufanLIU/CrossArch_KD. docs/method.md lists the differences from `cakd.py` and
why they matter. The released code's TrivialAugment, label smoothing, mixup and EMA are part of the
recipe, not of the method.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from typing_extensions import override

from xkd_jax.errors import UserError
from xkd_jax.methods import cakd
from xkd_jax.methods.base import Outputs, apply, weighted_sum
from xkd_jax.methods.logits import mean_squared_distance
from xkd_jax.methods.taps import teacher_taps
from xkd_jax.models.layers import normalize_batch


class LinearProjector(nn.Module):
    """One linear layer without bias to Q, K and V of 16 heads, together as wide as its input."""

    heads: int = 16

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[N, h, w, C] -> Q, K, V, each [N, heads, T, C / heads]."""
        n, h, w, channels = features.shape
        width = 3 * self.heads * max(1, channels // self.heads)
        projected = nn.Dense(width, use_bias=False)(features.reshape(n, h * w, channels))
        q, k, v = jnp.moveaxis(projected.reshape(n, h * w, 3, self.heads, -1), (2, 3), (0, 2))
        return q, k, v


class PatchGAN(nn.Module):
    """A discriminator of attention maps: strided convolutions to one logit per patch (pix2pix).

    The widths and the batch normalisation are the released code's. Small maps are padded so that a
    patch is left.
    """

    @nn.compact
    def __call__(self, scores: jax.Array) -> jax.Array:
        """[N, T, T] -> logits [N], averaged over patches."""
        x = nn.leaky_relu(nn.Conv(8, (4, 4), (2, 2))(scores[..., None]), 0.2)
        for i, (channels, stride) in enumerate(((16, 2), (32, 2), (64, 1)), start=1):
            x = nn.Conv(channels, (4, 4), (stride, stride), use_bias=False)(x)
            scale = self.param(f"scale_{i}", nn.initializers.ones, (channels,))
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (channels,))
            normalized: Any = normalize_batch(x, scale, bias, 1e-5)  # custom_vjp hides the type
            x = nn.leaky_relu(normalized[0], 0.2)
        return jnp.mean(nn.Conv(1, (4, 4))(x), axis=(1, 2, 3))


def mean_scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """Q K^T / sqrt(d) before the softmax, averaged over heads: [N, H, T, d] -> [N, T, T]."""
    return jnp.einsum("nhqd,nhkd->nqk", query, key) / (query.shape[1] * query.shape[-1] ** 0.5)


@dataclasses.dataclass(frozen=True)
class CAKDRelease(cakd.CAKD):
    """The preset `cakd_release`.

    The whole sum of the terms is multiplied by a ramp, which is 0 in the first 26 epochs:
    min(max(epoch - ramp_start, 0) / ramp_epochs, ramp_limit), of the whole epochs so far.

    Attributes:
      attention_weight: weight of the mean squared distance of the scores.
      value_weight: weight of that of the value relations.
      token_weight: weight of L_proj2.
      adversarial_weight: weight of the generator's term, which has no gradient.
      ramp_start: the last epoch in which the ramp is 0.
      ramp_epochs: epochs in which it would grow from 0 to 1.
      ramp_limit: its largest value.
      logit_weight: weight of the mean squared distance of the logits.
      class_token_weight: weight of the mean squared distance between the class token and a linear
        map of the student's pooled features.
    """

    multi_view: bool = False
    attention_weight: float = 0.2
    value_weight: float = 0.05
    token_weight: float = 0.05
    adversarial_weight: float = 1.0
    generator: str = "non_saturating"
    token_dropout: float = 0.0
    adversary_every: int = 1
    student_stage: str = "stage3"
    ramp_start: float = 25.0
    ramp_epochs: float = 50.0
    ramp_limit: float = 0.2
    logit_weight: float = 1.0
    class_token_weight: float = 1.0

    detection = False  # it reads logits and the class token

    @override
    def check(self, teacher_out, student_out):
        super().check(teacher_out, student_out)
        if not self.ramp_epochs > 0:
            raise UserError(f"method.cakd_release.ramp_epochs={self.ramp_epochs} must be above 0.")
        if self.pooled_weight:
            raise UserError(
                "method.cakd_release.pooled_weight has no effect; set class_token_weight instead."
            )

    def ramp(self, progress: jax.Array) -> jax.Array:
        """The factor of all terms after `progress` epochs."""
        epochs = jnp.maximum(jnp.floor(progress) - self.ramp_start, 0)
        return jnp.minimum(epochs / self.ramp_epochs, self.ramp_limit)

    def _release_modules(self, teacher_out: Outputs) -> tuple[nn.Module, nn.Module, nn.Module]:
        width = teacher_out["tokens"].shape[-1]
        return LinearProjector(), cakd.GLProjector(width, self.token_dropout), nn.Dense(width)

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        pca, gl, class_token = self._release_modules(teacher_out)
        features = self._student_map(teacher_out, student_out)
        keys = jax.random.split(key, 3)
        params = {
            "pca": pca.init(keys[0], features),
            "gl": gl.init(keys[1], features, train=False),
            "class_token": class_token.init(keys[2], student_out["pooled"].astype(jnp.float32)),
        }
        return params, {}

    @override
    def init_adversary(self, key, teacher_out, student_out):
        return PatchGAN().init(key, mean_scores(teacher_out["query"], teacher_out["key"]))

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        pca, gl, class_token = self._release_modules(teacher_out)
        (query, keys, value), teacher_tokens = teacher_taps(teacher_out, self.teacher_block)
        features = self._student_map(teacher_out, student_out)
        q, k, v = apply(pca, params["pca"], features)
        teacher_scores, scores = mean_scores(query, keys), mean_scores(q, k)
        tokens = apply(gl, params["gl"], features, rngs={"dropout": key})
        # Scaled on the student's side only: a slip in the released code, reproduced here.
        relation = mean_scores(v, v) - mean_scores(value, value) * value.shape[-1] ** 0.5
        pooled = apply(
            class_token, params["class_token"], student_out["pooled"].astype(jnp.float32)
        )
        target = jax.lax.stop_gradient(teacher_out.get("cls", teacher_out["pooled"]))
        teacher_logits = jax.lax.stop_gradient(teacher_out["logits"])
        ramp = self.ramp(progress)
        terms = {
            "attention": (self.attention_weight, jnp.mean((teacher_scores - scores) ** 2)),
            "value_relation": (self.value_weight, jnp.mean(relation**2)),
            "tokens": (self.token_weight, cakd.token_loss(teacher_tokens, tokens)),
            "logits_mse": (
                self.logit_weight,
                mean_squared_distance(student_out["logits"], teacher_logits),
            ),
            "class_token": (self.class_token_weight, jnp.mean((target - pooled) ** 2)),
        }
        if adversary:
            # The released code detaches the map: the student gets no gradient from this term.
            judged = jax.lax.stop_gradient(scores)
            fooled = apply(PatchGAN(), jax.lax.stop_gradient(adversary), judged)
            loss = cakd.generator_loss(fooled, self.generator)
            terms["generator"] = self.adversarial_weight, loss
        terms = {name: (ramp * weight, term) for name, (weight, term) in terms.items()}
        return weighted_sum(terms, state, judged=(teacher_scores, scores) if adversary else None)

    @override
    def adversary_loss(self, adversary, judged):
        """Half of L_MAD, of which only the student's half has a gradient.

        The released code detaches the teacher's logits: its discriminator is never trained on them.
        """
        teacher, student = (
            apply(PatchGAN(), adversary, scores) for scores in jax.lax.stop_gradient(judged)
        )
        loss = cakd.discriminator_loss(jax.lax.stop_gradient(teacher), student) / 2
        accuracy = (jnp.mean(teacher > 0) + jnp.mean(student < 0)) / 2
        return loss, {"discriminator": loss, "discriminator_accuracy": accuracy}
