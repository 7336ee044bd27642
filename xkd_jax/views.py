"""Augmentation, the multi-view generator and evaluation noise, batched and on the device.

Images are float32 [N, H, W, C] in [0, 1]. Everything runs inside `jit` with static shapes, and is a
pure function of the key that it gets. Threefry random numbers are what augmentation costs on a
CPU: what is drawn per image is drawn in one go, and what is drawn per pixel is drawn sparingly.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from xkd_jax.errors import UserError, unknown

GEOMETRY_MODES = ("shared", "student", "off")
# ITU-R 601-2 luma, with torchvision's digits.
_LUMA = (0.2989, 0.587, 0.114)


@dataclasses.dataclass(frozen=True)
class MultiView:
    """The strengths of the multi-view generator. Hashable: a static argument of `jit`.

    Attributes:
      geometry: "shared" (teacher and student see the same crop and rotation, so that their pixels
        stay aligned), "student" (the teacher sees the original) or "off".
      rotation: the largest rotation either way, in degrees.
      min_scale: the side of the smallest crop, as a fraction of the image's, in (0, 1].
      brightness: factors are uniform in [1 - brightness, 1 + brightness].
      contrast: the same for the contrast.
      saturation: the same for the saturation.
      noise: standard deviation of the Gaussian noise, in units of [0, 1].
      mask_patch: side of the masked patches, in pixels.
      mask_ratio: the probability with which each patch is masked.
    """

    geometry: str = "shared"
    rotation: float = 15.0
    min_scale: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    noise: float = 0.1
    mask_patch: int = 4
    mask_ratio: float = 0.25

    def __post_init__(self):
        if self.geometry not in GEOMETRY_MODES:
            raise unknown("geometry mode", self.geometry, GEOMETRY_MODES)
        if not 0 < self.min_scale <= 1:
            raise UserError(f"min_scale {self.min_scale} is not within (0, 1].")
        if not 0 <= self.mask_ratio <= 1:
            raise UserError(f"mask_ratio {self.mask_ratio} is not within [0, 1].")
        if self.mask_patch < 1:
            raise UserError(f"mask_patch {self.mask_patch} is not a number of pixels above 0.")
        for name in ("rotation", "brightness", "contrast", "saturation", "noise"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)} is negative; 0 turns it off.")


def multi_view(
    key: jax.Array, images: jax.Array, options: MultiView
) -> tuple[jax.Array, jax.Array]:
    """The multi-view generator: MVG(x) of Eq. 7, as what each network sees.

    With probability 0.5, drawn per image, an image is transformed, else both views are the image
    itself, bit for bit. Colour jitter, Gaussian noise and the patch-wise mask fall on the student's
    view only; the random crop and rotation on both, on the student's, or on none, by
    `options.geometry`.

    Args:
      key: a typed key.
      images: float32 [N, H, W, C] in [0, 1].
      options: the strengths.

    Returns:
      The teacher's and the student's view, both like `images`.
    """
    p_key, geometry_key, color_key, noise_key, mask_key = jax.random.split(key, 5)
    teacher = images
    # Jitter first: XLA's CPU backend would otherwise repeat the warp inside the jitter's reductions
    # (5 ms instead of 1.5 for 64 images of 28x28). The same key warps both views alike.
    student = color_jitter(
        color_key, images, options.brightness, options.contrast, options.saturation
    )
    if options.geometry != "off":
        student = random_geometry(geometry_key, student, options.rotation, options.min_scale)
    if options.geometry == "shared":
        teacher = random_geometry(geometry_key, images, options.rotation, options.min_scale)
    student = gaussian_noise(noise_key, student, options.noise)
    student = patch_mask(mask_key, student, options.mask_patch, options.mask_ratio)
    transformed = jax.random.uniform(p_key, (len(images), 1, 1, 1)) >= 0.5
    return jnp.where(transformed, teacher, images), jnp.where(transformed, student, images)


def random_crop_flip(key: jax.Array, images: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Pads with zeros, crops back to the old size at a random place, mirrors half of the images.

    The usual CIFAR recipe (He et al., 2016, section 4.2).

    Args:
      key: a typed key.
      images: [N, H, W, C], of any type.
      padding: pixels added on each side; 0 leaves the crop out.
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
    """A random crop, rotated and enlarged to the full size: one bilinear warp, zeros outside.

    Args:
      key: a typed key.
      images: float32 [N, H, W, C].
      max_rotation_degrees: the angle is uniform in plus or minus this.
      min_scale: the crop's side is uniform in [min_scale, 1] of the image's, in (0, 1].
    """
    n, h, w, _ = images.shape
    draws = jax.random.uniform(key, (n, 4, 1, 1))
    angle = jnp.deg2rad(max_rotation_degrees) * (2 * draws[:, 0] - 1)
    scale = min_scale + (1 - min_scale) * draws[:, 1]
    shift_y = (1 - scale) * (draws[:, 2] - 0.5) * (h - 1)
    shift_x = (1 - scale) * (draws[:, 3] - 0.5) * (w - 1)
    # Where each output pixel comes from, relative to the image's centre: [N, H, W].
    y = (jnp.arange(h, dtype=jnp.float32) - (h - 1) / 2)[:, None]
    x = (jnp.arange(w, dtype=jnp.float32) - (w - 1) / 2)[None, :]
    cos, sin = scale * jnp.cos(angle), scale * jnp.sin(angle)
    from_y = cos * y - sin * x + shift_y + (h - 1) / 2
    from_x = sin * y + cos * x + shift_x + (w - 1) / 2
    return _sample(images, from_y, from_x)


def _sample(images: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Bilinear samples of [N, H, W, C] images at coordinates [N, h, w]; zeros outside."""
    h, w = images.shape[1:3]
    # Clipped so that everything outside reads the border of zeros and nothing else.
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
      hue: the shift is uniform in [-hue, hue], in turns of the colour circle; at most 0.5.
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
    mean = _luma(images.mean((1, 2), keepdims=True))  # luma is linear: the mean may come first
    return jnp.clip(factor * images + (1 - factor) * mean, 0, 1)


def adjust_saturation(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Blends with the luma of each pixel: factor 0 is greyscale, 1 the image itself."""
    return jnp.clip(factor * images + (1 - factor) * _luma(images), 0, 1)


def adjust_hue(images: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Turns the hue of [N, H, W, 3] images by `shift` turns; HSV's saturation and value stay."""
    red, green, blue = images[..., :1], images[..., 1:2], images[..., 2:]
    value = images.max(-1, keepdims=True)
    chroma = value - images.min(-1, keepdims=True)
    scale = 1 / jnp.where(chroma > 0, chroma, 1)
    hue = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )  # in sixths of a turn
    # How far each channel is below the largest rises and falls along the circle.
    place = hue + 6 * shift + jnp.asarray((5.0, 3.0, 1.0))
    place = place - 6 * jnp.floor(place / 6)  # quicker than %
    return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)


def _luma(images: jax.Array) -> jax.Array:
    return jnp.dot(images, jnp.asarray(_LUMA), precision="highest")[..., None]


def gaussian_noise(key: jax.Array, images: jax.Array, std: float) -> jax.Array:
    """Adds Gaussian noise to every value, clipped to [0, 1].

    Args:
      key: a typed key.
      images: float32 [N, H, W, C] in [0, 1].
      std: standard deviation, in units of [0, 1].
    """
    # Two values from each 32 random bits: half the price of `jax.random.normal`. 65,536 levels, cut
    # off at 4.3 standard deviations, are finer than any image.
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
      patch_size: side of a patch, in pixels; the last row and column are cut where it does not
        divide the image.
      ratio: the probability with which each patch is masked, independently.
    """
    n, h, w, _ = images.shape
    grid = (-(-h // patch_size), -(-w // patch_size))
    masked = jax.random.uniform(key, (n, *grid)) < ratio
    masked = masked.repeat(patch_size, axis=1).repeat(patch_size, axis=2)[:, :h, :w, None]
    return jnp.where(masked, images.mean((1, 2), keepdims=True), images)


def noisy(key: jax.Array, images: jax.Array) -> jax.Array:
    """Corrupts each image in one of four ways that training never uses, for Fig. 3(a).

    Equally likely, per image: a 5x5 Gaussian blur (sigma of 1 pixel), salt and pepper on 10% of the
    pixels, a gamma log-uniform in [0.4, 2.5], or a black bar across the image, a quarter of its
    side thick. The same key gives the same result.

    Training has none of them: `config.validate` refuses `augment.blur` beside it. What comes near
    are RandAugment's and TrivialAugment's sharpness, which below 1 blends with a 3x3 smoothing,
    their linear brightness, the black borders of crops and warps, and erasing, which leaves noise.

    Args:
      key: a typed key.
      images: float32 [N, H, W, C] in [0, 1].
    """
    n, h, w, _ = images.shape
    kind_key, pixel_key = jax.random.split(key)
    draws = jax.random.uniform(kind_key, (n, 3, 1, 1, 1))
    kind = jnp.floor(4 * draws[:, 0])
    speck = jax.random.uniform(pixel_key, (n, h, w, 1))
    specked = jnp.where(speck < 0.05, 0.0, jnp.where(speck >= 0.95, 1.0, images))
    gamma = 0.4 * (2.5 / 0.4) ** draws[:, 1]
    # 0 has no finite derivative under a power below 1; nobody differentiates this.
    brightened = images**gamma
    corrupted = jnp.where(kind == 0, blur(images), specked)
    corrupted = jnp.where(kind == 2, brightened, corrupted)
    return jnp.where(kind == 3, _bar(draws[:, 1], draws[:, 2], images), corrupted)


def blur(images: jax.Array, sigma: jax.Array | float = 1.0, radius: int = 2) -> jax.Array:
    """A Gaussian blur; the border is reflected.

    Args:
      images: float32 [N, H, W, C].
      sigma: pixels; one number, or [N, 1, 1].
      radius: of the kernel, which is cut off there; pixels, less than the image's sides.
    """
    offsets = jnp.arange(-radius, radius + 1) / jnp.asarray(sigma)[..., None]
    weights = jnp.exp(-0.5 * offsets**2)
    weights = weights / weights.sum(-1, keepdims=True)
    n, h, w, c = images.shape
    # [N, H, W * C]: a CPU is twice as fast on long rows.
    padded = jnp.pad(images, ((0, 0), (radius, radius), (0, 0), (0, 0)), mode="reflect")
    flat = padded.reshape(n, -1, w * c)
    down = sum(weights[..., i] * flat[:, i : i + h] for i in range(2 * radius + 1))
    images = jnp.asarray(down).reshape(images.shape)
    padded = jnp.pad(images, ((0, 0), (0, 0), (radius, radius), (0, 0)), mode="reflect")
    flat = padded.reshape(n, h, -1)
    across = sum(weights[..., i] * flat[..., c * i : c * (i + w)] for i in range(2 * radius + 1))
    return jnp.asarray(across).reshape(images.shape)


def _bar(direction: jax.Array, place: jax.Array, images: jax.Array) -> jax.Array:
    """Blackens a bar, lying where `direction` < 0.5, else standing; both are [N, 1, 1, 1]."""
    h, w = images.shape[1:3]

    def covered(size: int) -> jax.Array:
        thick = max(1, size // 4)
        start = jnp.floor(place * (size - thick + 1))
        position = jnp.arange(size, dtype=jnp.float32)[None, :, None, None]
        return (position >= start) & (position < start + thick)

    lying, standing = covered(h), covered(w).swapaxes(1, 2)
    return jnp.where(jnp.where(direction < 0.5, lying, standing), 0.0, images)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Subtracts the mean and divides by the standard deviation, per channel.

    Args:
      images: float32 [N, H, W, C] in [0, 1].
      mean: one per channel, in the same units.
      std: one per channel, in the same units.
    """
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


def resize(images: jax.Array, size: int | tuple[int, int]) -> jax.Array:
    """Bilinear resizing, antialiased when it shrinks; returns `images` where the size is right.

    Args:
      images: float32 [N, H, W, C].
      size: (height, width) in pixels; one number stands for both.
    """
    n, h, w, c = images.shape
    target = (size, size) if isinstance(size, int) else tuple(size)
    if target == (h, w):
        return images
    return jax.image.resize(images, (n, *target, c), "bilinear", antialias=True)


def resize_crop(images: jax.Array, size: int, crop_fraction: float = 0.875) -> jax.Array:
    """The usual evaluation on ImageNet: the shorter side to size / crop_fraction, then the centre.

    Args:
      images: float32 [N, H, W, C].
      size: of the square that is returned, in pixels; with 0.875, 224 is cut out of 256.
      crop_fraction: in (0, 1]; what timm calls crop_pct.
    """
    h, w = images.shape[1:3]
    shorter = math.floor(size / crop_fraction)
    images = resize(images, (shorter * h // min(h, w), shorter * w // min(h, w)))
    top, left = (round((side - size) / 2) for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]
