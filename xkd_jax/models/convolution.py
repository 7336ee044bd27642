"""Convolutions in the form that is fastest on the current backend.

GPUs and TPUs use XLA's. On a CPU, XLA's depthwise convolutions take forty times as long as the
equivalent shifted products and sums, the kernel gradients of its grouped convolutions take
seconds, and its 1x1 convolutions are slower than a matrix product.
`docs/results/networks_speed.md` has the measurements.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from xkd_jax import backend

_MOST_BUNDLES = 24  # each takes time to compile

Pairs = tuple[tuple[int, int], tuple[int, int]]
# From this many products per output on, a depthwise convolution is kept apart from its readers.
# Smaller ones gain from being fused with a BatchNorm and an activation.
_LARGE = 49


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    stride: tuple[int, int] = (1, 1),
    padding: Sequence[tuple[int, int]] | str = "SAME",
    groups: int = 1,
) -> jax.Array:
    """Convolves `x` [N, H, W, C] with `kernel` [kh, kw, C / groups, features].

    Returns [N, h, w, features]. `padding` is ((top, bottom), (left, right)), or "SAME" as in
    TensorFlow.
    """
    height, width, channels, features = kernel.shape
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], (height, width), stride, padding)
    (top, bottom), (left, right) = padding
    pads = ((top, bottom), (left, right))
    if backend.current() == "cpu":
        if groups == 1 and (height, width) == (1, 1) and not any((top, bottom, left, right)):
            x = x[:, :: stride[0], :: stride[1]]
            y = x.reshape(-1, channels) @ kernel.reshape(channels, features)
            return y.reshape(*x.shape[:3], features)
        if channels == 1 and groups == features:
            return _depthwise(x, kernel, stride, pads)
        if groups > 1:
            return _grouped(x, kernel, stride, pads, groups)
    return _xla(x, kernel, stride, pads, groups)


def _xla(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, int], pads: Pairs, groups: int = 1
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        stride,
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _grouped(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, int], pads: Pairs, groups: int
) -> jax.Array:
    """Merges groups into bundles of about 32 channels: dense, with zeros between the groups."""
    height, width, channels, features = kernel.shape
    # Multiplying by zeros costs less than many convolutions of a few channels.
    size = max(1, 32 // channels, math.ceil(groups / _MOST_BUNDLES))
    count = math.ceil(groups / size)
    bounds = [i * groups // count for i in range(count + 1)]
    kernel = kernel.reshape(height, width, channels, groups, features // groups)
    parts = []
    for begin, end in itertools.pairwise(bounds):
        eye = jnp.eye(end - begin, dtype=kernel.dtype)
        dense = jnp.einsum("hwcgf,gn->hwncgf", kernel[:, :, :, begin:end], eye)
        dense = dense.reshape(height, width, (end - begin) * channels, -1)
        parts.append(_xla(x[..., begin * channels : end * channels], dense, stride, pads))
    return jnp.concatenate(parts, axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: jax.Array, kernel: jax.Array, stride: tuple[int, int], pads: Pairs) -> jax.Array:
    """One filter per channel, [kh, kw, 1, C], as shifted products: XLA fuses them into one loop.

    It also fuses them into whatever reads their sum and computes them again for each reader, which
    for a large kernel in front of a LayerNorm takes longer than all else. Inside a `lax.scan`, over
    two or more parts of the rows, they stay by themselves.
    """
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = kernel.shape[:2]
    rows = (x.shape[1] - height) // stride[0] + 1
    columns = (x.shape[2] - width) // stride[1] + 1
    if rows == 1 or height * width < _LARGE:
        return _shifted_products(x, kernel, stride, rows, columns)
    size = rows // next(n for n in range(2, rows + 1) if rows % n == 0)
    reach = stride[0] * (size - 1) + height

    def add_part(y: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        lines = jax.lax.dynamic_slice_in_dim(x, first * stride[0], reach, 1)
        part = _shifted_products(lines, kernel, stride, size, columns)
        return jax.lax.dynamic_update_slice_in_dim(y, part, first, 1), None

    y = jnp.zeros((len(x), rows, columns, x.shape[-1]), x.dtype)
    return jax.lax.scan(add_part, y, jnp.arange(0, rows, size))[0]


def _shifted_products(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, int], rows: int, columns: int
) -> jax.Array:
    """The depthwise convolution of `x`, already padded, to [N, rows, columns, C]."""
    total = jnp.zeros((), x.dtype)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            shifted = x[:, i : i + stride[0] * (rows - 1) + 1 : stride[0]]
            shifted = shifted[:, :, j : j + stride[1] * (columns - 1) + 1 : stride[1]]
            total = total + shifted * kernel[i, j, 0]
    return total


def _depthwise_forward(x, kernel, stride, pads):
    return _depthwise(x, kernel, stride, pads), (x, kernel)


def _depthwise_backward(stride, pads, saved, dy):
    x, kernel = saved
    return _input_gradient(x, kernel, stride, pads, dy), _kernel_gradient(
        x, kernel, stride, pads, dy
    )


def _input_gradient(x, kernel, stride, pads, dy):
    """The same convolution with the flipped kernel, over `dy` dilated by the stride."""
    spread = []
    for axis in range(2):
        low = kernel.shape[axis] - 1 - pads[axis][0]
        filled = stride[axis] * (dy.shape[1 + axis] - 1) + 1
        high = x.shape[1 + axis] + kernel.shape[axis] - 1 - low - filled
        spread.append((low, high, stride[axis] - 1))
    dy = jax.lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *spread, (0, 0, 0)))
    return _depthwise(dy, kernel[::-1, ::-1], (1, 1), ((0, 0), (0, 0)))


def _kernel_gradient(x, kernel, stride, pads, dy):
    """Accumulated row by row: a single reduction over the whole batch would miss the cache."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = kernel.shape[:2]
    reach = stride[1] * (dy.shape[2] - 1) + 1

    def add_row(sums: list[jax.Array], row: jax.Array) -> tuple[list[jax.Array], None]:
        d = jax.lax.dynamic_index_in_dim(dy, row, 1, keepdims=False)
        new = []
        for i in range(height):
            line = jax.lax.dynamic_index_in_dim(x, row * stride[0] + i, 1, keepdims=False)
            for j in range(width):
                new.append(sums[i * width + j] + line[:, j : j + reach : stride[1]] * d)
        return new, None

    zeros = [jnp.zeros((dy.shape[0], *dy.shape[2:]), dy.dtype)] * (height * width)
    sums, _ = jax.lax.scan(add_row, zeros, jnp.arange(dy.shape[1]))
    # Otherwise XLA fuses the loop's last step into the reduction, which then reads across rows.
    sums = jax.lax.optimization_barrier(sums)
    return jnp.stack([jnp.sum(part, (0, 1)) for part in sums]).reshape(kernel.shape)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)
