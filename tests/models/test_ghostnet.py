import jax
import numpy as np
import pytest

from tests.models.networks import images
from xkd_jax.errors import UserError
from xkd_jax.models import create_model
from xkd_jax.models.ghostnet import GhostModule, round_channels

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_parameters_are_timms_and_32x32_images_end_at_4x4():
    model = create_model("ghostnet_100_32", num_classes=1000)
    (_, out), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images())
    params = variables["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 5_182_508
    block = params["blocks_3_0"]
    layers = {"ghost1", "conv_dw", "bn_dw", "se", "ghost2", *(f"shortcut_{i}" for i in range(4))}
    assert block.keys() == layers
    assert params["blocks_4_0"].keys() == {"ghost1", "se", "ghost2"}
    assert block["se"]["conv_reduce"]["kernel"].shape == (1, 1, 72, 20)
    assert block["ghost1"]["cheap_operation_0"]["kernel"].shape == (3, 3, 1, 36)
    assert params["blocks_9_0"].keys() == {"conv", "bn1"}
    check(out, (32, 16, 8, 4), (24, 40, 112, 160))


def check(out, sides, channels):
    expected: dict[str, tuple[int, ...]] = {"pooled": (2, 1280), "logits": (2, 1000)}
    for stage, (side, count) in enumerate(zip(sides, channels, strict=True), start=1):
        expected[f"stage{stage}"] = expected[f"stage{stage}_pre"] = (2, side, side, count)
    assert {key: leaf.shape for key, leaf in out.items()} == expected


@pytest.mark.slow
def test_out_of_odd_images_and_half_the_width():
    model, x = create_model("ghostnet_100", num_classes=1000, width=0.5), images(size=97)
    (_, out), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    check(out, (25, 13, 7, 4), (12, 20, 56, 80))


def test_channels_round_to_multiples_of_four():
    assert [round_channels(n) for n in (16, 18, 19.5, 1)] == [16, 20, 20, 4]
    assert round_channels(5.9) == 8  # 4 would lose more than a tenth


def test_an_odd_number_of_channels_drops_the_last_ghost():
    module, x = GhostModule(5, True), images(size=4)
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    assert y.shape == (2, 4, 4, 5)
    assert variables["params"]["cheap_operation_1"]["scale"].shape == (3,)
    # PyTorch's initialisation: uniform within 1 / sqrt(fan in).
    kernel = variables["params"]["cheap_operation_0"]["kernel"]
    assert 0.8 / 3 < np.abs(kernel).max() <= 1 / 3


@pytest.mark.parametrize(
    ("args", "message"),
    [({"stem": "cifar10"}, "did you mean cifar"), ({"width": 0.0}, "above 0, not 0.0")],
)
def test_wrong_values(args, message):
    model = create_model("ghostnet_100", num_classes=5, **args)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), images(1))
