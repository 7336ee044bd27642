from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.models.networks import TINY_REGNET, images, initial, shapes
from xkd_jax.errors import UserError
from xkd_jax.models import create_model
from xkd_jax.models.regnet import VARIANTS, Bottleneck, adjust_width, block_widths

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Blocks, width and groups of each stage, in timm and, except for regnety_008, in torchvision.
STAGES = {
    "regnety_004": [(1, 48, 6), (3, 104, 13), (6, 208, 26), (6, 440, 55)],
    "regnety_008": [(1, 64, 4), (3, 128, 8), (8, 320, 20), (2, 768, 48)],
    "regnety_008_tv": [(1, 64, 4), (3, 144, 9), (8, 320, 20), (2, 784, 49)],
    "regnety_016": [(2, 48, 2), (6, 120, 5), (17, 336, 14), (2, 888, 37)],
    "regnety_032": [(2, 72, 3), (5, 216, 9), (13, 576, 24), (1, 1512, 63)],
}


def tiny(**args):
    return create_model("regnety_004_32", num_classes=5, **TINY_REGNET | args)


@pytest.mark.parametrize("name", STAGES)
def test_widths_and_groups_are_timms(name):
    model = VARIANTS[name].network(**VARIANTS[name].args)
    found = []
    widths = Counter(block_widths(model.depth, model.w0, model.wa, model.wm))
    for width, depth in sorted(widths.items()):
        features, group_size = adjust_width(width, model.group_size, model.tv_rounding)
        found.append((depth, features, features // group_size))
    assert found == STAGES[name]


def test_a_group_is_not_wider_than_the_stage():
    assert adjust_width(8, 24, False) == (8, 8)
    assert adjust_width(32, 24, False) == (24, 24)
    assert adjust_width(32, 24, True) == (48, 24)


def test_parameters_have_timms_names_and_count():
    model = create_model("regnety_004", num_classes=1000)
    params = jax.eval_shape(model.init, jax.random.key(0), images(1, 32))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_344_144
    assert params.keys() == {"stem", "s1", "s2", "s3", "s4", "head"}
    assert params["s2"].keys() == {"b1", "b2", "b3"}
    assert params["s2"]["b1"].keys() == {"conv1", "conv2", "se", "conv3", "downsample"}
    assert params["s2"]["b2"].keys() == {"conv1", "conv2", "se", "conv3"}
    assert params["s4"]["b2"]["conv2"]["conv"]["kernel"].shape == (3, 3, 8, 440)
    # A quarter of the block's input.
    assert params["s2"]["b1"]["se"]["fc1"]["kernel"].shape == (1, 1, 104, 12)


@pytest.mark.parametrize(
    ("stem", "size", "sides"), [("cifar", 32, (32, 16, 8, 4)), ("imagenet", 97, (25, 13, 7, 4))]
)
def test_out(stem, size, sides):
    expected: dict[str, tuple[int, ...]] = {"pooled": (2, 32), "logits": (2, 5)}
    for stage, (side, channels) in enumerate(zip(sides, (8, 16, 24, 32), strict=True), start=1):
        expected[f"stage{stage}"] = expected[f"stage{stage}_pre"] = (2, side, side, channels)
    assert shapes(tiny(stem=stem), jnp.zeros((2, size, size, 3)), train=True) == expected


def test_starts_as_timms():
    s4, head = initial(tiny(wa=15.0, wm=1.5, group_size=32), "s4", "head")
    block = s4["b1"]
    assert not block["conv3"]["bn"]["scale"].any()  # a new block starts as the identity
    assert block["conv2"]["bn"]["scale"].all()
    kernel = block["conv2"]["conv"]["kernel"]
    assert kernel.shape[-2:] == (32, 64)
    # Kaiming, fan out within a group of 32 channels.
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 32)) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(head["fc"]["kernel"].std(), 0.01, rtol=0.2)


def test_drop_path_rises_from_zero():
    rates = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, Bottleneck):
            rates.append(context.module.drop_path)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        model = tiny(depth=8, wa=3.5, drop_path_rate=0.7)
        jax.eval_shape(model.init, jax.random.key(0), images(1))
    np.testing.assert_allclose(rates, [0.1 * i for i in range(8)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"stem": "cifar10"}, "did you mean cifar"),
        ({"w0": 12}, "w0 must be a multiple of 8, not 12"),
        ({"wa": -1.0}, "wa must be at least 0 and wm above 1, not -1.0 and 1.6"),
        ({"wm": 1.0}, "wm above 1"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"se_ratio": -0.5}, "se_ratio at least 0"),
        ({"depth": 3}, r"must give four widths, not \[8, 16, 24\]"),
    ],
)
def test_wrong_values(args, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tiny(**args).init, jax.random.key(0), images(1))
