"""ResNets v1.5 (the stride in the 3x3 convolution), with timm's names, weights and numerics.

He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385). The layout follows
`ResNet` in timm (Ross Wightman, Apache-2.0) and torchvision (BSD-3).
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.models.variant import Variant

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default for a linear layer, which timm keeps: uniform +-1/sqrt(fan_in).
_head_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _conv(features: int, kernel: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    # PyTorch pads both sides alike; "SAME" would shift the strided ones by a pixel.
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=kernel // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=_conv_init,
        name=name,
    )


def _batch_norm(train: bool, dtype: Any):
    # Under jit the batch is the global one, so its statistics need no axis_name.
    # Flax keeps the statistics themselves in float32 whatever the compute dtype.
    return partial(
        nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype
    )


def _shortcut(x: jax.Array, features: int, stride: int, norm: Any, dtype: Any) -> jax.Array:
    """The residual branch: `x` itself, or its projection where the shape changes."""
    if stride == 1 and x.shape[-1] == features:
        return x
    x = _conv(features, 1, stride, dtype, "downsample_0")(x)
    return norm(name="downsample_1")(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; returns the sum before its ReLU."""

    expansion: ClassVar[int] = 1

    planes: int
    stride: int = 1
    zero_init_last: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, planes]."""
        norm = _batch_norm(train, self.dtype)
        last_init = nn.initializers.zeros if self.zero_init_last else nn.initializers.ones
        shortcut = _shortcut(x, self.planes, self.stride, norm, self.dtype)
        x = _conv(self.planes, 3, self.stride, self.dtype, "conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        x = _conv(self.planes, 3, 1, self.dtype, "conv2")(x)
        return norm(name="bn2", scale_init=last_init)(x) + shortcut


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; returns the sum before its ReLU."""

    expansion: ClassVar[int] = 4

    planes: int
    stride: int = 1
    zero_init_last: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, 4 planes]."""
        features = self.planes * self.expansion
        norm = _batch_norm(train, self.dtype)
        last_init = nn.initializers.zeros if self.zero_init_last else nn.initializers.ones
        shortcut = _shortcut(x, features, self.stride, norm, self.dtype)
        x = _conv(self.planes, 1, 1, self.dtype, "conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        x = _conv(self.planes, 3, self.stride, self.dtype, "conv2")(x)
        x = nn.relu(norm(name="bn2")(x))
        x = _conv(features, 1, 1, self.dtype, "conv3")(x)
        return norm(name="bn3", scale_init=last_init)(x) + shortcut


_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
_STEMS = ("imagenet", "cifar")


class ResNet(nn.Module):
    """A ResNet of four stages.

    `block` is "basic" or "bottleneck"; `layers` counts the blocks of each stage; `width`
    multiplies every channel count (2 for the paper's ResNet50x2, which is not timm's
    `wide_resnet50_2`). The stem is "imagenet" (7x7 stride 2, max-pool) or, for 32x32 images,
    "cifar" (3x3 stride 1, no pool). Training changes the collection `batch_stats`; with
    `drop_rate` above 0 it needs `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"

    block: str = "basic"
    layers: tuple[int, ...] = (2, 2, 2, 2)
    num_classes: int = 1000
    width: float = 1.0
    stem: str = "imagenet"
    zero_init_last: bool = True
    drop_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, Any]]:
        """Classifies `images` [N, H, W, 3], already normalised, of any size.

        Returns:
          logits [N, num_classes] float32, and the intermediates: `stage1` ... `stage4`
          [N, h, w, C] after the activation, `stage1_pre` ... before it, `pooled` [N, C],
          `logits`.

        Raises:
          UserError: `block`, `layers`, `width` or `stem` is not one of the above.
        """
        self._check()
        block = _BLOCKS[self.block]
        out: dict[str, Any] = {}
        x = self._stem(images, train)
        for stage, depth in enumerate(self.layers):
            planes = round(64 * 2**stage * self.width)
            pre = x
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"layer{stage + 1}_{i}"
                pre = block(planes, stride, self.zero_init_last, self.dtype, name=name)(x, train)
                x = nn.relu(pre)
            out[f"stage{stage + 1}_pre"] = pre
            out[f"stage{stage + 1}"] = x
        out["pooled"] = pooled = jnp.mean(x, axis=(1, 2))
        pooled = nn.Dropout(self.drop_rate, deterministic=not train)(pooled)
        # The head is a sliver of the work: in float32 it costs nothing and rounds nothing.
        head = nn.Dense(self.num_classes, dtype=jnp.float32, kernel_init=_head_init, name="fc")
        out["logits"] = head(pooled)
        return out["logits"], out

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = _conv(round(64 * self.width), kernel, stride, self.dtype, "conv1")(x)
        x = nn.relu(_batch_norm(train, self.dtype)(name="bn1")(x))
        if self.stem == "imagenet":
            pad: Any = ((1, 1), (1, 1))  # flax annotates only the string it may also be
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=pad)
        return x

    def _check(self) -> None:
        if self.block not in _BLOCKS:
            raise errors.unknown("block", self.block, _BLOCKS)
        if self.stem not in _STEMS:
            raise errors.unknown("stem", self.stem, _STEMS)
        if len(self.layers) != 4 or min(self.layers) < 1:
            raise errors.UserError(
                f"layers must be four block counts of at least 1, not {tuple(self.layers)}."
            )
        if round(64 * self.width) < 1:
            raise errors.UserError(
                f"width must leave at least one channel of 64, not {self.width}."
            )


_50 = {"block": "bottleneck", "layers": (3, 4, 6, 3)}
_101 = {"block": "bottleneck", "layers": (3, 4, 23, 3)}
_152 = {"block": "bottleneck", "layers": (3, 8, 36, 3)}
_ARGS: dict[str, dict[str, Any]] = {
    "resnet18": {"block": "basic", "layers": (2, 2, 2, 2)},
    "resnet34": {"block": "basic", "layers": (3, 4, 6, 3)},
    "resnet50": _50,
    "resnet101": _101,
    "resnet152": _152,
    "resnet50x2": {**_50, "width": 2.0},
    "resnet101x3": {**_101, "width": 3.0},
    "resnet152x2": {**_152, "width": 2.0},
}

VARIANTS = {name: Variant(ResNet, args) for name, args in _ARGS.items()}
