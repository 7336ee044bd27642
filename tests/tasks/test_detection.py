"""What a detector's training freezes, starts from and refuses, and whose logits are compared."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.tasks.detectors import TINY, batch_of, detector, vit
from xkd_jax.distiller import Distiller
from xkd_jax.errors import UserError
from xkd_jax.methods import create_method
from xkd_jax.methods.align import choose_stage, level_map, resize_map
from xkd_jax.methods.base import apply
from xkd_jax.model import create_model
from xkd_jax.optim import create_optimizer
from xkd_jax.tasks.detection import Detection

pytestmark = pytest.mark.usefixtures("quick_compilation")

TERMS = {"cakd": "tokens", "fitnet": "hint", "logits": "logits_kl", "ofd": "partial_distance",
         "review": "review"}  # fmt: skip
SGD = {"name": "sgd", "weight_decay": 1e-2}


def paths(tree):
    return {path for path, still in traverse_util.flatten_dict(tree, sep="/").items() if still}


def distiller(student, teacher=None, method="none", frozen_stages=0):
    optimizer = create_optimizer(SGD, lambda step: 0.01)
    method = create_method(method, {})
    return Distiller(teacher, student, method, optimizer, task=Detection(frozen_stages))


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_stem_stages_and_batch_normalisation_are_frozen(stages):
    student = detector()
    frozen = paths(Detection(stages).frozen(student, student.shapes["params"]))
    every = paths(jax.tree.map(lambda leaf: True, student.shapes["params"]))
    norms = {path for path in every if re.search(r"/(bn\d|downsample_1)/(scale|bias)$", path)}
    early = {path for path in every if stages and path.startswith("backbone/body/conv1/")}
    for stage in range(1, stages + 1):
        early |= {path for path in every if path.startswith(f"backbone/body/layer{stage}_")}
    assert frozen == norms | early


def test_nothing_is_frozen_without_weights():
    student = detector(frozen_norm=False)
    assert Detection().frozen(student, student.shapes["params"]) is None


@pytest.mark.slow
def test_a_backbone_with_weights_is_where_the_student_starts():
    student, cnn = detector(), create_model("resnet18", num_classes=0, **TINY["backbone_args"])
    variables = jax.jit(cnn.init)(jax.random.key(5))
    inside = {kind: {"backbone": {"body": tree}} for kind, tree in variables.items()}
    student = dataclasses.replace(student, variables=inside)
    initial = jax.jit(lambda key: Detection().initial(student, key))
    first, second = (initial(jax.random.key(seed)) for seed in (0, 1))
    for kind, tree in variables.items():
        for start in (first, second):
            same = jax.tree.map(np.array_equal, start[kind]["backbone"]["body"], tree)
            assert all(jax.tree.leaves(same))
    heads = [start["params"]["rpn"]["head"]["conv_0_0"]["kernel"] for start in (first, second)]
    assert not np.array_equal(*heads)  # the rest is the seed's


@pytest.mark.parametrize(
    ("teacher", "method", "says"),
    [
        (vit, "crd", "isn't made for detectors; take logits, fitnet, ofd, review or cakd."),
        (vit, "cakd+rkd", "isn't made for detectors"),
        (vit, "logits", "takes a detector as the teacher, but vit_tiny_patch16_224 isn't one"),
        (vit, "cakd+logits", "takes a detector as the teacher"),
        (detector, "cakd", "cakd taps a Transformer's query, key and value"),
        (lambda: create_model("resnet18", num_classes=0), "fitnet", "but resnet18 is neither"),
    ],
)
def test_what_cannot_teach_a_detector_is_refused(teacher, method, says):
    with pytest.raises(UserError) as error:
        distiller(detector(), teacher(), method)
    assert says in str(error.value)
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize(
    ("teacher", "method"),
    [
        (vit, "cakd"),
        (detector, "logits"),
        pytest.param(vit, "fitnet+review+ofd", marks=pytest.mark.slow),
        pytest.param(detector, "fitnet+review+ofd", marks=pytest.mark.slow),
    ],
)
def test_every_method_for_detectors_takes_a_step(teacher, method):
    """Up to the shapes that come out of it."""
    teacher = teacher()
    of = distiller(detector(), teacher, method)
    batch = jax.eval_shape(batch_of)
    after, metrics = jax.eval_shape(of._step, of.state_shapes, teacher.shapes, batch)
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(
        lambda leaf: leaf.shape, of.state_shapes
    )
    names = {"rpn_objectness", "rpn_box", "roi_class", "roi_box", "label_loss", "loss"}
    assert names <= metrics.keys()
    assert {"accuracy", "teacher_accuracy"}.isdisjoint(metrics)
    for part in method.split("+"):
        assert TERMS[part] in metrics


def test_a_step_outside_of_the_loop_takes_the_targets_of_a_batch():
    of, seen = distiller(detector()), {}

    def step(state, variables, batch):
        seen.update(batch)
        return state, {"loss": jnp.zeros(()), "flags": jnp.zeros(3)}

    of.__dict__["_step"] = step  # a cached property
    batch = batch_of()
    targets = {name: batch[name] for name in ("size", "boxes", "classes")}
    _, metrics = of.step(of.state_shapes, batch["image"], targets)
    assert metrics.keys() == {"loss"}
    assert seen.keys() == {"image", "index", *targets}


@pytest.mark.slow
def test_a_token_and_the_students_map_lie_over_the_same_place():
    """A mark in the padded image changes one token, and the student's map, at the same place."""
    student, teacher = detector(), vit(img_size=160)  # of 128 pixels: tokens of 12.8
    images = np.full((1, 128, 128, 3), 117, np.uint8)
    images[:, 96:] = images[:, :, 112:] = 124  # padding below and at the right
    variables = [jax.jit(model.init)(jax.random.key(2)) for model in (teacher, student)]

    def outputs(images):
        batch = {"image": jnp.asarray(images)}
        of = dataclasses.replace(distiller(student), teacher=teacher)
        views = Detection().create_views(of, jax.random.key(0), batch)[:2]
        tokens = teacher.forward(variables[0], views[0])[1]
        return tokens, apply(student.module, variables[1], views[1], method="features")[1]

    plain = outputs(images)
    for row, column in ((20, 75), (84, 4), (52, 104)):
        marked = images.copy()
        marked[:, row : row + 6, column : column + 6] = (255, 0, 0)
        found = outputs(marked)
        grid = found[0]["grid"]
        at = (row + 3) * grid[0] // 128, (column + 3) * grid[1] // 128
        assert place_of_change([out[0]["block01"][0] for out in (plain, found)], grid) == at
        stage = choose_stage(found[1], grid, "auto", (160, 128))
        maps = [resize_map(level_map(out[1], stage), grid)[0] for out in (plain, found)]
        # The bins of a map that the grid doesn't divide overlap by a cell.
        assert np.abs(np.subtract(place_of_change(maps, grid), at)).max() <= 1


def place_of_change(maps, grid):
    """The cell, (row, column), in which two maps or lists of tokens differ most."""
    change = np.square(np.asarray(maps[1] - maps[0])).sum(-1)
    return tuple(int(i) for i in np.unravel_index(np.argmax(change), grid))
