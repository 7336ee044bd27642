"""ResNets v1.5 (the stride in the 3x3 convolution) and ResNeXts, with timm's names and numerics.

He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385); Xie et al.,
"Aggregated Residual Transformations for Deep Neural Networks" (arXiv:1611.05431); the stem and the
shortcuts of names with a "d": ResNet-D of He et al., "Bag of Tricks for Image Classification with
Convolutional Neural Networks" (arXiv:1812.01187). The layout follows `ResNet` in timm (Ross
Wightman, Apache-2.0) and torchvision (BSD-3).
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD
from xkd_jax.models.layers import BatchNorm, Conv, add_logits, drop_path, max_pool, recomputed
from xkd_jax.models.variant import Variant


def _shortcut(block: Any, x: jax.Array, features: int, train: bool) -> jax.Array:
    """`x` itself, or its projection by layers of `block` where the shape changes."""
    stride, first = block.stride, 0
    if stride == 1 and x.shape[-1] == features:
        return x
    if block.avg_down:  # in timm, the pooling is the first layer
        x = halve(x) if stride == 2 else x
        stride, first = 1, 1
    x = Conv(features, 1, stride, dtype=block.dtype, name=f"downsample_{first}")(x)
    return BatchNorm(dtype=block.dtype, name=f"downsample_{first + 1}")(x, train)


def halve(x: jax.Array) -> jax.Array:
    """Means over 2x2 windows of `x` [N, H, W, C]; at the edge of odd sizes, over a part of one.

    PyTorch's `AvgPool2d(2, ceil_mode=True, count_include_pad=False)`.
    """
    odd = [side % 2 for side in x.shape[1:3]]
    pads: Any = tuple((0, more) for more in odd)  # flax annotates only the string
    y = nn.avg_pool(x, (2, 2), strides=(2, 2), padding=pads)
    if not any(odd):
        return y
    factors = np.ones((1, *y.shape[1:3], 1), np.float32)  # the mean above counts the padding
    factors[:, -1] *= 1 + odd[0]
    factors[:, :, -1] *= 1 + odd[1]
    return y * factors.astype(y.dtype)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; returns the sum before its ReLU."""

    planes: int
    stride: int = 1
    avg_down: bool = False
    zero_init_last: bool = True
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, planes]."""
        conv, norm = partial(Conv, dtype=self.dtype), partial(BatchNorm, dtype=self.dtype)
        last_init = nn.initializers.zeros if self.zero_init_last else nn.initializers.ones
        shortcut = _shortcut(self, x, self.planes, train)
        y = conv(self.planes, 3, self.stride, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y, train))
        y = conv(self.planes, 3, name="conv2")(y)
        y = norm(name="bn2", scale_init=last_init)(y, train)
        return drop_path(self, y, self.drop_path, train) + shortcut


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; returns the sum before its ReLU."""

    planes: int
    stride: int = 1
    groups: int = 1
    base_width: int = 64
    avg_down: bool = False
    zero_init_last: bool = True
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, 4 planes]."""
        features = 4 * self.planes
        # ResNeXt's rule: `groups` paths, each `base_width` wide in the stage with 64 planes.
        inner = self.planes * self.base_width // 64 * self.groups
        conv, norm = partial(Conv, dtype=self.dtype), partial(BatchNorm, dtype=self.dtype)
        last_init = nn.initializers.zeros if self.zero_init_last else nn.initializers.ones
        shortcut = _shortcut(self, x, features, train)
        y = conv(inner, 1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y, train))
        y = conv(inner, 3, self.stride, groups=self.groups, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y, train))
        y = conv(features, 1, name="conv3")(y)
        y = norm(name="bn3", scale_init=last_init)(y, train)
        return drop_path(self, y, self.drop_path, train) + shortcut


_BLOCKS = ("basic", "bottleneck")
_STEMS = ("imagenet", "deep", "cifar")


class ResNet(nn.Module):
    """A ResNet or ResNeXt of four stages.

    `block` is "basic" or "bottleneck"; `layers` counts the blocks of each stage; `width`
    multiplies every channel count (2 for the paper's ResNet50x2, which is not timm's
    `wide_resnet50_2`). `groups` and `base_width` are ResNeXt's cardinality and path width, 32 and
    4 in "32x4d". The stem is "imagenet" (7x7 stride 2, max-pool), "deep" (three 3x3, max-pool) or,
    for 32x32 images, "cifar" (3x3 stride 1, no pool); with `avg_down`, shortcuts halve the size by
    averages instead of a stride. Training updates the collection `batch_stats`; with `drop_rate` or
    `drop_path_rate` above 0 it needs `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"

    block: str = "basic"
    layers: tuple[int, ...] = (2, 2, 2, 2)
    num_classes: int = 1000
    width: float = 1.0
    groups: int = 1
    base_width: int = 64
    stem: str = "imagenet"
    avg_down: bool = False
    zero_init_last: bool = True
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
          UserError: `block`, `layers`, `width` or `stem` has an invalid value.
        """
        self._check()
        block = recomputed(BasicBlock, self.remat and train)
        if self.block == "bottleneck":
            block = recomputed(Bottleneck, self.remat and train)
            block = partial(block, groups=self.groups, base_width=self.base_width)
        out: dict[str, Any] = {}
        x, index = self._stem(images, train), 0
        for stage, depth in enumerate(self.layers):
            pre = x
            for i in range(depth):
                pre = block(
                    planes=round(64 * 2**stage * self.width),
                    stride=2 if stage > 0 and i == 0 else 1,
                    avg_down=self.avg_down,
                    zero_init_last=self.zero_init_last,
                    drop_path=self.drop_path_rate * index / max(sum(self.layers) - 1, 1),
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{i}",
                )(x, train)
                x, index = nn.relu(pre), index + 1
            out[f"stage{stage + 1}_pre"] = pre
            out[f"stage{stage + 1}"] = x
        out["pooled"] = jnp.mean(x, axis=(1, 2))
        return add_logits(out, self.num_classes, self.drop_rate, train, "fc")

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm = partial(Conv, dtype=self.dtype), partial(BatchNorm, dtype=self.dtype)
        channels, last = round(64 * self.width), "conv1"
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        if self.stem == "deep":
            half, last = round(32 * self.width), "conv1_6"
            x = conv(half, 3, 2, name="conv1_0")(x)
            x = nn.relu(norm(name="conv1_1")(x, train))
            x = conv(half, 3, name="conv1_3")(x)
            x = nn.relu(norm(name="conv1_4")(x, train))
        x = conv(channels, kernel, stride, name=last)(x)
        x = nn.relu(norm(name="bn1")(x, train))
        return x if self.stem == "cifar" else max_pool(x, 3, 2, padding=1)

    def _check(self) -> None:
        if self.block not in _BLOCKS:
            raise errors.unknown("block", self.block, _BLOCKS)
        if self.stem not in _STEMS:
            raise errors.unknown("stem", self.stem, _STEMS)
        if self.block == "basic" and (self.groups, self.base_width) != (1, 64):
            raise errors.UserError("groups and base_width need block='bottleneck'.")
        if len(self.layers) != 4 or min(self.layers) < 1:
            raise errors.UserError(
                f"layers must be four block counts of at least 1, not {tuple(self.layers)}."
            )
        stem = 32 if self.stem == "deep" else 64
        if round(stem * self.width) < 1:
            raise errors.UserError(
                f"width must leave at least one channel of the stem's {stem}, not {self.width}."
            )


_50 = {"block": "bottleneck", "layers": (3, 4, 6, 3)}
_101 = {"block": "bottleneck", "layers": (3, 4, 23, 3)}
_152 = {"block": "bottleneck", "layers": (3, 8, 36, 3)}
_D = {"stem": "deep", "avg_down": True}
_32X4D = {"groups": 32, "base_width": 4}
_ARGS: dict[str, dict[str, Any]] = {
    "resnet18": {"block": "basic", "layers": (2, 2, 2, 2)},
    "resnet18d": {"block": "basic", "layers": (2, 2, 2, 2), **_D},
    "resnet26d": {"block": "bottleneck", "layers": (2, 2, 2, 2), **_D},
    "resnet34": {"block": "basic", "layers": (3, 4, 6, 3)},
    "resnet50": _50,
    "resnet50d": {**_50, **_D},
    "resnet101": _101,
    "resnet152": _152,
    "resnet50x2": {**_50, "width": 2.0},
    "resnet101x3": {**_101, "width": 3.0},
    "resnet152x2": {**_152, "width": 2.0},
    "resnext26_32x4d": {"block": "bottleneck", "layers": (2, 2, 2, 2), **_32X4D},
    "resnext50_32x4d": {**_50, **_32X4D},
    "resnext50d_32x4d": {**_50, **_32X4D, **_D},
    "resnext101_32x8d": {**_101, "groups": 32, "base_width": 8},
}

VARIANTS = {name: Variant(ResNet, args) for name, args in _ARGS.items()}
# Not in timm: for the 32x32 images of CIFAR.
VARIANTS |= {
    f"{name}_32": Variant(ResNet, {**_ARGS[name], "stem": "cifar"}, 32, CIFAR100_MEAN, CIFAR100_STD)
    for name in ("resnet18", "resnet34", "resnet50")
}
