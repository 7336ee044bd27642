"""The common corruptions, against direct formulas and by their properties."""

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from xkd_jax import data
from xkd_jax.augment import common_corruptions, warps
from xkd_jax.augment.common_corruptions import CORRUPTIONS, SEVERITIES, corrupt
from xkd_jax.errors import UserError


def smooth(n=8, side=28):
    """uint8 images with edges at several scales, no value near 0 or 255."""
    rng = np.random.default_rng(0)
    small = rng.uniform(60, 190, (n, 7, 7, 3)).repeat(side // 7, 1).repeat(side // 7, 2)
    return (small + rng.uniform(-9, 9, (n, side, side, 3))).astype(np.uint8)


def distance(name, severity, images):
    return np.abs(corrupt(name, severity, images).astype(float) - images).mean()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_changes_images_deterministically_and_keeps_their_form(name):
    images = smooth()
    assert len(CORRUPTIONS[name].parameters) == len(SEVERITIES)
    for severity in (1, 5):
        result = corrupt(name, severity, images)
        assert (result.dtype, result.shape) == (np.uint8, images.shape)
        np.testing.assert_array_equal(result, corrupt(name, severity, images))
        assert (result != images).any((1, 2, 3)).all()
    assert (corrupt(name, 1, images) != corrupt(name, 5, images)).any()


@pytest.fixture(scope="module")
def photos():
    return data.load("fashion_mnist_mini", "validation[:24]").images


@pytest.mark.parametrize("name", sorted(CORRUPTIONS.keys() - {"glass_blur", "snow", "elastic"}))
def test_images_move_further_away_with_severity(name, photos):
    """Except for three, whose published parameters don't grow together."""
    distances = [distance(name, severity, photos) for severity in SEVERITIES]
    assert all(near < far for near, far in pairwise(distances)), distances


@pytest.mark.parametrize("name", sorted(CORRUPTIONS.keys() - {"snow", "fog", "brightness"}))
def test_geometry_blur_and_compression_keep_a_grey_image(name):
    """Noise moves it, on average to nowhere; weather adds light."""
    grey = np.full((4, 28, 28, 3), 128, np.uint8)
    result = corrupt(name, 3, grey).astype(float)
    if CORRUPTIONS[name].group == "noise":
        assert abs(result.mean() - 128) < 1
        assert result.std() > 3
    else:
        np.testing.assert_allclose(result, grey, atol=1)


def test_noise_has_the_documented_statistics():
    grey = np.full((16, 28, 28, 3), 128, np.uint8)
    assert corrupt("gaussian_noise", 5, grey).std() == pytest.approx(0.10 * 255, rel=0.03)
    shot = np.sqrt(128 / 255 / 50) * 255  # the variance of a Poisson variable is its mean
    assert corrupt("shot_noise", 5, grey).std() == pytest.approx(shot, rel=0.03)
    specks = corrupt("impulse_noise", 5, grey)
    assert set(np.unique(specks)) == {0, 128, 255}
    assert (specks == 0).mean() == pytest.approx(0.035, rel=0.15)
    assert (specks == 255).mean() == pytest.approx(0.035, rel=0.15)


def test_contrast_and_brightness_are_their_formulas():
    images = smooth()
    x = images / 255
    mean = x.mean((1, 2), keepdims=True)
    expected = np.round(255 * (0.4 * (x - mean) + mean))
    np.testing.assert_allclose(corrupt("contrast", 3, images), expected, atol=1)
    bright = corrupt("brightness", 2, images).astype(float)
    np.testing.assert_allclose(bright.max(-1), np.minimum(images.max(-1) + 25.5, 255), atol=1)
    hue = bright / bright.max(-1, keepdims=True)
    np.testing.assert_allclose(hue, images / images.max(-1, keepdims=True), atol=0.01)
    black = np.zeros((1, 8, 8, 3), np.uint8)
    assert set(np.unique(corrupt("brightness", 2, black))) == {26}


def test_pixelate_and_jpeg_are_pillows():
    images = smooth(n=2)
    for i, image in enumerate(images):
        small = Image.fromarray(image).resize((18, 18), Image.Resampling.BOX)
        boxes = np.asarray(small.resize((28, 28), Image.Resampling.BOX))
        np.testing.assert_array_equal(corrupt("pixelate", 5, images)[i], boxes)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=40)
        np.testing.assert_array_equal(corrupt("jpeg", 5, images)[i], np.asarray(Image.open(file)))


def test_glass_swaps_pixels_nearby():
    x = np.random.default_rng(0).random((3, 12, 12, 3)).astype(np.float32)
    result = common_corruptions.glass_blur(np.random.default_rng(1), x, 0.05, 1, 2)
    assert (result != x).any()
    for before, after in zip(x, result, strict=True):  # a sigma of 0.05 blurs nothing
        assert {*map(tuple, before.reshape(-1, 3))} == {*map(tuple, after.reshape(-1, 3))}


def test_fog_lightens_but_never_beyond_the_brightest_value():
    images = smooth()
    result = corrupt("fog", 5, images)
    assert (result.max((1, 2, 3)) <= images.max((1, 2, 3)) + 1).all()
    cloud = warps.plasma(np.random.default_rng(0), 5, 32, 2.0)
    np.testing.assert_allclose(cloud.min((1, 2)), 0)
    np.testing.assert_allclose(cloud.max((1, 2)), 1)
    assert np.isfinite(cloud).all()


def test_images_of_other_shapes_and_slices_are_accepted():
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3)).astype(np.uint8)
    for name in CORRUPTIONS:
        assert corrupt(name, 4, images).shape == images.shape


def test_chunks_have_different_noise(monkeypatch):
    monkeypatch.setattr(common_corruptions, "_CHUNK", 2)
    grey = np.full((4, 8, 8, 3), 128, np.uint8)
    result = corrupt("gaussian_noise", 1, grey)
    assert (result[:2] != result[2:]).any()


def test_unknown_names_and_severities_are_refused():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="unknown corruption 'frost'"):
        corrupt("frost", 1, images)
    with pytest.raises(UserError, match=r"severity is 6, but must be one of \(1, 2, 3, 4, 5\)"):
        corrupt("jpeg", 6, images)
