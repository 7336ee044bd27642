"""What EfficientNets and MobileNets share: their blocks, and the network that stacks them.

The layout follows `EfficientNetBuilder` and its blocks in timm (Ross Wightman, Apache-2.0).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.models.layers import BatchNorm, Conv, add_logits, drop_path, recomputed

ACTIVATIONS = {
    "silu": nn.silu,
    "relu": nn.relu,
    "relu6": nn.relu6,
    "hard_swish": nn.hard_swish,
}
_GATES = {"sigmoid": nn.sigmoid, "hard_sigmoid": nn.hard_sigmoid}
_STEMS = ("imagenet", "cifar")

# As in Google's code: uniform within +-1/sqrt(num_classes).
_head_init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


def round_channels(channels: int, width: float, limit: float = 0.9) -> int:
    """`channels` times `width`, to a multiple of 8 that is at least `limit` times as many."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < limit * scaled else rounded


def scale_repeats(repeats: Sequence[int], depth: float) -> list[int]:
    """The blocks of each row of a stage when the stage has `depth` times as many, rounded up.

    The last rows get their share first, as in timm, so that the first ones grow least.
    """
    total, scaled, counts = sum(repeats), math.ceil(sum(repeats) * depth), []
    for count in reversed(repeats):
        counts.append(max(1, round(count / total * scaled)))
        total, scaled = total - count, scaled - counts[-1]
    return counts[::-1]


class SqueezeExcite(nn.Module):
    """Scales channels by gates computed from the whole image (Hu et al., arXiv:1709.01507)."""

    reduced: int
    activation: str
    gate: str = "sigmoid"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales `x` [N, h, w, C]; `reduced` channels are between the two 1x1 convolutions."""
        conv = partial(Conv, kernel_size=1, use_bias=True, dtype=self.dtype)
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = ACTIVATIONS[self.activation](conv(self.reduced, name="conv_reduce")(gate))
        return x * _GATES[self.gate](conv(x.shape[-1], name="conv_expand")(gate))


class Block(nn.Module):
    """What all blocks share: their fields, convolutions and shortcut.

    A block maps `x` [N, h, w, C] to [N, h / stride, w / stride, features]. It returns that and the
    tensor before its last activation: the same, where it ends linearly. `activation`, `padding` and
    `bn_epsilon` are the network's; `drop_path` is the rate of stochastic depth.
    """

    features: int
    stride: int = 1
    activation: str = "relu"
    padding: str | None = None
    bn_epsilon: float = 1e-5
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    def _conv_norm(
        self,
        x: jax.Array,
        features: int,
        kernel_size: int,
        names: tuple[str, str],
        train: bool,
        stride: int = 1,
        depthwise: bool = False,
    ) -> jax.Array:
        """Convolution and normalisation, called `names`."""
        conv, norm = names
        groups = x.shape[-1] if depthwise else 1
        x = Conv(
            features,
            kernel_size,
            stride,
            self.padding,
            groups,
            # timm's fan-out counts the outputs that one input reaches: those of its group.
            kernel_init=nn.initializers.variance_scaling(2.0 * groups, "fan_out", "normal"),
            dtype=self.dtype,
            name=conv,
        )(x)
        return BatchNorm(epsilon=self.bn_epsilon, dtype=self.dtype, name=norm)(x, train)

    def _add_shortcut(self, x: jax.Array, y: jax.Array, train: bool) -> jax.Array:
        """Adds the block's input `x` to `y`, where neither size nor channel count changes."""
        if self.stride > 1 or x.shape[-1] != self.features:
            return y
        return drop_path(self, y, self.drop_path, train) + x


class ConvBlock(Block):
    """A convolution, normalisation and activation; with `shortcut`, its input may be added."""

    kernel_size: int = 3
    shortcut: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Maps `x` as described in `Block`."""
        pre = self._conv_norm(
            x, self.features, self.kernel_size, ("conv", "bn1"), train, self.stride
        )
        y = ACTIVATIONS[self.activation](pre)
        if not self.shortcut or self.stride > 1 or x.shape[-1] != self.features:
            return y, pre
        y = self._add_shortcut(x, y, train)
        return y, y


class InvertedResidual(Block):
    """Expansion, depthwise convolution and linear projection (MobileNetV2, arXiv:1801.04381).

    With `expansion` 1 there is no expansion, and the layers have the names of timm's
    `DepthwiseSeparableConv`. `squeeze_excite` is None, "efficientnet" (a quarter of the block's
    input channels) or "mobilenetv3" (a quarter of the expanded ones, ReLU and a hard sigmoid).
    """

    kernel_size: int = 3
    expansion: float = 6
    squeeze_excite: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Maps `x` as described in `Block`."""
        activation = ACTIVATIONS[self.activation]
        channels = hidden = x.shape[-1]
        y, depthwise_norm, project = x, "bn1", ("conv_pw", "bn2")
        if self.expansion > 1:
            hidden = round_channels(channels, self.expansion)
            y = activation(self._conv_norm(y, hidden, 1, ("conv_pw", "bn1"), train))
            depthwise_norm, project = "bn2", ("conv_pwl", "bn3")
        names = ("conv_dw", depthwise_norm)
        y = self._conv_norm(y, hidden, self.kernel_size, names, train, self.stride, depthwise=True)
        y = activation(y)
        if self.squeeze_excite == "mobilenetv3":
            reduced = round_channels(hidden, 0.25)
            y = SqueezeExcite(reduced, "relu", "hard_sigmoid", self.dtype, name="se")(y)
        elif self.squeeze_excite:
            y = SqueezeExcite(channels // 4, self.activation, dtype=self.dtype, name="se")(y)
        y = self._conv_norm(y, self.features, 1, project, train)
        y = self._add_shortcut(x, y, train)
        return y, y


class FusedInvertedResidual(Block):
    """One convolution that expands and filters, and a linear projection: timm's `EdgeResidual`.

    EfficientNetV2 (arXiv:2104.00298) calls it Fused-MBConv.
    """

    kernel_size: int = 3
    expansion: float = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Maps `x` as described in `Block`."""
        hidden = round_channels(x.shape[-1], self.expansion)
        names = ("conv_exp", "bn1")
        y = self._conv_norm(x, hidden, self.kernel_size, names, train, self.stride)
        y = ACTIVATIONS[self.activation](y)
        y = self._conv_norm(y, self.features, 1, ("conv_pwl", "bn2"), train)
        y = self._add_shortcut(x, y, train)
        return y, y


@dataclasses.dataclass(frozen=True)
class Row:
    """Equal blocks in sequence, a part of a stage.

    Attributes:
      block: their class.
      features: their output channels, before the network's `width`.
      repeats: their number, before the network's `depth`.
      stride: of the first one; the others have 1.
      args: their other fields.
    """

    block: type[Block]
    features: int
    repeats: int = 1
    stride: int = 1
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class BlockNetwork(nn.Module):
    """A stem, stages of blocks and a head; a family overrides what differs, above all `_stages`.

    `width` multiplies every channel count, rounded to multiples of 8, and `depth` every stage's
    blocks, rounded up. The stem is "imagenet" (stride 2) or, for 32x32 images, "cifar" (stride 1,
    also in the first stage that has stride 2). `activation` is "silu", "relu", "relu6" or
    "hard_swish"; `padding` is None, as in PyTorch, or "SAME", as in TensorFlow. Training updates
    the collection `batch_stats`; with `drop_rate` or `drop_path_rate` above 0 it needs
    `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"

    num_classes: int = 1000
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    activation: str = "silu"
    padding: str | None = None
    bn_epsilon: float = 1e-5
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
          [N, h, w, C], the last block's output at each resolution; `stage1_pre` ..., before its
          last activation: the same tensors where it ends without one, as a linear bottleneck does;
          `pooled` [N, C], `logits`.

        Raises:
          UserError: `width`, `depth`, `stem`, `activation` or `padding` has an invalid value.
        """
        self._check()
        stages = self._stages()
        stem_stride, strides = 2, [rows[0].stride for rows in stages]
        # The last stage at each resolution except the highest: reductions 4, 8, 16 and 32.
        ends = [i for i in range(len(stages)) if strides[i + 1 : i + 2] != [1]][-4:]
        if self.stem == "cifar":
            stem_stride, strides[strides.index(2)] = 1, 1
        x = self._conv_norm(
            images, self._stem_channels(), 3, stem_stride, ("conv_stem", "bn1"), train
        )
        out: dict[str, Any] = {}
        counts = [self._count_blocks(stage, rows) for stage, rows in enumerate(stages)]
        index, total = 0, sum(map(sum, counts))
        for stage, rows in enumerate(stages):
            blocks = [row for row, n in zip(rows, counts[stage], strict=True) for _ in range(n)]
            pre = x
            for i, row in enumerate(blocks):
                x, pre = recomputed(row.block, self.remat and train)(
                    features=self._channels(row.features),
                    stride=strides[stage] if i == 0 else 1,
                    drop_path=self.drop_path_rate * index / total,
                    name=f"blocks_{stage}_{i}",
                    **{**self._common(), **row.args},
                )(x, train)
                index += 1
            if stage in ends:
                key = f"stage{ends.index(stage) + 1}"
                out[key], out[f"{key}_pre"] = x, pre
        out["pooled"] = self._pool(x, train)
        return add_logits(out, self.num_classes, self.drop_rate, train, "classifier", _head_init)

    def _stages(self) -> tuple[tuple[Row, ...], ...]:
        """The rows of each stage; only the first of a stage may have a stride above 1."""
        raise NotImplementedError

    def _stem_channels(self) -> int:
        return self._channels(32)

    def _head_channels(self) -> int:
        return self._channels(1280)

    def _channels(self, channels: int) -> int:
        return round_channels(channels, self.width)

    def _count_blocks(self, stage: int, rows: Sequence[Row]) -> list[int]:
        """The number of blocks of each of the stage's `rows`."""
        return scale_repeats([row.repeats for row in rows], self.depth)

    def _pool(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps the last stage's `x` [N, h, w, C] to what the classifier reads, [N, features]."""
        x = self._conv_norm(x, self._head_channels(), 1, 1, ("conv_head", "bn2"), train)
        return jnp.mean(x, axis=(1, 2))

    def _conv_norm(
        self,
        x: jax.Array,
        channels: int,
        kernel_size: int,
        stride: int,
        names: tuple[str, str],
        train: bool,
    ) -> jax.Array:
        """Convolution and normalisation, called `names`, and the activation."""
        conv, norm = names
        x = Conv(channels, kernel_size, stride, padding=self.padding, dtype=self.dtype, name=conv)(
            x
        )
        x = BatchNorm(epsilon=self.bn_epsilon, dtype=self.dtype, name=norm)(x, train)
        return ACTIVATIONS[self.activation](x)

    def _common(self) -> dict[str, Any]:
        """The fields that all blocks take from the network."""
        names = ("activation", "padding", "bn_epsilon", "dtype")
        return {name: getattr(self, name) for name in names}

    def _check(self) -> None:
        if self.stem not in _STEMS:
            raise errors.unknown("stem", self.stem, _STEMS)
        if self.activation not in ACTIVATIONS:
            raise errors.unknown("activation", self.activation, ACTIVATIONS)
        if self.padding not in (None, "SAME"):
            raise errors.UserError(f"padding must be None or 'SAME', not {self.padding!r}.")
        for field in ("width", "depth"):
            if not getattr(self, field) > 0:
                raise errors.UserError(f"{field} must be above 0, not {getattr(self, field)}.")
