"""CLIP's and SigLIP's image encoders under the names of transformers and OpenCLIP."""

import json

import numpy as np
import pytest

from tests.convert.test_conversion import checkpoint, message
from xkd_jax.convert import hub, networks
from xkd_jax.convert.configs import read_config
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint, to_state
from xkd_jax.convert.layouts import find_layout, rename
from xkd_jax.models import MODELS

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"embed_dim": 8, "num_heads": 2, "depth": 1, "patch_size": 4, "img_size": 16}
CLIP, SIGLIP = "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"
QUICK = "vit_base_patch16_clip_quickgelu_224"
HUGGING_FACE = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
HUGGING_FACES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
    "blocks.0.norm1": "encoder.layers.0.layer_norm1",
    "blocks.0.norm2": "encoder.layers.0.layer_norm2",
    "blocks.0.mlp.fc1": "encoder.layers.0.mlp.fc1",
    "blocks.0.mlp.fc2": "encoder.layers.0.mlp.fc2",
    "blocks.0.attn.proj": "encoder.layers.0.self_attn.out_proj",
    "attn_pool.latent": "head.probe",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}


def hugging_face(state, prefix):
    """transformers' tensors, with some of the text's, of a network without a classifier."""
    theirs = {"text_model.final_layer_norm.bias": np.ones(3), "logit_scale": np.ones(())}
    for name, array in state.items():
        stem, _, leaf = name.rpartition(".")
        if name in HUGGING_FACES:
            new = HUGGING_FACES[name]
            theirs[new] = array if name == "attn_pool.latent" else array[0]
            if name == "cls_token":
                theirs[new] = array[0, 0]
        elif stem in HUGGING_FACES:
            theirs[f"{HUGGING_FACES[stem]}.{leaf}"] = array
        elif stem == "blocks.0.attn.qkv":
            for letter, part in zip("qkv", np.split(array, 3), strict=True):
                theirs[f"encoder.layers.0.self_attn.{letter}_proj.{leaf}"] = part
        elif stem == "attn_pool.q":
            both = np.concatenate([array, state[f"attn_pool.kv.{leaf}"]])
            theirs[f"head.attention.in_proj_{leaf}"] = both
    return {k if k.startswith(("text", "logit")) else prefix + k: v for k, v in theirs.items()}


def bare(name):
    state = checkpoint(name, TINY).state
    return {key: array for key, array in state.items() if not key.startswith("head.")}


@pytest.mark.parametrize(("name", "prefix"), [(CLIP, ""), (SIGLIP, "vision_model.")])
def test_hugging_faces_names(name, prefix):
    state = bare(name)
    theirs = hugging_face(state, prefix)
    if name == CLIP:
        theirs["visual_projection.weight"] = np.arange(24, dtype=np.float32).reshape(3, 8)
    result = convert(Checkpoint("w", theirs, {}), name, args=TINY)
    assert result.changes == ["renamed the tensors from Hugging Face's names"]
    back = to_state(result.variables, name)
    if name == CLIP:  # the projection into the common space is the head, as in timm
        assert not back.pop("head.bias").any()
        np.testing.assert_array_equal(back.pop("head.weight"), theirs["visual_projection.weight"])
    np.testing.assert_equal(back, state)
    assert result.metadata["num_classes"] == (3 if name == CLIP else 0)


@pytest.mark.parametrize(
    ("marker", "theirs", "timms"),
    [
        (HUGGING_FACE, "vision_model.pre_layrnorm.weight", "norm_pre.weight"),
        (HUGGING_FACE, "visual_projection.weight", "head.weight"),
        ("visual.class_embedding", "visual.ln_post.bias", "norm.bias"),
        ("visual.class_embedding", "visual.conv1.weight", "patch_embed.proj.weight"),
        (
            "visual.class_embedding",
            "visual.transformer.resblocks.11.attn.in_proj_weight",
            "blocks.11.attn.qkv.weight",
        ),
        (
            "visual.class_embedding",
            "visual.transformer.resblocks.3.mlp.c_proj.bias",
            "blocks.3.mlp.fc2.bias",
        ),
        ("visual.trunk.patch_embed.proj.weight", "visual.trunk.blocks.0.norm1.bias",
         "blocks.0.norm1.bias"),
    ],
)  # fmt: skip
def test_names(marker, theirs, timms):
    layout = find_layout([marker])
    assert layout
    assert rename(theirs, layout) == timms


def test_a_network_of_timm_in_open_clip():
    state = bare(SIGLIP)
    theirs = {f"visual.trunk.{name}": array for name, array in state.items()}
    theirs |= {"text.positional_embedding": np.ones((4, 8)), "logit_bias": np.ones(1)}
    result = convert(Checkpoint("w", theirs, {}), SIGLIP, args=TINY)
    np.testing.assert_equal(to_state(result.variables, SIGLIP), state)


# transformers' config.json of openai/clip-vit-base-patch32, of LAION's and of Google's, in short.
CONFIGS = {
    "openai": (
        {"model_type": "clip", "architectures": ["CLIPModel"],
         "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}},
        "vit_base_patch32_clip_quickgelu_224", "quick_gelu", 1e-5,
    ),
    "laion": (
        {"model_type": "clip", "architectures": ["CLIPModel"],
         "vision_config": {"hidden_act": "gelu", "patch_size": 16}},
        CLIP, "gelu", 1e-5,
    ),
    "google": (
        {"model_type": "siglip", "architectures": ["SiglipModel"],
         "vision_config": {"model_type": "siglip_vision_model"}},
        SIGLIP, "gelu_tanh", 1e-6,
    ),
    "another size": (
        {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"],
         "hidden_size": 1024, "patch_size": 14}, None, "quick_gelu", 1e-5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_hugging_faces_config(case, tmp_path):
    config, name, act_layer, epsilon = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = {"num_heads": 12, "act_layer": act_layer, "norm_epsilon": epsilon}
    expected = {"args": args, "image_size": 224} | ({"model": name} if name else {})
    assert read_config(tmp_path) == (expected, [])


def test_classifiers_and_unknown_activations_of_transformers(tmp_path):
    config = {"model_type": "siglip", "architectures": ["SiglipForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path)[0] == {"architecture": "SiglipForImageClassification"}
    config = {"model_type": "clip", "architectures": ["CLIPModel"]}
    config["vision_config"] = {"hidden_act": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    metadata, notes = read_config(tmp_path)
    assert metadata == {}
    assert notes[0].startswith("ignored")


@pytest.mark.slow  # it needs the extra hub
def test_quick_gelu_on_the_hub(monkeypatch, tmp_path):
    """timm's names with and without QuickGELU have the same file; the wrong name warns."""
    asked = []

    def get(repository, filename):
        asked.append(repository)
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", get)
    monkeypatch.setattr(hub, "read_checkpoint", lambda path, name: Checkpoint(name, {}, {}))
    quick, plain = hub.download(f"{QUICK}.openai"), hub.download(f"{CLIP}.openai")
    assert set(asked) == {f"timm/{CLIP}.openai"}
    assert quick.metadata["model"] == QUICK
    assert quick.notes == []
    assert plain.metadata["model"] == CLIP
    assert plain.notes == [f"warning: these weights were trained with QuickGELU, as {QUICK} has it"]
    assert hub.download(f"{CLIP}.openai_ft_in1k").notes == []


def test_what_the_tensors_do_not_tell():
    assumed = convert(checkpoint(SIGLIP, TINY), SIGLIP, args=TINY).assumed
    assert "LayerNorm epsilon 1e-06, activation gelu, " in assumed
    assert "--arg act_layer=NAME" in assumed


@pytest.mark.slow
def test_recognition(monkeypatch):
    names = [name for name in MODELS if name.startswith(("vit_base", "deit_base", "deit3_base"))]
    monkeypatch.setattr(networks, "MODELS", {name: MODELS[name] for name in names})
    found = convert(Checkpoint("w", checkpoint(SIGLIP).state, {}))
    assert found.changes == [f"recognised {SIGLIP}"]
    said = message(Checkpoint("w", checkpoint(CLIP).state, {}))
    assert f"w fits {CLIP}, {QUICK} equally well; choose one with --model" in said
