"""The multi-view generator of the paper: the views that teacher and student see."""

import dataclasses

import jax
import jax.numpy as jnp

from xkd_jax.augment import ops
from xkd_jax.errors import UserError, unknown

GEOMETRY_MODES = ("shared", "student", "off")


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
    student = ops.color_jitter(
        color_key, images, options.brightness, options.contrast, options.saturation
    )
    if options.geometry != "off":
        student = ops.random_geometry(geometry_key, student, options.rotation, options.min_scale)
    if options.geometry == "shared":
        teacher = ops.random_geometry(geometry_key, images, options.rotation, options.min_scale)
    student = ops.gaussian_noise(noise_key, student, options.noise)
    student = ops.patch_mask(mask_key, student, options.mask_patch, options.mask_ratio)
    transformed = jax.random.uniform(p_key, (len(images), 1, 1, 1)) >= 0.5
    return jnp.where(transformed, teacher, images), jnp.where(transformed, student, images)
