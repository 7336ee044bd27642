"""Checkpoints of Swin Transformers V2: other libraries' names and biases, and other windows."""

import importlib
import json

import numpy as np
import pytest

from tests.convert.test_conversion import checkpoint, message
from tests.convert.test_layouts import compare, hugging_face_blocks, randomise
from xkd_jax.convert import networks
from xkd_jax.convert.configs import read_config
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint
from xkd_jax.convert.layouts_swinv2 import name_biases
from xkd_jax.models import MODELS

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 2, 1), "patch_size": 2}
TINY |= {"img_size": 32, "window_size": 4}
NAME = "swinv2_tiny_window8_256"


def test_biases():
    prefix = "layers.0.blocks.0.attn."
    scale = {f"{prefix}logit_scale": np.ones((2, 1, 1))}
    joined = name_biases(scale | {f"{prefix}qkv.bias": np.arange(6)})
    assert {name: list(joined[f"{prefix}{name}"]) for name in ("q_bias", "v_bias")} == {
        "q_bias": [0, 1],
        "v_bias": [4, 5],
    }
    assert len(joined) == 3
    apart = {f"{prefix}query.bias": np.zeros(2), f"{prefix}value.bias": np.ones(2)}
    assert name_biases(scale | apart).keys() == joined.keys()
    first_version = {f"{prefix}qkv.bias": np.arange(6)}
    assert name_biases(first_version) == first_version


def test_computed_tensors_are_left_out_and_no_tensor_depends_on_sizes():
    theirs = checkpoint(NAME, TINY)
    prefix = "layers.0.blocks.0"
    theirs.state[f"{prefix}.attn.relative_coords_table"] = np.zeros((1, 7, 7, 2), np.float32)
    theirs.state[f"{prefix}.attn.relative_position_index"] = np.zeros((16, 16), np.int64)
    theirs.state[f"{prefix}.attn_mask"] = np.zeros((4, 16, 16), np.float32)
    args = {**TINY, "img_size": 64, "window_size": 8, "pretrained_window_sizes": (4, 4, 4, 2)}
    result = convert(theirs, NAME, args=args)
    assert result.changes == [f"left out {prefix}.attn.relative_coords_table and 2 more"]
    assert result.metadata["args"] == args


@pytest.mark.slow
def test_hugging_faces_tensors():
    state = checkpoint(NAME, TINY).state
    # As in the first version, whose blocks have a bias of the keys too.
    dims = {f"layers.{i}": TINY["embed_dim"] << i for i in range(4)}
    theirs = {}
    for layer, depth in enumerate(TINY["depths"]):
        for i in range(depth):
            block, name = f"layers.{layer}.blocks.{i}", f"swinv2.encoder.layers.{layer}.blocks.{i}"
            own = state | {f"{block}.attn.qkv.bias": np.zeros(3 * dims[f"layers.{layer}"])}
            theirs |= hugging_face_blocks(own, block, "attention.self", name)
            del theirs[f"{name}.attention.self.key.bias"]
            for theirs_, timms in (("query", "q_bias"), ("value", "v_bias")):
                theirs[f"{name}.attention.self.{theirs_}.bias"] = state[f"{block}.attn.{timms}"]
            theirs[f"{name}.attention.self.logit_scale"] = state[f"{block}.attn.logit_scale"]
            for part in ("0.weight", "0.bias", "2.weight"):
                theirs[f"{name}.attention.self.continuous_position_bias_mlp.{part}"] = state[
                    f"{block}.attn.cpb_mlp.{part}"
                ]
        for part in ("norm.weight", "norm.bias", "reduction.weight") if layer else ():
            name = f"swinv2.encoder.layers.{layer - 1}.downsample.{part}"
            theirs[name] = state[f"layers.{layer}.downsample.{part}"]
    names = {"patch_embed.proj": "swinv2.embeddings.patch_embeddings.projection"}
    names |= {"patch_embed.norm": "swinv2.embeddings.norm"}
    names |= {"norm": "swinv2.layernorm", "head.fc": "classifier"}
    for timms, name in names.items():
        theirs |= {f"{name}.{leaf}": state[f"{timms}.{leaf}"] for leaf in ("weight", "bias")}
    result = convert(Checkpoint("w", theirs, {}), NAME, args=TINY)
    assert result.changes == ["renamed the tensors from Hugging Face's names"]
    want = convert(Checkpoint("w", state, {}), NAME, args=TINY)
    np.testing.assert_equal(result.variables, want.variables)


def write_config(folder, **fields):
    config = {"model_type": "swinv2", "architectures": ["Swinv2ForImageClassification"], **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder)[0]


@pytest.mark.slow
def test_windows_are_told_by_the_config_only(tmp_path, monkeypatch):
    names = {name: MODELS[name] for name in MODELS if name.startswith("swinv2")}
    monkeypatch.setattr(networks, "MODELS", names)
    state = {
        name: np.zeros(tuple(5 if side == -1 else side for side in place.torch_shape), np.float32)
        for name, place in networks.get_places("swinv2_base_window8_256", {}).items()
    }
    said = message(Checkpoint("w", state, {}))
    assert "fits swinv2_base_window8_256, swinv2_base_window16_256" in said
    for name, window, pretrained in (
        ("swinv2_base_window8_256", 8, [0, 0, 0, 0]),
        ("swinv2_base_window12to16_192to256", 16, [12, 12, 12, 6]),
    ):
        config = write_config(tmp_path, window_size=window, pretrained_window_sizes=pretrained)
        assert convert(Checkpoint("w", state, config)).metadata["model"] == name


@pytest.fixture
def torch():
    import torch

    torch.manual_seed(0)
    return torch


@pytest.mark.parity
def test_torchvisions_network(torch):
    from tests.parity import reference

    assert reference.timm  # its import makes torchvision's possible
    swin = importlib.import_module("torchvision.models.swin_transformer")
    theirs = swin.SwinTransformer(
        [4, 4], 16, [2, 2, 2, 1], [1, 2, 4, 8], [4, 4], num_classes=5,
        block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2,
    )  # fmt: skip
    tables = {
        name: table.clone()
        for name, table in theirs.state_dict().items()
        if name.endswith("relative_coords_table")
    }
    randomise(torch, theirs).load_state_dict(tables, strict=False)
    args = {"embed_dim": 16, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)}
    args |= {"window_size": 4, "img_size": 128}
    result = compare(torch, theirs, NAME, args, 128)
    assert result.changes[0] == "renamed the tensors from torchvision's names"
    assert result.changes[1].startswith("left out layers.0.blocks.0.attn.relative_")
