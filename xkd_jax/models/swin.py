"""Swin Transformers, with timm's names, weight layout and numerics.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows"
(arXiv:2103.14030). The layout follows `SwinTransformer` in timm (Ross Wightman, Apache-2.0).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.models import scan
from xkd_jax.models.layers import Head, drop_path, layer_norm, recomputed
from xkd_jax.models.variant import Variant
from xkd_jax.models.vit_layers import Grid, Mlp, add_block, check_images, project_patches
from xkd_jax.models.windows import find_regions, relative_position_index, score_bias

# torch's trunc_normal_ truncates at an absolute +-2: with std 0.02 that is a plain normal.
_weight_init = nn.initializers.normal(0.02)
_layer_norm = partial(layer_norm, epsilon=1e-5)


def _side(x: jax.Array) -> int:
    """The side of the square map that `x` [N, T, C] holds in raster order."""
    return math.isqrt(x.shape[1])


class PatchEmbed(nn.Module):
    """Cuts an image into square patches, projects each and normalises the result."""

    patch_size: int
    embed_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `images` [N, H, W, 3] to [N, H/patch * W/patch, D], in raster order."""
        x = project_patches(images, self.patch_size, self.embed_dim, self.dtype)
        return _layer_norm("norm", dtype=self.dtype)(x.reshape(len(x), -1, self.embed_dim))


class PatchMerging(nn.Module):
    """Halves a map's side, rounding up: 2x2 positions become one with twice the channels.

    With `post_norm` the normalisation follows the projection, as in Swin V2.
    """

    dtype: Any = jnp.float32
    post_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [N, T, C], a square map in raster order, to [N, about T/4, 2C]."""
        n, _, dim = x.shape
        side = _side(x)
        x = x.reshape(n, side, side, dim)
        if side % 2:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        half = (side + 1) // 2
        # Neighbours by column, then row: the order of the published weights.
        x = x.reshape(n, half, 2, half, 2, dim).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(n * half * half, 4 * dim)
        norm = _layer_norm("norm", dtype=self.dtype)
        reduction = nn.Dense(
            2 * dim, use_bias=False, dtype=self.dtype, kernel_init=_weight_init, name="reduction"
        )
        x = norm(reduction(x)) if self.post_norm else reduction(norm(x))
        return x.reshape(n, half * half, 2 * dim)


class WindowAttention(nn.Module):
    """Multi-head self-attention within (shifted) windows, with a bias by relative position.

    A map whose side is not a multiple of the window's is padded with zeros on the right and below;
    as in timm, these take part in the attention. A window at least as large as the map covers the
    whole map, unshifted.
    """

    num_heads: int
    window_size: int
    shifted: bool
    qkv_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Attends over `x` [N, T, C], a square map in raster order.

        Also returns query, key and value [N, heads, T, d], in raster order too.
        """
        n, t, dim = x.shape
        side, heads, head_dim = _side(x), self.num_heads, dim // self.num_heads
        window = min(side, self.window_size)
        shift = window // 2 if self.shifted and window < side else 0
        padded = side + -side % window
        count = padded // window

        def restore(y):
            """Undoes roll and padding: [..., padded, padded, C] to [N, T, C]."""
            y = y.reshape(n, padded, padded, -1)[:, :side, :side]
            return (jnp.roll(y, (shift, shift), (1, 2)) if shift else y).reshape(n, t, -1)

        x = x.reshape(n, side, side, dim)
        if shift:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
        if padded > side:
            pad = (0, padded - side)
            x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
        qkv = self._project(x.reshape(-1, dim))
        raster = restore(qkv).reshape(n, t, 3, heads, head_dim).transpose(2, 0, 3, 1, 4)

        # One transpose cuts the windows and splits the heads.
        qkv = qkv.reshape(n, count, window, count, window, 3, heads, head_dim)
        qkv = qkv.transpose(5, 0, 1, 3, 6, 2, 4, 7)
        query, key, value = qkv.reshape(3, n, count**2, heads, window**2, head_dim)
        scores = jnp.einsum(
            "nwhqd,nwhkd->nwhqk", query * head_dim**-0.5, key, preferred_element_type=jnp.float32
        )
        table = self._position_table(window)
        scores = scores + table[relative_position_index(window)].transpose(2, 0, 1)
        if shift:
            # Computed from the regions: as a constant, the mask takes [windows, L, L] per block.
            region = jnp.asarray(find_regions(padded, window, shift))
            apart = region[:, None, :, None] != region[:, None, None, :]
            scores = scores + jnp.where(apart, -100.0, 0.0)
        weights = nn.softmax(scores, axis=-1).astype(self.dtype)
        y = jnp.einsum("nwhqk,nwhkd->nwhqd", weights, value)
        y = y.reshape(n, count, count, heads, window, window, head_dim)
        y = restore(y.transpose(0, 1, 4, 2, 5, 3, 6)).reshape(n * t, dim)
        y = nn.Dense(dim, dtype=self.dtype, kernel_init=_weight_init, name="proj")(y)
        return y.reshape(n, t, dim), tuple(raster)

    def _project(self, x: jax.Array) -> jax.Array:
        """Query, key and value of `x` [M, C], in this order: [M, 3C]."""
        return nn.Dense(
            3 * x.shape[-1],
            use_bias=self.qkv_bias,
            dtype=self.dtype,
            kernel_init=_weight_init,
            name="qkv",
        )(x)

    def _position_table(self, window: int) -> jax.Array:
        """The bias of the scores by relative position, [(2 window - 1)**2, heads]."""
        shape = ((2 * window - 1) ** 2, self.num_heads)
        return self.param("relative_position_bias_table", _weight_init, shape)


class Block(nn.Module):
    """A pre-norm Transformer block with attention within (shifted) windows."""

    num_heads: int
    window_size: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    dtype: Any = jnp.float32
    shifted: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, rate: float | jax.Array = 0.0
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Maps `x` [N, T, C] to [N, T, C]; also returns query, key and value.

        `rate` is the probability that a branch is dropped, per sample.
        """
        y = _layer_norm("norm1", dtype=self.dtype)(x)
        y, qkv = WindowAttention(
            self.num_heads, self.window_size, self.shifted, self.qkv_bias, self.dtype, name="attn"
        )(y)
        x = x + drop_path(self, y, rate, train)
        y = _layer_norm("norm2", dtype=self.dtype)(x)
        y = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")(y)
        return x + drop_path(self, y, rate, train), qkv


class Stage(nn.Module):
    """The blocks at one resolution, every second one shifted, after an optional downsampling."""

    post_norm: ClassVar[bool] = False

    drop_paths: tuple[float, ...]
    downsample: bool
    num_heads: int
    window_size: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, gather: scan.Gather | None = None
    ) -> list[tuple[jax.Array, tuple[jax.Array, ...]]]:
        """Maps `x` [N, T, C] to each block's output and its query, key and value."""
        if self.downsample:
            x = PatchMerging(self.dtype, self.post_norm, name="downsample")(x)
        make, options = self._block()
        remat, outs, first, depth = self.remat and train, [], 0, len(self.drop_paths)
        if scan.pays(depth, train) and not self.is_initializing():
            first = (depth - 1) // 2 * 2  # pairs; methods read the last block's taps
            pair = [make(**options, shifted=shifted, parent=None) for shifted in (False, True)]
            names = [f"blocks_{i}" for i in range(first)]
            rates = self.drop_paths[:first]
            x, outs = scan.scan_blocks(self, pair, names, x, train, rates, remat, gather)
        block = recomputed(make, remat, static=(2, 3))
        for i in range(first, depth):
            last = block(**options, shifted=i % 2 == 1, name=f"blocks_{i}")
            x, qkv = last(x, train, self.drop_paths[i])
            outs.append((x, qkv))
        return outs

    def _block(self) -> tuple[type[nn.Module], dict[str, Any]]:
        """The class of the blocks and its arguments, except `shifted`."""
        names = ("num_heads", "window_size", "mlp_ratio", "qkv_bias", "dtype")
        return Block, {name: getattr(self, name) for name in names}


class SwinTransformer(nn.Module):
    """timm's `SwinTransformer`, with its names and, except for drop_path_rate, its defaults.

    `img_size` is any multiple of `patch_size`: maps are padded where windows or halving need it,
    and windows shrink to fit smaller maps. With `drop_rate` or `drop_path_rate` above 0, training
    needs `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "transformer"

    num_classes: int = 1000
    img_size: int = 224
    patch_size: int = 4
    window_size: int = 7
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, gather: scan.Gather | None = None
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, img_size, img_size, 3], already normalised.

        With sharded parameters, `gather` lets a deep stage gather them block by block.

        Returns:
          logits [N, num_classes] float32, and the intermediates: `tokens` [N, T, D] after the
          final norm and their `grid` (h, w); `stage1` ... `stage4` [N, h, w, C], each before the
          next one's downsampling; for each block, numbered through all stages and with its
          stage's T and C, `block01` ... [N, T, C] and `block01_query` ... [N, heads, T, d];
          `query`, `key`, `value` of the last block; `pooled` [N, D], `logits`; for each block of
          the last stage `block11_bias` ... [1, heads, T, T], and `bias`, the last one's, what is
          added to the scores before the softmax, unless that stage pads its map. Everything with
          an axis T is in raster order.

        Raises:
          UserError: the options contradict each other, or `images` has another size.
        """
        self._check(images.shape)
        x = PatchEmbed(self.patch_size, self.embed_dim, self.dtype, name="patch_embed")(images)
        out: dict[str, Any] = {}
        block = 0
        for i in range(4):
            outs = self._stage(i)(x, train, gather)
            for x, qkv in outs:
                block += 1
                add_block(out, block, x, qkv)
            side = _side(x)
            out[f"stage{i + 1}"] = x.reshape(len(x), side, side, -1)

        blocks = self.variables["params"]["layers_3"]
        for i in range(self.depths[3]):
            table = self._position_table(blocks[f"blocks_{i}"]["attn"], min(side, self.window_size))
            bias = score_bias(table, side, self.window_size, i % 2 == 1)
            if bias is not None:
                out["bias"] = out[f"block{sum(self.depths[:3]) + i + 1:02d}_bias"] = bias

        out["grid"] = Grid((side, side))
        x = _layer_norm("norm", dtype=self.dtype)(x)
        out["tokens"] = x
        out["pooled"] = jnp.mean(x, axis=1)
        if self.num_classes:
            head = Head(self.num_classes, self.drop_rate, _weight_init, name="head")
            out["logits"] = head(out["pooled"], train)
        return out.get("logits"), out

    def _stage(self, i: int) -> Stage:
        return Stage(**self._stage_fields(i))

    def _stage_fields(self, i: int) -> dict[str, Any]:
        """The arguments of the stage at index `i`."""
        rates = np.linspace(0, self.drop_path_rate, sum(self.depths))
        first = sum(self.depths[:i])
        names = ("window_size", "mlp_ratio", "qkv_bias", "remat", "dtype")
        return {
            "drop_paths": tuple(float(rate) for rate in rates[first : first + self.depths[i]]),
            "downsample": i > 0,
            "num_heads": self.num_heads[i],
            "name": f"layers_{i}",
            **{name: getattr(self, name) for name in names},
        }

    def _position_table(self, attn: Mapping[str, Any], window: int) -> jax.Array:
        """The table of `score_bias` of a block of the last stage with the parameters `attn`."""
        return attn["relative_position_bias_table"]

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(self.depths) != 4 or len(self.num_heads) != 4 or min(self.depths) < 1:
            raise errors.UserError(
                f"depths {self.depths} and num_heads {self.num_heads} must be four numbers each, "
                "one per stage, and depths at least 1."
            )
        for i, heads in enumerate(self.num_heads):
            if (self.embed_dim << i) % heads:
                raise errors.UserError(
                    f"stage {i + 1} has {self.embed_dim << i} channels (embed_dim times {2**i}), "
                    f"which must be a multiple of its num_heads {heads}."
                )
        check_images(self.img_size, self.patch_size, shape)


SIZES = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}


def _variant(size: str, patch: int, window: int, img: int) -> Variant:
    args = {"img_size": img, "patch_size": patch, "window_size": window, **SIZES[size]}
    return Variant(SwinTransformer, args, img)


VARIANTS = {
    f"swin_{size}_patch4_window{window}_{img}": _variant(size, 4, window, img)
    for size in SIZES
    for window, img in ((7, 224), (12, 384))
    if img == 224 or size in ("base", "large")
}
# Not in timm: for the 32x32 images of CIFAR.
VARIANTS["swin_tiny_patch2_window4_32"] = _variant("tiny", 2, 4, 32)
