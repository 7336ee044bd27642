"""Decoded pixels, compared with Pillow and with torchvision's arithmetic."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from xkd_jax.data.decode import decode, decode_crop, eval_crop, image_size, random_box
from xkd_jax.errors import UserError


def photo(width: int = 640, height: int = 480) -> Image.Image:
    """Smooth colours with a few edges, like a photograph."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 23 + c) + np.cos(y / 17 - c) + (x + 2 * y > 600 + 90 * c) for c in range(3)]
    pixels = np.stack(waves, axis=-1) * 50 + 110
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str = "jpeg", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rms(a, b) -> float:
    return float(np.sqrt(np.mean((a.astype(float) - np.asarray(b).astype(float)) ** 2)))


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("RGB", "jpeg"),
        ("L", "jpeg"),
        ("CMYK", "jpeg"),
        ("RGB", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("1", "png"),
        ("RGB", "webp"),
        ("RGBA", "webp"),
        ("RGB", "bmp"),
    ],
)
def test_decode_is_pillow_bit_for_bit(mode, format):
    encoded = encode(photo(61, 47).convert(mode), format)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    pixels = decode(encoded)
    assert pixels.dtype == np.uint8
    tolerance = 1 if mode == "CMYK" else 0
    np.testing.assert_allclose(pixels.astype(int), expected, atol=tolerance)
    assert image_size(encoded) == (61, 47)


def test_transparent_palette():
    """Pillow warns about it, and warnings are errors here."""
    image = photo(20, 10).convert("P")
    encoded = encode(image, "png", transparency=bytes(range(256)))
    assert decode(encoded).shape == (10, 20, 3)


@pytest.mark.parametrize("shape", [(640, 480), (480, 640), (300, 300), (150, 100), (1500, 1100)])
@pytest.mark.parametrize("size", [224, 64])
def test_eval_crop_is_torchvision(shape, size):
    """Resize(size / 0.875), then CenterCrop(size), rounded as for Pillow images."""
    image = photo(*shape)
    (w, h), shorter = shape, math.floor(size / 0.875)
    scaled = (shorter, int(shorter * h / w)) if w <= h else (int(shorter * w / h), shorter)
    resized = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in scaled)
    expected = np.asarray(resized.crop((left, top, left + size, top + size))).astype(int)
    assert np.abs(eval_crop(np.asarray(image), size) - expected).max() <= 2
    assert (
        rms(eval_crop(encode(image, quality=98), size), expected) < 2
    )  # it may be decoded at 1/2 or 1/4


def test_eval_crop_of_the_whole_image():
    image = np.asarray(photo(32, 32))
    np.testing.assert_array_equal(eval_crop(image, 32, 1.0), image)


@pytest.mark.parametrize("shape", [(640, 480), (200, 300), (2000, 1500)])
@pytest.mark.parametrize("encoded", [True, False])
def test_decode_crop_is_near_pillow(shape, encoded):
    image = photo(*shape)
    given = encode(image, quality=95) if encoded else np.asarray(image)
    for seed in range(6):
        got = decode_crop(given, np.random.default_rng(seed), 96)
        box = random_box(np.random.default_rng(seed), *shape, (0.08, 1), (3 / 4, 4 / 3))
        expected = image.crop(box).resize((96, 96), Image.Resampling.BILINEAR)
        assert got.shape == (96, 96, 3)
        assert rms(got, expected) < 8
        mirrored = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert rms(got, mirrored) > 16  # so the bound above is meaningful


def test_crops_shrink_without_aliasing():
    """A pattern finer than the output's pixels becomes grey."""
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    for size in (210, 150, 60):
        crop = decode_crop(stripes, np.random.default_rng(0), size, (1, 1), (1, 1))
        assert np.abs(crop[5:-5, 5:-5].astype(int) - 127).mean() < 40


def test_random_boxes():
    rng = np.random.default_rng(0)
    areas, aspects = [], []
    for _ in range(2000):
        left, top, right, bottom = random_box(rng, 500, 400, (0.08, 1.0), (3 / 4, 4 / 3))
        assert 0 <= left < right <= 500
        assert 0 <= top < bottom <= 400
        areas.append((right - left) * (bottom - top) / 200_000)
        aspects.append((right - left) / (bottom - top))
    assert min(areas) == pytest.approx(0.08, abs=0.01)
    assert 0.45 < np.mean(areas) < 0.55  # uniform, without the large ones that do not fit
    assert min(aspects) > 0.74
    assert max(aspects) < 1.35
    # If no try fits, the crop is the largest one with an allowed aspect ratio.
    assert random_box(rng, 1000, 10, (1, 1), (3 / 4, 4 / 3)) == (493, 0, 506, 10)


def test_the_same_generator_gives_the_same_crop():
    encoded = encode(photo())
    first, again, other = (
        decode_crop(encoded, np.random.Generator(np.random.Philox(key=key)), 64)
        for key in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "it is empty"),
        (b"\xff\xd8\xff\xe0 no more", "it is not an image|Truncated File Read"),
        (encode(photo())[:3000], "image file is truncated"),
        (encode(photo(), "png")[:3000], "image file is truncated|unrecognized data"),
    ],
)
def test_damaged_images_are_named(image, reason):
    rng = np.random.default_rng(0)
    for function in (
        decode,
        lambda x, name: decode_crop(x, rng, 32, name=name),
        lambda x, name: eval_crop(x, 32, name=name),
    ):
        with pytest.raises(UserError, match=rf"^cats/7\.jpg can't be decoded \(({reason})"):
            function(image, name="cats/7.jpg")
