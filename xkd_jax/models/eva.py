"""EVA-02 and DINOv3, Transformers with rotary positions, with timm's names, layout and numerics.

Fang et al., "EVA-02: A Visual Representation for Neon Genesis" (arXiv:2303.11331); Siméoni et al.,
"DINOv3" (arXiv:2508.10104). The options and their meaning follow `Eva` in timm (Ross Wightman,
Apache-2.0).
"""

import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import CLIP_MEAN, CLIP_STD
from xkd_jax.models import scan
from xkd_jax.models.beit import (
    add_blocks,
    add_outputs,
    attend,
    check_network,
    project_qkv,
    residual_init,
    scale_branch,
    split_heads,
    weight_init,
)
from xkd_jax.models.layers import drop_path, layer_norm, recomputed
from xkd_jax.models.variant import Variant
from xkd_jax.models.vit import SIZES
from xkd_jax.models.vit_layers import Grid, Mlp, PatchEmbed

_ROPE_TYPES = ("cat", "dinov3")
_REFERENCE_SIDE = 16  # of EVA-02's grid in pretraining; the positions of others are scaled to it


def rotary_angles(side: int, head_dim: int, rope_type: str) -> np.ndarray:
    """The angles by which a row or column of the grid rotates: [side, d/4].

    "cat" counts positions from 0 to 16 with periods of 2 pi to 20000 pi (arXiv:2303.11331, and
    RoPE, arXiv:2104.09864); "dinov3" takes the patches' centres, from -1 to 1, with periods of 1 to
    100 (arXiv:2508.10104).
    """
    exponents = np.arange(head_dim // 4) / (head_dim // 4)
    if rope_type == "cat":
        return np.outer(np.arange(side) / side * _REFERENCE_SIDE, 10000.0**-exponents)
    return np.outer(2 * np.pi * ((2 * np.arange(side) + 1) / side - 1), 100.0**-exponents)


def rotate(x: jax.Array, prefix: int, rope_type: str) -> jax.Array:
    """Rotates queries or keys `x` [N, heads, P + T, d], all but the first `prefix` tokens.

    The first half of the rotated pairs of channels turns with the patch's row, the second half with
    its column. A pair is two neighbours ("cat") or two channels that are d/2 apart ("dinov3").
    """
    side = math.isqrt(x.shape[2] - prefix)
    angles = rotary_angles(side, x.shape[-1], rope_type)

    def table(function: Any) -> jax.Array:
        values = jnp.asarray(function(angles), jnp.float32)
        both = [jnp.repeat(values, side, axis=0), jnp.tile(values, (side, 1))]
        rows = jnp.concatenate(both, axis=1)
        return jnp.pad(rows, ((prefix, 0), (0, 0)), constant_values=function(0.0))

    sin, cos = table(np.sin), table(np.cos)
    if rope_type == "cat":
        a, b = x[..., 0::2], x[..., 1::2]
        pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return pairs.reshape(x.shape).astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention whose queries and keys are rotated by the patches' positions.

    `prefix` is the number of tokens before those of patches, which are not rotated. `number` is the
    block's; only the initial weights depend on it.
    """

    num_heads: int
    prefix: int
    rope_type: str
    qkv_bias: bool = True
    qkv_fused: bool = True
    number: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Attends over `x` [N, P + T, D].

        Also returns query and key, after the rotation, and value [N, heads, P + T, d].
        """
        n, t, dim = x.shape
        x = x.reshape(n * t, dim)
        if self.qkv_fused:
            qkv = project_qkv(self, x, self.qkv_bias)
        else:
            qkv = jnp.concatenate([self._project(name, x) for name in ("q", "k", "v")], axis=-1)
        query, key, value = split_heads(qkv, n, self.num_heads)
        query, key = (rotate(head, self.prefix, self.rope_type) for head in (query, key))
        y = attend(query, key, value)
        init = residual_init(self.number)
        y = nn.Dense(dim, dtype=self.dtype, kernel_init=init, name="proj")(y)
        return y.reshape(n, t, dim), (query, key, value)

    def _project(self, name: str, x: jax.Array) -> jax.Array:
        return nn.Dense(
            x.shape[-1],
            use_bias=self.qkv_bias and name != "k",
            dtype=self.dtype,
            kernel_init=weight_init,
            name=f"{name}_proj",
        )(x)


class SwiGlu(nn.Module):
    """The gated dense layers of a block (Shazeer, arXiv:2002.05202): silu(gate) * value, then fc2.

    Gate and value are the halves of one layer's output, or with `scale` two layers' outputs, whose
    product is then normalised. `number` is the block's; only the initial weights depend on it.
    """

    hidden: int
    scale: bool
    epsilon: float
    number: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [..., D] to [..., D]."""
        shape, dim = x.shape, x.shape[-1]
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=weight_init)
        x = x.reshape(-1, dim)  # as one matrix: see `vit.Mlp`
        if self.scale:
            gate, value = (dense(self.hidden, name=f"fc1_{name}")(x) for name in ("g", "x"))
        else:
            gate, value = jnp.split(dense(2 * self.hidden, name="fc1")(x), 2, axis=-1)
        x = nn.silu(gate) * value
        if self.scale:
            x = layer_norm("norm", self.epsilon, self.dtype)(x)
        init = residual_init(self.number)
        x = nn.Dense(dim, dtype=self.dtype, kernel_init=init, name="fc2")(x)
        return x.reshape(shape)


class Block(nn.Module):
    """A pre-norm Transformer block; with `init_values`, each branch ends in a LayerScale.

    `number` is the block's; only the initial weights depend on it.
    """

    num_heads: int
    prefix: int
    rope_type: str
    mlp_ratio: float
    qkv_bias: bool
    qkv_fused: bool
    swiglu_mlp: bool
    scale_mlp: bool
    init_values: float | None
    epsilon: float
    dtype: Any
    number: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, rate: float | jax.Array = 0.0
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Maps `x` [N, P + T, D] to [N, P + T, D]; also returns query, key and value.

        `rate` is the probability that a branch is dropped, per sample.
        """
        y = layer_norm("norm1", self.epsilon, self.dtype)(x)
        y, qkv = Attention(
            self.num_heads,
            self.prefix,
            self.rope_type,
            self.qkv_bias,
            self.qkv_fused,
            self.number,
            self.dtype,
            name="attn",
        )(y)
        y = scale_branch(self, "gamma_1", self.init_values, y)
        x = x + drop_path(self, y, rate, train)
        y = layer_norm("norm2", self.epsilon, self.dtype)(x)
        hidden = int(x.shape[-1] * self.mlp_ratio)
        if self.swiglu_mlp:
            options = self.scale_mlp, self.epsilon, self.number, self.dtype
            y = SwiGlu(hidden, *options, name="mlp")(y)
        else:
            y = Mlp(hidden, self.dtype, last_init=residual_init(self.number), name="mlp")(y)
        y = scale_branch(self, "gamma_2", self.init_values, y)
        return x + drop_path(self, y, rate, train), qkv


class Eva(nn.Module):
    """timm's `Eva` with rotary positions; the fields have timm's names and defaults.

    `rope_type` is "cat", EVA-02's, or "dinov3"; see `rotary_angles`. `qkv_fused=False` stores the
    projections of queries, keys and values separately. `swiglu_mlp` gates the dense layers and
    `scale_mlp` normalises what they gate. `use_abs_pos_emb` adds learnt position embeddings, and
    `num_reg_tokens` register tokens (arXiv:2309.16588) after the class token. `use_fc_norm=None` is
    timm's rule: with `global_pool="avg"` the final norm comes after the pooling, and the tokens are
    not normalised. `epsilon` is that of all layer normalisations. With `drop_rate` or
    `drop_path_rate` above 0, training needs `rngs={"dropout": key}`. No gradient flows into the
    first `frozen` blocks or the embedding.
    """

    kind: ClassVar[str] = "transformer"

    num_classes: int = 1000
    img_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qkv_fused: bool = True
    swiglu_mlp: bool = False
    scale_mlp: bool = False
    init_values: float | None = None
    num_reg_tokens: int = 0
    use_abs_pos_emb: bool = True
    rope_type: str = "cat"
    epsilon: float = 1e-6
    global_pool: str = "avg"
    use_fc_norm: bool | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    frozen: int = 0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, gather: scan.Gather | None = None
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, img_size, img_size, 3], already normalised.

        With sharded parameters, `gather` lets a deep network gather them block by block.

        Returns:
          logits [N, num_classes] float32, and the intermediates: `tokens` [N, T, D], `cls` [N, D],
          `block01` ... [N, T, D], `query` and `key`, both rotated, and `value` of the last block
          and `block01_query` ... of each [N, heads, T, d], `grid` (h, w), `pooled` [N, D], and
          `logits`. Everything per token covers only the patch tokens, except `prefix_query` ... of
          the last block, of the class token and the register tokens [N, heads, P, d].

        Raises:
          UserError: a field has a wrong value, or `images` has another size.
        """
        self._check(images.shape)
        x = PatchEmbed(self.patch_size, self.embed_dim, self.dtype, name="patch_embed")(images)
        n, height, width, dim = x.shape
        out: dict[str, Any] = {"grid": Grid((height, width))}
        prefix = [self.param("cls_token", weight_init, (1, 1, dim))]
        if self.num_reg_tokens:
            prefix.append(self.param("reg_token", weight_init, (1, self.num_reg_tokens, dim)))
        prefix = [jnp.tile(token.astype(x.dtype), (n, 1, 1)) for token in prefix]
        x = jnp.concatenate([*prefix, x.reshape(n, height * width, dim)], axis=1)
        if self.use_abs_pos_emb:
            x = x + self.param("pos_embed", weight_init, (1, x.shape[1], dim)).astype(x.dtype)
        x, blocks = self._blocks(x, train, gather)
        count = 1 + self.num_reg_tokens
        add_blocks(out, blocks, count)
        return add_outputs(self, out, x, count, train, self.epsilon)

    def _blocks(
        self, x: jax.Array, train: bool, gather: scan.Gather | None
    ) -> tuple[jax.Array, list]:
        """The last block's output, and each block's output with its query, key and value."""
        rates = [self.drop_path_rate * i / max(self.depth - 1, 1) for i in range(self.depth)]
        options = (
            self.num_heads, 1 + self.num_reg_tokens, self.rope_type, self.mlp_ratio, self.qkv_bias,
            self.qkv_fused, self.swiglu_mlp, self.scale_mlp, self.init_values, self.epsilon,
            self.dtype,
        )  # fmt: skip
        remat, outs, first = self.remat and train, [], 0
        if scan.pays(self.depth, train) and not self.is_initializing():
            last = self.depth - 1  # methods read the last block's taps
            frozen = min(self.frozen, last)
            for first, stop in ((0, frozen), (frozen, last)):
                if first == stop:
                    continue
                names, some = [f"blocks_{i}" for i in range(first, stop)], rates[first:stop]
                one = [Block(*options, parent=None)]
                x, new = scan.scan_blocks(self, one, names, x, train, some, remat, gather)
                x, new = self._freeze(stop, (x, new))
                outs += new
            first = last
        block = recomputed(Block, remat, static=(2, 3))
        for i in range(first, self.depth):
            number = i if self.is_initializing() else 0  # equal blocks compile once
            x, qkv = block(*options, number, name=f"blocks_{i}")(x, train, rates[i])
            x, qkv = self._freeze(i + 1, (x, qkv))
            outs.append((x, qkv))
        return x, outs

    def _freeze(self, number: int, outputs: Any) -> Any:
        """Cuts the gradient of all outputs of block `number` if it is frozen."""
        return jax.lax.stop_gradient(outputs) if number <= self.frozen else outputs

    def _check(self, shape: tuple[int, ...]) -> None:
        check_network(self, shape)
        if self.rope_type not in _ROPE_TYPES:
            raise errors.unknown("rope_type", self.rope_type, _ROPE_TYPES)
        if self.embed_dim // self.num_heads % 4:
            raise errors.UserError(
                f"a head's width, embed_dim {self.embed_dim} / num_heads {self.num_heads}, must be "
                "a multiple of 4: its channels rotate in pairs, half of them by row."
            )
        if self.scale_mlp and not self.swiglu_mlp:
            raise errors.UserError("scale_mlp=True needs swiglu_mlp=True.")


_EVA02 = {"swiglu_mlp": True, "mlp_ratio": 4 * 2 / 3}
_EVA02_BASE = {**_EVA02, **SIZES["base"], "qkv_fused": False, "scale_mlp": True}
_DINOV3 = {
    "img_size": 256,
    "patch_size": 16,
    "qkv_bias": False,
    "init_values": 1e-5,
    "num_reg_tokens": 4,
    "use_abs_pos_emb": False,
    "rope_type": "dinov3",
    "epsilon": 1e-5,
    "use_fc_norm": False,
}


def _eva02(args: dict[str, Any], img: int) -> Variant:
    return Variant(Eva, {"img_size": img, "patch_size": 14, **args}, img, CLIP_MEAN, CLIP_STD)


VARIANTS = {
    f"vit_{size}_patch16_dinov3": Variant(Eva, {**_DINOV3, **SIZES[size]}, 256)
    for size in ("small", "base", "large")
}
VARIANTS |= {
    "eva02_small_patch14_224": _eva02(_EVA02 | SIZES["small"], 224),
    "eva02_small_patch14_336": _eva02(_EVA02 | SIZES["small"], 336),
    "eva02_base_patch14_224": _eva02(_EVA02_BASE, 224),
    "eva02_base_patch14_448": _eva02(_EVA02_BASE, 448),
}
