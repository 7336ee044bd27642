"""What both networks of a pair make of a few images: attention, and tokens in one space."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xkd_jax.analysis.finished import by_class
from xkd_jax.analysis.linear_map import fit_linear_map
from xkd_jax.analysis.transferability import Pair, find_stage, forward, paired_tokens
from xkd_jax.augment import ops
from xkd_jax.methods.cakd import attention_weights
from xkd_jax.methods.taps import teacher_bias, teacher_taps
from xkd_jax.probing.linear import VALIDATION, Linear, hold_out

FITTED = 128  # training images that a linear map to the teacher's tokens is fitted on
_BATCH = 8
_SEED = 2022  # of the images that are held out

# A function of images, uint8 [N, H, W, 3], and their split's crop_pct; see `create_maps_step`.
MapsStep = Callable[[np.ndarray, float], dict[str, np.ndarray]]


def create_maps_step(pair: Pair) -> MapsStep:
    """A function of images, uint8 [N, H, W, 3], and their split's `crop_pct`.

    It returns NumPy arrays, float32, by name:
    - "pixels" [N, H, W, 3] in [0, 1]: what the teacher sees.
    - "teacher" [N, T, D]: h_T, or the last stage of a CNN.
    - "student": h'_S [N, T, D] with projectors; otherwise the map that cakd would tap, [N, T, C].
    - "Attn_T", and with projectors "Attn_S", [N, T, T]: the softmax of Eq. 2, averaged over heads.
      A CNN has none, nor has a Swin that pads its last map.
    """
    teacher, student = pair.teacher, pair.student
    method, params = pair.projectors or (None, {})
    stage = find_stage(teacher.output_shapes, student.output_shapes)

    @functools.partial(jax.jit, static_argnums=2)
    def step(variables: Any, images: jax.Array, crop_pct: float) -> dict[str, jax.Array]:
        pixels = ops.evaluated_pixels(images, teacher.image_size, crop_pct)
        teacher_out = forward(teacher, variables[0], images, crop_pct)
        student_out = forward(student, variables[1], images, crop_pct)
        if method is not None:
            done = method.project(variables[2], teacher_out, student_out)
            (query, key, _), (student_query, student_key, _) = done.teacher_qkv, done.student_qkv
            weights = {
                "Attn_T": attention_weights(query, key, done.bias),
                "Attn_S": attention_weights(student_query, student_key),
            }
            tokens = done.teacher_tokens, done.student_tokens
        else:
            weights, tokens = {}, paired_tokens(teacher_out, student_out, stage)
            if "query" in teacher_out and ("stage1" not in teacher_out or "bias" in teacher_out):
                (query, key, _), _ = teacher_taps(teacher_out, -1)
                weights["Attn_T"] = attention_weights(query, key, teacher_bias(teacher_out, -1))
        found = {name: heads.mean(1) for name, heads in weights.items()}
        found |= {"pixels": pixels, "teacher": tokens[0], "student": tokens[1]}
        return jax.tree.map(lambda array: array.astype(jnp.float32), found)

    variables = jax.device_put((teacher.variables, student.variables, params))
    return lambda images, crop_pct: jax.device_get(step(variables, images, crop_pct))


def fit_tokens(step: MapsStep, pair: Pair) -> Linear:
    """The ridge regression from "student" [..., C] to "teacher" [..., D], on training images."""
    fitted = by_class(pair.train, FITTED)
    parts = [
        step(fitted.images[first : first + _BATCH], fitted.crop_pct)
        for first in range(0, len(fitted), _BATCH)
    ]

    def join(name: str) -> np.ndarray:
        return np.concatenate([part[name].reshape(-1, part[name].shape[-1]) for part in parts])

    student, teacher = join("student"), join("teacher")
    held = hold_out(np.asarray(fitted.labels), VALIDATION, _SEED)
    return fit_linear_map(student, teacher, np.repeat(held, len(student) // len(held)))[0]


def principal_colours(reference: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """The first three principal components of `reference`, as colours.

    Args:
      reference: float [..., D], D at least 3; each component's range from its 1st to its 99th
        percentile becomes [0, 1].
      *others: the same; they are projected and scaled as `reference` is.

    Returns:
      Of each argument, [..., 3] in [0, 1].
    """
    flat = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
    mean = flat.mean(0)
    _, vectors = np.linalg.eigh((flat - mean).T @ (flat - mean))
    components = vectors[:, :-4:-1]
    # An eigenvector's sign is arbitrary: its largest entry is made positive.
    largest = np.abs(components).argmax(0)
    components = components * np.sign(components[largest, range(3)])
    low, high = np.percentile((flat - mean) @ components, (1, 99), axis=0)

    def colour(features: np.ndarray) -> np.ndarray:
        projected = (features.astype(np.float64) - mean) @ components
        return np.clip((projected - low) / np.maximum(high - low, 1e-12), 0, 1)

    return [colour(features) for features in (reference, *others)]
