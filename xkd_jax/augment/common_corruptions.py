"""The common corruptions of Hendrycks & Dietterich (arXiv:1903.12261), for evaluation only.

The parameters are CIFAR-10-C's, for images of 32 pixels; the same tables are used for other sizes.
Frost is left out, because it needs the authors' photographs; Gaussian blur, from their additional
corruptions, is included. ImageMagick's motion blur is reimplemented, and so are SciPy's filters:
the images resemble CIFAR-10-C's but are not identical. NumPy, on the host.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from xkd_jax.augment import warps
from xkd_jax.errors import UserError, unknown

SEED = 2019  # fixed: all models see the same images
SEVERITIES = (1, 2, 3, 4, 5)
_CHUNK = 256  # images corrupted at once; part of the seed
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

Rng = np.random.Generator
Images = np.ndarray  # float32 [N, H, W, 3] in [0, 1]


def gaussian_noise(rng: Rng, x: Images, std: float) -> Images:
    """Adds Gaussian noise to every value."""
    return x + std * rng.standard_normal(x.shape, np.float32)


def shot_noise(rng: Rng, x: Images, photons: float) -> Images:
    """Poisson noise of an exposure in which white is `photons` photons."""
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def impulse_noise(rng: Rng, x: Images, amount: float) -> Images:
    """Salt and pepper: a share of `amount` of the values becomes 0 or 1."""
    draws = rng.random(x.shape, np.float32)
    return np.where(draws < amount / 2, 0, np.where(draws < amount, 1, x)).astype(np.float32)


def gaussian_blur(rng: Rng, x: Images, sigma: float) -> Images:
    """A Gaussian blur; sigma in pixels."""
    del rng
    return warps.gaussian(x, sigma)


def defocus_blur(rng: Rng, x: Images, radius: float, sigma: float) -> Images:
    """Convolution with a disk, whose edge is smoothed with `sigma`; both in pixels."""
    del rng
    return warps.convolve(x, warps.disk(radius, sigma))


def glass_blur(rng: Rng, x: Images, sigma: float, delta: int, iterations: int) -> Images:
    """Swaps each pixel with a random one at most `delta` away, between two Gaussian blurs."""
    x = warps.gaussian(x, sigma).copy()
    each, (h, w) = np.arange(len(x)), x.shape[1:3]
    for _ in range(iterations):
        for row in range(h - 1 - delta, delta - 1, -1):
            for column in range(w - 1 - delta, delta - 1, -1):
                down, right = rng.integers(-delta, delta + 1, (2, len(x)))
                there = each, row + down, column + right
                swapped = x[there]
                x[there] = x[:, row, column]
                x[:, row, column] = swapped
    return warps.gaussian(x, sigma)


def motion_blur(rng: Rng, x: Images, radius: int, sigma: float) -> Images:
    """A one-sided Gaussian blur along a line, at most 45 degrees from the horizontal."""
    return warps.motion(x, radius, sigma, np.deg2rad(rng.uniform(-45, 45, len(x))))


def zoom_blur(rng: Rng, x: Images, steps: int) -> Images:
    """The mean of the image and of `steps` copies magnified by 1, 1.01, 1.02, ..."""
    del rng
    zoomed = sum(warps.magnify(x, 1 + step / 100) for step in range(steps))
    return (x + zoomed) / (steps + 1)


def snow(
    rng: Rng, x: Images, mean: float, std: float, zoom: float, threshold: float,
    radius: int, sigma: float, weight: float,
) -> Images:  # fmt: skip
    """Streaks of snow on a whitened image, of which `weight` keeps its colours."""
    layer = rng.normal(mean, std, (*x.shape[:3], 1)).astype(np.float32)
    layer = warps.magnify(layer, zoom)
    layer = np.clip(np.where(layer < threshold, 0, layer), 0, 1)
    layer = warps.motion(layer, radius, sigma, np.deg2rad(rng.uniform(-135, -45, len(x))))
    white = np.maximum(x, (x @ _LUMA)[..., None] * 1.5 + 0.5)
    return weight * x + (1 - weight) * white + layer + layer[:, ::-1, ::-1]


def fog(rng: Rng, x: Images, amount: float, decay: float) -> Images:
    """Adds a cloud of diamond-square noise and rescales to the image's brightest value."""
    h, w = x.shape[1:3]
    cloud = warps.plasma(rng, len(x), 1 << (max(h, w) - 1).bit_length(), decay)[:, :h, :w, None]
    brightest = x.max((1, 2, 3), keepdims=True)
    return (x + amount * cloud) * brightest / (brightest + amount)


def brightness(rng: Rng, x: Images, amount: float) -> Images:
    """Adds `amount` to the value (HSV) of every pixel."""
    del rng
    value = x.max(-1, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-6), brighter)


def contrast(rng: Rng, x: Images, factor: float) -> Images:
    """Scales the distance of every value to the mean of its channel."""
    del rng
    mean = x.mean((1, 2), keepdims=True)
    return factor * (x - mean) + mean


def elastic(rng: Rng, x: Images, strength: float, sigma: float, shift: float) -> Images:
    """A random affine map, then a smooth random displacement; lengths in image sides."""
    h, w = x.shape[1:3]
    side = min(h, w)
    corners = np.array([[1, 1], [1, -1], [-1, -1]]) * (side // 3) + np.array([w // 2, h // 2])
    moved = corners + rng.uniform(-shift * side, shift * side, (len(x), 3, 2))
    # The matrix that leads from the moved points back: [N, 3, 2], of (x, y, 1).
    back = np.linalg.solve(np.concatenate([moved, np.ones((len(x), 3, 1))], -1), corners[None])
    column, row = np.meshgrid(np.arange(w), np.arange(h))
    place = np.stack([column, row, np.ones_like(row)], -1) @ back[:, None]
    x = warps.sample(x, place[..., 1], place[..., 0], "reflect")
    if not strength:
        return x
    noise = rng.uniform(-1, 1, (len(x), h, w, 2)).astype(np.float32)
    move = strength * side * warps.gaussian(noise, sigma * side, "symmetric", truncate=3)
    return warps.sample(x, row + move[..., 1], column + move[..., 0], "symmetric")


def pixelate(rng: Rng, x: Images, scale: float) -> Images:
    """Shrinks the image to `scale` of its size and enlarges it again, with a box filter."""
    del rng

    def one(image: Image.Image) -> Image.Image:
        small = image.resize([int(scale * side) for side in image.size], Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.BOX)

    return _with_pillow(x, one)


def jpeg(rng: Rng, x: Images, quality: int) -> Images:
    """JPEG compression by Pillow."""
    del rng

    def one(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _with_pillow(x, one)


def _with_pillow(x: Images, function: Callable[[Image.Image], Image.Image]) -> Images:
    done = [np.asarray(function(Image.fromarray(image))) for image in _to_uint8(x)]
    return np.stack(done).astype(np.float32) / 255


class Corruption(NamedTuple):
    """A corruption with its parameters.

    Attributes:
      group: "noise", "blur", "weather" or "digital".
      function: (rng, images, *parameters) -> images.
      parameters: the function's, for each of the `SEVERITIES`.
    """

    group: str
    function: Callable[..., Images]
    parameters: Sequence[tuple[Any, ...]]


def _each(*values: float) -> list[tuple[float]]:
    return [(value,) for value in values]


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption("noise", gaussian_noise, _each(0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption("noise", shot_noise, _each(500, 250, 100, 75, 50)),
    "impulse_noise": Corruption("noise", impulse_noise, _each(0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": Corruption("blur", gaussian_blur, _each(0.4, 0.6, 0.7, 0.8, 1)),
    "defocus_blur": Corruption(
        "blur", defocus_blur, [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)]
    ),
    "glass_blur": Corruption(
        "blur", glass_blur, [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)]
    ),
    "motion_blur": Corruption(
        "blur", motion_blur, [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)]
    ),
    "zoom_blur": Corruption("blur", zoom_blur, _each(6, 11, 16, 21, 26)),
    "snow": Corruption(
        "weather",
        snow,
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
    ),
    "fog": Corruption("weather", fog, [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)]),
    "brightness": Corruption("weather", brightness, _each(0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption("digital", contrast, _each(0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic": Corruption(
        "digital",
        elastic,
        [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
    ),
    "pixelate": Corruption("digital", pixelate, _each(0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": Corruption("digital", jpeg, _each(80, 65, 58, 50, 40)),
}  # fmt: skip


def corrupt(name: str, severity: int, images: Any) -> np.ndarray:
    """All images with one corruption; the same call gives the same result.

    Args:
      name: a key of `CORRUPTIONS`.
      severity: one of the `SEVERITIES`.
      images: uint8 [n, H, W, 3], in memory or decoded slice by slice.

    Returns:
      uint8 [n, H, W, 3].

    Raises:
      UserError: there is no such corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise unknown("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise UserError(f"severity is {severity}, but must be one of {SEVERITIES}.")
    corruption, number = CORRUPTIONS[name], list(CORRUPTIONS).index(name)
    parameters = corruption.parameters[severity - 1]
    done = []
    for start in range(0, images.shape[0], _CHUNK):
        rng = np.random.default_rng([SEED, number, severity, start])
        x = images[start : start + _CHUNK].astype(np.float32) / 255
        done.append(_to_uint8(corruption.function(rng, x, *parameters)))
    return np.concatenate(done)


def _to_uint8(x: Images) -> np.ndarray:
    return np.round(255 * np.clip(x, 0, 1)).astype(np.uint8)
