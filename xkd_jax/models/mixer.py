"""MLP-Mixer, with timm's names, weights and numerics.

Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision" (arXiv:2105.01601). The layout
follows `MlpMixer` in timm (Ross Wightman, Apache-2.0).
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import HALF_MEAN, HALF_STD
from xkd_jax.models import scan
from xkd_jax.models.layers import Conv, add_logits, drop_path, gelu, layer_norm, recomputed
from xkd_jax.models.variant import Variant
from xkd_jax.models.vit import Grid, check_images

_layer_norm = partial(layer_norm, epsilon=1e-6)
_bias_init = nn.initializers.normal(1e-6)


class Stem(nn.Module):
    """Cuts an image into square patches and projects each."""

    patch_size: int
    embed_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Projects `images` [N, H, W, 3] to [N, H/patch, W/patch, D]."""
        patch = self.patch_size
        init = nn.initializers.lecun_normal()
        return Conv(
            self.embed_dim, patch, patch, 0, use_bias=True, kernel_init=init, dtype=self.dtype,
            name="proj",
        )(images)  # fmt: skip


class Dense(nn.Module):
    """A linear layer over the first axis; its parameters are those of `nn.Dense`."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [C, M] to [features, M]."""
        shape = (len(x), self.features)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        bias = self.param("bias", _bias_init, (self.features,))
        return kernel.astype(self.dtype).T @ x.astype(self.dtype) + bias.astype(self.dtype)[:, None]


class TokenMlp(nn.Module):
    """Two linear layers over the tokens, the same for each channel."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [N, T, D] to [N, T, D]."""
        n, t, dim = x.shape
        # As [T, N * D], to move whole tokens: a CPU takes long to transpose tokens and channels.
        y = x.swapaxes(0, 1).reshape(t, n * dim)
        y = gelu(Dense(self.hidden, self.dtype, name="fc1")(y))
        y = Dense(t, self.dtype, name="fc2")(y)
        return y.reshape(t, n, dim).swapaxes(0, 1)


class ChannelMlp(nn.Module):
    """Two linear layers over the channels, the same for each token."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [N, T, D] to [N, T, D]."""
        dense = partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=_bias_init,
        )
        y = x.reshape(-1, x.shape[-1])  # as one matrix, for the reason given in `vit.Mlp`
        y = gelu(dense(self.hidden, name="fc1")(y))
        return dense(x.shape[-1], name="fc2")(y).reshape(x.shape)


class Block(nn.Module):
    """An MLP over the tokens, the same for each channel, and one over the channels.

    `mlp_ratio` are their hidden widths as multiples of the number of channels, and `drop_path` is
    the rate of stochastic depth.
    """

    mlp_ratio: tuple[float, float]
    drop_path: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, T, D] to [N, T, D]."""
        of_tokens, of_channels = (int(x.shape[-1] * ratio) for ratio in self.mlp_ratio)
        y = _layer_norm("norm1", dtype=self.dtype)(x)
        y = TokenMlp(of_tokens, self.dtype, name="mlp_tokens")(y)
        x = x + drop_path(self, y, self.drop_path, train)
        y = _layer_norm("norm2", dtype=self.dtype)(x)
        y = ChannelMlp(of_channels, self.dtype, name="mlp_channels")(y)
        return x + drop_path(self, y, self.drop_path, train)


class MlpMixer(nn.Module):
    """timm's `MlpMixer`; the fields have timm's names, and the defaults are B/16's.

    The weights depend on the number of patches, so that `img_size` and `patch_size` are fixed for
    a trained network. `mlp_ratio` are the hidden widths of each block's two MLPs, over the tokens
    and over the channels, as multiples of `embed_dim`. With `drop_rate` or `drop_path_rate` above
    0, training needs `rngs={"dropout": key}`; the latter is the same for all blocks, as in timm.
    """

    kind: ClassVar[str] = "transformer"

    num_classes: int = 1000
    img_size: int = 224
    patch_size: int = 16
    num_blocks: int = 12
    embed_dim: int = 768
    mlp_ratio: tuple[float, float] = (0.5, 4.0)
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, gather: scan.Gather | None = None
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, img_size, img_size, 3], already normalised.

        `gather` is accepted as by other Transformers, and not used: blocks are not scanned.

        Returns:
          logits [N, num_classes] float32, and the intermediates: `tokens` [N, T, D] after the
          final norm, `block01` ... [N, T, D], `grid` (h, w), `pooled` [N, D] and `logits`. There
          is no attention, and so no `query`, `key` or `value`.

        Raises:
          UserError: the options contradict each other, or `images` has another size.
        """
        del gather
        self._check(images.shape)
        x = Stem(self.patch_size, self.embed_dim, self.dtype, name="stem")(images)
        n, height, width, dim = x.shape
        x = x.reshape(n, height * width, dim)
        out: dict[str, Any] = {"grid": Grid((height, width))}
        block = recomputed(Block, self.remat and train)
        for i in range(self.num_blocks):
            options = self.mlp_ratio, self.drop_path_rate, self.dtype
            x = block(*options, name=f"blocks_{i}")(x, train)
            out[f"block{i + 1:02d}"] = x
        x = _layer_norm("norm", dtype=self.dtype)(x)
        out["tokens"] = x
        out["pooled"] = jnp.mean(x, axis=1)
        zeros = nn.initializers.zeros
        return add_logits(out, self.num_classes, self.drop_rate, train, "head", zeros)

    def _check(self, shape: tuple[int, ...]) -> None:
        if self.num_blocks < 1:
            raise errors.UserError(f"num_blocks must be at least 1, not {self.num_blocks}.")
        if len(self.mlp_ratio) != 2 or min(self.mlp_ratio) * self.embed_dim < 1:
            raise errors.UserError(
                "mlp_ratio must be two numbers that leave at least one hidden unit each, not "
                f"{self.mlp_ratio}."
            )
        check_images(self.img_size, self.patch_size, shape)


VARIANTS = {
    "mixer_b16_224": Variant(
        MlpMixer, {"img_size": 224, "patch_size": 16}, 224, HALF_MEAN, HALF_STD
    ),
}
