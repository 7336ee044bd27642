"""RepVGGs, with timm's names, weights and numerics: three branches in training, one afterwards.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again" (arXiv:2101.03697). The layout follows
`ByobNet` in timm (Ross Wightman, Apache-2.0), whose `RepVggBlock` is adapted from the authors' code
(MIT).
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD
from xkd_jax.models.layers import BatchNorm, Conv, Head, drop_path, recomputed
from xkd_jax.models.variant import Variant

# Of the stem and the first stage; "cifar" drops both, so that 32x32 images end at 4x4.
_STRIDES = {"imagenet": 2, "cifar": 1}

_head_init = nn.initializers.normal(0.01)


def _small_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """timm's scales of the blocks' BatchNorms: normal, around 0.1."""
    return 0.1 + 0.1 * jax.random.normal(key, shape, dtype)


_norm = partial(BatchNorm, scale_init=_small_init, bias_init=nn.initializers.normal(0.1))


class ConvNorm(nn.Module):
    """A convolution and its normalisation, without activation."""

    features: int
    kernel_size: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, features]."""
        conv = Conv(self.features, self.kernel_size, self.stride, dtype=self.dtype, name="conv")
        return _norm(dtype=self.dtype, name="bn")(conv(x), train)


class RepVGGBlock(nn.Module):
    """The sum, before its ReLU, of a 3x3 and a 1x1 convolution and, where shapes allow, of `x`.

    Each branch ends in a BatchNorm. Without `branches` the block is one 3x3 convolution.
    """

    features: int
    stride: int = 1
    branches: bool = True
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, features]."""
        if not self.branches:
            conv = partial(Conv, use_bias=True, dtype=self.dtype, name="reparam_conv")
            return conv(self.features, 3, self.stride)(x)
        y = ConvNorm(self.features, 3, self.stride, self.dtype, name="conv_kxk")(x, train)
        y += ConvNorm(self.features, 1, self.stride, self.dtype, name="conv_1x1")(x, train)
        if self.stride > 1 or x.shape[-1] != self.features:
            return y
        identity = _norm(dtype=self.dtype, name="identity")(x, train)
        return drop_path(self, y, self.drop_path, train) + identity


class RepVGG(nn.Module):
    """A RepVGG of a stem and four stages; the defaults are A0's.

    `depths` and `channels` are those of the stages; the stem has as many channels as the first one,
    but at most 64. `stem` is "imagenet" (stride 2, and 2 in the first stage) or, for 32x32 images,
    "cifar" (strides of 1). `branches=False` is the form for inference, with one convolution per
    block, for which `reparameterize` computes the weights (timm's `inference_mode`). Training
    updates the collection `batch_stats`; with `drop_rate` or `drop_path_rate` above 0 it needs
    `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"

    num_classes: int = 1000
    depths: tuple[int, ...] = (2, 4, 14, 1)
    channels: tuple[int, ...] = (48, 96, 192, 1280)
    stem: str = "imagenet"
    branches: bool = True
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, H, W, 3], already normalised, of any size.

        Returns:
          logits [N, num_classes] float32, and the intermediates: `stage1` ... `stage4`
          [N, h, w, C] after the activation, `stage1_pre` ... before it, `pooled` [N, C],
          `logits`.

        Raises:
          UserError: `depths`, `channels` or `stem` has an invalid value.
        """
        self._check()
        block = partial(
            recomputed(RepVGGBlock, self.remat and train), branches=self.branches, dtype=self.dtype
        )
        first_stride = _STRIDES[self.stem]
        x = nn.relu(block(min(64, self.channels[0]), first_stride, name="stem")(images, train))
        out: dict[str, Any] = {}
        index, last = 0, max(sum(self.depths) - 1, 1)
        for stage, (depth, channels) in enumerate(zip(self.depths, self.channels, strict=True)):
            pre = x
            for i in range(depth):
                pre = block(
                    channels,
                    stride=1 if i > 0 else 2 if stage > 0 else first_stride,
                    drop_path=self.drop_path_rate * index / last,
                    name=f"stages_{stage}_{i}",
                )(x, train)
                x, index = nn.relu(pre), index + 1
            out[f"stage{stage + 1}_pre"] = pre
            out[f"stage{stage + 1}"] = x
        out["pooled"] = jnp.mean(x, axis=(1, 2))
        if self.num_classes:
            head = Head(self.num_classes, self.drop_rate, _head_init, name="head")
            out["logits"] = head(out["pooled"], train)
        return out.get("logits"), out

    def _check(self) -> None:
        if self.stem not in _STRIDES:
            raise errors.unknown("stem", self.stem, _STRIDES)
        for field in ("depths", "channels"):
            numbers = getattr(self, field)
            if len(numbers) != 4 or min(numbers) < 1:
                raise errors.UserError(
                    f"{field} must be four numbers of at least 1, not {tuple(numbers)}."
                )


def reparameterize(module: RepVGG, variables: Any) -> tuple[RepVGG, dict[str, Any]]:
    """The network with one convolution per block, and its weights: the same function in inference.

    Section 3.3 of the paper. A network that has this form already is returned as it is.

    Args:
      module: the trained network.
      variables: its `params` and `batch_stats`.
    """
    if not module.branches:
        return module, variables
    params = {
        name: {"reparam_conv": _fold(block, variables["batch_stats"][name])}
        if "conv_kxk" in block
        else block
        for name, block in variables["params"].items()
    }
    return module.clone(branches=False), {"params": params}


def _fold(block: Any, stats: Any) -> dict[str, jax.Array]:
    """Kernel [3, 3, C, features] and bias [features] of the sum of the block's branches."""
    scale, bias = _affine(block["conv_kxk"]["bn"], stats["conv_kxk"]["bn"])
    kernel = block["conv_kxk"]["conv"]["kernel"] * scale
    scale, more = _affine(block["conv_1x1"]["bn"], stats["conv_1x1"]["bn"])
    centre, bias = block["conv_1x1"]["conv"]["kernel"][0, 0] * scale, bias + more
    if "identity" in block:
        scale, more = _affine(block["identity"], stats["identity"])
        centre, bias = centre + jnp.diag(scale), bias + more
    return {"kernel": jnp.asarray(kernel).at[1, 1].add(centre), "bias": bias}


def _affine(norm: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
    """The scale and the bias [C] that a BatchNorm applies in inference."""
    scale = norm["scale"] * jax.lax.rsqrt(stats["var"] + BatchNorm.epsilon)
    return scale, norm["bias"] - stats["mean"] * scale


VARIANTS = {
    "repvgg_a0": Variant(RepVGG, {}),
    # Not in timm: for the 32x32 images of CIFAR.
    "repvgg_a0_32": Variant(RepVGG, {"stem": "cifar"}, 32, CIFAR100_MEAN, CIFAR100_STD),
}
