"""Inception-v3, with timm's names, weights and numerics.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv:1512.00567).
The layout follows `inception_v3` in timm (Ross Wightman, Apache-2.0) and torchvision (BSD-3).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.augment.normalization import HALF_MEAN, HALF_STD
from xkd_jax.models.layers import BatchNorm, Conv, add_logits, max_pool, recomputed
from xkd_jax.models.variant import Variant

# timm truncates at an absolute +-2: with these deviations that is a plain normal.
_weight_init = nn.initializers.normal(0.1)
_aux_head_init = nn.initializers.normal(0.001)

_SMALLEST = 75  # makes the last map one pixel
_SMALLEST_AUX = 299  # makes the 17x17 map that the auxiliary classifier is built for

# Name, features and kernel size (vertical, horizontal) of a convolution.
_Layer = tuple[str, int, int | tuple[int, int]]


class ConvNorm(nn.Module):
    """A convolution and batch normalisation, without an activation."""

    features: int
    kernel_size: int | tuple[int, int]
    stride: int = 1
    padding: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, H, W, C] to [N, h, w, features]."""
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.padding,
            kernel_init=_weight_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        return BatchNorm(epsilon=1e-3, dtype=self.dtype, name="bn")(x, train)


class Mixed(nn.Module):
    """The base of blocks with parallel branches, concatenated before their common ReLU."""

    dtype: Any = jnp.float32

    def _run(self, x: jax.Array, train: bool, *layers: _Layer, stride: int = 1) -> jax.Array:
        """Convolutions with ReLUs between them; only the last is strided, and then unpadded."""
        for i, (name, features, kernel) in enumerate(layers):
            x = nn.relu(x) if i > 0 else x
            strided = stride > 1 and i == len(layers) - 1
            x = ConvNorm(
                features,
                kernel,
                stride if strided else 1,
                0 if strided else None,
                self.dtype,
                name=name,
            )(x, train)
        return x

    def _pool(self, x: jax.Array, train: bool, features: int) -> jax.Array:
        # Zeros at the border count in the average, as in PyTorch.
        x = nn.avg_pool(x, (3, 3), padding="SAME")
        return self._run(x, train, ("branch_pool", features, 1))


class MixedA(Mixed):
    """Figure 5 of the paper, with a 5x5 convolution in one branch."""

    pool_features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to the concatenated branches [N, h, w, C'], before their ReLU."""
        branches = [
            self._run(x, train, ("branch1x1", 64, 1)),
            self._run(x, train, ("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
            self._run(
                x,
                train,
                ("branch3x3dbl_1", 64, 1),
                ("branch3x3dbl_2", 96, 3),
                ("branch3x3dbl_3", 96, 3),
            ),
            self._pool(x, train, self.pool_features),
        ]
        return jnp.concatenate(branches, axis=-1)


class MixedB(Mixed):
    """Reduces the 35x35 grid to 17x17 (figure 10 of the paper)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to the concatenated branches [N, h', w', C'], before their ReLU."""
        branches = [
            self._run(x, train, ("branch3x3", 384, 3), stride=2),
            self._run(
                x,
                train,
                ("branch3x3dbl_1", 64, 1),
                ("branch3x3dbl_2", 96, 3),
                ("branch3x3dbl_3", 96, 3),
                stride=2,
            ),
            max_pool(x, 3, 2),  # non-negative, so that the ReLU that follows changes nothing
        ]
        return jnp.concatenate(branches, axis=-1)


class MixedC(Mixed):
    """Factorised 7x7 convolutions, `features` wide inside (figure 6 of the paper)."""

    features: int = 192

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to the concatenated branches [N, h, w, C'], before their ReLU."""
        inner = self.features
        branches = [
            self._run(x, train, ("branch1x1", 192, 1)),
            self._run(
                x,
                train,
                ("branch7x7_1", inner, 1),
                ("branch7x7_2", inner, (1, 7)),
                ("branch7x7_3", 192, (7, 1)),
            ),
            self._run(
                x,
                train,
                ("branch7x7dbl_1", inner, 1),
                ("branch7x7dbl_2", inner, (7, 1)),
                ("branch7x7dbl_3", inner, (1, 7)),
                ("branch7x7dbl_4", inner, (7, 1)),
                ("branch7x7dbl_5", 192, (1, 7)),
            ),
            self._pool(x, train, 192),
        ]
        return jnp.concatenate(branches, axis=-1)


class MixedD(Mixed):
    """Reduces the 17x17 grid to 8x8."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to the concatenated branches [N, h', w', C'], before their ReLU."""
        branches = [
            self._run(x, train, ("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3), stride=2),
            self._run(
                x,
                train,
                ("branch7x7x3_1", 192, 1),
                ("branch7x7x3_2", 192, (1, 7)),
                ("branch7x7x3_3", 192, (7, 1)),
                ("branch7x7x3_4", 192, 3),
                stride=2,
            ),
            max_pool(x, 3, 2),
        ]
        return jnp.concatenate(branches, axis=-1)


class MixedE(Mixed):
    """Branches that split into 1x3 and 3x1 convolutions (figure 7 of the paper)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, C] to the concatenated branches [N, h, w, C'], before their ReLU."""
        single = nn.relu(self._run(x, train, ("branch3x3_1", 384, 1)))
        double = nn.relu(
            self._run(x, train, ("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3))
        )
        branches = [
            self._run(x, train, ("branch1x1", 320, 1)),
            self._run(single, train, ("branch3x3_2a", 384, (1, 3))),
            self._run(single, train, ("branch3x3_2b", 384, (3, 1))),
            self._run(double, train, ("branch3x3dbl_3a", 384, (1, 3))),
            self._run(double, train, ("branch3x3dbl_3b", 384, (3, 1))),
            self._pool(x, train, 192),
        ]
        return jnp.concatenate(branches, axis=-1)


class AuxHead(nn.Module):
    """The auxiliary classifier on the 17x17 map."""

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `x` [N, h, w, 768], h and w at least 17, to logits [N, num_classes] float32."""
        x = nn.avg_pool(x, (5, 5), strides=(3, 3))
        x = nn.relu(ConvNorm(128, 1, dtype=self.dtype, name="conv0")(x, train))
        x = nn.relu(ConvNorm(768, 5, padding=0, dtype=self.dtype, name="conv1")(x, train))
        pooled = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=jnp.float32, kernel_init=_aux_head_init, name="fc")(
            pooled
        )


class InceptionV3(nn.Module):
    """Inception-v3; `aux_logits` adds the auxiliary classifier, which only runs in training.

    Its cross-entropy is added to the loss with weight 0.4, as in TF-Slim and PyTorch's tutorials
    (the paper gives no weight). Training updates the collection `batch_stats`; with `drop_rate`
    above 0 it needs `rngs={"dropout": key}`.
    """

    kind: ClassVar[str] = "cnn"

    num_classes: int = 1000
    aux_logits: bool = True
    drop_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array | None, dict[str, Any]]:
        """Classifies `images` [N, H, W, 3], already normalised, at least 75 pixels a side.

        The stages are timm's features at reductions 4, 8, 16 and 32: `Conv2d_4a_3x3`,
        `Mixed_5d`, `Mixed_6e` and `Mixed_7c`.

        Returns:
          logits [N, num_classes] float32, and the intermediates: `stage1` ... `stage4`
          [N, h, w, C] after the activation, `stage1_pre` ... before it, `pooled` [N, C],
          `logits`; in training with `aux_logits` also `aux_logits` [N, num_classes] float32.

        Raises:
          UserError: `images` is smaller, or smaller than 299 in training with `aux_logits`.
        """
        self._check(images.shape, train)
        out: dict[str, Any] = {}

        def tap(stage: int, pre: jax.Array) -> jax.Array:
            out[f"stage{stage}_pre"] = pre
            out[f"stage{stage}"] = x = nn.relu(pre)
            return x

        def mixed(block: type[Mixed], name: str, x: jax.Array, **args: Any) -> jax.Array:
            block = recomputed(block, self.remat and train)
            return block(dtype=self.dtype, name=f"Mixed_{name}", **args)(x, train)

        x = max_pool(tap(1, self._stem(images, train)), 3, 2)
        x = nn.relu(mixed(MixedA, "5b", x, pool_features=32))
        x = nn.relu(mixed(MixedA, "5c", x))
        x = tap(2, mixed(MixedA, "5d", x))
        x = nn.relu(mixed(MixedB, "6a", x))
        x = nn.relu(mixed(MixedC, "6b", x, features=128))
        x = nn.relu(mixed(MixedC, "6c", x, features=160))
        x = nn.relu(mixed(MixedC, "6d", x, features=160))
        x = tap(3, mixed(MixedC, "6e", x))
        self._add_aux_logits(x, train, out)
        x = nn.relu(mixed(MixedD, "7a", x))
        x = nn.relu(mixed(MixedE, "7b", x))
        x = tap(4, mixed(MixedE, "7c", x))
        out["pooled"] = jnp.mean(x, axis=(1, 2))
        return add_logits(out, self.num_classes, self.drop_rate, train, "fc", _weight_init)

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        """Images to [N, h, w, 192] before the ReLU."""

        def conv(name: str, x: jax.Array, features: int, kernel: int, **args: Any) -> jax.Array:
            name = f"Conv2d_{name}_{kernel}x{kernel}"
            return ConvNorm(features, kernel, dtype=self.dtype, name=name, **args)(x, train)

        x = nn.relu(conv("1a", x, 32, 3, stride=2, padding=0))
        x = nn.relu(conv("2a", x, 32, 3, padding=0))
        x = nn.relu(conv("2b", x, 64, 3))
        x = max_pool(x, 3, 2)
        x = nn.relu(conv("3b", x, 80, 1))
        return conv("4a", x, 192, 3, padding=0)

    def _add_aux_logits(self, x: jax.Array, train: bool, out: dict[str, Any]) -> None:
        if not (self.aux_logits and self.num_classes):
            return
        head = AuxHead(self.num_classes, self.dtype, name="AuxLogits")
        if train:
            out["aux_logits"] = head(x, train)
        elif self.is_initializing():
            # Creates the parameters, whatever the size of the images.
            head(jnp.zeros((1, 17, 17, x.shape[-1]), x.dtype))

    def _check(self, shape: tuple[int, ...], train: bool) -> None:
        if min(shape[1:3]) < _SMALLEST:
            raise errors.UserError(
                f"Inception-v3 needs images of at least {_SMALLEST} pixels a side, not "
                f"{shape[1]}x{shape[2]}; it was designed for 299x299."
            )
        if train and self.aux_logits and self.num_classes and min(shape[1:3]) < _SMALLEST_AUX:
            raise errors.UserError(
                f"training Inception-v3's auxiliary classifier needs images of at least "
                f"{_SMALLEST_AUX} pixels a side, not {shape[1]}x{shape[2]}; set aux_logits=False "
                "for smaller ones."
            )


VARIANTS = {"inception_v3": Variant(InceptionV3, {}, 299, HALF_MEAN, HALF_STD)}
