"""Filters and warps in NumPy, against loops and closed forms."""

import numpy as np

from xkd_jax.augment import warps


def images_of(n=2, h=9, w=11):
    return np.random.default_rng(0).random((n, h, w, 3)).astype(np.float32)


def test_gaussian_is_a_convolution_with_a_truncated_kernel():
    x = images_of()
    weights = np.exp(-0.5 * (np.arange(-3, 4) / 0.8) ** 2)
    weights /= weights.sum()
    expected = np.zeros_like(x)
    for row in range(9):
        for column in range(11):
            rows, columns = (
                np.clip(np.arange(at - 3, at + 4), 0, side - 1)
                for at, side in ((row, 9), (column, 11))
            )
            patch = x[:, rows][:, :, columns]
            expected[:, row, column] = np.einsum("i,j,nijc->nc", weights, weights, patch)
    np.testing.assert_allclose(warps.gaussian(x, 0.8), expected, atol=1e-5)


def test_a_disk_is_symmetric_and_sums_to_one():
    for radius, sigma in ((0.3, 0.4), (1, 0.2), (1.5, 0.1)):
        kernel = warps.disk(radius, sigma)
        np.testing.assert_allclose(kernel.sum(), 1, atol=1e-6)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1])
        np.testing.assert_allclose(kernel, kernel.T)
    np.testing.assert_allclose(warps.disk(1.5, 0.1)[1:4, 1:4], 1 / 9, atol=1e-5)


def test_convolution_weighs_the_neighbours():
    x, kernel = images_of(), warps.disk(1.5, 0.1)
    expected = x[:, 2:5, 3:6].mean((1, 2))
    np.testing.assert_allclose(warps.convolve(x, kernel)[:, 3, 4], expected, atol=1e-5)


def test_motion_blur_smears_a_point_along_its_direction():
    x = np.zeros((3, 15, 15, 1), np.float32)
    x[:, 7, 7] = 1
    angles = np.array([0.0, np.pi / 2, np.pi / 4])
    result = warps.motion(x, 4, 2.0, angles)[..., 0]
    weights = np.exp(-0.5 * (np.arange(9) / 2) ** 2)
    weights /= weights.sum()
    np.testing.assert_allclose(result[0, 7, 7::-1], weights[:8], atol=1e-5)
    np.testing.assert_allclose(result[1, 7::-1, 7], weights[:8], atol=1e-5)
    rows, columns = np.nonzero(result[2])
    np.testing.assert_array_equal(rows, columns)


def test_magnifying_keeps_planes_and_the_centre():
    row, column = np.mgrid[:9, :9].astype(np.float32)
    plane = np.broadcast_to((2 * row + column)[None, ..., None], (2, 9, 9, 3))
    np.testing.assert_allclose(warps.magnify(plane, 1.0), plane, atol=1e-5)
    larger = warps.magnify(plane, 9 / 7)  # the crop of 7 pixels is centred
    np.testing.assert_allclose(larger[:, 4, 4], plane[:, 4, 4], atol=1e-4)
    steps = np.diff(larger[0, :, :, 0], axis=0)
    np.testing.assert_allclose(steps, steps[0, 0], atol=1e-4)
    assert 1 < steps[0, 0] < 2


def test_sampling_at_the_pixels_and_beyond_the_border():
    x = images_of(h=6, w=6)
    row, column = np.broadcast_arrays(*np.mgrid[:6, :6], np.zeros((2, 1, 1)))[:2]
    np.testing.assert_allclose(warps.sample(x, row, column, "reflect"), x)
    half = warps.sample(x, row[:, :, :5], column[:, :, :5] + 0.5, "reflect")
    np.testing.assert_allclose(half, (x[:, :, :5] + x[:, :, 1:]) / 2, atol=1e-6)
    for mode in ("reflect", "symmetric"):
        padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)), mode)
        row, column = np.broadcast_arrays(*np.mgrid[:14, :14] - 4, np.zeros((2, 1, 1)))[:2]
        np.testing.assert_allclose(warps.sample(x, row, column, mode), padded, atol=1e-6)
