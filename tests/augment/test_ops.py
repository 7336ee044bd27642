"""Batched image operations, compared with NumPy and Pillow."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tests.augment.images import images_of, key
from xkd_jax.augment import ops

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Compiled as in the training loop, which is also much faster than op by op.
random_crop_flip = jax.jit(ops.random_crop_flip, static_argnums=(2, 3))
random_geometry = jax.jit(ops.random_geometry, static_argnums=(2, 3))
sample = jax.jit(ops._sample)
color_jitter = jax.jit(ops.color_jitter, static_argnums=(2, 3, 4))
gaussian_noise = jax.jit(ops.gaussian_noise, static_argnums=2)
patch_mask = jax.jit(ops.patch_mask, static_argnums=(2, 3))
blur = jax.jit(ops.blur)


# ---- crop and flip


def test_crop_is_a_slice_of_the_padded_image():
    x = images_of(32, 6, 5)
    cropped = np.asarray(random_crop_flip(key(), x, padding=2, flip=False))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    offsets = set()
    for i in range(len(x)):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if (padded[i, top : top + 6, left : left + 5] == cropped[i]).all()
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert {top for top, _ in offsets} == {left for _, left in offsets} == set(range(5))


def test_flip_mirrors_half_of_the_images():
    x = images_of(400, 3, 4)
    y = np.asarray(random_crop_flip(key(), x, padding=0, flip=True))
    flipped = (y == x[:, :, ::-1]).all((1, 2, 3))
    np.testing.assert_array_equal(y[~flipped], x[~flipped])
    assert 160 < flipped.sum() < 240


def test_crop_and_flip_keep_uint8():
    x = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    assert random_crop_flip(key(), jnp.asarray(x), padding=1, flip=True).dtype == jnp.uint8
    np.testing.assert_array_equal(random_crop_flip(key(), jnp.asarray(x), 0, False), x)


# ---- geometry


def test_no_rotation_and_no_crop_is_the_identity():
    for h, w in ((12, 10), (7, 7), (5, 8)):
        x = images_of(4, h, w)
        np.testing.assert_array_equal(random_geometry(key(), x, 0.0, 1.0), x)


def test_warp_equals_pillow():
    """Compared with Pillow's bilinear affine transform, away from the border."""
    x = images_of(1, 16, 14)[0]
    angle, scale, shift = np.deg2rad(20), 0.8, (0.7, -0.4)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    cy, cx = 7.5, 6.5
    v, u = np.meshgrid(np.arange(16) - cy, np.arange(14) - cx, indexing="ij")
    from_y, from_x = cos * v - sin * u + shift[0] + cy, sin * v + cos * u + shift[1] + cx
    ours = sample(x[None], jnp.float32(from_y)[None], jnp.float32(from_x)[None])[0]
    # Pillow measures from pixel corners: shift by half a pixel before and after.
    matrix = (
        cos,
        sin,
        cx + shift[1] + 0.5 - cos * (cx + 0.5) - sin * (cy + 0.5),
        -sin,
        cos,
        cy + shift[0] + 0.5 + sin * (cx + 0.5) - cos * (cy + 0.5),
    )
    channels = [
        Image.fromarray(np.ascontiguousarray(x[..., c])).transform(
            (14, 16), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        for c in range(3)
    ]
    pillow = np.stack([np.asarray(channel) for channel in channels], -1)
    inside = (from_y > 0.5) & (from_y < 14.5) & (from_x > 0.5) & (from_x < 12.5)
    assert inside.mean() > 0.6
    np.testing.assert_allclose(np.asarray(ours)[inside], pillow[inside], atol=1e-4)


def test_outside_is_zero():
    x = jnp.ones((1, 8, 8, 3))
    far = jnp.full((1, 8, 8), 1e6)
    inside = jnp.full((1, 8, 8), 3.0)
    for y, x_at in ((far, inside), (-far, inside), (inside, far), (inside, -far)):
        np.testing.assert_array_equal(sample(x, y, x_at), 0)
    half_out = sample(x, jnp.full((1, 8, 8), -0.25), inside)
    np.testing.assert_allclose(half_out, 0.75, rtol=1e-6)
    half_out = sample(x, jnp.full((1, 8, 8), 7.25), inside)
    np.testing.assert_allclose(half_out, 0.75, rtol=1e-6)


def test_rotation_is_bounded_and_two_sided():
    """A ramp along x stays a ramp, whose slopes give the angle and the scale of each image."""
    n = 300
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32)[None, None, :, None], (n, 32, 32, 3))
    y = np.asarray(random_geometry(key(), jnp.asarray(ramp), 15.0, 0.8))
    slope_y = y[:, 17, 16, 0] - y[:, 16, 16, 0]
    slope_x = y[:, 16, 17, 0] - y[:, 16, 16, 0]
    angle = np.rad2deg(np.arctan2(slope_y, slope_x))
    scale = np.hypot(slope_y, slope_x)
    assert np.abs(angle).max() < 15.01
    assert angle.min() < -14
    assert angle.max() > 14
    assert 0.799 < scale.min() < 0.81
    assert 0.99 < scale.max() < 1.001


def test_crop_without_rotation_stays_inside():
    """No pixel from outside the image enters."""
    y = np.asarray(random_geometry(key(), jnp.ones((200, 16, 16, 3)), 0.0, 0.6))
    np.testing.assert_allclose(y, 1, rtol=1e-5)


# ---- colour


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("ours", "enhance"),
    [
        (ops.adjust_brightness, ImageEnhance.Brightness),
        (ops.adjust_contrast, ImageEnhance.Contrast),
        (ops.adjust_saturation, ImageEnhance.Color),
    ],
)
def test_colour_equals_pillow(ours, enhance, factor):
    x = np.random.default_rng(1).integers(0, 256, (9, 7, 3), np.uint8)
    pillow = np.asarray(enhance(Image.fromarray(x)).enhance(factor)) / 255
    result = ours(jnp.float32(x[None] / 255), factor)[0]
    np.testing.assert_allclose(result, pillow, atol=1.6 / 255)  # Pillow also rounds the luma


def test_jitter_equals_torchvisions_formulas():
    x = images_of(5)
    factors = np.asarray(jax.random.uniform(key(3), (5, 3, 1, 1, 1)))
    strengths = (0.4, 0.3, 1.5)
    luma = np.array([0.2989, 0.587, 0.114], np.float32)
    expected = x
    low = [max(0, 1 - s) for s in strengths]
    f = [low[i] + (1 + s - low[i]) * factors[:, i] for i, s in enumerate(strengths)]
    expected = np.clip(f[0] * expected, 0, 1)
    mean = (expected @ luma).mean((1, 2))[:, None, None, None]
    expected = np.clip(f[1] * expected + (1 - f[1]) * mean, 0, 1)
    expected = np.clip(f[2] * expected + (1 - f[2]) * (expected @ luma)[..., None], 0, 1)
    np.testing.assert_allclose(color_jitter(key(3), x, *strengths), expected, atol=1e-5)


def test_zero_jitter_is_the_identity():
    x = images_of()
    np.testing.assert_allclose(color_jitter(key(), x, 0.0, 0.0, 0.0), x, atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.1, -0.35, 0.5])
def test_hue_equals_hsv(shift):
    x = np.random.default_rng(1).random((1, 6, 7, 3), np.float32)
    x[0, 0] = 0.3  # grey stays grey
    expected = np.empty_like(x)
    for at in np.ndindex(6, 7):
        h, s, v = colorsys.rgb_to_hsv(*x[0][at])
        expected[0][at] = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
    np.testing.assert_allclose(ops.adjust_hue(x, shift), expected, atol=1e-5)


def test_hue_jitter_is_uniform_and_changes_nothing_else():
    red = np.broadcast_to(np.float32([0.8, 0.2, 0.2]), (400, 1, 1, 3))
    jitter = jax.jit(ops.color_jitter, static_argnums=(2, 3, 4, 5))
    y = np.asarray(jitter(key(), red, 0, 0, 0, 0.1))[:, 0, 0]
    shift = np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in y])
    shift = np.where(shift > 0.5, shift - 1, shift)
    assert np.abs(shift).max() <= 0.1001
    assert shift.min() < -0.095
    assert shift.max() > 0.095
    plain = ops.color_jitter(key(), red[:2], 0.4, 0.4, 0.4)
    np.testing.assert_array_equal(plain, ops.color_jitter(key(), red[:2], 0.4, 0.4, 0.4, 0.0))


# ---- noise and mask


def test_noise_is_gaussian():
    noise = np.asarray(gaussian_noise(key(), jnp.full((64, 17, 15, 3), 0.5), 0.1)) - 0.5
    assert abs(noise.mean()) < 1e-3
    np.testing.assert_allclose(noise.std(), 0.1, rtol=0.01)
    z = np.sort(noise.ravel()) / 0.1
    for quantile, expected in ((0.001, -3.0902), (0.1587, -1.0), (0.5, 0), (0.9772, 2.0)):
        np.testing.assert_allclose(z[int(quantile * len(z))], expected, atol=0.12)
    # Pairs come from the same 32 random bits, but must still be independent.
    flat = noise.reshape(64, -1)
    assert abs(np.corrcoef(flat[:, :-1].ravel(), flat[:, 1:].ravel())[0, 1]) < 0.01
    assert len(np.unique(noise[:, 0, 0, 0])) > 60


def test_noise_is_clipped_and_off_at_zero():
    x = images_of()
    result = np.asarray(gaussian_noise(key(), x, 0.8))
    assert result.min() == 0
    assert result.max() == 1
    np.testing.assert_array_equal(gaussian_noise(key(), x, 0.0), x)


@pytest.mark.parametrize(("h", "w", "patch"), [(12, 8, 4), (14, 9, 4), (5, 5, 8)])
def test_mask_drops_whole_patches(h, w, patch):
    x = images_of(400, h, w)
    y = np.asarray(patch_mask(key(), x, patch, 0.25))
    changed = (y != x).any(-1)
    mean = np.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)
    np.testing.assert_allclose(y[changed], mean[changed], atol=1e-5)
    patches = []
    for top in range(0, h, patch):
        for left in range(0, w, patch):
            block = changed[:, top : top + patch, left : left + patch]
            np.testing.assert_array_equal(block.all((1, 2)), block.any((1, 2)))
            patches.append(block[:, 0, 0])
    ratio = np.mean(patches)
    assert abs(ratio - 0.25) < 4 * np.sqrt(0.25 * 0.75 / (400 * len(patches)))


def test_mask_ratio_zero_and_one():
    x = images_of()
    np.testing.assert_array_equal(patch_mask(key(), x, 4, 0.0), x)
    masked = np.asarray(patch_mask(key(), x, 4, 1.0))
    mean = np.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)
    np.testing.assert_allclose(masked, mean, atol=1e-6)


# ---- blur


def test_blur_equals_numpy():
    x = images_of(2, 9, 8)
    kernel = np.exp(-0.5 * np.arange(-2, 3) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    expected = np.zeros(x.shape)
    for i in range(5):
        for j in range(5):
            expected += kernel[i] * kernel[j] * padded[:, i : i + 9, j : j + 8]
    np.testing.assert_allclose(blur(jnp.asarray(x)), expected, atol=1e-6)


def gaussian(x: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(x, pad, mode="reflect")
        x = np.apply_along_axis(lambda v: np.convolve(v, kernel, "valid"), axis, padded)
    return x


def test_sigma_may_differ_by_image():
    x = np.random.default_rng(0).random((3, 12, 9, 3), np.float32)
    sigma = np.float32([0.1, 0.8, 2.0])
    ours = ops.blur(x, sigma[:, None, None], 6)
    for i in range(3):
        np.testing.assert_allclose(ours[i], gaussian(x[i], sigma[i], 6), atol=1e-5)


# ---- normalize and resize


def test_normalize():
    x = images_of()
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = (x - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(ops.normalize(x, mean, std), expected, rtol=1e-5, atol=1e-6)


def test_resize():
    x = jnp.asarray(images_of(2, 12, 12))
    assert ops.resize(x, 12) is x
    assert ops.resize(x, (12, 12)) is x
    assert ops.resize(x, (24, 6)).shape == (2, 24, 6, 3)
    pillow = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(x[0, ..., c])).resize(
                (5, 5), Image.Resampling.BILINEAR
            )
        )
        for c in range(3)
    ]  # antialiased when it shrinks, like ours
    np.testing.assert_allclose(ops.resize(x, 5)[0], np.stack(pillow, -1), atol=1e-4)


@pytest.mark.parametrize(("h", "w"), [(40, 33), (50, 80), (28, 28)])
def test_resize_crop_equals_pillow(h, w):
    """Shorter side to 32, then the centre 28: the same ratio as 256 and 224."""
    y, x = np.mgrid[:h, :w][..., None] / 30
    image = np.uint8(127 + 100 * np.sin(np.array([3.0, 4.0, 6.0]) * (x + 0.7 * y)))
    size = (32 * w // min(h, w), 32 * h // min(h, w))
    left, top = round((size[0] - 28) / 2), round((size[1] - 28) / 2)
    resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((left, top, left + 28, top + 28)))
    ours = np.asarray(ops.resize_crop(jnp.asarray(np.float32(image) / 255)[None], 28))[0] * 255
    assert ours.shape == (28, 28, 3)
    np.testing.assert_allclose(ours, expected, atol=1.01)
