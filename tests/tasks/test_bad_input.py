"""What a detector's config can't be is said in one sentence, before anything is compiled."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.tasks.detectors import TINY, detector, vit
from tests.tasks.shapes import write_coco
from tests.tiny import set_fields
from xkd_jax.configs import coco_frcnn_r50, coco_mrcnn_r50
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.model import create_model
from xkd_jax.validation import validate


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), 8)


def changed(**changes):
    config = coco_frcnn_r50.get_config("smoke")
    config.method.name = "none"
    set_fields(config, changes)
    return config


@pytest.mark.parametrize("recipe", [coco_frcnn_r50, coco_mrcnn_r50])
@pytest.mark.parametrize("variant", ["", "2x", "smoke"])
def test_the_recipes_are_valid(recipe, variant):
    validate(recipe.get_config(variant))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student__model": "resnet18", "student__args": {}},
         "coco:DIR has boxes, which resnet18 doesn't learn; take fasterrcnn_resnet50_fpn or"),
        ({"data__name": "fashion_mnist_mini"},
         "fasterrcnn_resnet50_fpn is a detector, but fashion_mnist_mini has no boxes; take"),
        ({"augment__crop_padding": 4}, "augment.crop_padding=4 is not for detectors"),
        ({"augment__mixup": 0.2}, "augment.mixup=0.2 is not for detectors"),
        ({"image_size": 224}, "image_size=224 is not for detectors"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 is not for detectors"),
        ({"seeds": (0, 1)}, "seeds=(0, 1) is not for detectors"),
        ({"data__min_size": 400}, "data.min_size=400 is larger than data.max_size=128"),
        ({"data__max_objects": 0}, "data.max_objects is 0, but must be at least 1"),
        ({"method__name": "cakd", "method__cakd__multi_view": True},
         "method cakd would crop, rotate and mask the student's view, which moves and hides"),
    ],
)  # fmt: skip
def test_options_that_detectors_cannot_have(changes, says):
    with pytest.raises(UserError) as error:
        validate(changed(**changes))
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def save(folder, model, **metadata):
    """The path of a file with the model's weights, all zeros."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.shapes)
    path = str(folder / f"{model.name}.safetensors")
    dataclasses.replace(model, variables=zeros).save(path, **metadata)
    return path


def refused(coco, says, **changes):
    config = changed(data__name=coco, **changes)
    validate(config)
    with pytest.raises(UserError) as error:
        create_experiment(config)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_of_another_backbone(coco, tmp_path):
    path = save(tmp_path, create_model("resnet34", num_classes=3))
    says = "holds a resnet34, but the backbone of fasterrcnn_resnet50_fpn is a resnet18; give"
    refused(coco, says, student__weights=path)


@pytest.mark.exhaustive  # the networks that fit such weights are looked for
def test_weights_of_a_wider_backbone(coco, tmp_path):
    path = save(tmp_path, create_model("resnet18", num_classes=3))
    refused(coco, "resnet18", student__weights=path)


def test_stages_that_do_not_exist(coco, tmp_path):
    model = create_model("resnet18", num_classes=3, width=0.25)
    path = save(tmp_path, model)
    says = "freeze=5 counts the four stages of a ResNet or ResNeXt"
    refused(coco, says, student__weights=path, freeze=5)


@pytest.mark.slow
def test_class_scores_of_other_classes_or_of_no_proposals(coco, tmp_path):
    logits = {"method__name": "logits", "teacher__model": "", "teacher__args": {}}
    path = save(tmp_path, detector(name="maskrcnn_resnet50_fpn", backbone="resnet18"),
                class_names=["disc", "square"])  # fmt: skip
    refused(coco, "has the classes of", teacher__weights=path, **logits)
    path = save(tmp_path, create_model("fasterrcnn_resnet50_fpn", num_classes=5, **TINY))
    refused(coco, "method logits compares class scores, but", teacher__weights=path, **logits)
    path = save(tmp_path, vit())
    refused(coco, "takes a detector as the teacher", teacher__weights=path, **logits)
