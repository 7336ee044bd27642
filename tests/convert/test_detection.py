import dataclasses

import jax
import numpy as np
import pytest

from tests.models.networks import init
from xkd_jax.convert import networks
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint, read_checkpoint, to_state, write_state
from xkd_jax.errors import UserError
from xkd_jax.model import create_model, load
from xkd_jax.models import MODELS

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAME = "maskrcnn_resnet50_fpn"
ARGS = {"backbone": "resnet18", "backbone_args": {"width": 0.125, "layers": [1, 1, 1, 1]}}
# torchvision's published weights have the names of its networks before version 0.13.
OLD = {
    "rpn.head.conv.0.0.": "rpn.head.conv.",
    **{f"roi_heads.mask_head.{i}.0.": f"roi_heads.mask_head.mask_fcn{i + 1}." for i in range(4)},
    **{
        f"backbone.fpn.{part}_blocks.{i}.0.": f"backbone.fpn.{part}_blocks.{i}."
        for part in ("inner", "layer")
        for i in range(4)
    },
}


@pytest.fixture(scope="module")
def model():
    model = create_model(NAME, num_classes=3, image_size=64, class_names=("a", "b", "c"), **ARGS)
    variables = jax.device_get(init(model.module, 64))
    return model, variables, to_state(variables, NAME)


def equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_names_are_torchvisions(model):
    _, _, state = model
    assert state["backbone.body.layer1.0.bn1.running_var"].shape == (8,)
    assert state["backbone.fpn.inner_blocks.3.0.weight"].shape == (256, 64, 1, 1)
    assert state["rpn.head.bbox_pred.weight"].shape == (12, 256, 1, 1)
    assert state["roi_heads.box_head.fc6.weight"].shape == (1024, 256 * 49)
    assert state["roi_heads.box_predictor.bbox_pred.weight"].shape == (16, 1024)
    assert state["roi_heads.mask_head.3.0.bias"].shape == (256,)
    assert state["roi_heads.mask_predictor.conv5_mask.weight"].shape == (256, 256, 2, 2)
    assert state["roi_heads.mask_predictor.mask_fcn_logits.weight"].shape == (4, 256, 1, 1)


def test_old_names(model):
    _, variables, state = model
    for new, old in OLD.items():
        state = {name.replace(new, old): array for name, array in state.items()}
    assert "rpn.head.conv.weight" in state
    converted = convert(Checkpoint("old", state, {}), NAME, args=ARGS)
    assert converted.changes == ["renamed the tensors from torchvision's names"]
    equal(converted.variables, variables)
    assert converted.metadata["num_classes"] == 3


def test_published_weights_have_no_epsilon():
    model = create_model("fasterrcnn_resnet50_fpn", num_classes=90, image_size=64, **ARGS)
    variables = jax.device_get(init(model.module, 64))
    state = to_state(variables, model.name)
    for new, old in OLD.items():
        state = {name.replace(new, old): array for name, array in state.items()}
    converted = convert(Checkpoint("published", state, {}), model.name, args=ARGS)
    assert len(converted.changes) == 2
    assert "lowered the running variances by BatchNorm's epsilon" in converted.changes[1]
    for leaf in jax.tree.leaves(converted.variables["batch_stats"]["backbone"]):
        want = 1.0 if leaf.any() else 0.0
        np.testing.assert_allclose(leaf + want * 1e-5, want, rtol=1e-6)
    names = converted.metadata["class_names"]
    assert (names[0], names[11], names[15], names[-1]) == ("person", "N/A", "bird", "toothbrush")


def test_other_classes(model):
    _, variables, state = model
    converted = convert(Checkpoint("three", state, {}), NAME, num_classes=7, args=ARGS)
    (change,) = converted.changes
    assert change.endswith("mask_fcn_logits.weight to zero, for 7 classes")
    head = converted.variables["params"]["roi_heads"].pop("box_predictor")
    assert head["bbox_pred"]["kernel"].shape == (1024, 32)
    assert head["cls_score"]["kernel"].shape == (1024, 8)
    assert not any(leaf.any() for leaf in jax.tree.leaves(head))
    equal(converted.variables["params"]["rpn"], variables["params"]["rpn"])


def test_other_detectors_do_not_fit(model, monkeypatch):
    few_models(monkeypatch)
    _, _, state = model
    with pytest.raises(UserError, match=r"does not fit fasterrcnn_resnet50_fpn in 12 of its"):
        convert(Checkpoint("masks", state, {}), "fasterrcnn_resnet50_fpn", args=ARGS)
    with pytest.raises(UserError, match="needs at least one class, not 0"):
        convert(Checkpoint("masks", state, {}), NAME, num_classes=0, args=ARGS)


def few_models(monkeypatch):
    names = ("resnet18", "resnet34", "resnet50")
    monkeypatch.setattr(networks, "MODELS", {name: MODELS[name] for name in names})


def test_recognised_with_its_backbone(monkeypatch):
    few_models(monkeypatch)
    model = create_model("fasterrcnn_resnet50_fpn", num_classes=2, backbone="resnet18")
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.shapes)
    state = to_state(variables, model.name)
    converted = convert(Checkpoint("theirs", state, {}))
    assert converted.changes == ["recognised fasterrcnn_resnet50_fpn with backbone=resnet18"]
    assert converted.metadata["args"] == {"backbone": "resnet18"}


def test_unknown_backbone(model, monkeypatch):
    few_models(monkeypatch)
    _, _, state = model
    with pytest.raises(UserError, match="whose backbone is not among the networks here"):
        convert(Checkpoint("narrow", state, {}))


def test_files(model, tmp_path):
    model, variables, state = model
    path = tmp_path / "detector.safetensors"
    dataclasses.replace(model, variables=variables).save(path)
    loaded = load(path)
    assert loaded.module == model.module
    assert loaded.class_names == ("a", "b", "c")
    equal(loaded.variables, variables)
    exported = tmp_path / "exported.safetensors"
    write_state(exported, state, model.metadata())
    converted = convert(read_checkpoint(exported))
    equal(converted.variables, variables)
    assert converted.metadata["model"] == NAME
