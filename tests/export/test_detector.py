"""Exported detectors, run by ONNX Runtime and read back from StableHLO."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.export.test_export import create
from xkd_jax.cli import export as command
from xkd_jax.data.frame import Frame
from xkd_jax.export import student
from xkd_jax.tasks.detection import create_detect_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIDE, NAMES = 128, ("cat", "dog", "emu")
SMALL = {
    "num_classes": 3,
    "backbone": "resnet18",
    "backbone_args": {"layers": (1, 1, 1, 1), "width": 0.25},
    "anchor_sizes": (8, 16, 32, 64, 128),
    "rpn_pre_nms_test": 60,
    "rpn_post_nms_test": 50,
    "box_nms": 0.2,
    "max_detections": 150,
    "fpn_width": 32,
}
OPTIONS = student.Options(frame=Frame(96, SIDE), uint8=True)
# The whole image, and two with padding.
SIZES = np.array([[128, 128], [96, 128], [101, 67]], np.float32)


def detector(name="maskrcnn_resnet50_fpn", **args):
    model = create(name, SIDE, SMALL | args)
    return dataclasses.replace(model, class_names=NAMES)


def photos():
    """Images in which neighbouring pixels are alike, and so are neighbouring features."""
    coarse = np.random.default_rng(0).integers(0, 256, (len(SIZES), 16, 16, 3), np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def objects(found, index):
    """What an image of a batch has without its padding, by name."""
    arrays = {name: np.asarray(array)[index] for name, array in found.items() if array is not None}
    return {name: array[arrays["classes"] > 0] for name, array in arrays.items()}


def assert_same_objects(found, expected):
    assert found.keys() == expected.keys()
    assert_allclose(found["classes"], expected["classes"])
    for name in found.keys() - {"classes"}:
        assert found[name].shape == expected[name].shape
        assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-3)


def in_onnx_runtime(file, images, sizes):
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    inputs = {"images": images.transpose(0, 3, 1, 2), "sizes": sizes}
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.fixture(scope="module")
def model():
    return detector()


@pytest.fixture(scope="module")
def expected(model):
    return vars(create_detect_step(model)(model.variables, photos(), SIZES))


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
def test_onnx_runtime_finds_the_same_objects(model, expected, tmp_path, fold):
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    options = dataclasses.replace(OPTIONS, fold=fold)
    file, about = student.export(model, "onnx", tmp_path, options)
    for i, image in enumerate(photos()):
        found = in_onnx_runtime(file, image[None], SIZES[i : i + 1])
        wanted = objects(expected, i)
        assert len(wanted["scores"]) > 5
        assert len(set(wanted["classes"])) == 3
        assert_same_objects(found, wanted)
    proto = onnx.load(file)
    recorded = {prop.key: json.loads(prop.value) for prop in proto.metadata_props}
    assert recorded["class_names"] == list(NAMES)
    assert (recorded["min_size"], recorded["max_size"], recorded["size"]) == (96, SIDE, SIDE)
    assert json.loads(about.read_text()) == recorded | {"images": "[1, 3, H, W]"}
    kinds = collections.Counter(node.op_type for node in proto.graph.node)
    # Five levels of proposals, and the classes; four levels for boxes and for masks.
    assert (kinds["NonMaxSuppression"], kinds["RoiAlign"]) == (6, 8)
    assert proto.opset_import[0].version == 13


@pytest.mark.slow
@pytest.mark.parametrize("found", [0, 1])
def test_an_image_may_have_no_objects(tmp_path, found):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    model = detector(min_score=1.0 - found, max_detections=1)
    file, _ = student.export(model, "onnx", tmp_path, OPTIONS)
    arrays = in_onnx_runtime(file, photos()[:1], SIZES[:1])
    assert {name: array.shape for name, array in arrays.items()} == {
        "boxes": (found, 4), "scores": (found,), "classes": (found,), "masks": (found, 28, 28),
    }  # fmt: skip


@pytest.mark.slow
def test_another_backbone_without_masks(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    args = {"backbone": "mobilenetv2_100", "backbone_args": {"width": 0.25}}
    model = detector("fasterrcnn_resnet50_fpn", **args)
    file, how = student.export(model, "onnx", tmp_path, student.Options(frame=OPTIONS.frame))
    how = json.loads(how.read_text())["normalize"]
    prepared = (photos() * how["scale"] - how["mean"]) / how["std"]
    expected = vars(create_detect_step(model)(model.variables, photos(), SIZES))
    found = in_onnx_runtime(file, prepared[1:2].astype(np.float32), SIZES[1:2])
    assert found.keys() == {"boxes", "scores", "classes"}
    assert_same_objects(found, objects(expected, 1))


@pytest.mark.slow
def test_stablehlo_is_read_back_and_finds_the_same(model, expected, tmp_path):
    pytest.importorskip("flatbuffers", reason="needs the extra export")
    file, about = student.export(model, "stablehlo", tmp_path, OPTIONS)
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    found = exported.call(photos()[:2], SIZES[:2])
    for i in range(2):
        assert_same_objects(objects(found, i), objects(expected, i))
    assert json.loads(about.read_text())["images"] == "[N, H, W, 3]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to=timm"], "--to timm is for classifiers, but maskrcnn_resnet50_fpn is a detector;"),
        (["--to=litert"], "--to litert is for classifiers, but maskrcnn_resnet50_fpn is a"),
        (["--to=onnx", "--int8", "--data=x"], "--int8 is for classifiers, but maskrcnn_resnet50"),
    ],
)
def test_what_cannot_be_exported_is_refused(model, tmp_path, capsys, options, message):
    model.save(tmp_path / "s.safetensors")
    out = tmp_path / "out"
    assert command.main([str(tmp_path / "s.safetensors"), *options, f"--out={out}"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not out.exists()
