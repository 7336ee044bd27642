"""`xkd-jax predict` on image files."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

import xkd_jax as xkd
from xkd_jax import data
from xkd_jax.cli import predict
from xkd_jax.data.decode import decode, eval_crop
from xkd_jax.weights import locate

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEACHER = "packaged:quickstart_teacher"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with 70 images, more than a batch, in which one file is damaged."""
    folder = tmp_path_factory.mktemp("photos")
    images = data.load("fashion_mnist_mini", "test[:69]").images
    (folder / "more").mkdir()
    for i, image in enumerate(images):
        assert cv2.imwrite(str(folder / ("more" if i % 2 else "") / f"{i:03}.png"), image)
    (folder / "035_damaged.png").write_bytes(b"no image")
    return folder


def lines(capsys, *arguments):
    code = predict.main([*map(str, arguments), "--json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_folder_equals_the_model_on_its_images(photos, capsys):
    code, found = lines(capsys, TEACHER, photos, "--top", 3, "--crop_pct", 1)
    assert code == 1  # for the damaged one
    assert len(found) == 70
    assert [line["path"] for line in found] == sorted(line["path"] for line in found)
    (damaged,) = [line for line in found if "error" in line]
    assert "035_damaged.png can't be decoded" in damaged["error"]
    model = xkd.load(TEACHER)
    sound = [line for line in found if "error" not in line]
    images = np.stack([decode(Path(line["path"]).read_bytes()) for line in sound])
    logits = np.asarray(model(images), np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for line, row in zip(sound, expected, strict=True):
        names, probabilities = zip(*line["classes"], strict=True)
        order = np.argsort(-row)[:3]
        assert names == tuple(model.class_names[i] for i in order)
        np.testing.assert_allclose(probabilities, row[order], rtol=1e-4)


def test_the_crop_is_the_one_that_the_student_was_evaluated_with(tmp_path, capsys):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    assert cv2.imwrite(str(tmp_path / "x.png"), image[..., ::-1])
    model = xkd.load(TEACHER)
    model.save(tmp_path / "half.safetensors", crop_pct=0.5)
    for file, share in ((TEACHER, 0.875), (tmp_path / "half.safetensors", 0.5)):
        _, [line] = lines(capsys, file, tmp_path / "x.png", "--top", 10)
        logits = np.asarray(model(eval_crop(image, model.image_size, share)[None]), np.float64)[0]
        expected = dict(zip(model.class_names, np.exp(logits) / np.exp(logits).sum(), strict=True))
        assert {name: pytest.approx(p, rel=1e-4) for name, p in line["classes"]} == expected


def test_a_table_for_people(photos, capsys):
    assert predict.main([TEACHER, str(photos / "000.png"), "--top=2"]) == 0
    out, err = capsys.readouterr()
    path, first, second = out.rstrip("\n").split("\t")
    assert path == str(photos / "000.png")
    assert float(first.split("%")[0]) >= float(second.split("%")[0])
    assert first.split("%")[1].strip() in xkd.load(TEACHER).class_names
    assert not err
    assert predict.main([TEACHER, str(photos / "035_damaged.png")]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "035_damaged.png can't be decoded (it is not an image" in err


def test_a_runs_folder_is_its_student(photos, tmp_path, capsys):
    shutil.copy(locate(TEACHER), tmp_path / "student.safetensors")
    assert lines(capsys, tmp_path, photos / "000.png") == lines(capsys, TEACHER, photos / "000.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{runs}", "{photos}"], "{runs} holds no student.safetensors; give one of its runs: cakd"),
        (["{empty}", "{photos}"], "{empty} holds no student.safetensors; train it first."),
        ([TEACHER, "{empty}"], "{empty} has no images"),
        ([TEACHER, "{empty}/x.jpg"], "there is no image {empty}/x.jpg; give an image's path"),
        (["{headless}", "{photos}"], "headless.safetensors has no classifier; train it on"),
        (["{photos}/000.png", "{photos}"], "000.png is not"),
        ([TEACHER, "{photos}", "--top=0"], "--top is 0, but must be at least 1."),
        ([TEACHER, "{photos}", "--crop_pct=2"], "--crop_pct is 2, but must be in (0, 1]."),
        ([TEACHER], "the following arguments are required: IMAGES; see xkd-jax predict --help."),
    ],
)
def test_wrong_input(photos, tmp_path, capsys, arguments, message):
    paths = {"photos": photos, "runs": tmp_path / "runs", "empty": tmp_path / "empty"}
    paths["headless"] = tmp_path / "headless.safetensors"
    (paths["runs"] / "cakd").mkdir(parents=True)
    shutil.copy(locate(TEACHER), paths["runs"] / "cakd" / "student.safetensors")
    paths["empty"].mkdir()
    if "{headless}" in arguments:
        from xkd_jax.teacher.classes import without_classifier

        without_classifier(xkd.load(TEACHER)).save(paths["headless"])
    assert predict.main([argument.format(**paths) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message.format(**paths) in err
    assert len(err.splitlines()) == 1
