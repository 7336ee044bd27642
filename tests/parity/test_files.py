"""Files of PyTorch, and timm reading what we write."""

import argparse
import types
import warnings

import numpy as np
import pytest

from tests.convert.test_conversion import TINY_RESNET, checkpoint
from xkd_jax.convert import resize
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import read_checkpoint, to_state, write_state
from xkd_jax.convert.hub import DEFAULT_TAGS
from xkd_jax.errors import UserError
from xkd_jax.models import MODELS

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture
def timm():
    from tests.parity.reference import timm  # where PyTorch is

    return timm


def test_pytorch_files(tmp_path):
    state = checkpoint("resnet18", TINY_RESNET).state
    ours = convert(checkpoint("resnet18", TINY_RESNET), "resnet18", args=TINY_RESNET)
    path = tmp_path / "w.pth"
    write_state(path, to_state(ours.variables, "resnet18"), ours.metadata)
    tensors = torch.load(path, weights_only=True)
    assert all(np.array_equal(tensors[name].numpy(), array) for name, array in state.items())
    for legacy in (False, True):
        for holder in (
            tensors,
            {"state_dict": {f"module.{k}": v for k, v in tensors.items()}, "epoch": 3},
            {"model": tensors, "args": argparse.Namespace(lr=0.1)},
            {"state_dict_ema": tensors, "state_dict": {}},
        ):
            torch.save(holder, path, _use_new_zipfile_serialization=not legacy)
            again = read_checkpoint(path).state
            assert again.keys() == state.keys()
            assert all(np.array_equal(again[name], array) for name, array in state.items())
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(UserError, match="cut off"):
            read_checkpoint(path)
    torch.save({"a": torch.ones(3, dtype=torch.bfloat16)}, path)
    np.testing.assert_array_equal(read_checkpoint(path).state["a"], np.ones(3, np.float32))
    torch.save({"model": types.SimpleNamespace()}, path)
    with pytest.raises(UserError, match=r"holds types.SimpleNamespace besides its tensors"):
        read_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(UserError, match="holds a list"):
        read_checkpoint(path)


# The first network of each class: the others only have other numbers.
FIRST = {MODELS[name].network: name for name in reversed(DEFAULT_TAGS)}.values()


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(name, marks=() if name in FIRST else pytest.mark.exhaustive)
        for name in DEFAULT_TAGS
    ],
)
def test_timm_loads_what_is_written(timm, tmp_path, model):
    args = {"aux_logits": False} if model == "inception_v3" else {}
    ours = convert(checkpoint(model, args), model, args=args)
    write_state(tmp_path / "w.safetensors", to_state(ours.variables, model), ours.metadata)
    theirs = timm.create_model(model, num_classes=5)
    from safetensors.torch import load_file as load_tensors

    tensors = load_tensors(tmp_path / "w.safetensors")
    assert theirs.state_dict().keys() == tensors.keys()
    theirs.load_state_dict(tensors, strict=True)
    default = theirs.pretrained_cfg
    assert default["tag"] == DEFAULT_TAGS[model]
    assert tuple(default["mean"]) == MODELS[model].mean
    assert tuple(default["std"]) == MODELS[model].std
    assert default["input_size"][-1] == MODELS[model].image_size


@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (4, 7), (37, 8)])
def test_resizing_is_timms(timm, old, new):
    layers = timm.layers
    rng = np.random.default_rng(0)
    table = 0.1 * rng.standard_normal((1, old * old + 1, 8), np.float32)
    for antialias in (True, False):
        theirs = layers.resample_abs_pos_embed(torch.tensor(table), [new, new], antialias=antialias)
        ours = resize.resize_position_embedding(table, new * new + 1, antialias)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    kernel = 0.1 * rng.standard_normal((8, 3, old, old), np.float32)
    theirs = layers.resample_patch_embed(torch.tensor(kernel), [new, new]).numpy()
    ours = resize.resize_patch_kernel(kernel.transpose(2, 3, 1, 0), new)
    np.testing.assert_allclose(ours, theirs.transpose(2, 3, 1, 0), atol=1e-5)
    table = 0.1 * rng.standard_normal(((2 * old - 1) ** 2, 4), np.float32)
    rows = (2 * new - 1) ** 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        theirs = layers.resize_rel_pos_bias_table(torch.tensor(table), (new, new), (rows, 4))
    np.testing.assert_allclose(resize.resize_bias_table(table, rows), theirs, atol=1e-5)
