"""NumPy float64 references for tests of methods: levels as maps, resizing, connectors."""

import jax
import numpy as np

from tests.methods.outputs import pair
from tests.methods.test_align import adaptive_average, bilinear

# The matching levels of the pairs in `outputs`, shallow to deep.
_STAGES, _BLOCKS = ("stage2", "stage3", "stage4"), ("block01", "block02", "block03")
LEVELS = {
    "CNN to CNN": (_STAGES, _STAGES),
    "ViT to CNN": (_BLOCKS, _STAGES),
    "Swin to CNN": (("stage1", *_STAGES), ("stage1", *_STAGES)),
    "Swin to ViT": (_STAGES, _BLOCKS),
    "CNN to ViT": (_STAGES, _BLOCKS),
}


def level_map(out, name, before_activation=False, standardize=True):
    """[N, h, w, C]; optionally before a CNN's activation, optionally with standardised tokens."""
    if "tokens" not in out:
        return np.float64(out[f"{name}_pre" if before_activation else name])
    x = np.float64(out[name])
    if x.ndim == 3:
        x = x.reshape(len(x), *out["grid"], -1)
    if standardize:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x


def level_maps(name, **how):
    """The teacher's and the student's map at each level of a pair."""
    levels = zip(*LEVELS[name], strict=True)
    return [
        tuple(level_map(out, level, **how) for out, level in zip(pair(name), both, strict=True))
        for both in levels
    ]


def on_grid(x, grid):
    for axis, target in zip((1, 2), grid, strict=True):
        if x.shape[axis] != target:
            resize = adaptive_average if x.shape[axis] > target else bilinear
            x = resize(x, axis, target)
    return x


def conv_norm(params, x):
    """A 1x1 convolution; each channel is normalised over the batch and the positions."""
    params = jax.tree.map(np.float64, params["params"])
    x = x @ params["conv"]["kernel"][0, 0]
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    return x * params["scale"] + params["bias"]
