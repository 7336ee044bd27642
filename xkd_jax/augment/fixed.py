"""Fixed views: each image has V views, so that the teacher's outputs can be computed once.

View v of image i is a function of v and i alone, whatever the run's seed and batch. The random
crop, the flip, `augment.*` and the multi-view generator's shared geometry belong to the view;
operations on the student's view alone are drawn in every step, as without fixed views.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xkd_jax.augment import ops
from xkd_jax.augment.multiview import student_only
from xkd_jax.augment.pipeline import Pipeline
from xkd_jax.augment.policies import augment

SEED = 2022  # of all fixed views: runs with different seeds share them


def view_keys(view: jax.Array, index: jax.Array) -> jax.Array:
    """The keys [N] of the views [N] of the examples with these indices [N]."""
    root = jax.random.key(SEED)
    return jax.vmap(lambda v, i: jax.random.fold_in(jax.random.fold_in(root, v), i))(view, index)


def shared_view(
    pipeline: Pipeline, keys: jax.Array, images: jax.Array, multiple: bool
) -> tuple[jax.Array, jax.Array]:
    """The part of the views that is shared by teacher and student.

    Args:
      pipeline: the augmentation.
      keys: from `view_keys`, [N].
      images: [N, H, W, 3], uint8 or float in [0, 1].
      multiple: whether the multi-view generator makes the student's view.

    Returns:
      The teacher's views, float32 [N, H, W, 3] in [0, 1]; and which images the multi-view generator
      transforms, bool [N, 1, 1, 1], for the geometry "shared".
    """
    options, padding = pipeline.views, pipeline.padding(images.shape[1])

    def one(key: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        crop_key, augment_key, geometry_key, p_key = jax.random.split(key, 4)
        view = ops.random_crop_flip(crop_key, ops.to_float(image[None]), padding, pipeline.flip)
        view = augment(augment_key, view, pipeline.policy)
        transformed = jax.random.uniform(p_key, (1, 1, 1)) >= 0.5
        if multiple and options.geometry == "shared":
            warped = ops.random_geometry(geometry_key, view, options.rotation, options.min_scale)
            view = jnp.where(transformed, warped, view)
        return view[0], transformed

    return jax.vmap(one)(keys, images)


def fixed_views(
    pipeline: Pipeline,
    key: jax.Array,
    keys: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    multiple: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Augments one batch as `pipeline` does, with fixed views.

    Args:
      pipeline: the augmentation, without mixup and CutMix, which mix several images.
      key: a typed key, for the operations on the student's view alone.
      keys: from `view_keys`, [N].
      images: [N, H, W, 3], uint8 or float in [0, 1].
      targets: class probabilities [N, K].
      multiple: whether the multi-view generator makes the student's view.

    Returns:
      As `Pipeline.__call__`.
    """
    teacher, transformed = shared_view(pipeline, keys, images, multiple)
    small = ops.resize(teacher, pipeline.student_size) if pipeline.student_size else teacher
    targets = optax.smooth_labels(targets, pipeline.label_smoothing)
    if not multiple:
        return teacher, small, targets
    p_key, *student_keys = jax.random.split(key, 5)
    options = pipeline.views
    if options.geometry != "shared":
        transformed = jax.random.uniform(p_key, (len(images), 1, 1, 1)) >= 0.5
    student = student_only(student_keys, small, options, warp=options.geometry == "student")
    return teacher, jnp.where(transformed, student, small), targets


def recipe(pipeline: Pipeline, side: int, multiple: bool) -> dict[str, Any]:
    """Everything that `shared_view` depends on for images with this side; can be saved as JSON."""
    policy = {k: v for k, v in dataclasses.asdict(pipeline.policy).items() if "mix" not in k}
    found = {"seed": SEED, "side": side, "flip": pipeline.flip, **policy}
    found["crop_padding"] = pipeline.padding(side)
    if multiple and pipeline.views.geometry == "shared":
        views = pipeline.views
        found["geometry"] = {"rotation": views.rotation, "min_scale": views.min_scale}
    return found
