"""Vision Transformers, with timm's names, weight layout and numerics.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv:2010.11929). The options and their
meaning follow `VisionTransformer` and `VisionTransformerDistilled` in timm (Ross Wightman,
Apache-2.0).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import HALF_MEAN, HALF_STD
from xkd_jax.models import scan
from xkd_jax.models.layers import classify, layer_norm, recomputed
from xkd_jax.models.variant import Variant
from xkd_jax.models.vit_layers import (
    ACTIVATIONS,
    AttentionPool,
    Block,
    Grid,
    PatchEmbed,
    add_block,
    check_images,
    weight_init,
)

_POOLS = ("token", "avg", "map", "token_avg")


class VisionTransformer(nn.Module):
    """timm's `VisionTransformer`; the fields have timm's names and defaults.

    `distilled` adds DeiT's distillation token, which has its own head. `init_values` turns on
    `LayerScale`. `reg_tokens` adds register tokens (arXiv:2309.16588) after the class token. With
    `no_embed_class`, only patch tokens have position embeddings. `fc_norm=None` is timm's
    rule: with `global_pool="avg"` the final norm comes after the pooling, and the tokens are not
    normalised. `global_pool="map"` pools the patch tokens by attention. `global_pool="token_avg"`,
    which timm lacks, concatenates the class token and the mean of the patch tokens, as DINOv2's
    linear classifiers do (arXiv:2304.07193). `pre_norm` normalises the embedded tokens, whose
    patch projection then has no bias. `norm_epsilon` is that of all norms, and `act_layer` one of
    `vit_layers.ACTIVATIONS`. With `drop_rate` or `drop_path_rate` above 0, training needs
    `rngs={"dropout": key}`. No gradient flows into the first `frozen` blocks or the embedding.
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
    act_layer: str = "gelu"
    norm_epsilon: float = 1e-6
    pre_norm: bool = False
    class_token: bool = True
    distilled: bool = False
    reg_tokens: int = 0
    no_embed_class: bool = False
    global_pool: str = "token"
    fc_norm: bool | None = None
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
          logits [N, num_classes] float32, and the intermediates: `tokens` [N, T, D], `cls`
          [N, D] with a class token, `block01` ... [N, T, D], `query`, `key`, `value` of the
          last block and `block01_query` ... of each [N, heads, T, d], `grid` (h, w), `pooled`
          [N, D], or [N, 2D] for "token_avg", and `logits`. Everything per token covers only the
          patch tokens, except `prefix_query` ... of the last block, of the class token, the
          distillation token and the register tokens, as far as there are any, [N, heads, P, d].
          With `distilled` also `dist` [N, D], and the two heads' `cls_logits` and `dist_logits`;
          `logits` is their mean.

        Raises:
          UserError: the options contradict each other, or `images` has another size.
        """
        self._check(images.shape)
        prefix = self.class_token + self.distilled + self.reg_tokens
        x, grid = self._embed(images)
        out: dict[str, Any] = {"grid": grid}
        x, blocks = self._blocks(x, train, gather)
        for i, (tokens, qkv) in enumerate(blocks, start=1):
            heads = tuple(head[:, :, prefix:] for head in qkv)
            add_block(out, i, tokens[:, prefix:], heads)
        if prefix:
            for name, head in zip(("query", "key", "value"), blocks[-1][1], strict=True):
                out[f"prefix_{name}"] = head[:, :, :prefix]

        use_fc_norm = self.global_pool == "avg" if self.fc_norm is None else self.fc_norm
        if not use_fc_norm:
            x = self._norm("norm")(x)
        out["tokens"] = x[:, prefix:]
        if self.class_token:
            out["cls"] = x[:, 0]
        if self.distilled:
            out["dist"] = x[:, 1]
            out["pooled"] = (x[:, 0] + x[:, 1]) / 2
            if self.num_classes:
                out["cls_logits"] = self._head("head", x[:, 0], train)
                out["dist_logits"] = self._head("head_dist", x[:, 1], train)
                out["logits"] = (out["cls_logits"] + out["dist_logits"]) / 2
            return out.get("logits"), out
        pooled = self._pool(x[:, 0], x[:, prefix:])
        if use_fc_norm:
            pooled = self._norm("fc_norm")(pooled)
        out["pooled"] = pooled
        if self.num_classes:
            out["logits"] = self._head("head", pooled, train)
        return out.get("logits"), out

    def _blocks(
        self, x: jax.Array, train: bool, gather: scan.Gather | None
    ) -> tuple[jax.Array, list]:
        """The last block's output, and each block's output with its query, key and value."""
        rates = [self.drop_path_rate * i / max(self.depth - 1, 1) for i in range(self.depth)]
        options = (
            *(self.num_heads, self.mlp_ratio, self.qkv_bias, self.init_values),
            *(self.act_layer, self.norm_epsilon, self.dtype),
        )
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
            x, qkv = block(*options, name=f"blocks_{i}")(x, train, rates[i])
            x, qkv = self._freeze(i + 1, (x, qkv))
            outs.append((x, qkv))
        return x, outs

    def _freeze(self, number: int, outputs: Any) -> Any:
        """Cuts the gradient of all outputs of block `number` if it is frozen."""
        return jax.lax.stop_gradient(outputs) if number <= self.frozen else outputs

    def _pool(self, cls: jax.Array, tokens: jax.Array) -> jax.Array:
        """The class token [N, D] and the patch tokens [N, T, D], pooled to [N, D] or [N, 2D]."""
        if self.global_pool == "map":
            options = self.num_heads, self.mlp_ratio, self.act_layer, self.norm_epsilon, self.dtype
            return AttentionPool(*options, name="attn_pool")(tokens)
        if self.global_pool == "token":
            return cls
        mean = jnp.mean(tokens, axis=1)
        return mean if self.global_pool == "avg" else jnp.concatenate([cls, mean], axis=-1)

    def _norm(self, name: str) -> nn.LayerNorm:
        return layer_norm(name, self.norm_epsilon, self.dtype)

    def _head(self, name: str, x: jax.Array, train: bool) -> jax.Array:
        return classify(x, self.num_classes, self.drop_rate, train, name, weight_init)

    def _embed(self, images: jax.Array) -> tuple[jax.Array, Grid]:
        """Images to embedded tokens [N, P + T, D], class token first, and the patch grid."""
        options = self.patch_size, self.embed_dim, self.dtype, not self.pre_norm
        x = PatchEmbed(*options, name="patch_embed")(images)
        n, height, width, dim = x.shape
        x = x.reshape(n, height * width, dim)
        small, prefix = nn.initializers.normal(1e-6), []  # timm's
        if self.class_token:
            prefix.append(self.param("cls_token", small, (1, 1, dim)))
        if self.distilled:
            prefix.append(self.param("dist_token", weight_init, (1, 1, dim)))
        if self.reg_tokens:
            prefix.append(self.param("reg_token", small, (1, self.reg_tokens, dim)))
        prefix = [jnp.tile(token.astype(x.dtype), (n, 1, 1)) for token in prefix]
        if not self.no_embed_class:
            x = jnp.concatenate([*prefix, x], axis=1)
        pos = self.param("pos_embed", weight_init, (1, x.shape[1], dim))
        x = x + pos.astype(x.dtype)
        if self.no_embed_class:
            x = jnp.concatenate([*prefix, x], axis=1)
        if self.pre_norm:
            x = self._norm("norm_pre")(x)
        return x, Grid((height, width))

    def _check(self, shape: tuple[int, ...]) -> None:
        if self.global_pool not in _POOLS:
            raise errors.unknown("global_pool", self.global_pool, _POOLS)
        if self.act_layer not in ACTIVATIONS:
            raise errors.unknown("act_layer", self.act_layer, ACTIVATIONS)
        if self.global_pool in ("token", "token_avg") and not self.class_token:
            raise errors.UserError(
                f"global_pool={self.global_pool!r} needs class_token=True; without it, use 'avg' "
                "or 'map'."
            )
        if self.distilled and not (self.class_token and self.global_pool == "token"):
            raise errors.UserError(
                "distilled=True needs class_token=True and global_pool='token'; its heads "
                "read both tokens."
            )
        if self.distilled and (self.reg_tokens or self.no_embed_class):
            raise errors.UserError(
                "distilled=True takes no reg_tokens or no_embed_class, as in timm; leave them out."
            )
        if self.embed_dim % self.num_heads:
            raise errors.UserError(
                f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}."
            )
        check_images(self.img_size, self.patch_size, shape)


SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def _variant(size: str, patch: int, img: int) -> Variant:
    args = {"img_size": img, "patch_size": patch, **SIZES[size]}
    return Variant(VisionTransformer, args, img, HALF_MEAN, HALF_STD)


VARIANTS = {
    f"vit_{size}_patch{patch}_{img}": _variant(size, patch, img)
    for size in SIZES
    for patch in (16, 32)
    for img in (224, 384)
    if (size, patch) != ("tiny", 32)
}
# Not in timm: for the 32x32 images of CIFAR.
VARIANTS |= {f"vit_{size}_patch4_32": _variant(size, 4, 32) for size in ("tiny", "small")}


def _dinov2(size: str, registers: int) -> Variant:
    args = {"img_size": 518, "patch_size": 14, "init_values": 1e-5, **SIZES[size]}
    if registers:
        args |= {"reg_tokens": registers, "no_embed_class": True}
    return Variant(VisionTransformer, args, 518)


# DINOv2 (arXiv:2304.07193), trained without labels, and with registers (arXiv:2309.16588).
VARIANTS |= {
    f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2": _dinov2(size, registers)
    for size in ("small", "base", "large")
    for registers in (0, 4)
}
