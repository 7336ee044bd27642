"""DINOv2's and DeiT III's weights: timm's, Meta's and Hugging Face's names, and their resizing."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.test_conversion import checkpoint, message
from tests.convert.test_layouts import hugging_face_vit
from xkd_jax.convert import networks
from xkd_jax.convert.configs import read_config
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint, read_checkpoint, to_state
from xkd_jax.convert.layouts import find_layout, name_unread, rename
from xkd_jax.convert.resize import resize_position_embedding
from xkd_jax.models import MODELS

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLAIN, REGISTERS = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
TINY = {"embed_dim": 8, "num_heads": 2, "depth": 2, "patch_size": 4, "img_size": 16}


def meta(model):
    """timm's tensors, and the same network's as Meta publishes them."""
    state = checkpoint(model, TINY).state
    theirs = {name: array for name, array in state.items() if not name.startswith("head.")}
    theirs["mask_token"] = np.zeros((1, 8), np.float32)
    if model == REGISTERS:
        theirs["register_tokens"] = theirs.pop("reg_token")
        first = np.full((1, 1, 8), 0.25, np.float32)
        theirs["cls_token"] = theirs["cls_token"] - first
        theirs["pos_embed"] = np.concatenate([first, theirs["pos_embed"]], axis=1)
    return state, theirs


def hugging_face(model, prefix=""):
    """Meta's tensors as Hugging Face names them."""
    _, state = meta(model)
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "pos_embed": "embeddings.position_embeddings",
        "norm": "layernorm",
    }
    names |= {name: f"embeddings.{name}" for name in ("cls_token", "mask_token", "register_tokens")}
    parts = {"attn.proj": "attention.output.dense", "ls1": "layer_scale1", "ls2": "layer_scale2"}
    theirs = {}
    for name, array in state.items():
        stem, _, leaf = name.rpartition(".")
        if not name.startswith("blocks."):
            theirs[names[name] if name in names else f"{names[stem]}.{leaf}"] = array
            continue
        _, block, part = stem.split(".", 2)
        new, leaf = f"encoder.layer.{block}.", "lambda1" if leaf == "gamma" else leaf
        if part == "attn.qkv":
            for third, values in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                theirs[f"{new}attention.attention.{third}.{leaf}"] = values
        else:
            theirs[f"{new}{parts.get(part, part)}.{leaf}"] = array
    return {f"{prefix}{name}": array for name, array in theirs.items()}


def converted(state, model):
    return convert(Checkpoint("w", state, {}), model, args=TINY, num_classes=5)


def assert_equal_but_for_the_head(result, state, model):
    got = to_state(result.variables, model)
    assert got.keys() == state.keys()
    for name in state.keys() - {"head.weight", "head.bias"}:
        np.testing.assert_allclose(got[name], state[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("model", [PLAIN, REGISTERS, "deit3_small_patch16_224"])
def test_timms_names_and_back(model):
    theirs = checkpoint(model, TINY, model=model)
    assert theirs.state["blocks.1.ls2.gamma"].shape == (8,)
    prefix = {PLAIN: 1, REGISTERS: 0}.get(model, 0)
    assert theirs.state["pos_embed"].shape == (1, 16 + prefix, 8)
    result = convert(theirs)
    assert result.changes == []
    back = to_state(result.variables, model)
    assert back.keys() == theirs.state.keys()
    assert all(np.array_equal(back[name], array) for name, array in theirs.state.items())
    assert ("reg_token" in back) == (model == REGISTERS)


@pytest.mark.parametrize("model", [PLAIN, REGISTERS])
def test_metas_names(model):
    state, theirs = meta(model)
    result = converted(theirs, model)
    assert_equal_but_for_the_head(result, state, model)
    wanted = ["set head.bias and head.weight to zero, for 5 classes"]
    if model == REGISTERS:
        wanted[:0] = [
            "renamed the tensors from Meta's names",
            "added the class token's position embedding to the token, as in timm",
        ]
    assert result.changes == wanted


@pytest.mark.parametrize(
    ("model", "prefix"),
    [(PLAIN, ""), (PLAIN, "dinov2."), (REGISTERS, ""), (REGISTERS, "dinov2_with_registers.")],
)
def test_hugging_faces_names(model, prefix):
    state, _ = meta(model)
    result = converted(hugging_face(model, prefix), model)
    assert_equal_but_for_the_head(result, state, model)
    assert result.changes[0] == "renamed the tensors from Hugging Face's names"


@pytest.mark.parametrize(
    ("theirs", "timms"),
    [
        ("dinov2.encoder.layer.3.layer_scale1.lambda1", "blocks.3.ls1.gamma"),
        ("encoder.layer.11.norm2.bias", "blocks.11.norm2.bias"),
        ("encoder.layer.11.mlp.fc1.bias", "blocks.11.mlp.fc1.bias"),
        ("encoder.layer.0.attention.output.dense.weight", "blocks.0.attn.proj.weight"),
        ("dinov2_with_registers.embeddings.register_tokens", "reg_token"),
        ("dinov2.layernorm.weight", "norm.weight"),
    ],
)
def test_hugging_faces_tensors(theirs, timms):
    layout = find_layout(["dinov2.encoder.layer.0.attention.attention.query.weight"])
    assert layout
    assert rename(theirs, layout) == timms


def test_a_head_on_the_class_token_and_the_mean_token():
    theirs = hugging_face(PLAIN, "dinov2.")
    weight = np.arange(7 * 16, dtype=np.float32).reshape(7, 16)
    theirs |= {"classifier.weight": weight, "classifier.bias": np.ones(7, np.float32)}
    result = convert(Checkpoint("w", theirs, {}), PLAIN, args=TINY)
    assert result.metadata["args"] == {**TINY, "global_pool": "token_avg"}
    assert result.metadata["num_classes"] == 7
    # As there, the class token comes first.
    np.testing.assert_array_equal(result.variables["params"]["head"]["kernel"], weight.T)


def test_a_vit_of_hugging_face_without_a_classifier():
    args = {**TINY, "depth": 1}
    state, theirs = hugging_face_vit(args)
    bare = {k.removeprefix("vit."): v for k, v in theirs.items() if not k.startswith("classifier")}
    model = "vit_tiny_patch16_224"
    result = convert(Checkpoint("w", bare, {}), model, args=args, num_classes=5)
    assert_equal_but_for_the_head(result, state, model)


def test_a_networks_own_registers_are_needed():
    _, theirs = meta(REGISTERS)
    assert "unexpected tensor reg_token [1, 4, 8]" in message(
        Checkpoint("w", theirs, {}), PLAIN, args=TINY
    )
    _, theirs = meta(PLAIN)
    assert "reg_token [1, 4, 8] is missing" in message(
        Checkpoint("w", theirs, {}), REGISTERS, args=TINY
    )


@pytest.fixture
def small_models(monkeypatch):
    names = [name for name in MODELS if name.startswith(("vit_small", "deit3_small", "deit_small"))]
    monkeypatch.setattr(networks, "MODELS", {name: MODELS[name] for name in names})


@pytest.mark.slow
@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize(
    ("model", "args"),
    [
        (PLAIN, {}),
        (PLAIN, {"img_size": 224}),
        (REGISTERS, {}),
        (REGISTERS, {"img_size": 112}),
        ("deit3_small_patch16_224", {}),
        ("deit3_small_patch16_384", {}),
        ("vit_small_patch32_224", {}),
    ],
)
def test_recognition_is_unambiguous(model, args):
    found = convert(Checkpoint("w", checkpoint(model, args).state, {}))
    assert found.metadata["model"] == model
    others = [change for change in found.changes if change.startswith("recognised")]
    assert others == [f"recognised {model}"]


@pytest.mark.usefixtures("small_models")
def test_metas_and_hugging_faces_files_are_recognised():
    for model in (PLAIN, REGISTERS):
        state = checkpoint(model).state
        state["mask_token"] = np.zeros((1, 384), np.float32)
        if model == REGISTERS:
            state["register_tokens"] = state.pop("reg_token")
            state["pos_embed"] = np.zeros((1, 1370, 384), np.float32)
        found = convert(Checkpoint("w", state, {}), image_size=112)
        assert found.metadata["model"] == model
        assert "pos_embed resized from grid 37x37 to 8x8" in found.changes


@pytest.mark.slow
def test_a_stated_architecture_wins(tmp_path):
    # The tensors are those of the networks at 224 and 384 pixels as well, up to their sizes.
    state = checkpoint("deit3_small_patch16_224", TINY).state
    path = tmp_path / "w.safetensors"
    stated = {"source": "a lab", "license": "Apache-2.0"}
    save_file(state, path, {"architecture": f"{PLAIN}.lvd142m", **stated})
    known = read_checkpoint(path)
    assert known.metadata == {"model": PLAIN, **stated}
    assert "pos_embed has the shape [1, 16, 8] instead of [1, 17, 8]" in message(known, args=TINY)
    save_file(checkpoint(PLAIN, TINY).state, path, {"architecture": PLAIN, **stated})
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    metadata = convert(read_checkpoint(path), args=TINY).metadata
    assert metadata == metadata | {"model": PLAIN, **stated}
    save_file(state, path, {"architecture": "vit_giant_patch14_dinov2"})
    assert "states that it is vit_giant_patch14_dinov2, which is not among the networks here" in (
        message(read_checkpoint(path))
    )


def test_hugging_faces_config(tmp_path):
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "image_size": 518,
        "num_attention_heads": 6,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == ({"args": {"num_heads": 6}, "image_size": 518}, [])
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_swiglu_ffn": True}))
    assert read_config(tmp_path)[0]["architecture"] == "Dinov2Model"


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("blocks.0.mlp.w12.weight", "DINOv2's ViT-g"),
        ("dinov2.encoder.layer.0.mlp.weights_in.weight", "DINOv2's ViT-g"),
        ("storage_tokens", "Meta's DINOv3 of another size"),
        ("blocks.0.gamma_1", "timm's DINOv3, EVA or BEiT of another size"),
    ],
)
def test_relatives_that_are_not_read(name, network):
    assert name_unread([name, "cls_token"]) == network


@pytest.mark.parametrize("prefix", [0, 1])
def test_resizing_without_antialiasing(prefix):
    table = np.arange(9.0 + prefix).reshape(1, -1, 1) ** 2
    if prefix:
        table = np.concatenate([table[:, -1:], table[:, :-1]], axis=1)
    resized = resize_position_embedding(table, prefix + 4, antialias=False)
    assert resized is not None
    # torch.nn.functional.interpolate(..., mode="bicubic")
    wanted = [1.430755615, 6.522369385, 32.39736938, 53.18075562]
    np.testing.assert_allclose(resized[0, prefix:, 0], wanted, rtol=1e-6)
    np.testing.assert_array_equal(resized[:, :prefix], table[:, :prefix])
    same = resize_position_embedding(table, prefix + 9, antialias=False)
    np.testing.assert_array_equal(same, table)
    flat = resize_position_embedding(np.ones((1, 37 * 37 + prefix, 2)), prefix + 64, False)
    np.testing.assert_allclose(flat, 1, rtol=1e-6)


def test_the_metadata_say_how_positions_were_resized():
    theirs = checkpoint(PLAIN, TINY, model=PLAIN)
    with_it = convert(theirs, image_size=8)
    without = convert(theirs, image_size=8, antialias=False)
    assert with_it.metadata["changes"] == ["pos_embed resized from grid 4x4 to 2x2"]
    assert without.metadata["changes"] == [
        "pos_embed resized from grid 4x4 to 2x2 without antialiasing"
    ]
    a, b = (result.variables["params"]["pos_embed"] for result in (with_it, without))
    assert np.abs(a - b).max() > 0.01
    assert "such as 16 or 20" in message(theirs, image_size=18)
