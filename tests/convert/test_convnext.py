"""ConvNeXts under Meta's, torchvision's and Hugging Face's names, and in their shapes."""

import re

import numpy as np
import pytest

from tests.convert.test_conversion import checkpoint
from xkd_jax.augment.normalization import IMAGENET_MEAN
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"depths": (1, 1, 2, 1), "dims": (4, 6, 8, 10)}
# Patterns of timm's names, and theirs.
META = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"\.blocks\.", "."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc", ".pwconv"),
    (r"\.mlp\.grn\.weight", ".grn.gamma"),
    (r"\.mlp\.grn\.bias", ".grn.beta"),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)
TORCHVISION = (
    (r"^stem\.", "features.0."),
    *((rf"^stages\.{i}\.blocks\.", f"features.{2 * i + 1}.") for i in range(4)),
    *((rf"^stages\.{i}\.downsample\.", f"features.{2 * i}.") for i in range(1, 4)),
    (r"\.conv_dw\.", ".block.0."),
    (r"(?<=\d)\.norm\.", ".block.2."),
    (r"\.mlp\.fc1\.", ".block.3."),
    (r"\.mlp\.fc2\.", ".block.5."),
    (r"\.gamma$", ".layer_scale"),
    (r"^head\.norm\.", "classifier.0."),
    (r"^head\.fc\.", "classifier.2."),
)
HUGGING_FACE = (
    (r"^stem\.0\.", "convnext.embeddings.patch_embeddings."),
    (r"^stem\.1\.", "convnext.embeddings.layernorm."),
    (r"(?<=\d)\.norm\.", ".layernorm."),
    (r"^head\.norm\.", "convnext.layernorm."),
    (r"^head\.fc\.", "classifier."),
    (r"^stages\.(\d)\.blocks\.", r"convnext.encoder.stages.\1.layers."),
    (r"^stages\.(\d)\.downsample\.", r"convnext.encoder.stages.\1.downsampling_layer."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc", ".pwconv"),
    (r"\.mlp\.grn\.", ".grn."),
    (r"\.gamma$", ".layer_scale_parameter"),
)


def reshaped(name, array):
    """A tensor of timm's in the shape that others give it."""
    if ".mlp.fc" in name and array.ndim == 4:
        return array[:, :, 0, 0]
    if ".grn." in name:
        return array[None, None, None]
    return array[:, None, None] if name.endswith(".gamma") else array


@pytest.mark.parametrize(
    ("model", "whose", "names"),
    [
        pytest.param("convnext_tiny", "torchvision's", TORCHVISION, marks=pytest.mark.slow),
        pytest.param("convnext_atto", "Hugging Face's", HUGGING_FACE, marks=pytest.mark.slow),
        ("convnextv2_atto", "Meta's", META),
    ],
)
def test_other_names_and_shapes(model, whose, names):
    state = checkpoint(model, TINY).state
    theirs = {}
    for name, array in state.items():
        renamed = name
        for pattern, replacement in names:
            renamed = re.sub(pattern, replacement, renamed)
        theirs[renamed] = reshaped(name, array)
    result = convert(Checkpoint("w", theirs, {}), model, args=TINY)
    assert result.changes == [f"renamed the tensors from {whose} names"]
    want = convert(Checkpoint("w", state, {}), model, args=TINY)
    np.testing.assert_equal(result.variables, want.variables)
    assert result.metadata["mean"] == list(IMAGENET_MEAN)
