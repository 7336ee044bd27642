"""Checkpoints as trainers write them: formats, keys, prefixes, stated names, messages."""

import argparse
import json
import re
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.test_conversion import TINY_RESNET, TINY_VIT, checkpoint, message
from xkd_jax.convert import configs
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import read_checkpoint
from xkd_jax.convert.messages import Misfit, describe, join_names
from xkd_jax.convert.prefixes import strip_prefixes
from xkd_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")


def write_zip(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("ViT-Ti_16.npz", ("cls.npy", "head/bias.npy"), r"a NumPy \.npz archive.*--timm NAME"),
        ("w.npz", ("a.npy",), "a NumPy"),
        ("w.pt", ("w/constants.pkl", "w/data.pkl", "w/code/a.py"), "a TorchScript archive"),
        ("w.keras", ("config.json", "model.weights.h5"), "a Keras model"),
        ("w.zip", ("readme.txt",), r"a zip archive that torch\.save didn't write"),
        ("w.h5", b"\x89HDF\r\n", "an HDF5 file, as Keras writes"),
        ("w.onnx", b"\x08\x07\x12", "an ONNX model"),
        ("w.tflite", b"\x1c\x00\x00\x00TFL3", "a TensorFlow Lite model"),
        ("w.pb", b"\x08\x01", "a TensorFlow graph"),
        ("w.ckpt", b"\x00\x01", "a TensorFlow checkpoint, or another file"),
        ("w.ckpt.data-00000-of-00001", b"\x00\x01", "part of a TensorFlow checkpoint"),
        ("w.msgpack", b"\x82\xa6", "a Flax checkpoint"),
        ("w.npy", b"\x93NUMPY", "a single NumPy array"),
        ("w.pth.gz", b"\x1f\x8b\x08", "compressed with gzip; unpack it first"),
        ("w.bin", b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        ("w.bin", b"<!DOCTYPE html>", "a web page"),
        ("w.pth", b"", "is empty"),
        ("w.pth", b"\x00\x01", r"was not written by torch\.save"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path, name, contents, said):
    path = tmp_path / name
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        write_zip(path, *contents)
    with pytest.raises(UserError, match=said) as error:
        read_checkpoint(path)
    assert "damaged" not in str(error.value)
    assert "cut off" not in str(error.value)


def test_folders_and_tensorflows_prefixes(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"is a folder.*it has model\.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.ckpt.index").touch()
    with pytest.raises(UserError, match=r"model\.ckpt is a TensorFlow checkpoint"):
        read_checkpoint(tmp_path / "model.ckpt")


def test_a_safetensors_file_under_another_suffix(tmp_path):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "w.bin")
    assert read_checkpoint(tmp_path / "w.bin").state.keys() == {"a"}


RESNET = ("conv1.weight", "layer1.0.conv1.weight", "fc.weight")


@pytest.mark.parametrize(
    ("theirs", "taken", "left"),
    [
        ("model.{} model.{} model.{}", "model.", ""),
        ("module.model.{} module.model.{} module.model.{}", "module. and model.", ""),
        ("backbone.{} backbone.{} head.{}", "backbone.", ""),
        ("backbone.{} backbone.{} {}", "backbone.", ""),
        ("model.{} model.{} model.{} criterion.weight", "model.", "criterion.weight"),
        ("{} {} {}", "", ""),
    ],
)
def test_prefixes(theirs, taken, left):
    theirs = theirs.format(*RESNET).split()
    state, notes = strip_prefixes("w", dict.fromkeys(theirs, 0))
    assert set(state) == set(RESNET)
    want = [f"took the prefix {taken} off the tensors' names"] if taken else []
    want += [f"left out {left}, not part of model"] if left else []
    assert notes == want


def test_names_of_other_libraries_keep_their_prefixes():
    names = ["class_token", "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"]
    assert strip_prefixes("w", dict.fromkeys(names, 0)) == (dict.fromkeys(names, 0), [])
    names = ["vit.encoder.layer.0.attention.attention.query.weight", "classifier.weight"]
    assert strip_prefixes("w", dict.fromkeys(names, 0))[1] == []


def test_two_networks_in_one_state():
    both = {f"module.{part}.{name}": part for part in ("student", "teacher") for name in RESNET}
    with pytest.raises(UserError, match=r"two networks, 'student' and 'teacher'.*--key student"):
        strip_prefixes("w", both)
    state, notes = strip_prefixes("w", both, "teacher")
    assert state == dict.fromkeys(RESNET, "teacher")
    assert notes == ["took the prefix module. and teacher. off the tensors' names"]
    with pytest.raises(UserError, match="under the key 'pupil'; their names begin with student"):
        strip_prefixes("w", both, "pupil")


def stated(tmp_path, **config):
    """A tiny ResNet's file with a config.json next to it."""
    save_file(checkpoint("resnet18", TINY_RESNET).state, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.slow
def test_a_stated_network_is_not_overridden(tmp_path):
    theirs = checkpoint("efficientnet_b0", architecture="tf_efficientnet_b0")
    assert message(theirs) == (
        "w.pth states that it is tf_efficientnet_b0, which is not among the networks here; its "
        "tensors fit efficientnet_b0 as well, and --model efficientnet_b0 forces that, but "
        "padding, epsilon, activation or heads may differ."
    )
    forced = convert(theirs, "efficientnet_b0")
    assert forced.changes == [
        "warning: the checkpoint states tf_efficientnet_b0 and is read as efficientnet_b0; "
        "networks with equal tensors can differ in padding, epsilon, activation or heads"
    ]
    assert "architecture" not in forced.metadata
    # Without the images' preparation, the name still counts.
    other = stated(tmp_path, architecture="resnet14t.c3_in1k")
    assert re.search(r"the nearest name is resnet\w+, and --model NAME", message(other))
    assert "states that it is LevitForImageClassification" in message(
        stated(tmp_path, model_type="levit", architectures=["LevitForImageClassification"])
    )


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("resnet50", {"model": "resnet50"}),
        ("resnet50.a1_in1k", {"model": "resnet50"}),
        ("vit_b_16", {"model": "vit_base_patch16_224"}),
        ("visiontransformer", {}),
        ("vit_small", {"architecture": "vit_small"}),
    ],
)
def test_names_that_files_state(name, metadata):
    assert configs.state_network(name) == metadata


def test_hugging_faces_config(tmp_path):
    images = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    fields = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    fields |= {"num_attention_heads": 4, "image_size": 32, "id2label": {"1": "dog", "0": "cat"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    metadata, notes = configs.read_config(tmp_path)
    assert notes == []
    assert metadata == {
        "args": {"num_heads": 4},
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
        "image_size": 32,
        "class_names": ["cat", "dog"],
    }


@pytest.mark.parametrize("text", ["{torn", "[1]", '{"architecture": "resnet18", "mean": 3}'])
def test_a_damaged_config_is_ignored_aloud(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    metadata, notes = configs.read_config(tmp_path)
    assert metadata == {}
    assert notes[0].startswith("ignored ")


def test_assumptions():
    theirs = checkpoint("vit_tiny_patch4_32", TINY_VIT)
    said = convert(theirs, "vit_tiny_patch4_32", args=TINY_VIT).assumed
    assert said.startswith("assumed, not in the tensors: mean ")
    assert "heads" not in said
    small = checkpoint("vit_small_patch16_224")
    assert convert(small, "vit_small_patch16_224").assumed == (
        "assumed, not in the tensors: 6 heads, mean 0.5 0.5 0.5 and std 0.5 0.5 0.5, "
        "LayerNorm epsilon 1e-06, activation gelu, bilinear interpolation of images; change with "
        "--arg num_heads=N --mean R G B --std R G B --arg norm_epsilon=X --arg act_layer=NAME"
    )
    named = checkpoint("resnet18", TINY_RESNET, model="resnet18", mean=[0] * 3, std=[1] * 3)
    assert convert(named).assumed == ""
    named.metadata["interpolation"] = "bicubic"
    assert convert(named).assumed.endswith(
        "bilinear interpolation of images, although it states bicubic"
    )


def test_values_that_are_not_finite():
    theirs = checkpoint("resnet18", TINY_RESNET, model="resnet18")
    theirs.state["fc.weight"][0, 0] = np.nan
    for layer in (1, 2, 3):
        theirs.state[f"layer{layer}.0.bn1.bias"][0] = np.inf
    assert "values in fc.weight, layer{1..3}.0.bn1.bias; give an earlier" in message(theirs)
    result = convert(theirs, allow_not_finite=True)
    assert result.changes[0].startswith("warning: NaN or infinite values in ")
    # A new head replaces the one that is not finite, but the rest counts.
    assert "values in layer{1..3}.0.bn1.bias; give" in message(theirs, num_classes=3)


@pytest.mark.slow
def test_many_misfits_make_a_short_message():
    theirs = checkpoint("vit_tiny_patch16_224", {"depth": 3})
    text = message(theirs, "deit_tiny_patch16_224", args={})
    assert text.count("\n") <= 6
    assert "blocks.{3..11}.attn.proj.bias [192] is missing (9 tensors)" in text
    assert text.endswith(" more.")
    many = [Misfit(f"a.{i}", "missing", " is missing") for i in range(6)]
    many += [Misfit(f"b.{i}", "unexpected", "", before="unexpected tensor ") for i in (1, 5)]
    assert describe(many) == [
        "a.{0..5} is missing (6 tensors)",
        "unexpected tensor b.{1,5} (2 tensors)",
    ]
    assert join_names(["layer1.0.a", "layer2.0.a"]) == "layer{1,2}.0.a"


@pytest.fixture
def torch():
    import torch

    return torch


@pytest.fixture
def tensors(torch):
    state = checkpoint("resnet18", TINY_RESNET).state
    return {name: torch.tensor(array) for name, array in state.items()}


KEYS = "net model model_state_dict state_dict module ema model_ema state_dict_ema"


@pytest.mark.parity
@pytest.mark.parametrize("key", [*KEYS.split(), "teacher", "student", "generator"])
def test_keys_of_trainers(torch, tensors, tmp_path, key):
    averages = {"ema": {}} if key != "ema" else {}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
    torch.save({key: tensors, **averages, "optimizer": optimizer, "epoch": 3}, tmp_path / "w.pth")
    read = read_checkpoint(tmp_path / "w.pth")
    assert read.state.keys() == tensors.keys()
    known = key not in ("teacher", "student", "generator")
    assert read.notes == ([] if known else [f"read {key!r}"])


@pytest.mark.parity
def test_several_state_dicts(torch, tensors, tmp_path):
    path, other = tmp_path / "w.pth", {"a": torch.zeros(3)}
    torch.save({"student": other, "teacher": tensors}, path)
    with pytest.raises(UserError, match="2 state dicts, under 'student', 'teacher'; choose one"):
        read_checkpoint(path)
    assert read_checkpoint(path, key="teacher").state.keys() == tensors.keys()
    with pytest.raises(UserError, match="no key 'pupil'; it has state dicts under 'student'"):
        read_checkpoint(path, key="pupil")
    torch.save({"state_dict": other, "model_ema": {"module": tensors}}, path)
    read = read_checkpoint(path)
    assert read.state.keys() == tensors.keys()
    assert read.notes == ["read 'model_ema'; --key state_dict reads 'state_dict' instead"]
    assert read_checkpoint(path, key="state_dict").state.keys() == {"a"}
    both = {f"{part}.{k}": v for part in ("student", "teacher") for k, v in tensors.items()}
    torch.save({"state_dict": both}, path)
    assert read_checkpoint(path, key="teacher").state.keys() == tensors.keys()
    torch.save({"epoch": 3, "best": 0.9}, path)
    with pytest.raises(UserError, match=r"holds no tensors \(its keys are epoch, best\)"):
        read_checkpoint(path)


@pytest.mark.parity
def test_what_else_trainers_write(torch, tensors, tmp_path):
    path = tmp_path / "epoch.ckpt"  # Lightning's suffix
    parameters = {f"model.{k}": torch.nn.Parameter(v) for k, v in tensors.items()}
    holder = {"state_dict": parameters, "best": np.float64(0.9), "optimizer_states": [{}]}
    torch.save({**holder, "arch": "resnet18"}, path)
    read = read_checkpoint(path)
    assert read.state.keys() == tensors.keys()
    assert read.metadata == {"model": "resnet18"}
    torch.save({**holder, "args": argparse.Namespace(model="resnet18_wide")}, path)
    assert "states that it is resnet18_wide" in message(read_checkpoint(path))


@pytest.mark.parity
def test_a_damaged_zip_says_so(torch, tensors, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(tensors, path)
    contents = path.read_bytes()
    start = contents.index(b"data.pkl") + 100
    path.write_bytes(contents[:start] + b"\xff" * 50 + contents[start + 50 :])
    with pytest.raises(UserError, match=r"w\.pth (is damaged|can't be read by torch\.load)"):
        read_checkpoint(path)
