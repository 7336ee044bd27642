"""BEiT's, EVA-02's and DINOv3's weights: timm's, Meta's and Hugging Face's names, and resizing."""

import json

import numpy as np
import pytest

from tests.convert.test_conversion import checkpoint, message
from xkd_jax.convert import networks
from xkd_jax.convert.configs import read_config
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint, to_state
from xkd_jax.convert.resize import resize_bias_table
from xkd_jax.models import MODELS

pytestmark = pytest.mark.usefixtures("quick_compilation")

DINOV3, BEIT, EVA02 = "vit_small_patch16_dinov3", "beit_base_patch16_224", "eva02_base_patch14_224"
TINY = {"embed_dim": 16, "num_heads": 2, "depth": 2, "patch_size": 4, "img_size": 16}
TABLE = "relative_position_bias_table"
HEAD = {"head.weight", "head.bias"}


def headless(state):
    return {name: array for name, array in state.items() if name not in HEAD}


def split(name, array, names):
    return zip((f"{name}{part}" for part in names), np.split(array, len(names)), strict=True)


def meta(state):
    """DINOv3's tensors as Meta publishes them, from timm's."""
    theirs = {"mask_token": np.zeros((1, 16), np.float32), "rope_embed.periods": np.ones(4)}
    for name, array in headless(state).items():
        if name.endswith("attn.q_bias"):
            bias = name.removesuffix("q_bias") + "qkv.bias"
            key = np.full(16, np.nan, np.float32)  # masked
            value = state[name.replace("q_bias", "v_bias")]
            theirs |= {bias: np.concatenate([array, key, value]), f"{bias}_mask": np.ones(48)}
        elif not name.endswith("attn.v_bias"):
            new = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
            theirs[{"reg_token": "storage_tokens"}.get(name, new)] = array
    return theirs


def hugging_face_dinov3(state, prefix="layer."):
    names = {"reg_token": "register_tokens", "attn.proj": "attention.o_proj"}
    names |= {"attn.q_bias": "attention.q_proj.bias", "attn.v_bias": "attention.v_proj.bias"}
    names |= {"gamma_1": "layer_scale1.lambda1", "gamma_2": "layer_scale2.lambda1"}
    names |= {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj", "cls_token": "cls_token"}
    theirs = {"embeddings.mask_token": np.zeros((1, 1, 16), np.float32)}
    for name, array in headless(state).items():
        if not name.startswith("blocks."):
            new = name.replace("patch_embed.proj", "embeddings.patch_embeddings")
            theirs[f"embeddings.{names[name]}" if name in names else new] = array
            continue
        _, block, part = name.split(".", 2)
        if part == "attn.qkv.weight":
            parts = [f"{which}_proj.weight" for which in "qkv"]
            theirs |= split(f"{prefix}{block}.attention.", array, parts)
            continue
        stem, _, leaf = part.rpartition(".")
        new = names.get(part) or f"{names.get(stem, stem)}.{leaf}"
        theirs[f"{prefix}{block}.{new}"] = array
    return theirs


def hugging_face_beit(state, prefix="beit."):
    names = {"attn.proj": "attention.output.dense", "norm1": "layernorm_before"}
    names |= {"norm2": "layernorm_after", "mlp.fc1": "intermediate.dense"}
    names |= {"mlp.fc2": "output.dense", "gamma_1": "lambda_1", "gamma_2": "lambda_2"}
    attention = "attention.attention."
    names |= {"attn.q_bias": f"{attention}query.bias", "attn.v_bias": f"{attention}value.bias"}
    names |= {f"attn.{TABLE}": f"{attention}relative_position_bias.{TABLE}"}
    ends = {"patch_embed.proj": "embeddings.patch_embeddings.projection"}
    ends |= {"fc_norm": "pooler.layernorm", "norm": "layernorm"}
    theirs = {}
    for name, array in state.items():
        stem, _, leaf = name.rpartition(".")
        if name in HEAD:
            theirs[f"classifier.{leaf}"] = array
        elif name == "cls_token":
            theirs[f"{prefix}embeddings.cls_token"] = array
        elif name.startswith("rel_pos_bias"):
            theirs[f"{prefix}encoder.relative_position_bias.{leaf}"] = array
        elif not name.startswith("blocks."):
            theirs[f"{prefix}{ends[stem]}.{leaf}"] = array
        else:
            _, block, part = name.split(".", 2)
            new = f"{prefix}encoder.layer.{block}."
            if part == "attn.qkv.weight":
                parts = [f"{which}.weight" for which in ("query", "key", "value")]
                theirs |= split(f"{new}{attention}", array, parts)
            else:
                stem, _, leaf = part.rpartition(".")
                theirs[new + (names.get(part) or f"{names[stem]}.{leaf}")] = array
    return theirs


def assert_equal(result, state, model):
    got = to_state(result.variables, model)
    assert got.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("model", "args"), [(DINOV3, {}), (BEIT, {"use_abs_pos_emb": True}), (EVA02, {})]
)
def test_timms_names_and_back(model, args):
    theirs = checkpoint(model, TINY | args, model=model)
    result = convert(theirs)
    assert result.changes == []
    assert_equal(result, theirs.state, model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "rename",
    [meta, hugging_face_dinov3, lambda state: hugging_face_dinov3(state, "model.layer.")],
    ids=["Meta", "Hugging Face", "Hugging Face, another version"],
)
def test_dinov3s_names(rename, bias):
    """The published files have biases, which are all 0."""
    state = checkpoint(DINOV3, TINY | {"qkv_bias": True}).state
    wanted = headless(state)
    if not bias:
        state = {name: 0 * x if name.endswith(("q_bias", "v_bias")) else x
                 for name, x in state.items()}  # fmt: skip
        wanted = {name: x for name, x in wanted.items() if "attn.q_b" not in name
                  and "attn.v_b" not in name}  # fmt: skip
    result = convert(Checkpoint("w", rename(state), {}), DINOV3, args=TINY)
    assert_equal(result, wanted, DINOV3)
    assert result.metadata["args"] == (TINY | {"qkv_bias": True} if bias else TINY)
    assert result.changes[0].startswith("renamed the tensors from ")


@pytest.mark.parametrize(("prefix", "shared"), [("beit.", False), ("", False), ("beit.", True)])
def test_beits_names(prefix, shared):
    args = TINY | {"use_rel_pos_bias": not shared, "use_shared_rel_pos_bias": shared}
    state = checkpoint(BEIT, args).state
    theirs = hugging_face_beit(state, prefix)
    theirs[f"{prefix}embeddings.mask_token"] = np.zeros((1, 1, 16), np.float32)
    result = convert(Checkpoint("w", theirs, {}), BEIT, args=TINY)
    assert_equal(result, state, BEIT)
    assert result.metadata["args"] == (args if shared else TINY)


def test_beits_bias_tables_follow_the_image_size():
    theirs = checkpoint(BEIT, TINY, model=BEIT)
    theirs.state["blocks.1.attn.relative_position_index"] = np.zeros((17, 17), np.int64)
    result = convert(theirs, image_size=24)
    assert result.changes == [
        f"{TABLE} resized from window 4x4 to 6x6, 2 times",
        "left out blocks.1.attn.relative_position_index",
    ]
    old = theirs.state[f"blocks.1.attn.{TABLE}"]
    new = result.variables["params"]["blocks_1"]["attn"][TABLE]
    assert new.shape == (11**2 + 3, 2)
    np.testing.assert_array_equal(new[-3:], old[-3:])
    np.testing.assert_array_equal(new[:-3], resize_bias_table(old[:-3], 11**2))
    one = resize_bias_table(old, 1 + 3)
    np.testing.assert_array_equal(one, old[[24, -3, -2, -1]])
    assert resize_bias_table(old, 49) is None


def test_rotary_positions_need_no_resizing():
    theirs = checkpoint(DINOV3, TINY, model=DINOV3)
    assert convert(theirs, image_size=24).changes == []
    theirs = checkpoint(EVA02, TINY, model=EVA02)
    assert convert(theirs, image_size=24).changes == ["pos_embed resized from grid 4x4 to 6x6"]


@pytest.mark.parametrize(
    ("config", "metadata"),
    [
        ({"model_type": "dinov3_vit"}, {}),
        ({"model_type": "dinov3_vit", "use_gated_mlp": True}, {"architecture": "Some"}),
        ({"model_type": "beit", "use_mean_pooling": True}, {}),
        (
            {"model_type": "beit", "use_mean_pooling": False},
            {"args": {"num_heads": 6, "global_pool": "token"}},
        ),
    ],
)
def test_hugging_faces_config(config, metadata, tmp_path):
    config = config | {"architectures": ["Some"], "num_attention_heads": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == ({"args": {"num_heads": 6}} | metadata, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_small_patch14_336"])
def test_recognition_is_unambiguous(name, monkeypatch):
    few = [name for name in MODELS if name.startswith(("vit_small", "deit_small", "eva02", "beit"))]
    monkeypatch.setattr(networks, "MODELS", {name: MODELS[name] for name in few})
    found = convert(Checkpoint("w", checkpoint(name).state, {}))
    assert found.metadata["model"] == name
    assert f"recognised {name}" in found.changes
    assert "looks like" in message(checkpoint(name), "vit_small_patch16_224")
