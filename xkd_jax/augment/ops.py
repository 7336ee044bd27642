"""Operations on batches of images, on the device.

Images are float32 [N, H, W, C] in [0, 1]. All functions have static shapes, run inside `jit` and
are deterministic given their key. On a CPU, Threefry random numbers dominate the cost: draws per
image are made in a single call, and draws per pixel are kept to a minimum.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from xkd_jax.errors import UserError

# ITU-R 601-2 luma, with torchvision's digits.
_LUMA = (0.2989, 0.587, 0.114)


def check_images(images: Any) -> None:
    """Refuses what isn't a batch of images: [N, H, W, 3], uint8 or float.

    Raises:
      UserError: the shape or the type is another.
    """
    shape = list(jnp.shape(images))
    if len(shape) != 4 or shape[-1] != 3:
        raise UserError(f"images have the shape {shape}, but must be [N, H, W, 3].")
    dtype = images.dtype  # of NumPy or JAX: jnp.asarray would narrow it
    if dtype != jnp.uint8 and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"images are {dtype}, but must be uint8, or float in [0, 1].")


def to_float(images: jax.Array) -> jax.Array:
    """uint8 images to float32 in [0, 1]; float ones, which are in [0, 1] already, to float32."""
    scale = 255 if images.dtype == jnp.uint8 else 1
    return images.astype(jnp.float32) / scale


def random_crop_flip(key: jax.Array, images: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Pads with zeros, crops the original size at random and mirrors half of the images.

    The usual CIFAR recipe (He et al., 2016, section 4.2).

    Args:
      key: a typed key.
      images: [N, H, W, C], of any dtype.
      padding: pixels added on each side; 0 turns cropping off.
      flip: whether to mirror left and right, with probability 0.5 per image.
    """
    n, h, w, c = images.shape
    draws = jax.random.uniform(key, (n, 3))
    if padding:
        offsets = jnp.floor(draws[:, :2] * (2 * padding + 1)).astype(jnp.int32)
        padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        crop = jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (at[0], at[1], 0), (h, w, c)))
        images = crop(padded, offsets)
    if flip:
        images = jnp.where(draws[:, 2, None, None, None] < 0.5, images[:, :, ::-1], images)
    return images


def random_geometry(
    key: jax.Array, images: jax.Array, max_rotation_degrees: float, min_scale: float
) -> jax.Array:
    """A random crop, rotated and resized to full size in one bilinear warp; zeros outside.

    Args:
      key: a typed key.
      images: float32 [N, H, W, C].
      max_rotation_degrees: the angle is uniform between minus and plus this.
      min_scale: the crop's side, as a fraction of the image's, is uniform in [min_scale, 1].
    """
    n, h, w, _ = images.shape
    draws = jax.random.uniform(key, (n, 4, 1, 1))
    angle = jnp.deg2rad(max_rotation_degrees) * (2 * draws[:, 0] - 1)
    scale = min_scale + (1 - min_scale) * draws[:, 1]
    shift_y = (1 - scale) * (draws[:, 2] - 0.5) * (h - 1)
    shift_x = (1 - scale) * (draws[:, 3] - 0.5) * (w - 1)
    # The source of each output pixel, first relative to the image's centre: [N, H, W].
    y = (jnp.arange(h, dtype=jnp.float32) - (h - 1) / 2)[:, None]
    x = (jnp.arange(w, dtype=jnp.float32) - (w - 1) / 2)[None, :]
    cos, sin = scale * jnp.cos(angle), scale * jnp.sin(angle)
    from_y = cos * y - sin * x + shift_y + (h - 1) / 2
    from_x = sin * y + cos * x + shift_x + (w - 1) / 2
    return _sample(images, from_y, from_x)


def _sample(images: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Bilinear samples of [N, H, W, C] images at coordinates [N, h, w]; zeros outside."""
    h, w = images.shape[1:3]
    # Clipped so that everything outside reads the border of zeros.
    y, x = jnp.clip(y, -1, h), jnp.clip(x, -1, w)
    y0, x0 = jnp.floor(y), jnp.floor(x)
    dy, dx = (y - y0)[..., None], (x - x0)[..., None]
    padded = jnp.pad(images, ((0, 0), (1, 2), (1, 2), (0, 0)))
    top, left = y0.astype(jnp.int32) + 1, x0.astype(jnp.int32) + 1
    flat = padded.reshape(len(images), -1, images.shape[3])

    def corner(down: int, right: int) -> jax.Array:
        index = (top + down) * padded.shape[2] + left + right
        return jax.vmap(lambda pixels, at: pixels[at])(flat, index)

    above = (1 - dx) * corner(0, 0) + dx * corner(0, 1)
    below = (1 - dx) * corner(1, 0) + dx * corner(1, 1)
    return (1 - dy) * above + dy * below


def color_jitter(
    key: jax.Array,
    images: jax.Array,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float = 0.0,
) -> jax.Array:
    """Brightness, contrast, saturation, then hue, by torchvision's formulas for float images.

    Args:
      key: a typed key.
      images: float32 [N, H, W, 3] in [0, 1].
      brightness: the factor is uniform in [max(0, 1 - brightness), 1 + brightness], per image.
      contrast: the same for the contrast.
      saturation: the same for the saturation.
      hue: the shift is uniform in [-hue, hue], in turns of the colour wheel; at most 0.5.
    """
    draws = jax.random.uniform(key, (len(images), 3, 1, 1, 1))

    def factor(i: int, strength: float) -> jax.Array:
        low = max(0.0, 1 - strength)
        return low + (1 + strength - low) * draws[:, i]

    images = adjust_brightness(images, factor(0, brightness))
    images = adjust_contrast(images, factor(1, contrast))
    images = adjust_saturation(images, factor(2, saturation))
    if not hue:
        return images
    shift_key = jax.random.fold_in(key, 1)
    shift = jax.random.uniform(shift_key, (len(images), 1, 1, 1), minval=-hue, maxval=hue)
    return adjust_hue(images, shift)


def adjust_brightness(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Scales [N, H, W, 3] images in [0, 1]: factor 0 is black, 1 the image itself."""
    return jnp.clip(factor * images, 0, 1)


def adjust_contrast(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Blends with the mean luma of each image: factor 0 is plain grey, 1 the image itself."""
    mean = _luma(
        images.mean((1, 2), keepdims=True)
    )  # luma is linear, so the mean can be taken first
    return jnp.clip(factor * images + (1 - factor) * mean, 0, 1)


def adjust_saturation(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Blends with the luma of each pixel: factor 0 is greyscale, 1 the image itself."""
    return jnp.clip(factor * images + (1 - factor) * _luma(images), 0, 1)


def adjust_hue(images: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Rotates the hue of [N, H, W, 3] images by `shift` turns; keeps HSV saturation and value."""
    red, green, blue = images[..., :1], images[..., 1:2], images[..., 2:]
    value = images.max(-1, keepdims=True)
    chroma = value - images.min(-1, keepdims=True)
    scale = 1 / jnp.where(chroma > 0, chroma, 1)
    hue = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )  # in sixths of a turn
    # Each channel's distance below the maximum is a trapezoid wave of the hue.
    place = hue + 6 * shift + jnp.asarray((5.0, 3.0, 1.0))
    place = place - 6 * jnp.floor(place / 6)  # faster than %
    return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)


def _luma(images: jax.Array) -> jax.Array:
    return jnp.dot(images, jnp.asarray(_LUMA), precision="highest")[..., None]


def gaussian_noise(key: jax.Array, images: jax.Array, std: float) -> jax.Array:
    """Adds Gaussian noise to every value, clipped to [0, 1].

    Args:
      key: a typed key.
      images: float32 [N, H, W, C] in [0, 1].
      std: standard deviation, for pixels in [0, 1].
    """
    # Two values from each 32 random bits: half the cost of `jax.random.normal`. 65,536 levels,
    # truncated at 4.3 standard deviations, are finer than the images' own 256.
    n, size = len(images), images[0].size
    bits = jax.random.bits(key, (n, (size + 1) // 2), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(n, -1)[:, :size]
    uniform = (halves.astype(jnp.float32) + 0.5) * (2 / 2**16) - 1  # inside (-1, 1)
    noise = jnp.sqrt(2.0) * jax.lax.erf_inv(uniform)
    return jnp.clip(images + std * noise.reshape(images.shape), 0, 1)


def patch_mask(key: jax.Array, images: jax.Array, patch_size: int, ratio: float) -> jax.Array:
    """Sets random patches to the mean colour of their image.

    Args:
      key: a typed key.
      images: float32 [N, H, W, C].
      patch_size: side of a patch, in pixels; the last row and column of patches are smaller if it
        does not divide the image.
      ratio: the probability that a patch is masked, independently of the others.
    """
    n, h, w, _ = images.shape
    grid = (-(-h // patch_size), -(-w // patch_size))
    masked = jax.random.uniform(key, (n, *grid)) < ratio
    masked = masked.repeat(patch_size, axis=1).repeat(patch_size, axis=2)[:, :h, :w, None]
    return jnp.where(masked, images.mean((1, 2), keepdims=True), images)


def blur(images: jax.Array, sigma: jax.Array | float = 1.0, radius: int = 2) -> jax.Array:
    """A Gaussian blur with reflected borders.

    Args:
      images: float32 [N, H, W, C].
      sigma: in pixels; a scalar or [N, 1, 1].
      radius: where the kernel is truncated, in pixels; less than the image's sides.
    """
    offsets = jnp.arange(-radius, radius + 1) / jnp.asarray(sigma)[..., None]
    weights = jnp.exp(-0.5 * offsets**2)
    weights = weights / weights.sum(-1, keepdims=True)
    n, h, w, c = images.shape
    # [N, H, W * C]: a CPU is twice as fast with long rows.
    padded = jnp.pad(images, ((0, 0), (radius, radius), (0, 0), (0, 0)), mode="reflect")
    flat = padded.reshape(n, -1, w * c)
    down = sum(weights[..., i] * flat[:, i : i + h] for i in range(2 * radius + 1))
    images = jnp.asarray(down).reshape(images.shape)
    padded = jnp.pad(images, ((0, 0), (0, 0), (radius, radius), (0, 0)), mode="reflect")
    flat = padded.reshape(n, h, -1)
    across = sum(weights[..., i] * flat[..., c * i : c * (i + w)] for i in range(2 * radius + 1))
    return jnp.asarray(across).reshape(images.shape)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Subtracts the mean and divides by the standard deviation, per channel.

    Args:
      images: float32 [N, H, W, C] in [0, 1].
      mean: per channel, in the same units.
      std: per channel, in the same units.
    """
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


def resize(images: jax.Array, size: int | tuple[int, int]) -> jax.Array:
    """Bilinear resizing, antialiased when it shrinks; a no-op if the size is already right.

    Args:
      images: float32 [N, H, W, C].
      size: (height, width) in pixels, or one number for both.
    """
    n, h, w, c = images.shape
    target = (size, size) if isinstance(size, int) else tuple(size)
    if target == (h, w):
        return images
    return jax.image.resize(images, (n, *target, c), "bilinear", antialias=True)


def resize_crop(images: jax.Array, size: int, crop_fraction: float = 0.875) -> jax.Array:
    """The usual ImageNet evaluation: shorter side to size / crop_fraction, then a centre crop.

    Args:
      images: float32 [N, H, W, C].
      size: side of the resulting square, in pixels; with 0.875, 224 is cropped from 256.
      crop_fraction: in (0, 1]; timm's crop_pct.
    """
    h, w = images.shape[1:3]
    shorter = math.floor(size / crop_fraction)
    images = resize(images, (shorter * h // min(h, w), shorter * w // min(h, w)))
    top, left = (round((side - size) / 2) for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def evaluated_pixels(images: jax.Array, size: int, crop_pct: float) -> jax.Array:
    """What is evaluated of images: in [0, 1], and cropped, unless the host has done that.

    Args:
      images: uint8 or float32 in [0, 1], [N, H, W, C].
      size: side of the resulting square, in pixels.
      crop_pct: `data.Split.crop_pct`; 0: the images stay as they are.
    """
    pixels = to_float(images)
    return resize_crop(pixels, size, crop_pct) if crop_pct else pixels
