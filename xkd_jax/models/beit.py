"""BEiT's Vision Transformers, with timm's names, weight layout and numerics.

Bao et al., "BEiT: BERT Pre-Training of Image Transformers" (arXiv:2106.08254). The options and
their meaning follow `Beit` in timm (Ross Wightman, Apache-2.0). EVA and DINOv3 share the parts
below that are public.
"""

import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import HALF_MEAN, HALF_STD
from xkd_jax.models import scan
from xkd_jax.models.layers import add_logits, drop_path, layer_norm, recomputed
from xkd_jax.models.variant import Variant
from xkd_jax.models.vit import SIZES
from xkd_jax.models.vit_layers import Grid, Mlp, PatchEmbed, add_block, check_images

# torch's trunc_normal_ truncates at an absolute +-2: with std 0.02 that is a plain normal.
weight_init = nn.initializers.normal(0.02)
_head_init = nn.initializers.normal(0.02 * 0.001)
_layer_norm = partial(layer_norm, epsilon=1e-6)


def residual_init(number: int) -> Any:
    """The initialisation of the layers that end the branches of block `number`, from 0."""
    return nn.initializers.normal(0.02 / math.sqrt(2 * (number + 1)))


def project_qkv(module: Any, x: jax.Array, bias: bool) -> jax.Array:
    """The fused projection of the attention `module`: `x` [R, D] to [R, 3D].

    With `bias`, queries and values have one, in parameters of its own; keys have none, because the
    softmax would cancel it.
    """
    dim = x.shape[-1]
    qkv = nn.Dense(
        3 * dim, use_bias=False, dtype=module.dtype, kernel_init=weight_init, name="qkv"
    )(x)
    if not bias:
        return qkv
    query, value = (
        module.param(f"{name}_bias", nn.initializers.zeros, (dim,)) for name in ("q", "v")
    )
    return qkv + jnp.concatenate([query, jnp.zeros_like(query), value]).astype(qkv.dtype)


def split_heads(qkv: jax.Array, n: int, heads: int) -> jax.Array:
    """The projection [N * T, 3D] of N images as query, key and value [3, N, heads, T, d]."""
    qkv = qkv.reshape(n, len(qkv) // n, 3, heads, qkv.shape[-1] // (3 * heads))
    return qkv.transpose(2, 0, 3, 1, 4)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Attention, softmax(query key^T / sqrt(d) + bias) value: [N, heads, T, d] to [N * T, D].

    `bias` is [1, heads, T, T].
    """
    n, heads, t, head_dim = query.shape
    scores = jnp.einsum(
        "nhqd,nhkd->nhqk", query * head_dim**-0.5, key, preferred_element_type=jnp.float32
    )
    if bias is not None:
        scores = scores + bias
    weights = nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("nhqk,nhkd->nqhd", weights, value).reshape(n * t, heads * head_dim)


def scale_branch(
    module: nn.Module, name: str, init_values: float | None, x: jax.Array
) -> jax.Array:
    """The branch `x` [..., D] times the parameter `name` of `module`, a factor per channel.

    That is LayerScale (Touvron et al., arXiv:2103.17239); None: there is none.
    """
    if init_values is None:
        return x
    init = nn.initializers.constant(init_values)
    return x * module.param(name, init, (x.shape[-1],)).astype(x.dtype)


def add_blocks(
    out: dict[str, Any], blocks: list[tuple[jax.Array, tuple[jax.Array, ...]]], prefix: int
) -> None:
    """Adds the taps of all blocks to `out`.

    Args:
      out: the network's intermediates.
      blocks: each block's output [N, P + T, D] and its query, key and value [N, heads, P + T, d].
      prefix: P, the number of tokens before those of patches.
    """
    for number, (tokens, qkv) in enumerate(blocks, start=1):
        add_block(out, number, tokens[:, prefix:], tuple(head[:, :, prefix:] for head in qkv))
    for name, head in zip(("query", "key", "value"), blocks[-1][1], strict=True):
        out[f"prefix_{name}"] = head[:, :, :prefix]


def add_outputs(
    module: Any, out: dict[str, Any], x: jax.Array, prefix: int, train: bool, epsilon: float
) -> tuple[jax.Array | None, dict[str, Any]]:
    """Normalises, pools and classifies the last block's output, as submodules of `module`.

    Args:
      module: the network; its fields `global_pool`, `use_fc_norm`, `num_classes`, `drop_rate` and
        `dtype` say how.
      out: the intermediates, to which `tokens`, `cls`, `pooled` and `logits` are added.
      x: the last block's output [N, P + T, D].
      prefix: P, the number of tokens before those of patches.
      train: whether dropout is on.
      epsilon: that of the layer normalisation.

    Returns:
      the logits [N, num_classes], None without a classifier, and `out`.
    """
    norm = partial(layer_norm, epsilon=epsilon, dtype=module.dtype)
    average = module.global_pool == "avg"
    late = average if module.use_fc_norm is None else module.use_fc_norm
    if not late:
        x = norm("norm")(x)
    out["tokens"], out["cls"] = x[:, prefix:], x[:, 0]
    pooled = jnp.mean(out["tokens"], axis=1) if average else out["cls"]
    out["pooled"] = norm("fc_norm")(pooled) if late else pooled
    return add_logits(out, module.num_classes, module.drop_rate, train, "head", _head_init)


def check_network(module: Any, shape: tuple[int, ...]) -> None:
    """Checks the fields that all networks of this kind share, and the `shape` of images.

    Raises:
      UserError: a field has a wrong value, or the images have another size.
    """
    if module.global_pool not in ("avg", "token"):
        raise errors.unknown("global_pool", module.global_pool, ("avg", "token"))
    if module.embed_dim % module.num_heads:
        raise errors.UserError(
            f"embed_dim {module.embed_dim} must be a multiple of num_heads {module.num_heads}."
        )
    check_images(module.img_size, module.patch_size, shape)


def _position_bias(module: nn.Module, tokens: int, heads: int) -> jax.Array:
    """The bias of the scores of all pairs of tokens, class token first: [1, heads, 1 + T, 1 + T].

    Rows of the parameter `relative_position_bias_table` of `module` are for the (2 side - 1)^2
    differences in position of two patches; the last three are for the class token's query with a
    patch's key, for a patch's query with its key, and for the class token with itself.
    """
    side = math.isqrt(tokens - 1)
    width = 2 * side - 1
    table = module.param(
        "relative_position_bias_table", nn.initializers.zeros, (width**2 + 3, heads)
    )
    # First by row, then by column: one index for all pairs would be a constant of T^2 integers.
    place = np.arange(side)
    difference = place[:, None] - place + side - 1
    pairs = table[:-3].reshape(width, width, heads)[difference][:, :, difference]
    patches = pairs.transpose(4, 0, 2, 1, 3).reshape(heads, side**2, side**2)
    from_class, to_class, own = (row[:, None, None] for row in table[-3:])
    first = jnp.concatenate([own, jnp.broadcast_to(from_class, (heads, 1, side**2))], axis=2)
    others = jnp.concatenate([jnp.broadcast_to(to_class, (heads, side**2, 1)), patches], axis=2)
    return jnp.concatenate([first, others], axis=1)[None]


class RelativePositionBias(nn.Module):
    """The relative position bias that all blocks share."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The bias for the scores of the tokens `x` [N, 1 + T, D]: [1, heads, 1 + T, 1 + T]."""
        return _position_bias(self, x.shape[1], self.num_heads)


class Attention(nn.Module):
    """Multi-head self-attention with a bias by relative position.

    `number` is the block's; only the initial weights depend on it.
    """

    num_heads: int
    qkv_bias: bool = True
    use_rel_pos_bias: bool = False
    number: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array | None]:
        """Attends over `x` [N, 1 + T, D] with the bias that blocks share and the block's own.

        Also returns query, key and value [N, heads, 1 + T, d], and the sum of the biases.
        """
        n, t, dim = x.shape
        qkv = project_qkv(self, x.reshape(n * t, dim), self.qkv_bias)
        query, key, value = split_heads(qkv, n, self.num_heads)
        bias = shared
        if self.use_rel_pos_bias:
            own = _position_bias(self, t, self.num_heads)
            bias = own if shared is None else own + shared
        y = attend(query, key, value, bias)
        init = residual_init(self.number)
        y = nn.Dense(dim, dtype=self.dtype, kernel_init=init, name="proj")(y)
        return y.reshape(n, t, dim), (query, key, value), bias


class Block(nn.Module):
    """A pre-norm Transformer block; with `init_values`, each branch ends in a LayerScale.

    `number` is the block's; only the initial weights depend on it.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    init_values: float | None = None
    use_rel_pos_bias: bool = False
    number: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        rate: float = 0.0,
        shared: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array | None]:
        """Maps `x` [N, 1 + T, D] to [N, 1 + T, D]; also returns query, key, value and bias.

        `rate` is the probability that a branch is dropped, per sample, and `shared` the bias that
        all blocks share.
        """
        y = _layer_norm("norm1", dtype=self.dtype)(x)
        y, qkv, bias = Attention(
            self.num_heads,
            self.qkv_bias,
            self.use_rel_pos_bias,
            self.number,
            self.dtype,
            name="attn",
        )(y, shared)
        y = scale_branch(self, "gamma_1", self.init_values, y)
        x = x + drop_path(self, y, rate, train)
        y = _layer_norm("norm2", dtype=self.dtype)(x)
        hidden, init = int(x.shape[-1] * self.mlp_ratio), residual_init(self.number)
        y = Mlp(hidden, self.dtype, last_init=init, name="mlp")(y)
        y = scale_branch(self, "gamma_2", self.init_values, y)
        return x + drop_path(self, y, rate, train), qkv, bias


class Beit(nn.Module):
    """timm's `Beit`; the fields have timm's names and defaults.

    Positions enter as embeddings of the tokens (`use_abs_pos_emb`), as a bias of the scores that is
    learnt per block (`use_rel_pos_bias`), as one that all blocks share
    (`use_shared_rel_pos_bias`), or as several of these. `use_fc_norm=None` is timm's rule: with
    `global_pool="avg"` the final norm comes after the pooling, and the tokens are not normalised.
    With `drop_rate` or `drop_path_rate` above 0, training needs `rngs={"dropout": key}`.
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
    init_values: float | None = None
    use_abs_pos_emb: bool = True
    use_rel_pos_bias: bool = False
    use_shared_rel_pos_bias: bool = False
    global_pool: str = "avg"
    use_fc_norm: bool | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, gather: scan.Gather | None = None
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, img_size, img_size, 3], already normalised.

        `gather`, which other Transformers use where they scan over blocks, is ignored.

        Returns:
          logits [N, num_classes] float32, and the intermediates: `tokens` [N, T, D], `cls` [N, D],
          `block01` ... [N, T, D], `query`, `key`, `value` of the last block and `block01_query` ...
          of each [N, heads, T, d], `grid` (h, w), `pooled` [N, D], and `logits`. Everything per
          token covers only the patch tokens, except `prefix_query` ... of the last block, of the
          class token [N, heads, 1, d]. With a bias of the scores also `bias` of the last block and
          `block01_bias` ... of each [1, heads, T, T], and `prefix_bias`, the last block's with the
          class token as first row and column, [1, heads, 1 + T, 1 + T].

        Raises:
          UserError: a field has a wrong value, or `images` has another size.
        """
        del gather
        check_network(self, images.shape)
        x = PatchEmbed(self.patch_size, self.embed_dim, self.dtype, name="patch_embed")(images)
        n, height, width, dim = x.shape
        out: dict[str, Any] = {"grid": Grid((height, width))}
        token = self.param("cls_token", weight_init, (1, 1, dim)).astype(x.dtype)
        x = jnp.concatenate([jnp.tile(token, (n, 1, 1)), x.reshape(n, height * width, dim)], axis=1)
        if self.use_abs_pos_emb:
            x = x + self.param("pos_embed", weight_init, (1, x.shape[1], dim)).astype(x.dtype)
        shared = None
        if self.use_shared_rel_pos_bias:
            shared = RelativePositionBias(self.num_heads, name="rel_pos_bias")(x)

        block, blocks = recomputed(Block, self.remat and train, static=(2, 3)), []
        for i in range(self.depth):
            x, qkv, bias = block(
                self.num_heads,
                self.mlp_ratio,
                self.qkv_bias,
                self.init_values,
                self.use_rel_pos_bias,
                i if self.is_initializing() else 0,  # equal blocks compile once
                self.dtype,
                name=f"blocks_{i}",
            )(x, train, self.drop_path_rate * i / max(self.depth - 1, 1), shared)
            blocks.append((x, qkv))
            if bias is not None:
                out["bias"] = out[f"block{i + 1:02d}_bias"] = bias[:, :, 1:, 1:]
                out["prefix_bias"] = bias
        add_blocks(out, blocks, 1)
        return add_outputs(self, out, x, 1, train, 1e-6)


VARIANTS = {
    "beit_base_patch16_224": Variant(
        Beit,
        {
            "img_size": 224,
            "patch_size": 16,
            "init_values": 0.1,
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": True,
            **SIZES["base"],
        },
        224,
        HALF_MEAN,
        HALF_STD,
    )
}
