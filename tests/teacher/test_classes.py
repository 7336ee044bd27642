"""Teachers without a classifier, or of other classes than the data's."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from tests import tiny
from tests.experiments import run
from tests.methods.pairs import NETWORKS
from xkd_jax.augment.ops import to_float
from xkd_jax.distiller import Distiller
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.methods import METHODS
from xkd_jax.methods.reads import needs_logits
from xkd_jax.model import create_model, load
from xkd_jax.teacher.classes import without_classifier
from xkd_jax.weights import fingerprint

pytestmark = pytest.mark.usefixtures("quick_compilation")

READ_LOGITS = {"logits", "deit", "cakd_release", "dkd", "dist", "ofa"}


def network(kind, classes):
    name, args = NETWORKS[kind]
    return create_model(name, num_classes=classes, image_size=args.get("img_size", 28), **args)


def drawn(model):
    return dataclasses.replace(model, variables=jax.jit(model.init)(jax.random.key(0)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_without_classes_there_is_no_head(kind):
    model = network(kind, 0)
    assert model.num_classes == 0
    whole, outs = network(kind, 3).output_shapes, model.output_shapes
    heads = {key for key in whole if key.endswith("logits")}
    assert outs.keys() == whole.keys() - heads
    assert outs["pooled"] == whole["pooled"]
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), np.float32)
    assert jax.eval_shape(model.forward, model.shapes, images)[0] is None


@pytest.mark.slow
def test_a_classifier_can_be_left_out(tmp_path):
    whole = drawn(network("deit", 3))
    model = without_classifier(whole)
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    outs = [m.forward(m.variables, m.preprocess(to_float(images)))[1] for m in (whole, model)]
    np.testing.assert_array_equal(outs[0]["pooled"], outs[1]["pooled"])
    model.save(tmp_path / "w.safetensors")
    assert load(tmp_path / "w.safetensors").num_classes == 0
    with pytest.raises(UserError, match="the model has no classifier"):
        load(tmp_path / "w.safetensors")(images)


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.needs_teacher])
def test_which_methods_read_the_teachers_logits(name):
    pairs = [("vit", "deit")] if name in ("deit", "minilm") else [("vit", "resnet")]
    for teacher, student in pairs:
        outs = network(teacher, 7).output_shapes, network(student, 3).output_shapes
        assert needs_logits(METHODS[name], *outs) == (name in READ_LOGITS)


def test_a_distiller_refuses_a_teacher_without_the_logits_that_are_read():
    teacher, student = network("vit", 0), network("resnet", 3)
    with pytest.raises(UserError, match="reads the teacher's logits, but the teacher has no"):
        Distiller(teacher, student, "logits", optax.sgd(0.1))
    Distiller(teacher, student, "rkd", optax.sgd(0.1))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [0, 7])
def test_features_of_a_teacher_of_other_classes(tmp_path, classes, capsys):
    config = tiny.get_config("fitnet")
    args = config.teacher.args.to_dict()
    model = drawn(create_model("vit_tiny_patch16_224", num_classes=classes, **args))
    model.save(tmp_path / "teacher.safetensors")
    config.teacher.update(model="", weights=str(tmp_path / "teacher.safetensors"))
    experiment = create_experiment(config)
    teacher = experiment.distiller.teacher
    assert teacher.num_classes == 0
    assert teacher.fingerprint == fingerprint(model.variables)
    said = "has 7 classes but fashion_mnist_mini has 10: its classifier is not used"
    assert (said in capsys.readouterr().err) == (classes > 0)
    (metrics,) = run(experiment, 1).metrics
    assert np.isfinite(metrics["loss"])
    assert metrics["hint"] > 0
    assert "teacher_accuracy" not in metrics
