"""Training without labels, and what comes after."""

import copy
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
from xkd_jax.teacher.classes import without_classifier
from xkd_jax.weights import load_weights

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


def taught(config, weights="packaged:quickstart_teacher"):
    # An untrained teacher has the data's classes, which are none: a file has its own.
    config.teacher.update(model="", weights=weights)
    with config.unlocked():
        config.teacher.args = {}
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
        ("dkd", "contrasts images by their class"),
        ("logits", "reads the teacher's logits, but .* has no classifier; fit a classifier to it"),
        ("cakd+logits", "reads the teacher's logits, but .* has no classifier"),
    ],
)
def test_methods_that_need_labels_are_refused(method, reason, tmp_path):
    teacher = load("packaged:quickstart_teacher")
    without_classifier(teacher).save(tmp_path / "headless.safetensors")
    config = taught(unlabelled(method), str(tmp_path / "headless.safetensors"))
    with pytest.raises(UserError, match=rf"method {method.replace('+', '.')} {reason}") as error:
        runs.run(config, tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_teachers_classes_without_labels(tmp_path, capsys):
    config = taught(monitored("dist"))
    config.epochs = 2
    assert runs.run(config, tmp_path / "run") == 0
    assert (
        "fashion_mnist_mini has no labels: the student learns the 10 classes of "
        "packaged:quickstart_teacher." in capsys.readouterr().err
    )
    teacher, student = load(config.teacher.weights), load(tmp_path / "run" / "student.safetensors")
    assert student.num_classes == 10
    assert student.class_names == teacher.class_names
    assert np.any(student.variables["params"]["fc"]["kernel"])
    first, *_, last = (line for line in read_metrics(tmp_path / "run") if "loss" in line)
    assert last["dist_inter"] < first["dist_inter"]
    assert not {"label_loss", "accuracy", "teacher_accuracy"} & first.keys()
    # Only the monitor has labels.
    evaluated = [line for line in read_metrics(tmp_path / "run") if "eval_probe_top1" in line]
    assert evaluated
    assert not any("eval_top1" in line for line in evaluated)
    best = load_weights(tmp_path / "run" / "best.safetensors")[1]
    assert best["eval_probe_top1"] == max(line["eval_probe_top1"] for line in evaluated)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "probe_top1" in summary["student"]
    assert "top1" not in summary["student"].keys() | summary["teacher"].keys()


@pytest.mark.slow
def test_without_labels_is_as_with_their_term_left_out():
    config = taught(unlabelled("dist"))
    ignored = copy.deepcopy(config)
    ignored.data.labels = True
    ignored.data.update(eval="validation[:50]", test="validation[:50]")
    ignored.method.dist.label_weight = 0.0
    of_both = [run(create_experiment(c), 3) for c in (config, ignored)]
    without, beside = (jax.device_get(of.states[-1].params) for of in of_both)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, without, beside)))
    assert "accuracy" in of_both[1].metrics[0]


def test_the_student_gets_classes_only_to_imitate_logits():
    for method, classes in (("dist", 10), ("rkd+logits", 10), ("rkd", 0), ("cakd", 0)):
        distiller = create_experiment(taught(unlabelled(method))).distiller
        assert distiller.teacher is not None
        assert distiller.student.num_classes == distiller.teacher.num_classes == classes


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
