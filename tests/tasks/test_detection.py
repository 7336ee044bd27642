"""What a detector's training freezes, starts from and refuses, and whose logits are compared."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.tasks.detectors import TINY, batch_of, detector, vit
from xkd_jax.distiller import Distiller
from xkd_jax.errors import UserError
from xkd_jax.methods.align import choose_stage, level_map, resize_map
from xkd_jax.model import create_model
from xkd_jax.optim import create_optimizer
from xkd_jax.tasks.detection import Detection

pytestmark = pytest.mark.usefixtures("quick_compilation")

SGD = {"name": "sgd", "weight_decay": 1e-2}


def paths(tree):
    return {path for path, still in traverse_util.flatten_dict(tree, sep="/").items() if still}


def distiller(student, teacher=None, method="none", frozen_stages=0):
    optimizer = create_optimizer(SGD, lambda step: 0.01)
    task = Detection(frozen_stages)
    return Distiller(teacher, student, method, optimizer, task=task)


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_stem_stages_and_batch_normalisation_are_frozen(stages):
    student = detector()
    frozen = paths(Detection(stages).frozen(student, student.shapes["params"]))
    every = paths(jax.tree.map(lambda leaf: True, student.shapes["params"]))
    norms = {path for path in every if path.rsplit("/", 2)[-2].startswith("bn")
             or "downsample_1/" in path}  # fmt: skip
    assert norms <= frozen
    body = "backbone/body/"
    early = {path for path in every if stages and path.startswith(f"{body}conv1/")}
    early |= {p for p in every for s in range(1, stages + 1) if p.startswith(f"{body}layer{s}_")}
    assert frozen == norms | early
    assert len(frozen) < len(every) / 2 + len(norms)
    trained = detector(frozen_norm=False)
    assert (Detection().frozen(trained, trained.shapes["params"]) is None) == (stages >= 0)


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
    [(vit, "cakd"), (vit, "fitnet+review"), (vit, "ofd"), (detector, "logits"),
     (detector, "fitnet+ofd"), (detector, "review+logits")],
)  # fmt: skip
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
        term = {"cakd": "tokens", "fitnet": "hint", "logits": "logits_kl"}.get(part, part)
        assert term in metrics


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
        taps = student.module.apply(variables[1], views[1], method="features")[1]
        return tokens, taps

    plain = outputs(images)
    for row, column in ((20, 75), (84, 4), (52, 104)):
        marked = images.copy()
        marked[:, row : row + 6, column : column + 6] = (255, 0, 0)
        found = outputs(marked)
        grid = found[0]["grid"]
        stage = choose_stage(found[1], grid, "auto", (160, 128))
        maps = [level_map(new, "block01", standardize=False) - level_map(old, "block01",
                standardize=False) for new, old in ((found[0], plain[0]),)]  # fmt: skip
        change = level_map(found[1], stage) - level_map(plain[1], stage)
        maps.append(resize_map(change, grid))
        places = [np.unravel_index(np.argmax(np.square(m[0]).sum(-1)), grid) for m in maps]
        at = (row + 3) * grid[0] // 128, (column + 3) * grid[1] // 128
        assert tuple(places[0]) == at
        assert np.abs(np.subtract(places[1], at)).max() <= 1  # a map's cells overlap tokens
