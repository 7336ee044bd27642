"""Weights derived from parameter names: the same on both sides without shipping any."""

import math
import re
import zlib

import numpy as np

# A prime, so that no dimension of a tensor is in step with the repetition. NumPy promises that its
# legacy generator never changes, and nothing of the kind for the new one.
_POOL = np.random.RandomState(0).standard_normal(65537).astype(np.float32)

# What is added to a Transformer's residual stream. It and whatever goes into a BatchNorm are kept
# near 0.1, where the epsilons still show in the results; all else is near 1.
_STREAM = re.compile(
    r"(patch_embed\.(proj|norm)|norm_pre|attn_pool\.proj|stem\.proj"
    r"|.*\.(attn\.proj|mlp(_tokens|_channels)?\.fc2|downsample\.reduction))\.(weight|bias)"
    r"|pos_embed|cls_token|dist_token|reg_token"
)
# The last norm of a residual block: more, and a hundred blocks would magnify every rounding error.
_LAST_NORM = re.compile(r"layer\d\.\d+\.bn[23]\.weight")
# The BatchNorm of a RepVGG block's input: near 1, it would magnify it tenfold in every block.
_IDENTITY_NORM = re.compile(r".*\.identity\.weight")
# Convolutions that no BatchNorm follows: squeeze-excite's, the depthwise ones of Xception, and the
# first of ConvNeXt's MLPs.
_UNNORMED = re.compile(
    r".*\.se\.(conv_(reduce|expand)|fc[12])\.weight|(block\d+\.rep\.\d|conv[34])\.conv1\.weight"
    r"|.*\.mlp\.fc1\.weight"
)


def noise(key: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Standard normal numbers times `scale`, float32 of `shape`; `key` alone decides which."""
    pool = np.roll(_POOL, zlib.crc32(key.encode()) % _POOL.size) * np.float32(scale)
    return np.resize(pool, shape)


def images(batch: int, size: int) -> np.ndarray:
    """The images that both sides see, [batch, size, size, 3].

    Noise of different colour and contrast: deep down, images of plain noise look so much alike
    that BatchNorm over a few of them would magnify rounding errors.
    """
    contrast = np.array([1, 2, 0.5, 3], np.float32)[:batch, None, None, None]
    return noise("colours", (batch, 1, 1, 3)) + contrast * noise("images", (batch, size, size, 3))


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor called `name` in PyTorch's state dict, float32 of PyTorch's `shape`.

    In memory a convolution's is laid out as in Flax, HWIO, and a linear layer's as [in, out], so
    that transposing to Flax's layout needs no copy.
    """
    if name.endswith(".running_mean"):
        return noise(name, shape, 0.02)
    if name.endswith(".running_var"):
        return 0.005 + np.abs(noise(name, shape, 0.01))
    if name.endswith(".logit_scale"):
        return 3.5 + noise(name, shape)  # some above the limit log(100)
    scale = 0.1 if _STREAM.fullmatch(name) else 1.0
    if not name.endswith((".weight", ".gamma")):
        return noise(name, shape, 0.2 * scale)
    if len(shape) == 1:
        scale = 0.4 if _LAST_NORM.fullmatch(name) else scale
        scale = 0.1 if _IDENTITY_NORM.fullmatch(name) else scale
        return np.float32(scale) + noise(name, shape, 0.2 * scale)
    flipped = (1, 0)
    if len(shape) == 4:
        flipped = (2, 3, 1, 0)
        scale = 1.0 if _UNNORMED.fullmatch(name) else 0.1
    deviation = scale * math.prod(shape[1:]) ** -0.5
    array = noise(name, tuple(shape[i] for i in flipped), deviation)
    return array.transpose(np.argsort(flipped))
