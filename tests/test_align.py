"""Maps brought to another grid, against NumPy."""

import math

import numpy as np
import pytest

from xkd_jax.methods.align import resize_map


def features(h, w):
    return np.random.default_rng(0).normal(size=(2, h, w, 3)).astype(np.float32)


def adaptive_average(x, axis, target):
    """PyTorch's AdaptiveAvgPool: cell i averages [floor(i size / target), ceil((i + 1) ...))."""
    size = x.shape[axis]
    cells = []
    for i in range(target):
        first, last = math.floor(i * size / target), math.ceil((i + 1) * size / target)
        cells.append(np.take(np.float64(x), range(first, last), axis).mean(axis))
    return np.stack(cells, axis)


def bilinear(x, axis, target):
    """Pixel centres at half coordinates, the border repeated (align_corners=False)."""
    size = x.shape[axis]
    lines = []
    for i in range(target):
        at = min(max((i + 0.5) * size / target - 0.5, 0), size - 1)
        low = math.floor(at)
        high = min(low + 1, size - 1)
        a, b = (np.take(np.float64(x), j, axis) for j in (low, high))
        lines.append(a + (at - low) * (b - a))
    return np.stack(lines, axis)


def test_the_same_grid_is_left_alone():
    x = features(5, 7)
    assert resize_map(x, (5, 7)) is x


def test_integer_ratios_are_mean_pooling():
    x = features(8, 9)
    expected = x.reshape(2, 4, 2, 3, 3, 3).mean((2, 4))
    np.testing.assert_allclose(resize_map(x, (4, 3)), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "target"), [(7, 4), (14, 8), (32, 14), (5, 1)])
def test_down_is_adaptive_average_pooling(size, target):
    x = features(size, size + 1)
    expected = adaptive_average(adaptive_average(x, 1, target), 2, target)
    np.testing.assert_allclose(resize_map(x, (target, target)), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "target"), [(4, 8), (4, 7), (7, 14), (1, 3)])
def test_up_is_bilinear(size, target):
    x = features(size, size)
    expected = bilinear(bilinear(x, 1, target), 2, target)
    np.testing.assert_allclose(resize_map(x, (target, target)), expected, atol=1e-6)


def test_each_axis_goes_its_own_way():
    x = features(7, 4)
    expected = bilinear(adaptive_average(x, 1, 4), 2, 7)
    np.testing.assert_allclose(resize_map(x, (4, 7)), expected, atol=1e-6)
    expected = adaptive_average(bilinear(x, 1, 9), 2, 3)
    np.testing.assert_allclose(resize_map(x, (9, 3)), expected, atol=1e-6)
