"""Strong augmentation, batched and on the device: RandAugment, TrivialAugment, blur, erasing.

Images are float32 [N, H, W, 3] in [0, 1]; each image has its own draws. All functions have static
shapes, run inside `jit` and are deterministic given their key. Images are processed independently,
so that batches can be sharded.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from xkd_jax.augment import ops
from xkd_jax.errors import UserError, unknown

AUTO = ("", "randaugment", "trivialaugment")
OPS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_FIRST_SIGNED, _LAST_SIGNED = OPS.index("shear_x"), OPS.index("sharpness")
_TOP_LEVEL = 30  # magnitudes have 31 levels
_MIN_SIGMA = 0.1  # pixels
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, with Pillow's digits


@dataclasses.dataclass(frozen=True)
class Augment:
    """Augmentation in addition to crop and flip; none by default. Hashable: static under `jit`.

    Attributes:
      auto: "", "randaugment" or "trivialaugment".
      randaugment_ops: the number of operations that RandAugment applies in sequence.
      randaugment_magnitude: their strength, from 0 to 30.
      brightness: factors are uniform in [1 - brightness, 1 + brightness].
      contrast: the same for the contrast.
      saturation: the same for the saturation.
      hue: shifts are uniform in [-hue, hue], in turns of the colour wheel, at most 0.5.
      blur: the probability of a Gaussian blur.
      blur_sigma: the largest standard deviation of the blur, in pixels, at least 0.1.
      erasing: the probability of erasing a rectangle.
      mixup: alpha of mixup's Beta distribution; 0 is off. See `mixup.mix`.
      cutmix: alpha of CutMix's Beta distribution; 0 is off. With both, each applies half the time.
    """

    auto: str = ""
    randaugment_ops: int = 2
    randaugment_magnitude: int = 9
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    blur: float = 0.0
    blur_sigma: float = 2.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        if self.auto not in AUTO:
            raise unknown("automatic augmentation", self.auto, AUTO)
        if self.randaugment_ops < 1:
            raise UserError(f"randaugment_ops {self.randaugment_ops} must be at least 1.")
        if not 0 <= self.randaugment_magnitude <= _TOP_LEVEL:
            raise UserError(
                f"randaugment_magnitude {self.randaugment_magnitude} is not within [0, 30]."
            )
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"hue {self.hue} is not within [0, 0.5].")
        if self.blur_sigma < _MIN_SIGMA:
            raise UserError(f"blur_sigma {self.blur_sigma} must be at least {_MIN_SIGMA} pixels.")
        for name in ("blur", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} is not a probability in [0, 1].")
        for name in ("brightness", "contrast", "saturation", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)} is negative; 0 turns it off.")


def augment(key: jax.Array, images: jax.Array, options: Augment) -> jax.Array:
    """RandAugment or TrivialAugment, colour jitter, blur, then erasing; for mixing see `mixup.mix`.

    Args:
      key: a typed key.
      images: float32 [N, H, W, 3] in [0, 1], already cropped and flipped.
      options: what to apply; parts that are off cost nothing.

    Returns:
      Images of the same shape and range.
    """
    auto_key, color_key, blur_key, erasing_key = jax.random.split(key, 4)
    if options.auto == "randaugment":
        images = rand_augment(
            auto_key, images, options.randaugment_ops, options.randaugment_magnitude
        )
    elif options.auto == "trivialaugment":
        images = trivial_augment(auto_key, images)
    jitter = (options.brightness, options.contrast, options.saturation, options.hue)
    if any(jitter):
        images = ops.color_jitter(color_key, images, *jitter)
    if options.blur:
        images = random_blur(blur_key, images, options.blur, options.blur_sigma)
    if options.erasing:
        images = random_erasing(erasing_key, images, options.erasing)
    return images


def rand_augment(key: jax.Array, images: jax.Array, num_ops: int, magnitude: int) -> jax.Array:
    """RandAugment (Cubuk et al., 2020) with torchvision's operations and ranges.

    Args:
      key: a typed key.
      images: float32 [N, H, W, 3] in [0, 1].
      num_ops: the number of operations in sequence, drawn independently for each image.
      magnitude: of all operations, from 0 to 30; their sign is random.
    """
    h, w = images.shape[1:3]
    shift = 150 / 331
    ranges = (0, 0.3, 0.3, shift * w, shift * h, 30, 0.9, 0.9, 0.9, 0.9, 4, 255, 0, 0)

    def layer(images: jax.Array, layer_key: jax.Array) -> tuple[jax.Array, None]:
        return apply_ops(images, *_draw_ops(layer_key, len(images), ranges, magnitude)), None

    # If unrolled, XLA's CPU backend repeats a layer's warp inside the reductions of the next one,
    # at four times the cost.
    return jax.lax.scan(layer, images, jax.random.split(key, num_ops))[0]


def trivial_augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """TrivialAugment (Müller and Hutter, 2021), wide, with torchvision's operations and ranges.

    Args:
      key: a typed key.
      images: float32 [N, H, W, 3] in [0, 1]; each gets one operation of a random magnitude.
    """
    ranges = (0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99, 6, 255, 0, 0)
    return apply_ops(images, *_draw_ops(key, len(images), ranges, None))


def _draw_ops(
    key: jax.Array, n: int, ranges: tuple[float, ...], level: int | None
) -> tuple[jax.Array, jax.Array]:
    """The operation and magnitude of each image, both [N]; `level` None draws a random one."""
    draws = jax.random.uniform(key, (n, 3))
    op = jnp.floor(draws[:, 0] * len(OPS)).astype(jnp.int32)
    levels = jnp.floor(draws[:, 1] * (_TOP_LEVEL + 1)) if level is None else level
    magnitude = jnp.asarray(ranges, jnp.float32)[op] * levels / _TOP_LEVEL
    signed = (op >= _FIRST_SIGNED) & (op <= _LAST_SIGNED)
    return op, jnp.where(signed & (draws[:, 2] < 0.5), -magnitude, magnitude)


def apply_ops(images: jax.Array, op: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Applies one of `OPS` to each image, as Pillow does for uint8.

    All operations that change values share one formula, and all that move pixels share one warp,
    with parameters per image; computing all fourteen and selecting one would cost far more.

    Args:
      images: float32 [N, H, W, 3] in [0, 1]; they are rounded to multiples of 1/255.
      op: int32 [N], indices into `OPS`.
      magnitude: float32 [N]: a tangent (shear), pixels (translate; rounded towards 0), degrees
        counter-clockwise (rotate), the factor minus 1 (brightness, color, contrast, sharpness), the
        number of bits dropped (posterize), or 255 minus the threshold (solarize: 255 inverts).
    """
    values = jnp.clip(jnp.round(images * 255), 0, 255)
    values = _map_values(values, op, magnitude)
    return _warp(values, op, magnitude) / 255


def _map_values(x: jax.Array, op: jax.Array, magnitude: jax.Array) -> jax.Array:
    """The operations on values; `x` holds integers in [0, 255], [N, H, W, 3]."""
    amount = magnitude[:, None, None, None]

    def pick(name: str, then: jax.Array | float, otherwise: jax.Array | float) -> jax.Array:
        return jnp.where((op == OPS.index(name))[:, None, None, None], then, otherwise)

    # Brightness, colour, contrast and sharpness blend with an image that has none of it.
    # Autocontrast is the same formula, with a factor and an offset per channel.
    blends = (op >= OPS.index("brightness")) & (op <= OPS.index("sharpness"))
    factor = jnp.where(blends[:, None, None, None], 1 + amount, 1.0)
    luma = jnp.floor(jnp.dot(x, jnp.asarray(_LUMA), precision="highest") + 0.5)[..., None]
    flat = jnp.floor(luma.mean((1, 2), keepdims=True) + 0.5)
    without = pick("color", luma, pick("sharpness", _smooth(x), pick("contrast", flat, 0.0)))
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    stretch = jnp.where(high > low, 255 / jnp.maximum(high - low, 1), 1.0)
    factor = pick("autocontrast", stretch, factor)
    offset = pick(
        "autocontrast", jnp.where(high > low, -low * stretch, 0.0), (1 - factor) * without
    )
    # Pillow truncates; the 1e-3 lifts float32 results just below an integer.
    blended = jnp.floor(jnp.clip(factor * x + offset, 0, 255) + 1e-3)
    bits = jnp.round(pick("posterize", amount, 0.0)).astype(jnp.int32)
    step = jnp.left_shift(1, bits).astype(jnp.float32)
    kept = step * jnp.floor(blended / step)
    threshold = pick("solarize", 255 - amount, 256.0)
    return pick("equalize", _equalize(x), jnp.where(kept >= threshold, 255 - kept, kept))


def _smooth(x: jax.Array) -> jax.Array:
    """Pillow's 3x3 SMOOTH filter for integer values; the border is unchanged."""
    n, h, w, c = x.shape
    flat = x.reshape(n, h, w * c)  # a CPU is twice as fast with long rows
    rows = flat[:, :-2] + flat[:, 1:-1] + flat[:, 2:]
    box = rows[..., : -2 * c] + rows[..., c:-c] + rows[..., 2 * c :]
    inner = jnp.floor((box + 4 * flat[:, 1:-1, c:-c]) / 13 + 0.5)
    return flat.at[:, 1:-1, c:-c].set(inner).reshape(x.shape)


def _equalize(x: jax.Array) -> jax.Array:
    """Equalizes the histogram of each channel; `x` holds integers in [0, 255], [N, H, W, C]."""
    n, _, _, c = x.shape
    places = (c * x.astype(jnp.int32) + jnp.arange(c)).reshape(
        n, -1
    )  # indices into tables [256, C]

    def count(at: jax.Array) -> jax.Array:
        return jnp.zeros(256 * c, jnp.int32).at[at].add(1, mode="promise_in_bounds")

    counts = jax.vmap(count)(places).reshape(n, 256, c)
    below = jnp.cumsum(counts, 1) - counts
    # `below` at the largest value present counts all pixels with a smaller value.
    step = below.max(1, keepdims=True, where=counts > 0, initial=0) // 255
    spread = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    table = jnp.where(step > 0, spread, jnp.arange(256)[:, None]).astype(x.dtype)
    read = jax.vmap(lambda entries, at: entries.at[at].get(mode="promise_in_bounds"))
    return read(table.reshape(n, -1), places).reshape(x.shape)


def _warp(images: jax.Array, op: jax.Array, magnitude: jax.Array) -> jax.Array:
    """The operations that move pixels of [N, H, W, C]: nearest neighbour, zeros outside."""
    n, h, w, c = images.shape

    def pick(name: str) -> jax.Array:
        return jnp.where(op == OPS.index(name), magnitude, 0.0)[:, None, None]

    angle = jnp.deg2rad(pick("rotate"))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Pixel centres relative to the upper left corner, the fixed point of torchvision's shear.
    y, x = jnp.arange(h)[:, None] + 0.5, jnp.arange(w)[None, :] + 0.5
    down, right = y - h / 2, x - w / 2
    from_x = cos * right - sin * down + w / 2 + pick("shear_x") * y - jnp.trunc(pick("translate_x"))
    from_y = sin * right + cos * down + h / 2 + pick("shear_y") * x - jnp.trunc(pick("translate_y"))
    row, column = jnp.floor(from_y).astype(jnp.int32), jnp.floor(from_x).astype(jnp.int32)
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    index = jnp.where(inside, row * w + column, h * w)

    def read(pixels: jax.Array, at: jax.Array) -> jax.Array:
        return pixels.at[at].get(mode="fill", fill_value=0)

    return jax.vmap(read)(images.reshape(n, h * w, c), index)


def random_blur(
    key: jax.Array, images: jax.Array, probability: float, max_sigma: float
) -> jax.Array:
    """Gaussian blur of randomly chosen images; sigma is uniform in [0.1, max_sigma] (SimCLR).

    Args:
      key: a typed key.
      images: float32 [N, H, W, C].
      probability: the probability that an image is blurred.
      max_sigma: in pixels.
    """
    draws = jax.random.uniform(key, (len(images), 2, 1, 1))
    sigma = _MIN_SIGMA + (max_sigma - _MIN_SIGMA) * draws[:, 0]
    radius = min(math.ceil(3 * max_sigma), *(side - 1 for side in images.shape[1:3]))
    chosen = draws[:, 1, ..., None] < probability
    return jnp.where(chosen, ops.blur(images, sigma, radius), images)


def random_erasing(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Replaces a rectangle in randomly chosen images by noise (Zhong et al., 2020).

    A rectangle covers 2% to 33% of the image, with a log-uniform aspect ratio in [0.3, 3.3]; the
    first of ten tries that fits is used, as in timm (Ross Wightman, Apache-2.0). The noise is
    uniform in [0, 1], which after normalization has about the mean and standard deviation of
    timm's normal noise. All rectangles of a batch are cut from the same [H, W, C] noise.

    Args:
      key: a typed key.
      images: float32 [N, H, W, C] in [0, 1].
      probability: the probability that an image loses a rectangle.
    """
    n, h, w, c = images.shape
    draw_key, noise_key = jax.random.split(key)
    draws = jax.random.uniform(draw_key, (n, 23))
    where, tries = draws[:, :3], draws[:, 3:].reshape(n, 10, 2)
    area = h * w * (0.02 + (1 / 3 - 0.02) * tries[..., 0])
    aspect = jnp.exp(math.log(0.3) * (2 * tries[..., 1] - 1))
    heights, widths = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (heights < h) & (widths < w)
    first = jnp.argmax(fits, 1)[:, None]
    height = jnp.take_along_axis(heights, first, 1)[:, 0]
    width = jnp.take_along_axis(widths, first, 1)[:, 0]
    chosen = (where[:, 0] < probability) & fits.any(1)
    rows = _interval(where[:, 1], height, h)[:, :, None]
    columns = _interval(where[:, 2], width, w)[:, None, :]
    erased = chosen[:, None, None] & rows & columns
    noise = jax.random.uniform(noise_key, (h, w, c))
    return jnp.where(erased[..., None], noise, images)


def _interval(draw: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Which of `size` pixels a randomly placed interval of `length` [N] covers: bool [N, size]."""
    start = jnp.floor(draw * (size - length + 1))[:, None]
    position = jnp.arange(size)
    return (position >= start) & (position < start + length[:, None])
