"""`xkd-jax predict` and `xkd-jax evaluate` with detectors."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.cli.test_predict import lines
from tests.export.test_detector import NAMES, SIDE, detector
from tests.tasks.shapes import write_coco
from xkd_jax.analysis.detection import evaluate_detector
from xkd_jax.cli import evaluate, export, predict
from xkd_jax.data import coco, masks
from xkd_jax.data.decode import decode
from xkd_jax.data.frame import Frame
from xkd_jax.detection import Detected, frame_of
from xkd_jax.distributed import sharding
from xkd_jax.reporting.drawing import draw_objects
from xkd_jax.tasks.detection import create_detect_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGE = Path(__file__).parents[2] / "docs" / "detection.md"
FRAME = Frame(96, SIDE)
SIZES = [(96, 128), (200, 150), (64, 64), (300, 100), (128, 96)]  # one more than a batch


@pytest.fixture(scope="module")
def model():
    return detector(min_score=0.2)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "detector.safetensors"
    model.save(path, min_size=FRAME.min_size, max_size=FRAME.max_size)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of several sizes, and a damaged one."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (folder / "more").mkdir()
    for i, (height, width) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
        assert cv2.imwrite(str(folder / ("more" if i % 2 else "") / f"{i}.png"), image)
    (folder / "3_damaged.jpg").write_bytes(b"no image")
    return folder


def found_directly(model, path):
    """Classes, scores, boxes and masks of an image, resized and padded by hand."""
    pixels = decode(path.read_bytes())
    height, width = FRAME.fit(*pixels.shape[:2])
    padded = np.full((1, SIDE, SIDE, 3), (124, 116, 104), np.uint8)
    shrinks = height < pixels.shape[0]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    padded[0, :height, :width] = cv2.resize(pixels, (width, height), interpolation=how)
    sizes = np.array([[height, width]], np.float32)
    found = create_detect_step(model)(model.variables, padded, sizes)
    kept = np.flatnonzero(np.asarray(found.classes[0]))
    scale = pixels.shape[1] / width, pixels.shape[0] / height
    boxes = np.asarray(found.boxes[0])[kept] * np.tile(scale, 2)
    return (np.asarray(array[0])[kept] for array in (found.classes, found.scores)), boxes


@pytest.mark.slow
def test_boxes_and_masks_are_in_pixels_of_the_file(model, file, photos, capsys):
    code, found = lines(capsys, file, photos, "--threshold", 0)
    assert code == 1  # for the damaged one
    (damaged,) = [line for line in found if "error" in line]
    assert "3_damaged.jpg can't be decoded" in damaged["error"]
    sound = [line for line in found if "error" not in line]
    assert len(sound) == len(SIZES)
    for line in sound:
        path = photos / line["path"]
        (classes, scores), boxes = found_directly(model, path)
        objects = line["objects"]
        assert [thing["class"] for thing in objects] == [NAMES[label - 1] for label in classes]
        np.testing.assert_allclose([thing["score"] for thing in objects], scores, atol=1e-3)
        np.testing.assert_allclose([thing["box"] for thing in objects], boxes, atol=0.1)
        size = decode(path.read_bytes()).shape[:2]
        for thing in objects:
            left, top, right, bottom = thing["box"]
            rows, columns = np.nonzero(masks.decode(thing["mask"]))
            assert thing["mask"]["size"] == list(size)
            if len(rows):  # a mask is cut off a pixel beyond its box at most
                assert left - 2 <= columns.min() <= columns.max() <= right + 2
                assert top - 2 <= rows.min() <= rows.max() <= bottom + 2


@pytest.mark.slow
def test_copies_are_drawn_on(file, photos, tmp_path, capsys):
    for threshold, drawn in ((0.2, True), (1.0, False)):
        out = tmp_path / str(threshold)
        arguments = [str(file), str(photos), f"--threshold={threshold}", f"--out={out}"]
        assert predict.main(arguments) == 1
        text, err = capsys.readouterr()
        assert "3_damaged.jpg" in err
        assert sorted(path.name for path in out.rglob("*.*")) == [f"{i}.png" for i in range(5)]
        for i in range(5):
            name = f"{'more/' if i % 2 else ''}{i}.png"
            before, after = (np.asarray(Image.open(place / name)) for place in (photos, out))
            rows = [line.split("\t") for line in text.splitlines() if f"{i}.png" in line]
            found = [row for row in rows if row[1:] != ["no objects"]]
            assert bool(found) == drawn
            assert before.shape == after.shape
            assert np.array_equal(before, after) != drawn
            for _, label, box in found:
                assert label.split("%")[1].strip() in NAMES
                assert float(label.split("%")[0]) >= 100 * threshold
                assert len([float(side) for side in box.split()]) == 4


@pytest.mark.slow
def test_the_exported_file_finds_the_same(file, photos, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    _, expected = lines(capsys, file, photos)
    for options in (["--uint8", "--fold"], []):
        out = tmp_path / str(len(options))
        assert export.main([str(file), "--to=onnx", f"--out={out}", *options]) == 0
        capsys.readouterr()
        _, found = lines(capsys, out / "model.onnx", photos)
        assert [line["path"] for line in found if "path" in line] == [
            line["path"] for line in expected if "path" in line
        ]
        for line, other in zip(found, expected, strict=True):
            assert line.keys() == other.keys()
            things, others = line.get("objects", []), other.get("objects", [])
            assert [thing["class"] for thing in things] == [thing["class"] for thing in others]
            boxes = [np.array([thing["box"] for thing in each]) for each in (things, others)]
            np.testing.assert_allclose(*boxes, atol=0.1)


@pytest.mark.slow
def test_the_pages_program_finds_the_same(file, photos, tmp_path, monkeypatch, capsys):
    """docs/detection.md's, on an image that is not resized."""
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    command = [str(file), "--to=onnx", f"--out={tmp_path / 'exported'}", "--uint8", "--fold"]
    assert export.main(command) == 0
    shutil.copy(photos / "0.png", tmp_path / "photo.jpg")
    capsys.readouterr()
    _, [line] = lines(capsys, file, photos / "0.png", "--threshold=0")
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    printed = [text.split(maxsplit=2) for text in capsys.readouterr().out.splitlines()]
    assert len(printed) == len(line["objects"])
    for (name, score, box), thing in zip(printed, line["objects"], strict=True):
        assert name == thing["class"]
        assert float(score) == pytest.approx(thing["score"], abs=0.02)
        sides = [float(side) for side in box.strip("[]").split()]
        np.testing.assert_allclose(sides, thing["box"], atol=0.2)


def test_a_mask_a_box_and_a_name_are_drawn():
    pixels = np.full((200, 300, 3), 100, np.uint8)
    probabilities = np.zeros((1, 28, 28), np.float32)
    probabilities[:, 7:21, 7:21] = 1
    box = np.array([[100.0, 80.0, 220.0, 190.0]], np.float32)
    found = Detected("x.png", pixels, np.array([2]), ["emu"], np.array([0.9]), box, probabilities)
    drawn = draw_objects(found)
    assert (pixels == 100).all()
    changed = (drawn != pixels).any(-1)
    rows, columns = np.nonzero(changed)
    assert columns.min() == 100  # the box, and the label above it
    assert 60 < rows.min() < 80
    assert changed[135, 160]  # the mask's middle
    assert not changed[95, 120:200].any()  # inside the box, beside the mask
    plain = draw_objects(found._replace(masks=None))
    assert not (plain != pixels).any(-1)[135, 160]


def test_sizes_that_are_not_recorded_are_torchvisions(model):
    whole = dataclasses.replace(model, image_size=1344)
    assert frame_of(whole, {}) == Frame(800, 1333)
    assert frame_of(model, {}).side == SIDE
    assert frame_of(model, {"min_size": 96, "max_size": 128}) == FRAME


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{file}", "{photos}", "--top=3"], "--top has no use for {file}, a detector; leave it"),
        (["{file}", "{photos}", "--crop_pct=1"], "--crop_pct has no use for {file}, a detector;"),
        (["packaged:quickstart_teacher", "{photos}", "--out={photos}/x"],
         "--out has no use for packaged:quickstart_teacher, a classifier; leave it out."),
        (["{file}", "{photos}", "--threshold=2"], "--threshold is 2, but must be in [0, 1]."),
        (["{file}", "{photos}", "--out={photos}"],
         "--out {photos} would overwrite {photos}/0.png; give another folder."),
    ],
)  # fmt: skip
def test_wrong_input(file, photos, capsys, arguments, message):
    paths = {"file": file, "photos": photos}
    assert predict.main([argument.format(**paths) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert message.format(**paths) in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_evaluate_measures_boxes_and_masks(tmp_path, capsys):
    pytest.importorskip("pycocotools", reason="needs the extra detection")
    data = write_coco(tmp_path / "coco", 3)
    # In another order than the data's, and with a class that these lack.
    model = detector(num_classes=3, min_score=0.0)
    model = dataclasses.replace(model, class_names=("disc", "N/A", "square"))
    model.save(tmp_path / "s.safetensors", min_size=96, max_size=SIDE)
    arguments = [str(tmp_path / "s.safetensors"), f"--data={data}", "--split=val2017"]
    assert evaluate.main([*arguments, f"--out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    split = coco.open_split(data, "val2017", FRAME, training=False, masks=True)
    step, mesh = create_detect_step(model), sharding.create_mesh()

    def relabelled(*inputs):
        found = step(*inputs)
        is_disc, is_square = found.classes == 1, found.classes == 3
        return found.replace(classes=jnp.where(is_disc, 2, jnp.where(is_square, 1, 0)))

    expected = evaluate_detector(relabelled, model.variables, split, mesh, masks=True)
    assert scores["images"] == 3
    assert scores["AP50"] == pytest.approx(expected["bbox"]["AP50"])
    assert scores["mask_AP50"] == pytest.approx(expected["segm"]["AP50"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[:4]]
    assert rows[0][:3] == [f"{data} val2017", "images", "AP %"]
    assert rows[2][:3] == ["boxes", "3", f"{100 * scores['AP']:.2f}"]
    assert rows[3][:3] == ["masks", "3", f"{100 * scores['mask_AP']:.2f}"]


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        ("{file}", ["--data={data}", "--split=val2017"],
         "{file} doesn't know 'square', a class of {data}; evaluate it on images of its own"),
        ("{file}", ["--data=fashion_mnist_mini"], "{file} is a detector; give a classifier, or"),
        ("{file}", ["--data={data}", "--noisy"], "--noisy, --crop_pct and --data_dir are for"),
        ("packaged:quickstart_teacher", ["--data={data}", "--split=val2017"],
         "packaged:quickstart_teacher is a classifier, but {data} is for detectors; give another"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(file, tmp_path, capsys, student, options, message):
    pytest.importorskip("pycocotools", reason="needs the extra detection")
    paths = {"file": file, "data": write_coco(tmp_path, 1)}
    assert evaluate.main([word.format(**paths) for word in (student, *options)]) == 2
    err = capsys.readouterr().err
    assert message.format(**paths) in err
    assert len(err.splitlines()) == 1
