"""The layers of Vision Transformers: embedding, attention, MLP and block, and the taps of blocks.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv:2010.11929), with the numerics and weight
names of timm (Ross Wightman, Apache-2.0).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.models.layers import drop_path, layer_norm, torch_default

# torch's trunc_normal_ truncates at an absolute +-2: with std 0.02 that is a plain normal.
weight_init = nn.initializers.normal(0.02)

# The activations of the MLPs, by timm's names; OpenAI's CLIP has "quick_gelu" (arXiv:2103.00020).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


@jax.tree_util.register_static
class Grid(tuple):
    """The patch grid (h, w): a tuple that stays Python integers through jit and grad.

    A plain tuple would come out of a transformation as two traced arrays, unusable in reshapes.
    """

    __slots__ = ()


def project_patches(
    images: jax.Array, patch: int, features: int, dtype: Any, use_bias: bool = True
) -> jax.Array:
    """The convolution "proj" of a patch embedding: [N, H, W, 3] to [N, H/patch, W/patch, features].

    As in timm, weights and bias have PyTorch's default initialisation, uniform +-1/sqrt(fan_in).
    """
    bound = (images.shape[-1] * patch**2) ** -0.5

    def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Conv(
        features,
        (patch, patch),
        strides=(patch, patch),
        padding="VALID",
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=torch_default,
        bias_init=bias_init,
        name="proj",
    )(images)


def check_images(img_size: int, patch_size: int, shape: tuple[int, ...]) -> None:
    """Checks `img_size` and the `shape` of images, [N, H, W, 3].

    Raises:
      UserError: `img_size` is not a multiple of `patch_size`, or the images have another size.
    """
    if img_size % patch_size:
        near = max(img_size // patch_size, 1) * patch_size
        raise errors.UserError(
            f"img_size {img_size} must be a multiple of patch_size {patch_size}, such as {near} or "
            f"{near + patch_size}."
        )
    if shape[1:] != (img_size, img_size, 3):
        raise errors.UserError(
            f"this Transformer takes images [N, {img_size}, {img_size}, 3], not {list(shape)}; for "
            f"another size set img_size to a multiple of patch_size {patch_size}."
        )


def add_block(
    out: dict[str, Any], number: int, tokens: jax.Array, qkv: tuple[jax.Array, ...]
) -> None:
    """Adds a block's taps to `out`: `block01`, `block01_query` ... and `query` ..."""
    out[f"block{number:02d}"] = tokens
    for name, head in zip(("query", "key", "value"), qkv, strict=True):
        # The short name ends up with the last block's.
        out[name] = out[f"block{number:02d}_{name}"] = head


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and projects each: [N, H, W, 3] -> [N, h, w, D]."""

    patch_size: int
    embed_dim: int
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Projects `images` [N, H, W, 3] to [N, H/patch, W/patch, D]."""
        return project_patches(images, self.patch_size, self.embed_dim, self.dtype, self.use_bias)


class Attention(nn.Module):
    """Multi-head self-attention with fused `qkv` weights, as timm stores them."""

    num_heads: int
    qkv_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Attends over `x` [N, T, D]; also returns query, key and value [N, heads, T, d]."""
        n, t, dim = x.shape
        head_dim = dim // self.num_heads
        qkv = nn.Dense(
            3 * dim,
            use_bias=self.qkv_bias,
            dtype=self.dtype,
            kernel_init=weight_init,
            name="qkv",
        )(x.reshape(n * t, dim))
        qkv = qkv.reshape(n, t, 3, self.num_heads, head_dim).transpose(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        scores = jnp.einsum(
            "nhqd,nhkd->nhqk", query * head_dim**-0.5, key, preferred_element_type=jnp.float32
        )
        weights = nn.softmax(scores, axis=-1).astype(self.dtype)
        x = jnp.einsum("nhqk,nhkd->nqhd", weights, value).reshape(n * t, dim)
        x = nn.Dense(dim, dtype=self.dtype, kernel_init=weight_init, name="proj")(x)
        return x.reshape(n, t, dim), (query, key, value)


class Mlp(nn.Module):
    """The two dense layers of a block, with one of `ACTIVATIONS` between them.

    `last_init` initialises the second one's weights.
    """

    hidden: int
    dtype: Any = jnp.float32
    act_layer: str = "gelu"
    last_init: Any = weight_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [..., D] to [..., D]."""
        shape, dim = x.shape, x.shape[-1]
        # As one matrix: with [N, T, D], XLA on a CPU takes three times as long for the gradients
        # of the products, because it fuses the GELU into them and recomputes it.
        x = x.reshape(-1, dim)
        x = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=weight_init, name="fc1")(x)
        x = ACTIVATIONS[self.act_layer](x)
        x = nn.Dense(dim, dtype=self.dtype, kernel_init=self.last_init, name="fc2")(x)
        return x.reshape(shape)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., arXiv:2103.17239)."""

    init_values: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales `x` [..., D]."""
        init = nn.initializers.constant(self.init_values)
        return x * self.param("gamma", init, (x.shape[-1],)).astype(self.dtype)


class Block(nn.Module):
    """A pre-norm Transformer block; with `init_values`, each branch ends in a `LayerScale`."""

    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    init_values: float | None = None
    act_layer: str = "gelu"
    norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, rate: float | jax.Array = 0.0
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Maps `x` [N, T, D] to [N, T, D]; also returns query, key and value.

        `rate` is the probability that a branch is dropped, per sample.
        """
        y = layer_norm("norm1", self.norm_epsilon, self.dtype)(x)
        y, qkv = Attention(self.num_heads, self.qkv_bias, self.dtype, name="attn")(y)
        x = x + drop_path(self, self._scale("ls1", y), rate, train)
        y = layer_norm("norm2", self.norm_epsilon, self.dtype)(x)
        y = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, self.act_layer, name="mlp")(y)
        return x + drop_path(self, self._scale("ls2", y), rate, train), qkv

    def _scale(self, name: str, x: jax.Array) -> jax.Array:
        if self.init_values is None:
            return x
        return LayerScale(self.init_values, self.dtype, name=name)(x)


class AttentionPool(nn.Module):
    """timm's `AttentionPoolLatent`: a learned query attends over all tokens, and an MLP follows.

    The attention pooling of SigLIP (arXiv:2303.15343) and of Zhai et al. (arXiv:2106.04560).
    """

    num_heads: int
    mlp_ratio: float = 4.0
    act_layer: str = "gelu"
    norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pools tokens `x` [N, T, D] to [N, D]."""
        n, t, dim = x.shape
        head_dim = dim // self.num_heads
        latent = self.param("latent", nn.initializers.truncated_normal(dim**-0.5), (1, 1, dim))
        query = self._dense("q", dim)(latent[0].astype(self.dtype))
        kv = self._dense("kv", 2 * dim)(x.reshape(n * t, dim))
        query = query.reshape(self.num_heads, head_dim) * head_dim**-0.5
        kv = kv.reshape(n, t, 2, self.num_heads, head_dim)
        scores = jnp.einsum("hd,nkhd->nhk", query, kv[:, :, 0], preferred_element_type=jnp.float32)
        weights = nn.softmax(scores, axis=-1).astype(self.dtype)
        y = jnp.einsum("nhk,nkhd->nhd", weights, kv[:, :, 1]).reshape(n, dim)
        y = self._dense("proj", dim)(y)
        z = layer_norm("norm", self.norm_epsilon, self.dtype)(y)
        return y + Mlp(int(dim * self.mlp_ratio), self.dtype, self.act_layer, name="mlp")(z)

    def _dense(self, name: str, features: int) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, kernel_init=weight_init, name=name)
