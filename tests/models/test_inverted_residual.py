"""What EfficientNets and MobileNets share, apart from what test_efficientnet.py tests."""

import jax
import numpy as np
import pytest

from tests.models.networks import images, init
from xkd_jax.models.inverted_residual import (
    ConvBlock,
    FusedInvertedResidual,
    InvertedResidual,
    round_channels,
    scale_repeats,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def parameters(block, x=None):
    return jax.eval_shape(block.init, jax.random.key(0), images() if x is None else x)["params"]


@pytest.mark.parametrize(
    ("repeats", "depth", "want"),
    [
        ([3], 1.1, [4]),
        ([1, 1, 2], 1.0, [1, 1, 2]),
        ([1, 1, 2], 1.2, [1, 2, 2]),  # the first row gets what the others leave
        ([1, 2], 1.4, [2, 3]),
        ([1, 1, 2], 0.1, [1, 1, 1]),
    ],
)
def test_the_depth_of_a_stage_is_shared_among_its_rows(repeats, depth, want):
    assert scale_repeats(repeats, depth) == want


def test_channels_without_a_limit_round_to_the_nearest():
    assert round_channels(24, 0.8) == 24  # 19.2, and 16 would lose more than a tenth
    assert round_channels(24, 0.8, 0.0) == 16


def test_fused_residuals_have_timms_names():
    params = parameters(FusedInvertedResidual(8, expansion=4))
    assert params.keys() == {"conv_exp", "bn1", "conv_pwl", "bn2"}
    assert params["conv_exp"]["kernel"].shape == (3, 3, 3, 16)  # 12, in multiples of 8


def test_mobilenetv3s_squeeze_excite_reads_the_expanded_channels():
    block = InvertedResidual(16, expansion=3.67, squeeze_excite="mobilenetv3")
    params = parameters(block, images().repeat(8, -1))
    assert params["conv_pw"]["kernel"].shape == (1, 1, 24, 88)
    assert params["se"]["conv_reduce"]["kernel"].shape == (1, 1, 88, 24)
    assert params["se"]["conv_expand"].keys() == {"kernel", "bias"}


@pytest.mark.parametrize(("shortcut", "features"), [(True, 3), (True, 8), (False, 3)])
def test_a_convolution_adds_its_input_after_the_activation(shortcut, features):
    block, x = ConvBlock(features, shortcut=shortcut), images(2, 8)
    y, pre = jax.jit(block.apply)(init(block, 8), x)
    if shortcut and features == 3:
        assert np.array_equal(y, pre)
        assert (y >= x).all()
        assert (y > x).any()
    else:
        np.testing.assert_array_equal(y, np.maximum(pre, 0))
        assert (pre < 0).any()
