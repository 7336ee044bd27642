"""The small networks of the CIFAR-100 distillation literature, for 32x32 images.

He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385, section 4.2);
Zagoruyko and Komodakis, "Wide Residual Networks" (arXiv:1605.07146); Simonyan and Zisserman,
"Very Deep Convolutional Networks" (arXiv:1409.1556). The variants are those of Tian et al.,
"Contrastive Representation Distillation" (arXiv:1910.10699): names, layout and numerics follow
its RepDistiller (BSD-2), whose published teachers can be converted. `vgg13` is therefore not
timm's ImageNet network of that name.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import CIFAR100_MEAN, CIFAR100_STD
from xkd_jax.models.layers import BatchNorm, Conv, add_logits, max_pool, recomputed
from xkd_jax.models.resnet import BasicBlock
from xkd_jax.models.variant import Variant


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers: a stem and three groups of n blocks.

    `channels` are those of the stem and the groups. The shortcut is a projection where the shape
    changes (He et al. pad with zeros instead). `drop_rate` is that of the dropout before the
    classifier. Training updates the collection `batch_stats`; with `drop_rate` above 0 it needs
    `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"

    depth: int = 20
    channels: tuple[int, ...] = (16, 16, 32, 64)
    num_classes: int = 100
    drop_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, H, W, 3], already normalised, of any size.

        Returns:
          logits [N, num_classes] float32, and the intermediates: `stage1`, the stem, and
          `stage2` ... `stage4`, the groups, [N, h, w, C] after the activation; `stage1_pre` ...
          before it; `pooled` [N, C], `logits`. The literature calls the stages f0 ... f3.

        Raises:
          UserError: `depth` is not 6n + 2, or `channels` is not four positive numbers.
        """
        self._check()
        out: dict[str, Any] = {}
        pre = Conv(self.channels[0], 3, dtype=self.dtype, name="conv1")(images)
        out["stage1_pre"] = pre = BatchNorm(dtype=self.dtype, name="bn1")(pre, train)
        out["stage1"] = x = nn.relu(pre)
        block = recomputed(BasicBlock, self.remat and train)
        for group, planes in enumerate(self.channels[1:], start=1):
            for i in range((self.depth - 2) // 6):
                stride = 2 if group > 1 and i == 0 else 1
                pre = block(
                    planes,
                    stride,
                    zero_init_last=False,
                    dtype=self.dtype,
                    name=f"layer{group}_{i}",
                )(x, train)
                x = nn.relu(pre)
            out[f"stage{group + 1}_pre"] = pre
            out[f"stage{group + 1}"] = x
        out["pooled"] = jnp.mean(x, axis=(1, 2))
        return add_logits(out, self.num_classes, self.drop_rate, train, "fc")

    def _check(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise errors.UserError(
                f"depth must be 6n + 2 with an integer n >= 1, not {self.depth}."
            )
        if len(self.channels) != 4 or min(self.channels) < 1:
            raise errors.UserError(
                "channels must be four positive numbers (of the stem and three groups), not "
                f"{self.channels}."
            )


class WideBlock(nn.Module):
    """A pre-activation block; the projection shares the first norm and ReLU.

    `drop_rate` is that of the dropout between the two convolutions.
    """

    planes: int
    stride: int = 1
    drop_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, planes].

        Returns:
          the sum, without an activation, and the input of the first ReLU [N, h, w, C].
        """
        pre = BatchNorm(dtype=self.dtype, name="bn1")(x, train)
        y = nn.relu(pre)
        if x.shape[-1] != self.planes:
            x = Conv(self.planes, 1, self.stride, dtype=self.dtype, name="convShortcut")(y)
        y = Conv(self.planes, 3, self.stride, dtype=self.dtype, name="conv1")(y)
        y = nn.relu(BatchNorm(dtype=self.dtype, name="bn2")(y, train))
        y = nn.Dropout(self.drop_rate, deterministic=not train)(y)
        y = Conv(self.planes, 3, dtype=self.dtype, name="conv2")(y)
        return x + y, pre


class WideGroup(nn.Module):
    """A sequence of blocks; the first has the stride."""

    depth: int
    planes: int
    stride: int = 1
    drop_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Maps `x` [N, h, w, C] to [N, h / stride, w / stride, planes].

        Returns:
          the last block's sum, and the input of the first block's first ReLU [N, h, w, C].
        """
        pres = []
        block = recomputed(WideBlock, self.remat and train)
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            options = self.planes, stride, self.drop_rate, self.dtype
            x, pre = block(*options, name=f"layer_{i}")(x, train)
            pres.append(pre)
        return x, pres[0]


class WideResNet(nn.Module):
    """A wide ResNet of 6n + 4 layers: a stem and three groups of n pre-activation blocks.

    `widen_factor` multiplies the groups' 16, 32 and 64 channels; `drop_rate` is that of the
    dropout inside the blocks. Training updates the collection `batch_stats`; with `drop_rate`
    above 0 it needs `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"

    depth: int = 16
    widen_factor: int = 2
    num_classes: int = 100
    drop_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, H, W, 3], already normalised, of any size.

        In a pre-activation network, the activation of a group's output belongs to the next group.
        The features behind published results are therefore not the usual pair: `stage1` ...
        `stage4` are the stem's convolution and the last sum of each group (f0 ... f3), without
        norm or activation; `stage1_pre` ... are the same after the norm that follows, the input
        of the next ReLU (the literature's preact, except that its f0 is not normalised).

        Returns:
          logits [N, num_classes] float32, and the intermediates: `stage1` ... `stage4` and
          `stage1_pre` ... [N, h, w, C] as above, `pooled` [N, C], `logits`.

        Raises:
          UserError: `depth` is not 6n + 4, or `widen_factor` is below 1.
        """
        self._check()
        out: dict[str, Any] = {}
        out["stage1"] = x = Conv(16, 3, dtype=self.dtype, name="conv1")(images)
        for group in range(1, 4):
            x, out[f"stage{group}_pre"] = WideGroup(
                (self.depth - 4) // 6,
                8 * 2**group * self.widen_factor,
                1 if group == 1 else 2,
                self.drop_rate,
                self.remat,
                self.dtype,
                name=f"block{group}",
            )(x, train)
            out[f"stage{group + 1}"] = x
        out["stage4_pre"] = pre = BatchNorm(dtype=self.dtype, name="bn1")(x, train)
        out["pooled"] = jnp.mean(nn.relu(pre), axis=(1, 2))
        return add_logits(out, self.num_classes, 0.0, train, "fc")

    def _check(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise errors.UserError(
                f"depth must be 6n + 4 with an integer n >= 1, not {self.depth}."
            )
        if self.widen_factor < 1:
            raise errors.UserError(f"widen_factor must be at least 1, not {self.widen_factor}.")


class CifarVGG(nn.Module):
    """A VGG of five blocks with batch normalisation and one linear layer.

    `channels` lists the output channels of each block's convolutions; `drop_rate` is that of the
    dropout before the classifier. Training updates the collection `batch_stats`; with `drop_rate`
    above 0 it needs `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"

    channels: tuple[tuple[int, ...], ...] = ((64,), (128,), (256,), (512,), (512,))
    num_classes: int = 100
    drop_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, H, W, 3], already normalised, at least 8 pixels a side.

        A 2x2 max-pool separates the blocks; the last two, only for images 64 pixels high, as in
        the literature.

        Returns:
          logits [N, num_classes] float32, and the intermediates: `stage1` ... `stage4`, the
          second to fifth block [N, h, w, C] after the activation; `stage1_pre` ... before it,
          both before the pooling; `pooled` [N, C], `logits`.

        Raises:
          UserError: `images` is smaller, or `channels` is not five blocks of positive numbers.
        """
        self._check(images.shape)
        out: dict[str, Any] = {}
        x = images
        for block, widths in enumerate(self.channels):
            if block in (1, 2, 3) or (block == 4 and images.shape[1] == 64):
                x = max_pool(x, 2, 2)
            pre = x
            for i, width in enumerate(widths):
                # The published names count ReLUs too.
                conv, norm = f"block{block}_{3 * i}", f"block{block}_{3 * i + 1}"
                pre = Conv(width, 3, use_bias=True, dtype=self.dtype, name=conv)(x)
                pre = BatchNorm(dtype=self.dtype, name=norm)(pre, train)
                x = nn.relu(pre)
            if block > 0:
                out[f"stage{block}_pre"] = pre
                out[f"stage{block}"] = x
        out["pooled"] = jnp.mean(x, axis=(1, 2))
        head_init = nn.initializers.normal(0.01)
        return add_logits(out, self.num_classes, self.drop_rate, train, "classifier", head_init)

    def _check(self, shape: tuple[int, ...]) -> None:
        if min(shape[1:3]) < 8:
            raise errors.UserError(
                f"this VGG needs images of at least 8 pixels a side, not {shape[1]}x{shape[2]}; "
                "it was designed for 32x32."
            )
        if len(self.channels) != 5 or min(min(block, default=0) for block in self.channels) < 1:
            raise errors.UserError(
                "channels must be five blocks of at least one positive number, not "
                f"{self.channels}."
            )


_X4 = (32, 64, 128, 256)
_VGG13 = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
_NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    **{f"resnet{depth}": (CifarResNet, {"depth": depth}) for depth in (8, 20, 32, 44, 56, 110)},
    "resnet8x4": (CifarResNet, {"depth": 8, "channels": _X4}),
    "resnet32x4": (CifarResNet, {"depth": 32, "channels": _X4}),
    **{
        f"wrn_{depth}_{widen}": (WideResNet, {"depth": depth, "widen_factor": widen})
        for depth in (16, 40)
        for widen in (1, 2)
    },
    "vgg8": (CifarVGG, {}),
    "vgg13": (CifarVGG, {"channels": _VGG13}),
}

VARIANTS = {
    name: Variant(network, args, 32, CIFAR100_MEAN, CIFAR100_STD)
    for name, (network, args) in _NETWORKS.items()
}
