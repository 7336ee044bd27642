"""The paper's multi-view generator: the views that the teacher and the student see."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from xkd_jax.augment import ops
from xkd_jax.errors import UserError, unknown

GEOMETRY_MODES = ("shared", "student", "off")


@dataclasses.dataclass(frozen=True)
class MultiView:
    """Options of the multi-view generator. Hashable, for use as a static argument of `jit`.

    Attributes:
      geometry: "shared" (the teacher and the student see the same crop and rotation, so that their
        pixels stay aligned), "student" (the teacher sees the original) or "off".
      rotation: the largest rotation in either direction, in degrees.
      min_scale: side of the smallest crop, as a fraction of the image's side, in (0, 1].
      brightness: factors are uniform in [1 - brightness, 1 + brightness].
      contrast: the same for the contrast.
      saturation: the same for the saturation.
      noise: standard deviation of the Gaussian noise, for pixels in [0, 1].
      mask_patch: side of the masked patches, in pixels.
      mask_ratio: the probability that a patch is masked.
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
            raise UserError(f"mask_patch {self.mask_patch} must be at least 1 pixel.")
        for name in ("rotation", "brightness", "contrast", "saturation", "noise"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)} is negative; 0 turns it off.")


def multi_view(
    key: jax.Array, images: jax.Array, options: MultiView, student_size: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The multi-view generator MVG(x) of Eq. 7: the view that each network sees.

    Each image is transformed with probability 0.5; otherwise both views are the image itself, bit
    for bit. Colour jitter, Gaussian noise and the patch-wise mask apply only to the student's view;
    the random crop and rotation apply to both views, to the student's or to neither, according to
    `options.geometry`.

    Args:
      key: a typed key.
      images: float32 [N, H, W, C] in [0, 1].
      options: see `MultiView`.
      student_size: side of the student's view in pixels, if it is resized; the operations on the
        student's view alone apply at this size. 0: the size of `images`.

    Returns:
      The teacher's view, shaped like `images`, and the student's.
    """
    p_key, *keys = jax.random.split(key, 5)
    teacher, small = images, ops.resize(images, student_size) if student_size else images
    if options.geometry == "shared":
        teacher = ops.random_geometry(keys[0], images, options.rotation, options.min_scale)
    if options.geometry == "shared" and small is not images:
        student = student_only(keys, ops.resize(teacher, student_size), options, warp=False)
    else:  # the same key warps both views identically
        student = student_only(keys, small, options, warp=options.geometry != "off")
    transformed = jax.random.uniform(p_key, (len(images), 1, 1, 1)) >= 0.5
    return jnp.where(transformed, teacher, images), jnp.where(transformed, student, small)


def student_only(
    keys: Sequence[jax.Array], images: jax.Array, options: MultiView, warp: bool
) -> jax.Array:
    """Colour jitter, noise and mask: the operations on the student's view alone.

    Args:
      keys: four keys: for the warp, the jitter, the noise and the mask.
      images: float32 [N, H, W, C] in [0, 1].
      options: see `MultiView`.
      warp: whether to warp the images too, after the jitter.
    """
    geometry_key, color_key, noise_key, mask_key = keys
    # Jitter first: otherwise XLA's CPU backend repeats the warp inside the jitter's reductions, at
    # 5 ms instead of 1.5 for 64 images of 28x28.
    images = ops.color_jitter(
        color_key, images, options.brightness, options.contrast, options.saturation
    )
    if warp:
        images = ops.random_geometry(geometry_key, images, options.rotation, options.min_scale)
    images = ops.gaussian_noise(noise_key, images, options.noise)
    return ops.patch_mask(mask_key, images, options.mask_patch, options.mask_ratio)
