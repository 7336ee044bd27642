"""ConvNeXts and ConvNeXt V2s, with timm's names, weights and numerics.

Liu et al., "A ConvNet for the 2020s" (arXiv:2201.03545); Woo et al., "ConvNeXt V2: Co-designing and
Scaling ConvNets with Masked Autoencoders" (arXiv:2301.00808). The layout, and the sizes below
"tiny" of the first version, follow `ConvNeXt` in timm (Ross Wightman, Apache-2.0).
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD
from xkd_jax.models.layers import Conv, classify, drop_path, gelu, layer_norm, recomputed
from xkd_jax.models.variant import Variant

# torch's trunc_normal_ truncates at an absolute +-2: with std 0.02 that is a plain normal.
_weight_init = nn.initializers.normal(0.02)
_layer_norm = partial(layer_norm, epsilon=1e-6)
_conv = partial(Conv, padding=0, use_bias=True, kernel_init=_weight_init)
# Kernel size, stride and padding of the stem, and the factor by which the stages reduce its map.
_STEMS = {"imagenet": (4, 4, 0), "cifar": (3, 1, 1)}
_REDUCTION = 8


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its norm over the image, relative to the mean over channels.

    Section 3.2 of ConvNeXt V2. With the initial weights it is the identity.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [N, h, w, C] to the same shape."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(1, 2), keepdims=True)
        # As in PyTorch, the gradient of the norm of a channel of zeros is zero, not NaN.
        some = squares > 0
        norms = jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)
        relative = norms / (jnp.mean(norms, axis=-1, keepdims=True) + self.epsilon)
        return x * (1 + scale * relative).astype(x.dtype) + bias.astype(x.dtype)


class Pointwise(nn.Module):
    """A linear layer over the channels, whose kernel is stored as a 1x1 convolution's if `conv`."""

    features: int
    conv: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [M, C] to [M, features]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", _weight_init, (1, 1, *shape) if self.conv else shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = kernel.reshape(shape).astype(self.dtype)
        return x.astype(self.dtype) @ kernel + bias.astype(self.dtype)


class Mlp(nn.Module):
    """The two pointwise layers of a block; the options are those of `ConvNeXt`."""

    conv_mlp: bool
    use_grn: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [N, h, w, C] to the same shape."""
        n, height, width, dim = x.shape
        # As one matrix, for the reason given in `vit.Mlp`.
        y = x.reshape(-1, dim)
        y = Pointwise(4 * dim, self.conv_mlp, self.dtype, name="fc1")(y)
        y = gelu(y)
        if self.use_grn:
            y = GlobalResponseNorm(name="grn")(y.reshape(n, height, width, -1))
            y = y.reshape(-1, 4 * dim)
        y = Pointwise(dim, self.conv_mlp, self.dtype, name="fc2")(y)
        return y.reshape(x.shape)


class Block(nn.Module):
    """A 7x7 depthwise convolution and an MLP, in one residual branch.

    The options are those of `ConvNeXt`; `drop_path` is the rate of stochastic depth.
    """

    ls_init_value: float | None
    conv_mlp: bool
    use_grn: bool
    drop_path: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to the same shape, without activation."""
        dim = x.shape[-1]
        y = _conv(dim, 7, padding=3, groups=dim, dtype=self.dtype, name="conv_dw")(x)
        y = _layer_norm("norm", dtype=self.dtype)(y)
        y = Mlp(self.conv_mlp, self.use_grn, self.dtype, name="mlp")(y)
        if self.ls_init_value is not None:  # LayerScale, arXiv:2103.17239
            init = nn.initializers.constant(self.ls_init_value)
            y = y * self.param("gamma", init, (dim,)).astype(y.dtype)
        return x + drop_path(self, y, self.drop_path, train)


class Stage(nn.Module):
    """The blocks at one resolution, after an optional downsampling.

    `drop_paths` has one rate per block; the other options are those of `ConvNeXt`.
    """

    dim: int
    downsample: bool
    drop_paths: tuple[float, ...]
    ls_init_value: float | None
    conv_mlp: bool
    use_grn: bool
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h, w, dim], or half the height and width."""
        if self.downsample:
            x = _layer_norm("downsample_0", dtype=self.dtype)(x)
            x = _conv(self.dim, 2, 2, dtype=self.dtype, name="downsample_1")(x)
        block = recomputed(Block, self.remat and train)
        for i, rate in enumerate(self.drop_paths):
            options = self.ls_init_value, self.conv_mlp, self.use_grn, rate, self.dtype
            x = block(*options, name=f"blocks_{i}")(x, train)
        return x


class Head(nn.Module):
    """timm's `NormMlpClassifierHead` after the pooling: norm, dropout and linear classifier."""

    num_classes: int
    drop_rate: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array | None]:
        """Maps `x` [N, C] to the normalised [N, C] and the logits [N, num_classes] float32.

        With `num_classes=0` the logits are None.
        """
        x = _layer_norm("norm", dtype=self.dtype)(x)
        if not self.num_classes:
            return x, None
        return x, classify(x, self.num_classes, self.drop_rate, train, "fc", _weight_init)


class ConvNeXt(nn.Module):
    """timm's `ConvNeXt` of four stages; the fields have timm's names and the defaults are tiny's.

    `depths` counts the blocks of each stage and `dims` are their channels. With `ls_init_value`,
    each branch ends in a learned factor per channel, LayerScale; `use_grn` adds V2's
    `GlobalResponseNorm` to the MLPs. `conv_mlp` computes the same, with the kernels of the MLPs
    stored as 1x1 convolutions. The stem is "imagenet" (4x4 stride 4) or, for 32x32 images, "cifar"
    (3x3 stride 1). With `drop_rate` or `drop_path_rate` above 0, training needs
    `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"

    num_classes: int = 1000
    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    ls_init_value: float | None = 1e-6
    conv_mlp: bool = False
    use_grn: bool = False
    stem: str = "imagenet"
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, H, W, 3], already normalised.

        The sides must be at least 32 pixels, or 8 with the stem "cifar"; downsampling ignores
        rows and columns that its stride does not divide.

        Returns:
          logits [N, num_classes] float32, and the intermediates: `stage1` ... `stage4`
          [N, h, w, C], the last block's output; `stage1_pre` ..., the same tensors, because blocks
          end without an activation; `pooled` [N, C], after the head's norm, and `logits`.

        Raises:
          UserError: `depths`, `dims` or `stem` has an invalid value, or the images are smaller.
        """
        self._check(images.shape)
        kernel, stride, padding = _STEMS[self.stem]
        x = _conv(
            self.dims[0], kernel, stride, padding=padding, dtype=self.dtype, name="stem_0"
        )(images)  # fmt: skip
        x = _layer_norm("stem_1", dtype=self.dtype)(x)
        last = max(sum(self.depths) - 1, 1)
        out: dict[str, Any] = {}
        for i, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            first = sum(self.depths[:i])
            x = Stage(
                dim,
                i > 0,
                tuple(self.drop_path_rate * (first + j) / last for j in range(depth)),
                self.ls_init_value,
                self.conv_mlp,
                self.use_grn,
                self.remat,
                self.dtype,
                name=f"stages_{i}",
            )(x, train)
            out[f"stage{i + 1}"] = out[f"stage{i + 1}_pre"] = x
        head = Head(self.num_classes, self.drop_rate, self.dtype, name="head")
        out["pooled"], logits = head(jnp.mean(x, axis=(1, 2)), train)
        if logits is not None:
            out["logits"] = logits
        return logits, out

    def _check(self, shape: tuple[int, ...]) -> None:
        if self.stem not in _STEMS:
            raise errors.unknown("stem", self.stem, _STEMS)
        for field in ("depths", "dims"):
            values = getattr(self, field)
            if len(values) != 4 or min(values) < 1:
                raise errors.UserError(
                    f"{field} must be four numbers of at least 1, one per stage, not {values}."
                )
        smallest = _STEMS[self.stem][1] * _REDUCTION
        if min(shape[1:3]) < smallest:
            raise errors.UserError(
                f"this ConvNeXt needs images of at least {smallest} pixels a side, not "
                f"{shape[1]}x{shape[2]}."
            )


_SIZES: dict[str, dict[str, Any]] = {
    "atto": {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320), "conv_mlp": True},
    "femto": {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384), "conv_mlp": True},
    "nano": {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640), "conv_mlp": True},
    "tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
}
_V2 = {"use_grn": True, "ls_init_value": None}

VARIANTS = {f"convnext_{size}": Variant(ConvNeXt, args) for size, args in _SIZES.items()}
VARIANTS |= {
    f"convnextv2_{size}": Variant(ConvNeXt, {**_SIZES[size], **_V2})
    for size in ("atto", "nano", "tiny")
}
# Not in timm: for the 32x32 images of CIFAR.
VARIANTS["convnext_atto_32"] = Variant(
    ConvNeXt, {**_SIZES["atto"], "stem": "cifar"}, 32, CIFAR100_MEAN, CIFAR100_STD
)
