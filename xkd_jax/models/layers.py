"""Layers shared by several families, with PyTorch's padding, statistics and initialisation."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax.models.convolution import convolve

# Kaiming, fan out: He et al. (arXiv:1502.01852), as timm initialises most convolutions.
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default for convolutions and linear layers: uniform +-1/sqrt(fan_in).
torch_default = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(nn.Module):
    """A convolution with PyTorch's arguments; its parameters are those of `nn.Conv`.

    `kernel_size`, `stride` and `padding` are one number or (vertical, horizontal). `padding=None`
    pads (kernel - 1) / 2 on every side, as PyTorch's networks do; "SAME" is TensorFlow's, which is
    asymmetric for some strides and sizes.
    """

    features: int
    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str | None = None
    groups: int = 1
    use_bias: bool = False
    kernel_init: Any = kaiming_fan_out
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [N, H, W, C] to [N, h, w, features]."""
        kernel, stride = _pair(self.kernel_size), _pair(self.stride)
        padding: Any = self.padding
        if padding is None:
            padding = tuple((side - 1) // 2 for side in kernel)
        if padding != "SAME":
            padding = [(side, side) for side in _pair(padding)]
        shape = (*kernel, x.shape[-1] // self.groups, self.features)
        weights = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        y = convolve(x.astype(self.dtype), weights, stride, padding, self.groups)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        return y


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's running statistics (arXiv:1502.03167).

    `momentum` is PyTorch's, the weight of the new batch. The running variance is the unbiased
    estimate, as in PyTorch but not in Flax; the normalisation uses the biased one, as both do.
    Under jit the batch is the global one, so its statistics need no axis name. Parameters,
    statistics and their computation are float32, whatever `dtype` is.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    scale_init: Any = nn.initializers.ones
    bias_init: Any = nn.initializers.zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, frozen: bool = False) -> jax.Array:
        """Normalises `x` [..., C] over all axes but the last, keeping its shape.

        With `frozen`, by the running statistics whatever `train` is, and without gradients of the
        parameters.
        """
        channels = x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,))
        bias = self.param("bias", self.bias_init, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if frozen:
            scale, bias = jax.lax.stop_gradient((scale, bias))
        if frozen or not train:
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            shift = bias - running_mean.value * factor
            return x.astype(self.dtype) * factor.astype(self.dtype) + shift.astype(self.dtype)
        out: Any = normalize_batch(x.astype(self.dtype), scale, bias, self.epsilon)
        y, mean, var = out
        if not self.is_initializing():
            count = x.size // channels
            unbiased = var * (count / max(count - 1, 1))
            keep = 1 - self.momentum
            running_mean.value = keep * running_mean.value + self.momentum * mean
            running_var.value = keep * running_var.value + self.momentum * unbiased
        return y


def batch_statistics() -> Any:
    """A context in which `BatchNorm` uses the batch's statistics, also with `train=False`.

    `apply` then needs `mutable=["batch_stats"]`.
    """
    return _batch_norm_with(train=True)


def frozen_batch_norm() -> Any:
    """A context in which `BatchNorm` is frozen, also with `train=True`."""
    return _batch_norm_with(frozen=True)


def _batch_norm_with(**options: bool) -> Any:
    def intercept(call: Any, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            return call(args[0], **options)
        return call(*args, **kwargs)

    return nn.intercept_methods(intercept)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises `x` [..., C] by its own mean and biased variance, and returns these too.

    No gradient flows through the returned mean and variance. The derivative is written by hand
    because the automatic one keeps several arrays of the size of `x`, and memory traffic is the
    cost of this layer.
    """
    axes = tuple(range(x.ndim - 1))
    full = x.astype(jnp.float32)
    mean = jnp.mean(full, axes)
    # Both sums read `x` directly; centring it first would write another copy.
    var = jnp.maximum(jnp.mean(jnp.square(full), axes) - jnp.square(mean), 0.0)
    y = (full - mean) * (scale * jax.lax.rsqrt(var + epsilon)) + bias
    return y.astype(x.dtype), mean, var


def _normalize_forward(x, scale, bias, epsilon):
    out: Any = normalize_batch(x, scale, bias, epsilon)  # pyright loses the type behind custom_vjp
    _, mean, var = out
    return out, (x, scale, mean, jax.lax.rsqrt(var + epsilon))


def _normalize_backward(epsilon, saved, cotangents):
    x, scale, mean, rstd = saved
    axes = tuple(range(x.ndim - 1))
    full, dy = x.astype(jnp.float32), cotangents[0].astype(jnp.float32)
    dbias = jnp.sum(dy, axes)
    dscale = (jnp.sum(dy * full, axes) - mean * dbias) * rstd
    count = x.size // x.shape[-1]
    dx = (dy - dbias / count - (full - mean) * (dscale * rstd / count)) * (scale * rstd)
    return dx.astype(x.dtype), dscale, dbias


normalize_batch.defvjp(_normalize_forward, _normalize_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU of `x` (arXiv:1606.08415), with its derivative written by hand.

    On a CPU, `nn.gelu` takes four times as long, because erfc costs more than erf, and with its
    automatic derivative, training the MLPs of ConvNeXt's first stage takes twice as long.
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_forward(x):
    return x * _normal_cdf(x), x


def _gelu_backward(x, dy):
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return (dy * (_normal_cdf(x) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def layer_norm(
    name: str, epsilon: float, dtype: Any, scale_init: Any = nn.initializers.ones
) -> nn.LayerNorm:
    """A Transformer's layer normalisation."""
    # The two-pass variance: pretrained ViTs carry outlier channels that cancel in the fast one.
    return nn.LayerNorm(
        epsilon=epsilon, dtype=dtype, use_fast_variance=False, scale_init=scale_init, name=name
    )


def add_logits(
    out: dict[str, Any],
    num_classes: int,
    drop_rate: float,
    train: bool,
    name: str,
    kernel_init: Any = torch_default,
) -> tuple[jax.Array | None, dict[str, Any]]:
    """What a network returns: the logits of `out["pooled"]`, and `out` with them.

    With `num_classes=0` there is no head, as in timm: None, and `out` without "logits". The other
    arguments are those of `classify`.
    """
    if num_classes:
        logits = classify(out["pooled"], num_classes, drop_rate, train, name, kernel_init)
        out["logits"] = logits
    return out.get("logits"), out


def classify(
    x: jax.Array,
    num_classes: int,
    drop_rate: float,
    train: bool,
    name: str,
    kernel_init: Any = torch_default,
) -> jax.Array:
    """Dropout and the linear head called `name`, as submodules of the calling module.

    Maps `x` [N, C] to logits [N, num_classes], always float32.
    """
    x = nn.Dropout(drop_rate, deterministic=not train)(x)
    # The head is a tiny part of the work: float32 is almost free here and avoids rounding.
    return nn.Dense(num_classes, dtype=jnp.float32, kernel_init=kernel_init, name=name)(x)


class Head(nn.Module):
    """timm's `ClassifierHead` after the pooling: dropout and the linear classifier."""

    num_classes: int
    drop_rate: float
    kernel_init: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Classifies `x` [N, C]: logits [N, num_classes] float32."""
        return classify(x, self.num_classes, self.drop_rate, train, "fc", self.kernel_init)


def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0) -> jax.Array:
    """Maximum over windows of `x` [N, H, W, C], padded with -inf on every side."""
    pads: Any = ((padding, padding), (padding, padding))  # flax annotates only the string
    return nn.max_pool(x, (size, size), strides=(stride, stride), padding=pads)


def recomputed(block: type[nn.Module], on: bool, static: tuple[int, ...] = (2,)) -> Any:
    """`block`, if `on` with gradient checkpointing (Chen et al., arXiv:1604.06174).

    The backward pass then recomputes the block's insides, which saves memory; parameters keep
    their names. `static` are the positions of the call's arguments that are not arrays, such as
    `train`; `self` is 0.
    """
    return nn.remat(block, static_argnums=static) if on else block


def drop_path(module: nn.Module, x: jax.Array, rate: float | jax.Array, train: bool) -> jax.Array:
    """Stochastic depth (arXiv:1603.09382): drops whole samples of a branch `x` [N, ...].

    Draws from the "dropout" key of `module`, unless `rate` is the Python float 0.
    """
    if not train or (isinstance(rate, float) and rate == 0.0):
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
