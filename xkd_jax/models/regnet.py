"""RegNets with squeeze-and-excitation (RegNetY), with timm's names, weights and numerics.

Radosavovic et al., "Designing Network Design Spaces" (arXiv:2003.13678). The layout follows
`RegNet` in timm (Ross Wightman, Apache-2.0), whose names are those of its `regnety_*`.
"""

import math
from collections import Counter
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD
from xkd_jax.models.layers import BatchNorm, Conv, Head, drop_path, recomputed
from xkd_jax.models.variant import Variant

_STEM_CHANNELS = 32
_MULTIPLE = 8  # of which every width is one before it is adjusted to the groups
# Of the stem and the four stages; "cifar" drops the first two, so that 32x32 images end at 4x4.
_STRIDES = {"imagenet": (2, 2, 2, 2, 2), "cifar": (1, 1, 2, 2, 2)}

_head_init = nn.initializers.normal(0.01)


def block_widths(depth: int, w0: int, wa: float, wm: float) -> list[int]:
    """The channels of each block: the linear rule w0 + wa i, quantised (section 3.3).

    Widths are w0 times the nearest power of wm, rounded to multiples of 8.
    """
    widths = []
    for i in range(depth):
        power = round(math.log((w0 + wa * i) / w0) / math.log(wm))
        widths.append(round(w0 * wm**power / _MULTIPLE) * _MULTIPLE)
    return widths


def adjust_width(width: int, group_size: int, tv_rounding: bool) -> tuple[int, int]:
    """A stage's width as a multiple of its group size, and that size.

    With `tv_rounding` the width never falls by more than 10%, as in torchvision.
    """
    group_size = min(group_size, width)
    if not tv_rounding:
        return round(width / group_size) * group_size, group_size
    rounded = (width + group_size // 2) // group_size * group_size
    return rounded + group_size * (rounded < 0.9 * width), group_size


class ConvNorm(nn.Module):
    """A convolution and batch normalisation, without an activation."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    zero_init: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, H, W, C] to [N, h, w, features]."""
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            groups=self.groups,
            # timm's fan-out counts the outputs that one input reaches: those of its group.
            kernel_init=nn.initializers.variance_scaling(2.0 * self.groups, "fan_out", "normal"),
            dtype=self.dtype,
            name="conv",
        )(x)
        init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        return BatchNorm(scale_init=init, dtype=self.dtype, name="bn")(x, train)


class SqueezeExcite(nn.Module):
    """Scales channels by gates computed from the whole image (Hu et al., arXiv:1709.01507)."""

    reduced: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales `x` [N, h, w, C]; `reduced` channels are between the two 1x1 convolutions."""
        conv = partial(Conv, kernel_size=1, use_bias=True, dtype=self.dtype)
        gate = nn.relu(conv(self.reduced, name="fc1")(jnp.mean(x, axis=(1, 2), keepdims=True)))
        return x * nn.sigmoid(conv(x.shape[-1], name="fc2")(gate))


class Bottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions and a shortcut; returns the sum before its ReLU.

    All three have `features` channels: the bottleneck ratio is 1.
    """

    features: int
    stride: int
    group_size: int
    se_ratio: float
    zero_init_last: bool
    drop_path: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, features]."""
        layer = partial(ConvNorm, self.features, dtype=self.dtype)
        channels, groups = x.shape[-1], self.features // self.group_size
        y = nn.relu(layer(1, name="conv1")(x, train))
        y = nn.relu(layer(3, self.stride, groups, name="conv2")(y, train))
        if self.se_ratio:
            # A share of the block's input, not of the channels that are scaled.
            y = SqueezeExcite(round(channels * self.se_ratio), self.dtype, name="se")(y)
        y = layer(1, zero_init=self.zero_init_last, name="conv3")(y, train)
        if self.stride > 1 or channels != self.features:
            x = layer(1, self.stride, name="downsample")(x, train)
        return drop_path(self, y, self.drop_path, train) + x


class Stage(nn.Module):
    """Blocks of one width, of which the first is strided; `drop_paths` has a rate for each."""

    features: int
    stride: int
    drop_paths: tuple[float, ...]
    group_size: int
    se_ratio: float
    zero_init_last: bool
    remat: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, features].

        Returns:
          the last block's output, and the sum before its ReLU.
        """
        block, pre = recomputed(Bottleneck, self.remat and train), x
        for i, rate in enumerate(self.drop_paths):
            pre = block(
                self.features,
                self.stride if i == 0 else 1,
                self.group_size,
                self.se_ratio,
                self.zero_init_last,
                rate,
                self.dtype,
                name=f"b{i + 1}",
            )(x, train)
            x = nn.relu(pre)
        return x, pre


class RegNet(nn.Module):
    """A RegNetY of four stages.

    `depth` is the number of blocks; `w0`, `wa` and `wm` are the paper's parameters of their
    widths: the first width, the slope, and the step from one stage's width to the next's.
    `group_size` is the number of channels in a group of the 3x3 convolutions. Widths are rounded
    to multiples of it, with `tv_rounding` as in torchvision. `se_ratio` sets the channels inside
    squeeze-and-excitation; 0 leaves it out. The stem is "imagenet" (stride 2) or, for 32x32
    images, "cifar" (stride 1, in the first stage too). Training updates the collection
    `batch_stats`; with `drop_rate` or `drop_path_rate` above 0 it needs `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"

    num_classes: int = 1000
    depth: int = 16
    w0: int = 48
    wa: float = 27.89
    wm: float = 2.09
    group_size: int = 8
    tv_rounding: bool = False
    se_ratio: float = 0.25
    stem: str = "imagenet"
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
          UserError: `stem`, or a parameter of the widths, has an invalid value.
        """
        stages = self._stages()
        stem_stride, *strides = _STRIDES[self.stem]
        x = ConvNorm(_STEM_CHANNELS, 3, stem_stride, dtype=self.dtype, name="stem")(images, train)
        x = nn.relu(x)
        step = self.drop_path_rate / max(self.depth - 1, 1)
        out: dict[str, Any] = {}
        first = 0
        for i, (width, depth) in enumerate(stages):
            features, group_size = adjust_width(width, self.group_size, self.tv_rounding)
            x, out[f"stage{i + 1}_pre"] = Stage(
                features,
                strides[i],
                tuple(step * block for block in range(first, first + depth)),
                group_size,
                self.se_ratio,
                self.zero_init_last,
                self.remat,
                self.dtype,
                name=f"s{i + 1}",
            )(x, train)
            out[f"stage{i + 1}"] = x
            first += depth
        out["pooled"] = jnp.mean(x, axis=(1, 2))
        if self.num_classes:
            head = Head(self.num_classes, self.drop_rate, _head_init, name="head")
            out["logits"] = head(out["pooled"], train)
        return out.get("logits"), out

    def _stages(self) -> list[tuple[int, int]]:
        """The width, before its adjustment to the groups, and the number of blocks of each stage.

        Raises:
          UserError: see `__call__`.
        """
        if self.stem not in _STRIDES:
            raise errors.unknown("stem", self.stem, _STRIDES)
        if self.w0 < 1 or self.w0 % _MULTIPLE:
            raise errors.UserError(f"w0 must be a multiple of {_MULTIPLE}, not {self.w0}.")
        if self.wa < 0 or self.wm <= 1:
            raise errors.UserError(
                f"wa must be at least 0 and wm above 1, not {self.wa} and {self.wm}."
            )
        if self.group_size < 1 or self.se_ratio < 0:
            raise errors.UserError(
                f"group_size must be at least 1 and se_ratio at least 0, not {self.group_size} "
                f"and {self.se_ratio}."
            )
        counts = Counter(block_widths(self.depth, self.w0, self.wa, self.wm))
        if len(counts) != 4:
            raise errors.UserError(
                f"depth, w0, wa and wm must give four widths, not {sorted(counts)}."
            )
        return sorted(counts.items())


_ARGS: dict[str, dict[str, Any]] = {
    "regnety_004": {},
    "regnety_008": {"depth": 14, "w0": 56, "wa": 38.84, "wm": 2.4, "group_size": 16},
    "regnety_016": {"depth": 27, "w0": 48, "wa": 20.71, "wm": 2.65, "group_size": 24},
    "regnety_032": {"depth": 21, "w0": 80, "wa": 42.63, "wm": 2.66, "group_size": 24},
}
_ARGS["regnety_008_tv"] = {**_ARGS["regnety_008"], "tv_rounding": True}

VARIANTS = {name: Variant(RegNet, args) for name, args in sorted(_ARGS.items())}
# Not in timm: for the 32x32 images of CIFAR.
VARIANTS["regnety_004_32"] = Variant(RegNet, {"stem": "cifar"}, 32, CIFAR100_MEAN, CIFAR100_STD)
