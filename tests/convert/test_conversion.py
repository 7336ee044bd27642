"""Conversion in memory: names, layouts, what doesn't fit, recognition and resizing."""

import jax
import numpy as np
import pytest

from tests.convert.names import NAMES
from xkd_jax.convert import networks
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint, to_state
from xkd_jax.convert.layouts import find_layout, rename
from xkd_jax.convert.networks import get_places, recognize
from xkd_jax.convert.resize import resize_bias_table, resize_patch_kernel, resize_position_embedding
from xkd_jax.errors import UserError
from xkd_jax.models import MODELS, create_model
from xkd_jax.weights import check_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY_RESNET = {"layers": (1, 1, 1, 1), "width": 0.125}
TINY_VIT = {"embed_dim": 8, "num_heads": 2, "depth": 1, "patch_size": 4, "img_size": 16}
TINY_SWIN = {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 2, 1), "patch_size": 2}


def checkpoint(network, args=None, classes=5, **metadata):
    """Random tensors for a network, as timm would have stored them."""
    rng = np.random.default_rng(0)
    state = {
        name: rng.standard_normal(
            tuple(classes if side == -1 else side for side in place.torch_shape), np.float32
        )
        for name, place in get_places(network, args or {}).items()
    }
    return Checkpoint("w.pth", state, {"args": args or {}, **metadata})


def tiny(**metadata):
    return checkpoint("resnet18", TINY_RESNET, model="resnet18", **metadata)


def message(*args, **kwargs):
    with pytest.raises(UserError) as error:
        convert(*args, **kwargs)
    return str(error.value)


def test_every_class_of_network_is_tested():
    assert {MODELS[name].network for name in NAMES} == {v.network for v in MODELS.values()}


# The default suite has little time.
LARGE = (
    "beit_base_patch16_224",
    "vit_small_patch16_dinov3",
    "eva02_base_patch14_224",
    "swinv2_tiny_window8_256",
    "tf_efficientnetv2_b0",
    "mobilenetv3_small_100",
    "mobilenetv4_hybrid_medium",
    "mixer_b16_224",
)


@pytest.mark.parametrize(
    "model",
    [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in NAMES],
)
def test_names_and_round_trip(model):
    classes = 100 if MODELS[model].image_size == 32 else 1000
    theirs = checkpoint(model, classes=classes)
    shapes = {name: array.shape for name, array in theirs.state.items()}
    assert shapes == shapes | NAMES[model]
    ours = convert(theirs, model)
    assert ours.changes == []
    assert ours.metadata["num_classes"] == classes
    assert ours.metadata["image_size"] == MODELS[model].image_size
    back = to_state(ours.variables, model)
    assert shapes.keys() == back.keys()
    assert all(np.array_equal(back[name], array) for name, array in theirs.state.items())
    again = convert(Checkpoint("again", back, ours.metadata))
    assert again.metadata == ours.metadata
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.variables, again.variables))


def test_layouts_and_leaves():
    theirs = tiny()
    ours = convert(theirs).variables
    params, state = ours["params"], theirs.state
    stem = state["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["conv1"]["kernel"], stem)
    np.testing.assert_array_equal(params["fc"]["kernel"], state["fc.weight"].T)
    np.testing.assert_array_equal(
        params["layer2_0"]["downsample_1"]["scale"], state["layer2.0.downsample.1.weight"]
    )
    np.testing.assert_array_equal(ours["batch_stats"]["bn1"]["var"], state["bn1.running_var"])
    assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(ours))


def test_metadata():
    theirs = tiny(mean=[0.1, 0.2, 0.3], class_names=list("abcde"), test_top1=0.5, source="a lab")
    assert convert(theirs).metadata == {
        "model": "resnet18",
        "args": TINY_RESNET,
        "num_classes": 5,
        "image_size": 224,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.229, 0.224, 0.225],
        "class_names": list("abcde"),
        "test_top1": 0.5,
        "source": "a lab",
    }
    other = convert(theirs, num_classes=3, image_size=64, mean=(0, 0, 0), std=(1, 1, 1)).metadata
    assert (other["mean"], other["std"], other["image_size"]) == ([0, 0, 0], [1, 1, 1], 64)
    assert "class_names" not in other
    assert "test_top1" not in other
    assert other["changes"] == ["set fc.bias and fc.weight to zero, for 3 classes"]


def test_everything_that_does_not_fit_is_told_at_once():
    theirs = tiny()
    del theirs.state["bn1.running_var"], theirs.state["fc.weight"]
    theirs.state["layer1.0.conv1.weight"] = np.zeros((8, 4, 3, 3))
    theirs.state["extra.bias"] = np.zeros(3)
    assert message(theirs) == (
        "w.pth does not fit resnet18 in 4 of its tensors:\n"
        "  bn1.running_var [8] is missing (batch_stats/bn1/var);\n"
        "  fc.weight [5, 64] is missing (params/fc/kernel);\n"
        "  layer1.0.conv1.weight has the shape [8, 4, 3, 3] instead of [8, 8, 3, 3] "
        "(params/layer1_0/conv1/kernel);\n"
        "  unexpected tensor extra.bias [3]."
    )


def test_another_number_of_classes_gets_a_new_head():
    theirs = tiny()
    result = convert(theirs, num_classes=7)
    assert result.metadata["num_classes"] == 7
    assert not result.variables["params"]["fc"]["kernel"].any()
    assert result.variables["params"]["fc"]["kernel"].shape == (64, 7)
    assert convert(theirs, num_classes=5).changes == []


def test_a_classifier_can_be_left_out():
    result = convert(tiny(), num_classes=0)
    assert "left out fc.bias and fc.weight, the classifier" in result.changes
    assert "fc" not in result.variables["params"]
    assert result.metadata["num_classes"] == 0


def test_a_headless_checkpoint():
    theirs = tiny()
    del theirs.state["fc.weight"], theirs.state["fc.bias"]
    headless = convert(theirs)
    assert headless.metadata["num_classes"] == 0
    assert "fc" not in headless.variables["params"]
    model = create_model("resnet18", num_classes=0, **headless.metadata["args"])
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    check_weights("w", headless.variables, jax.eval_shape(model.init, jax.random.key(0), images))
    assert convert(theirs, num_classes=5).variables["params"]["fc"]["bias"].shape == (5,)
    del theirs.state["conv1.weight"]
    assert "conv1.weight [8, 3, 7, 7] is missing" in message(theirs)


def test_wrong_names():
    assert "did you mean resnet18" in message(tiny(), "resnet19")
    assert "unknown resnet18 argument 'widht'; did you mean width" in message(
        tiny(), args={"widht": 2}
    )


@pytest.fixture
def few_models(monkeypatch):
    names = ("resnet18", "resnet34", "vit_tiny_patch16_224", "deit_tiny_patch16_224")
    names += ("vit_tiny_patch4_32", "efficientnet_b0", "efficientnet_b0_32")
    monkeypatch.setattr(networks, "MODELS", {name: MODELS[name] for name in names})


@pytest.mark.usefixtures("few_models")
def test_recognition():
    resnet = checkpoint("resnet34")
    assert convert(resnet).metadata["model"] == "resnet34"
    assert message(resnet, "resnet18").startswith(
        "w.pth is not resnet18 but looks like resnet34; choose that model instead "
        "(unexpected tensor layer1.2."
    )
    efficient = convert(checkpoint("efficientnet_b0"))
    assert efficient.changes == ["recognised efficientnet_b0, not efficientnet_b0_32"]
    assert "fits vit_tiny_patch16_224, deit_tiny_patch16_224 equally well; choose one" in message(
        checkpoint("vit_tiny_patch16_224")
    )
    nothing = Checkpoint("w.pth", {"a": np.zeros(3), "b": np.zeros(2)}, {})
    assert "does not match any known network (its first tensors are a, b)" in message(nothing)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", MODELS)
def test_every_network_is_recognised(model):
    shapes = {name: place.torch_shape for name, place in get_places(model, {}).items()}
    names, score = recognize({name: tuple(map(abs, shape)) for name, shape in shapes.items()})
    assert score == 1
    assert model in names


@pytest.mark.parametrize(
    ("theirs", "timms"),
    [
        ("layers.0.downsample.norm.bias", "layers.1.downsample.norm.bias"),
        ("layers.2.downsample.reduction.weight", "layers.3.downsample.reduction.weight"),
        ("layers.2.blocks.0.norm1.bias", "layers.2.blocks.0.norm1.bias"),
        ("head.weight", "head.fc.weight"),
    ],
)
def test_old_swin(theirs, timms):
    layout = find_layout(["layers.0.downsample.reduction.weight"])
    assert layout
    assert rename(theirs, layout) == timms


@pytest.mark.parametrize(
    ("theirs", "timms"),
    [
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_bn0.running_mean", "bn1.running_mean"),
        ("_bn1.bias", "bn2.bias"),
        ("_fc.bias", "classifier.bias"),
        ("_blocks.0._depthwise_conv.weight", "blocks.0.0.conv_dw.weight"),
        ("_blocks.0._bn1.weight", "blocks.0.0.bn1.weight"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.0._bn2.weight", "blocks.0.0.bn2.weight"),
        ("_blocks.4._expand_conv.weight", "blocks.2.1.conv_pw.weight"),
        ("_blocks.4._bn0.weight", "blocks.2.1.bn1.weight"),
        ("_blocks.10._depthwise_conv.weight", "blocks.4.2.conv_dw.weight"),
        ("_blocks.15._project_conv.weight", "blocks.6.0.conv_pwl.weight"),
        ("_blocks.15._bn2.running_var", "blocks.6.0.bn3.running_var"),
        ("_blocks.1._se_reduce.bias", "blocks.1.0.se.conv_reduce.bias"),
    ],
)
def test_efficientnet_pytorch(theirs, timms):
    layout = find_layout(["_blocks.15._depthwise_conv.weight"])
    assert layout
    assert rename(theirs, layout) == timms


def test_computed_tensors_are_left_out():
    theirs = checkpoint("swin_tiny_patch4_window7_224", {**TINY_SWIN, "img_size": 32})
    theirs.state["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((49, 49), np.int64)
    result = convert(theirs, "swin_tiny_patch4_window7_224")
    assert result.changes == ["left out layers.0.blocks.0.attn.relative_position_index"]


def test_the_auxiliary_classifier_is_optional():
    theirs = checkpoint("inception_v3", {"aux_logits": True}, model="inception_v3")
    assert convert(theirs, args={"aux_logits": False}).changes[0].startswith("left out")
    state = {name: a for name, a in theirs.state.items() if not name.startswith("Aux")}
    result = convert(Checkpoint("w.pth", state, {}), "inception_v3")
    assert result.metadata["args"] == {"aux_logits": False}


def test_other_floats_become_float32():
    theirs = tiny()
    theirs.state["bn1.bias"] = theirs.state["bn1.bias"].astype(np.float16)
    result = convert(theirs)
    assert result.changes == ["converted float16 to float32"]
    assert {leaf.dtype for leaf in jax.tree.leaves(result.variables)} == {np.dtype("float32")}


@pytest.mark.usefixtures("few_models")
def test_another_image_size_for_a_vit():
    theirs = checkpoint("vit_tiny_patch4_32", TINY_VIT, model="vit_tiny_patch4_32")
    result = convert(theirs, image_size=28)
    assert result.metadata["image_size"] == result.metadata["args"]["img_size"] == 28
    assert result.changes == ["pos_embed resized from grid 4x4 to 7x7"]
    old, new = theirs.state["pos_embed"], result.variables["params"]["pos_embed"]
    np.testing.assert_array_equal(new[:, 0], old[:, 0])
    assert convert(theirs, image_size=16).changes == []
    patches = convert(theirs, args={**TINY_VIT, "patch_size": 2})
    assert patches.changes == [
        "patch_embed.proj.weight resized from patch 4x4 to 2x2",
        "pos_embed resized from grid 4x4 to 8x8",
    ]
    assert "img_size 30 must be a multiple of patch_size 4" in message(theirs, image_size=30)
    distilled = {**TINY_VIT, "distilled": True}
    assert "pos_embed has the shape [1, 17, 8] instead of [1, 18, 8]" in message(
        theirs, args=distilled
    )


def test_another_window_for_a_swin():
    args = {**TINY_SWIN, "img_size": 32, "window_size": 4}
    theirs = checkpoint("swin_tiny_patch4_window7_224", args, model="swin_tiny_patch4_window7_224")
    result = convert(theirs, args={**args, "window_size": 8})
    assert result.changes == [
        "relative_position_bias_table resized from window 4x4 to 8x8, 2 times"
    ]
    assert "such as 32 or 34" in message(theirs, image_size=33)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_position_embeddings(prefix):
    table = np.random.default_rng(0).standard_normal((1, prefix + 16, 3), np.float32)
    np.testing.assert_array_equal(resize_position_embedding(table, prefix + 16), table)
    larger = resize_position_embedding(table, prefix + 49)
    assert larger is not None
    assert larger.dtype == np.float32
    np.testing.assert_array_equal(larger[:, :prefix], table[:, :prefix])
    flat = resize_position_embedding(np.ones_like(table), prefix + 4)
    np.testing.assert_allclose(flat, 1, rtol=1e-6)
    assert resize_position_embedding(table, prefix + 50) is None


def test_resizing_gives_timms_numbers():
    table = np.arange(10.0).reshape(1, 5, 2) ** 2
    resized = resize_position_embedding(table, 10)
    assert resized is not None
    wanted = [0, 1.17452216, 7.36842728, 13.56233501, 18.68421364, 30, 41.31579208, 36.19391251]
    np.testing.assert_allclose(resized[0, :8, 0], wanted, rtol=1e-5)
    table = np.tile(np.arange(7.0) ** 2, 7).reshape(49, 1)
    wanted = [0, 0, 0.33333, 0.77778, 2, 4, 9, 16, 22, 27.44445, 32.33335, 36, 36]
    resized = resize_bias_table(table, 169).reshape(13, 13)
    np.testing.assert_allclose(resized, [wanted] * 13, atol=3e-5)
    kernel = np.arange(4.0).reshape(2, 2, 1, 1) ** 2
    wanted = [
        [-0.3146441, -0.21188661, -0.10912949],
        [0.67183542, 1.55555463, 2.43927455],
        [1.65831518, 3.32299733, 4.98768044],
    ]
    np.testing.assert_allclose(resize_patch_kernel(kernel, 3)[:, :, 0, 0], wanted, atol=1e-5)


def test_other_resizing_properties():
    table = np.random.default_rng(0).standard_normal((49, 3), np.float32)
    np.testing.assert_allclose(resize_bias_table(np.ones_like(table), 225), 1, rtol=1e-6)
    middle = resize_bias_table(table, 225)[112]
    np.testing.assert_allclose(middle, table[24], rtol=1e-6)
    kernel = np.random.default_rng(0).standard_normal((4, 4, 3, 2), np.float32)
    np.testing.assert_allclose(resize_patch_kernel(kernel, 4), kernel, atol=1e-6)
    # An image of one colour keeps its embedding, whatever the patch.
    larger = resize_patch_kernel(kernel, 8)
    np.testing.assert_allclose(larger.sum((0, 1)), kernel.sum((0, 1)), atol=1e-4)
