"""Training without labels, and what comes after."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.experiments import run
from xkd_jax.cli import runs
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import read_checkpoint
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.model import load
from xkd_jax.reporting.files import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


def unlabelled(method="fitnet", **data):
    config = tiny.get_config(method)
    config.epochs = 1
    config.data.update(labels=False, test="nothing", eval="nothing", **data)
    return config


def monitored(method="fitnet"):
    config = unlabelled(method)
    config.monitor.update(name="fashion_mnist_mini", train="train[:100]", test="validation[:50]")
    return config


@pytest.mark.slow
def test_a_step_without_labels(capsys):
    experiment = create_experiment(unlabelled("cakd+rkd"))
    assert experiment.distiller.student.num_classes == 0
    assert experiment.distiller.method.label_weight == 0
    assert "has no labels: the label term is left out" in capsys.readouterr().err
    (metrics,) = run(experiment, 1).metrics
    assert np.isfinite(metrics["loss"])
    assert not {"label_loss", "accuracy", "teacher_accuracy"} & metrics.keys()


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("none", "learns from labels only"),
        ("crd", "contrasts images by their class"),
        ("ab", "learns from the teacher in its first phase only"),
        ("logits", "reads the teacher's logits, but fashion_mnist_mini has no labels"),
        ("cakd+logits", "reads the teacher's logits"),
    ],
)
def test_methods_that_need_labels_are_refused(method, reason, tmp_path):
    config = unlabelled(method)
    # An untrained teacher has the data's classes, which are none: a file has its own.
    config.teacher.update(model="", weights="packaged:quickstart_teacher")
    with config.unlocked():
        config.teacher.args = {}
    with pytest.raises(UserError, match=rf"method {method.replace('+', '.')} {reason}") as error:
        runs.run(config, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_methods_that_read_features_are_not(capsys):
    for method in ("ft", "at", "irg", "review", "ofd"):
        create_experiment(unlabelled(method))


def test_the_monitor_needs_labels(tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    config = unlabelled()
    config.monitor.update(name=f"images:{tmp_path}", test="train")
    with pytest.raises(UserError, match=r"monitor.name=images:.* has no labels"):
        create_experiment(config)


@pytest.mark.slow
def test_from_images_without_labels_to_a_classifier(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 256, (28, 28, 3), np.uint8)
        (tmp_path / "photos" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / str(i % 3) / f"{i}.png")
    config = monitored()
    config.data.update(name=f"images:{tmp_path / 'photos'}", train="train", labels=True)
    assert runs.run(config, tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test"] == "fashion_mnist_mini validation[:50]"
    evaluated = [line for line in read_metrics(tmp_path / "run") if "eval_probe_top1" in line]
    assert evaluated[-1]["eval_probe_top1"] == summary["student"]["probe_top1"]
    measured = {"model", "image_size", "probe_top1", "knn_top1", "parameters", "flops"}
    assert summary["student"].keys() == measured
    report = (tmp_path / "run" / "report.md").read_text()
    assert "linear probe %" in report
    assert "best evaluation" in report
    student = load(tmp_path / "run" / "student.safetensors")
    assert student.num_classes == 0
    assert student.class_names == ()

    labelled = tiny.get_config("none")
    labelled.student.weights = str(tmp_path / "run" / "student.safetensors")
    capsys.readouterr()
    started = create_experiment(labelled).distiller.student
    assert "set fc.bias and fc.weight to zero, for 10 classes" in capsys.readouterr().err
    assert started.num_classes == 10
    old, new = student.variables["params"], started.variables["params"]
    assert new.keys() - old.keys() == {"fc"}
    same = jax.tree.map(np.array_equal, old, {name: new[name] for name in old})
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_without_a_monitor_the_last_student_is_kept(tmp_path):
    assert runs.run(unlabelled(), tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test"] == "nothing, for lack of labels"
    files = [tmp_path / f"{name}.safetensors" for name in ("student", "best")]
    last, best = (load(file).variables for file in files)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, last, best)))
    assert "no evaluation" in (tmp_path / "report.md").read_text()


def test_a_students_classifier_is_left_out(tmp_path, capsys):
    config = tiny.get_config("none")
    student = create_experiment(config).distiller.student
    variables = jax.jit(student.init)(jax.random.key(0))
    path = tmp_path / "student.safetensors"
    from xkd_jax.weights import save_weights

    save_weights(path, jax.device_get(variables), student.metadata())
    assert convert(read_checkpoint(path)).metadata["num_classes"] == 10
    config = unlabelled()
    config.student.weights = str(path)
    assert create_experiment(config).distiller.student.num_classes == 0
    assert "left out fc.bias and fc.weight, the classifier" in capsys.readouterr().err
