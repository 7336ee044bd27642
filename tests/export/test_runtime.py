"""`evaluate` and `predict` on exported students, quantised ones included."""

import dataclasses
import json
import shutil

import cv2
import numpy as np
import pytest

from tests.export.test_export import create
from xkd_jax import data
from xkd_jax.cli import evaluate, export, predict
from xkd_jax.export import int8, runtime, student

pytestmark = pytest.mark.usefixtures("quick_compilation")

DATA = "fashion_mnist_mini"
MESSAGES = {
    "missing.onnx": "there is no {}; export the student first, with xkd-jax export.",
    "damaged.onnx": "{} can't be read as ONNX (",
    "foreign.onnx": "{} lacks the class_names that xkd-jax export records; export it again.",
}


@pytest.fixture(scope="module")
def model():
    split = data.load(DATA, "test[:1]")
    cnn = create("resnet8", 28, {"num_classes": 10})
    return dataclasses.replace(cnn, class_names=split.class_names)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The student's file, and what is exported from it."""
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    folder = tmp_path_factory.mktemp("exported")
    model.save(folder / "student.safetensors", crop_pct=1.0)
    found = [folder / "student.safetensors"]
    for out, options in (("pixels", ["--uint8"]), ("floats", ["--int8", "--data", DATA])):
        command = [str(found[0]), "--to=onnx", f"--out={folder / out}", *options]
        assert export.main(command) == 0
        found += sorted((folder / out).glob("*.onnx"))
    return found


def top1(file, folder, *options):
    arguments = [str(file), "--data", DATA, "--split=test[:200]", f"--out={folder}", *options]
    assert evaluate.main(arguments) == 0
    return json.loads((folder / "evaluation.json").read_text())


@pytest.mark.slow
def test_evaluate_gives_the_same_scores(files, tmp_path):
    scores = [top1(file, tmp_path) for file in files]
    expected, *exact, quantised = (row["top1"] for row in scores)
    assert exact == [pytest.approx(expected, abs=0.006)] * 2
    assert quantised == pytest.approx(expected, abs=0.05)
    assert (
        quantised != expected or scores[0]["calibration_error"] != scores[-1]["calibration_error"]
    )


@pytest.mark.slow
def test_predict_gives_the_same_classes(files, tmp_path, capsys):
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    assert cv2.imwrite(str(tmp_path / "x.png"), image)
    found = []
    for file in files[:3]:
        assert predict.main([str(file), str(tmp_path / "x.png"), "--top=3", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["classes"])
    names, probabilities = zip(*(zip(*classes, strict=True) for classes in found), strict=True)
    assert names[0] == names[1] == names[2]
    np.testing.assert_allclose(probabilities[1:], [probabilities[0]] * 2, rtol=1e-3)


@pytest.mark.slow
def test_classes_are_matched_by_name(model, files, tmp_path):
    pytest.importorskip("onnx", reason="needs the extra export")
    backwards = dataclasses.replace(model, class_names=model.class_names[::-1])
    order = tuple(reversed(range(10)))
    file, _ = student.export(backwards, "onnx", tmp_path, student.Options(uint8=True))
    images = data.load(DATA, "test[:4]").images
    exported, _ = runtime.load(file)
    logits = dataclasses.replace(exported, class_order=order)(images)
    np.testing.assert_allclose(logits, model(images)[:, ::-1], atol=1e-4)


@pytest.mark.slow
def test_weights_have_7_bits_and_a_scale_per_channel(files):
    import onnx
    from onnx import numpy_helper

    float32, quantised = files[2:]
    assert quantised.name == "model_int8.onnx"
    assert quantised.stat().st_size < 0.4 * float32.stat().st_size
    graph = onnx.load(quantised).graph
    arrays = {array.name: numpy_helper.to_array(array) for array in graph.initializer}
    weights = {name: a for name, a in arrays.items() if a.dtype == np.int8 and a.ndim == 4}
    assert len(weights) == sum(node.op_type == "Conv" for node in graph.node) == 9
    for name, array in weights.items():
        scales = arrays[name.replace("_quantized", "_scale")]
        assert scales.shape == array.shape[:1]
        assert 60 < np.abs(array).max() <= 64
    activations = {
        arrays[node.input[2]].dtype for node in graph.node if node.op_type == "QuantizeLinear"
    }
    assert activations == {np.dtype("uint8")}


def test_calibration_images_are_drawn_from_the_split():
    few = int8.calibration_images((DATA, "validation[:20]", ""), 28, 1.0)
    np.testing.assert_array_equal(few, data.load(DATA, "validation[:20]").images)
    split = data.load(DATA, "train[:600]").images
    drawn = int8.calibration_images((DATA, "train[:600]", ""), 28, 1.0)
    assert drawn.shape == (512, 28, 28, 3)
    places = [np.flatnonzero((split == image).all((1, 2, 3)))[0] for image in drawn]
    assert sorted(set(places)) == places
    assert max(places) > 580
    half = int8.calibration_images((DATA, "validation[:20]", ""), 14, 0.5)
    np.testing.assert_array_equal(half, few[:, 7:21, 7:21])


@pytest.mark.slow
@pytest.mark.parametrize("name", MESSAGES)
def test_files_that_cannot_be_run_are_refused(files, tmp_path, capsys, name):
    import onnx

    (tmp_path / "damaged.onnx").write_bytes(files[1].read_bytes()[:1000])
    proto = onnx.load(files[1])
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    assert evaluate.main([str(tmp_path / name), "--data", DATA]) == 2
    err = capsys.readouterr().err
    assert MESSAGES[name].format(tmp_path / name) in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_noisy_images_need_the_network(files, capsys):
    assert evaluate.main([str(files[1]), "--data", DATA, "--noisy"]) == 2
    err = capsys.readouterr().err
    assert f"--noisy needs the network itself, but {files[1]} is exported; give its run" in err


@pytest.mark.slow
def test_a_tflite_file_needs_its_own_preprocessing(model, files, tmp_path, capsys):
    pytest.importorskip("litert_converter", reason="needs LiteRT, see docs/export.md")
    file, about = student.export(model, "litert", tmp_path, student.Options())
    assert top1(file, tmp_path)["top1"] == pytest.approx(
        top1(files[0], tmp_path)["top1"], abs=0.006
    )
    capsys.readouterr()
    shutil.copy(files[1].with_name("preprocessing.json"), about)
    assert evaluate.main([str(file), "--data", DATA]) == 2
    assert f"{about} is of another export than model.tflite;" in capsys.readouterr().err
    about.unlink()
    assert evaluate.main([str(file), "--data", DATA]) == 2
    assert f"there is no {about}, which says how to prepare" in capsys.readouterr().err


def test_an_exported_file_is_not_exported_again(tmp_path, capsys):
    assert export.main(["a/model.onnx", "--to=timm", f"--out={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert "a/model.onnx is exported already; give the run's folder or .safetensors file." in err


def test_a_missing_runtime_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.onnx").write_bytes(b"")
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    assert evaluate.main([str(tmp_path / "model.onnx"), "--data", DATA]) == 2
    assert "needs the package onnxruntime; pip install 'xkd_jax[export]'" in capsys.readouterr().err
