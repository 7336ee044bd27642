"""Decodes images to uint8 pixels: whole, as training crops or as evaluation crops."""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from PIL import Image

from xkd_jax.data.pixels import LARGE, decode_pixels, measure
from xkd_jax.errors import UserError

# Many processes and threads decode at once: OpenCV's own threads would oversubscribe the cores.
cv2.setNumThreads(0)
# Large images are cropped one at a time: each takes up to 8 bytes per pixel until then, and a pool
# of threads that does so at once would exhaust the memory.
_ONE_LARGE = threading.Lock()


class DamagedImage(UserError):
    """An image that can't be read or decoded; `data.on_error` decides whether it is skipped."""


def _named(function: Callable) -> Callable:
    """Turns any error of a decoder into a DamagedImage that names the image."""

    @functools.wraps(function)
    def wrapped(image, *args, name: str = "an image", **kwargs):
        try:
            return function(image, *args, **kwargs)
        # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        except Exception as error:
            reason = " ".join(str(error).split())[:150]
            if isinstance(image, bytes) and not image:
                reason = "it is empty"
            elif "cannot identify image file" in reason:
                reason = "it is not an image, or its header is damaged"
            text = f"{name} can't be decoded ({reason}); repair or delete it."
            raise DamagedImage(text) from error

    return wrapped


@_named
def decode(image: bytes | np.ndarray) -> np.ndarray:
    """Decodes a whole image and turns it upright, as its EXIF orientation says.

    Args:
      image: JPEG, PNG, WebP, BMP, GIF, TIFF or PPM bytes, or decoded pixels: uint8 [h, w, 3].
      name: what an error calls the image.

    Returns:
      uint8 [h, w, 3]; greyscale is repeated, the alpha channel dropped, palettes and CMYK are
      converted to RGB, 16 bits are reduced to their upper 8, and an animation is its first frame.

    Raises:
      DamagedImage: it can't be decoded.
    """
    return _decode(image, _measure(image)[2])


@_named
def image_size(image: bytes | np.ndarray) -> tuple[int, int]:
    """Width and height in pixels once the image is upright, read from the header.

    Args:
      image: as for `decode`.
      name: what an error calls the image.

    Raises:
      DamagedImage: it can't be decoded.
    """
    return _measure(image)[:2]


@_named
def decode_crop(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Decodes a random crop and resizes it to a square: torchvision's RandomResizedCrop.

    Args:
      image: as for `decode`.
      rng: draws the crop.
      size: side of the result, in pixels.
      scale: the crop's share of the image's area is uniform in this range.
      ratio: width divided by height is log-uniform in this range.
      name: what an error calls the image.

    Returns:
      uint8 [size, size, 3].

    Raises:
      DamagedImage: it can't be decoded.
    """
    width, height, orientation = _measure(image)
    box = random_box(rng, width, height, scale, ratio)
    reduction = min(box[2] - box[0], box[3] - box[1]) / size
    with _memory(width * height):
        pixels = _decode(image, orientation, reduction, fast=True)
        fx, fy = pixels.shape[1] / width, pixels.shape[0] / height
        left, top = int(box[0] * fx), int(box[1] * fy)
        right, bottom = max(left + 1, round(box[2] * fx)), max(top + 1, round(box[3] * fy))
        crop = _shrink(pixels[top:bottom, left:right], size)
        del pixels
    return crop


@_named
def eval_crop(image: bytes | np.ndarray, size: int, crop_pct: float = 0.875) -> np.ndarray:
    """Resizes the shorter side to size / crop_pct and crops the centre square.

    Args:
      image: as for `decode`.
      size: side of the result, in pixels.
      crop_pct: side of the crop divided by the shorter side of the resized image, in (0, 1];
        0.875 is "resize 256, crop 224".
      name: what an error calls the image.

    Returns:
      uint8 [size, size, 3].

    Raises:
      DamagedImage: it can't be decoded.
    """
    width, height, orientation = _measure(image)
    shorter, resized = min(width, height), math.floor(size / crop_pct)
    # Rounded as in torchvision, to give the same pixels.
    scaled = [int(resized * side / shorter) for side in (width, height)]
    left, top = (round((side - size) / 2) for side in scaled)
    with _memory(width * height):
        # Half the reduction that the sizes allow, as in Pillow's thumbnails: Pillow's filter, which
        # determines the result, still gets twice the resolution that it needs.
        pixels = Image.fromarray(_decode(image, orientation, shorter / resized / 2))
        fx, fy = pixels.width / scaled[0], pixels.height / scaled[1]
        box = (left * fx, top * fy, (left + size) * fx, (top + size) * fy)
        crop = np.asarray(pixels.resize((size, size), Image.Resampling.BILINEAR, box))
        del pixels
    return crop


@_named
def decode_resize(
    image: bytes | np.ndarray, stated: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Decodes a whole image and resizes it.

    Args:
      image: as for `decode`.
      stated: height and width that it should have, as for `check_size`.
      size: height and width of the result, in pixels.
      name: what an error calls the image.

    Returns:
      uint8 [*size, 3].

    Raises:
      DamagedImage: it can't be decoded, or has another size than stated.
    """
    orientation = _orientation(image, stated)
    reduction = min(stated[0] / size[0], stated[1] / size[1])
    # Enlarged as by torchvision, whose detectors are used to it. It doesn't antialias.
    interpolation = cv2.INTER_LINEAR if reduction <= 1 else cv2.INTER_AREA
    with _memory(stated[0] * stated[1]):
        pixels = _decode(image, orientation, reduction / 2)  # see `eval_crop`
        return cv2.resize(pixels, size[::-1], interpolation=interpolation)


@_named
def check_size(image: bytes, stated: tuple[int, int]) -> None:
    """Checks the size of an image, from its header.

    Args:
      image: as for `decode`.
      stated: height and width that annotations say, in pixels, either of the upright image or of
        the stored one.
      name: what an error calls the image.

    Raises:
      DamagedImage: it has another size.
    """
    _orientation(image, stated)


def random_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """The crop of torchvision's RandomResizedCrop: left, top, right, bottom, in pixels."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # No try fitted: the largest centred crop with an allowed aspect ratio.
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _orientation(image: bytes | np.ndarray, stated: tuple[int, int]) -> int:
    """EXIF's orientation by which stored pixels must be turned to have the height and width."""
    width, height, orientation = _measure(image)
    if (height, width) == stated:
        return orientation
    if orientation >= 5 and (width, height) == stated:
        return 1  # annotated as stored
    raise ValueError(
        f"it has {width} x {height} pixels, but its annotations say {stated[1]} x {stated[0]}"
    )


@contextlib.contextmanager
def _memory(pixels: int) -> Iterator[None]:
    """Waits until no other thread holds a large image, if this one is large."""
    with _ONE_LARGE if pixels > LARGE else contextlib.nullcontext():
        yield


def _measure(image: bytes | np.ndarray) -> tuple[int, int, int]:
    """As `pixels.measure`, for decoded pixels too."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0], 1
    return measure(image)


def _decode(
    image: bytes | np.ndarray, orientation: int, reduction: float = 1, fast: bool = False
) -> np.ndarray:
    """As `pixels.decode_pixels`; decoded pixels are returned unchanged."""
    if isinstance(image, np.ndarray):
        return image
    return decode_pixels(image, orientation, reduction, fast)


def _shrink(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resizes to a square, antialiased when it shrinks."""
    target, longer = (size, size), max(pixels.shape[:2])
    if longer > 2 * size:
        return cv2.resize(pixels, target, interpolation=cv2.INTER_AREA)
    if longer > size:
        # The mean of 2x2 samples is closer to Pillow's antialiased bilinear filter than INTER_AREA
        # alone, and three times as fast.
        pixels = cv2.resize(pixels, (2 * size, 2 * size), interpolation=cv2.INTER_LINEAR)
        return cv2.resize(pixels, target, interpolation=cv2.INTER_AREA)
    return cv2.resize(pixels, target, interpolation=cv2.INTER_LINEAR)
