"""Resizes tensors that depend on the image size: position embeddings, bias tables, patches.

The results are those of timm (Ross Wightman, Apache-2.0) when it loads a checkpoint, to float32
precision.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


def resize_position_embedding(
    table: np.ndarray, tokens: int, antialias: bool = True
) -> np.ndarray | None:
    """Resizes a position embedding [1, T, D] to another square grid, [1, tokens, D].

    Bicubic with anti-aliasing, as in timm's `resample_abs_pos_embed`. The embeddings of prefix
    tokens (class, distillation, registers) are kept.

    Args:
      table: the embedding.
      tokens: the number of tokens, prefix tokens included.
      antialias: False interpolates between the four nearest positions per axis, as DINOv2 without
        registers does (Hugging Face's code; Meta's also adds 0.1 to the new side).

    Returns:
      The embedding, or None if `tokens` implies another number of prefix tokens.
    """
    old, new = math.isqrt(table.shape[1]), math.isqrt(tokens)
    prefix = tokens - new**2
    if table.shape[1] - old**2 != prefix:
        return None
    grid = table[0, prefix:].reshape(old, old, -1)
    matrix = _bicubic(old, new) if antialias else _bicubic_aliased(old, new)
    grid = np.einsum("Hh,Ww,hwd->HWd", matrix, matrix, grid).reshape(1, new * new, -1)
    return np.concatenate([table[:, :prefix], grid.astype(table.dtype)], axis=1)


def resize_patch_kernel(kernel: np.ndarray, patch: int) -> np.ndarray:
    """Resizes a patch projection [h, w, 3, D] to another patch size, [patch, patch, 3, D].

    The pseudo-inverse of enlarging a patch (FlexiViT, arXiv:2212.08013), as in timm's
    `resample_patch_embed`: an enlarged patch has the same projection as the original one.
    """
    rows, columns = (np.linalg.pinv(_bicubic(side, patch)) for side in kernel.shape[:2])
    return np.einsum("hH,wW,hwio->HWio", rows, columns, kernel).astype(kernel.dtype)


def resize_bias_table(table: np.ndarray, rows: int) -> np.ndarray | None:
    """Resizes relative position biases [(2w - 1)**2, heads] to another window, [rows, heads].

    Linear interpolation between positions that are denser near the centre, as in timm's
    `resize_rel_pos_bias_table` (the idea is BEiT's, arXiv:2106.08254): near neighbours keep
    their biases. BEiT's tables end in three more rows, for the class token, which are kept.

    Returns:
      The table, or None if it and `rows` differ in such further rows.
    """
    old, new = _bias_side(len(table)), _bias_side(rows)
    if len(table) - old**2 != rows - new**2:
        return None
    table, further = np.split(table, [old**2])
    half = new // 2
    positions = _geometric_positions(old // 2, half)
    matrix = np.stack(
        [np.interp(np.arange(-half, half + 1), positions, unit) for unit in np.eye(old)], axis=1
    )
    square = table.reshape(old, old, -1)
    square = np.einsum("Hh,Ww,hwn->HWn", matrix, matrix, square)
    return np.concatenate([square.reshape(new**2, -1).astype(table.dtype), further])


def _bias_side(rows: int) -> int:
    """2w - 1, the side of the square of differences in position that a table of biases starts with.

    It is odd, and followed by at most three rows: 4 are a window of 1x1 and those three.
    """
    side = math.isqrt(rows)
    return side - 1 + side % 2


_resize_aliased = functools.partial(resize_position_embedding, antialias=False)


class _Resizer(NamedTuple):
    pattern: str  # matches timm's name
    function: Callable[[np.ndarray, int], np.ndarray | None]
    axis: int  # its new length is the function's argument; the axes after it are channels
    what: str  # what the message says is resized
    side: Callable[[int], int]  # that thing's side, from the axis' length


_RESIZERS = (
    _Resizer(r"pos_embed", resize_position_embedding, 1, "grid", math.isqrt),
    _Resizer(r"patch_embed\.proj\.weight", resize_patch_kernel, 1, "patch", int),
    _Resizer(
        r".*\.relative_position_bias_table",
        resize_bias_table,
        0,
        "window",
        lambda rows: (_bias_side(rows) + 1) // 2,
    ),
)


def is_resizable(name: str) -> bool:
    """Whether the size of the tensor that timm calls `name` depends on the image size."""
    return any(re.fullmatch(resizer.pattern, name) for resizer in _RESIZERS)


def resize(
    name: str, array: np.ndarray, shape: tuple[int, ...], antialias: bool = True
) -> tuple[np.ndarray, str] | None:
    """Resizes a tensor that depends on the image size.

    Args:
      name: timm's name.
      array: the tensor in our layout.
      shape: the shape that it should have.
      antialias: of position embeddings, as in `resize_position_embedding`.

    Returns:
      the resized tensor and a description of the change, or None if it can't be resized so.
    """
    for pattern, function, axis, what, side in _RESIZERS:
        channels = axis + 1
        if (
            re.fullmatch(pattern, name)
            and array.ndim == len(shape)
            and array.shape[channels:] == shape[channels:]
        ):
            how = ""
            if function is resize_position_embedding and not antialias:
                function, how = _resize_aliased, " without antialiasing"
            resized = function(array, shape[axis])
            old, new = side(array.shape[axis]), side(shape[axis])
            if resized is not None:
                return resized, f"resized from {what} {old}x{old} to {new}x{new}{how}"
    return None


def _bicubic(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] that resizes one axis: Keys' kernel with a = -1/2, anti-aliased."""
    scale = max(old / new, 1.0)
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    x = np.abs(np.arange(old) - centres[:, None]) / scale
    weights = np.where(
        x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0.0)
    )
    return weights / weights.sum(axis=1, keepdims=True)


def _bicubic_aliased(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] that resizes one axis: Keys' kernel with a = -3/4, as in PyTorch.

    Positions beyond the border repeat the outermost one.
    """
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    taps = np.floor(centres).astype(int)[:, None] + np.arange(-1, 3)
    x = np.abs(taps - centres[:, None])
    inner, outer = (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
    matrix = np.zeros((new, old))
    rows = np.arange(new)[:, None]
    np.add.at(matrix, (rows, np.clip(taps, 0, old - 1)), np.where(x <= 1, inner, outer))
    return matrix


def _geometric_positions(count: int, reach: int) -> np.ndarray:
    """2 count + 1 positions around 0; each step is q times the one before, up to `reach`."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**count) / (1 - q) > reach else (q, high)
    positions = np.cumsum(q ** np.arange(count))
    return np.concatenate([-positions[::-1], [0.0], positions])
