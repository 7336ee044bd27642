"""`xkd-jax evaluate` on labelled images."""

import csv
import dataclasses
import json
import shutil

import cv2
import jax
import numpy as np
import pytest

import xkd_jax as xkd
from xkd_jax import data
from xkd_jax.cli import evaluate
from xkd_jax.model import create_model
from xkd_jax.weights import locate

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEACHER = "packaged:quickstart_teacher"
DATA = ("--data", "fashion_mnist_mini", "--split", "test[:300]")


def measured(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(locate(TEACHER), folder / "student.safetensors")
    assert evaluate.main([str(folder), *DATA, "--noisy"]) == 0
    return folder / "evaluation"


def test_scores_are_those_of_the_models_logits(evaluated):
    split, model = data.load("fashion_mnist_mini", "test[:300]"), xkd.load(TEACHER)
    predicted = np.argmax(np.asarray(model(split.images)), 1)
    scores = measured(evaluated)
    assert scores["images"] == 300
    assert scores["top1"] == pytest.approx(np.mean(predicted == split.labels))
    assert 0.5 < scores["noisy_top1"] < scores["top1"] < scores["top5"] <= 1
    assert 0 < scores["calibration_error"] < 0.3
    with (evaluated / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(split.class_names)
    for label, row in enumerate(rows):
        of_class = split.labels == label
        assert int(row["images"]) == of_class.sum()
        assert float(row["accuracy"]) == pytest.approx(
            np.mean(predicted[of_class] == label), abs=1e-4
        )
    with (evaluated / "confusion.csv").open() as file:
        header, *matrix = csv.reader(file)
    assert header[1:] == list(split.class_names)
    counts = np.array([[int(cell) for cell in row[1:]] for row in matrix])
    assert np.trace(counts) == np.sum(predicted == split.labels)
    assert (evaluated / "confusion.png").stat().st_size > 1000


def test_classes_are_matched_by_name(evaluated, tmp_path, capsys):
    model = xkd.load(TEACHER)
    assert model.variables is not None
    params = dict(model.variables["params"])
    params["head"] = jax.tree.map(lambda leaf: leaf[..., ::-1], params["head"])
    backwards = dataclasses.replace(
        model, variables={"params": params}, class_names=model.class_names[::-1]
    )
    backwards.save(tmp_path / "backwards.safetensors")
    assert (
        evaluate.main([str(tmp_path / "backwards.safetensors"), *DATA, "--out", str(tmp_path)]) == 0
    )
    assert "in another order" in capsys.readouterr().err
    for name in ("top1", "top5"):
        assert measured(tmp_path)[name] == measured(evaluated)[name]
    assert (tmp_path / "confusion.csv").read_text() == (evaluated / "confusion.csv").read_text()


def test_two_classes_have_an_equal_error_rate(tmp_path, capsys):
    classes = tmp_path / "photos" / "val"
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (classes / name).mkdir(parents=True)
        for i in range(6):
            image = np.clip(rng.normal(level, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            assert cv2.imwrite(str(classes / name / f"{i}.png"), image)
    shutil.copytree(classes, tmp_path / "photos" / "train")
    model = create_model(
        "resnet18", num_classes=2, image_size=32, class_names=("dark", "light"),
        layers=(1, 1, 1, 1), width=0.0625, stem="cifar",
    )  # fmt: skip
    variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape), model.shapes)
    model = dataclasses.replace(model, variables=variables)
    model.save(tmp_path / "two.safetensors")
    code = evaluate.main(
        [str(tmp_path / "two.safetensors"), "--data", f"folder:{tmp_path / 'photos'}",
         "--split=val", "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert code == 0
    assert 0 <= measured(tmp_path / "out")["eer"] <= 1
    out = capsys.readouterr().out
    assert "EER %" in out
    assert "top-5" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [TEACHER, "--data", "fashion_mnist_mini", "--split=tset"],
            "unknown split 'tset'; known: ",
        ),
        ([TEACHER, "--data", "tfds:cifar100", "--data_dir=nowhere"], "cifar100"),
        (["nothing.safetensors", *DATA], "nothing.safetensors"),
        ([TEACHER], "required: --data; see xkd-jax evaluate --help."),
        ([TEACHER, *DATA, "--crop_pct=-1"], "--crop_pct is -1, but must be in (0, 1]."),
    ],
)
def test_wrong_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_other_classes_are_refused(tmp_path, capsys):
    model = xkd.load(TEACHER)
    names = ("anorak", *model.class_names[1:])
    dataclasses.replace(model, class_names=names).save(tmp_path / "other.safetensors")
    assert evaluate.main([str(tmp_path / "other.safetensors"), *DATA]) == 2
    message = capsys.readouterr().err
    assert "was trained on other classes than those of fashion_mnist_mini" in message
    assert "'anorak'" in message
    assert message.rstrip().endswith("evaluate it on images of its own classes.")
