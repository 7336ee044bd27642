"""Levels of every kind of network, and resized maps, against NumPy."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import cnn, swin, teacher_cnn, vit
from xkd_jax.methods.align import (
    is_transformer,
    level_map,
    levels,
    on_smaller_grid,
    paired_levels,
    resize_map,
)

STAGES = ["stage1", "stage2", "stage3", "stage4"]


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


def test_each_axis_is_resized_independently():
    x = features(7, 4)
    expected = bilinear(adaptive_average(x, 1, 4), 2, 7)
    np.testing.assert_allclose(resize_map(x, (4, 7)), expected, atol=1e-6)
    expected = adaptive_average(bilinear(x, 1, 9), 2, 3)
    np.testing.assert_allclose(resize_map(x, (9, 3)), expected, atol=1e-6)


def test_the_smaller_grid_is_taken_axis_by_axis():
    a, b = features(8, 3), features(4, 6)
    on_a, on_b = on_smaller_grid(a, b)
    assert on_a.shape == on_b.shape == (2, 4, 3, 3)
    np.testing.assert_allclose(on_a, a.reshape(2, 4, 2, 3, 3).mean(2), atol=1e-6)
    np.testing.assert_allclose(on_b, b.reshape(2, 4, 3, 2, 3).mean(3), atol=1e-6)
    same = features(5, 5)
    assert on_smaller_grid(same, same) == (same, same)


@pytest.mark.parametrize(
    ("out", "names"),
    [
        (cnn(0), STAGES),
        (teacher_cnn(0), STAGES[1:]),  # a CIFAR ResNet's first stage is as large as its second
        (swin(0), STAGES),
        (vit(0, depth=12), ["block02", "block04", "block10", "block12"]),
        (vit(0, depth=24), ["block04", "block08", "block20", "block24"]),
        (vit(0, depth=3), ["block01", "block02", "block03"]),
        (vit(0, depth=1), ["block01"]),
    ],
)
def test_levels_go_from_shallow_to_deep(out, names):
    assert levels(out) == names


def test_a_single_stage_is_not_a_stem():
    assert levels({"stage4": cnn(0)["stage4"]}) == ["stage4"]


def test_levels_are_paired_from_the_deepest_up():
    expected = [("block04", "stage2"), ("block10", "stage3"), ("block12", "stage4")]
    assert paired_levels(vit(0, depth=12), teacher_cnn(1)) == expected
    swapped = [(student, teacher) for teacher, student in expected]
    assert paired_levels(teacher_cnn(1), vit(0, depth=12)) == swapped
    expected = [("stage2", "block01"), ("stage3", "block02"), ("stage4", "block03")]
    assert paired_levels(swin(0), vit(1, depth=3)) == expected
    assert paired_levels(swin(0), cnn(1)) == list(zip(STAGES, STAGES, strict=True))


def test_a_cnns_map_is_its_stage():
    out = cnn(0)
    np.testing.assert_array_equal(level_map(out, "stage2"), out["stage2"])
    before = level_map(out, "stage2", before_activation=True)
    np.testing.assert_array_equal(before, out["stage2_pre"])
    assert np.min(before) < 0


def test_a_vits_map_has_its_tokens_row_by_row():
    out = vit(0, side=4)
    plain = level_map(out, "block02", standardize=False)
    assert plain.shape == (4, 4, 4, 8)
    np.testing.assert_array_equal(plain[1, 2, 3], out["block02"][1, 2 * 4 + 3])
    before = level_map(out, "block02", before_activation=True, standardize=False)
    np.testing.assert_array_equal(before, plain)


@pytest.mark.parametrize(("out", "name"), [(vit(0), "block02"), (swin(0), "stage2")])
def test_a_transformers_tokens_are_standardised(out, name):
    plain = np.float64(level_map(out, name, standardize=False))
    found = level_map(out, name)
    token = plain[1, 0, 1]
    expected = (token - token.mean()) / np.sqrt(np.mean((token - token.mean()) ** 2) + 1e-6)
    np.testing.assert_allclose(found[1, 0, 1], expected, rtol=1e-5, atol=1e-6)
    # A token's scale and offset are removed.
    scaled = level_map(out | {name: 50 * out[name] + 7}, name)
    np.testing.assert_allclose(scaled, found, atol=1e-3)


def test_maps_are_float32():
    half = {k: v if k == "grid" else v.astype(jnp.bfloat16) for k, v in vit(0).items()}
    assert level_map(half, "block01").dtype == jnp.float32


def test_transformers_are_recognised_by_their_tokens():
    assert is_transformer(vit(0))
    assert is_transformer(swin(0))
    assert not is_transformer(cnn(0))
