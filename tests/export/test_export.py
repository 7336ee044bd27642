"""Exported students, each run by its own runtime."""

import collections
import dataclasses
import json
import re
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from xkd_jax.cli import export as command
from xkd_jax.errors import UserError
from xkd_jax.export import runtime, student
from xkd_jax.model import create_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A network of each class, and the side of its images.
CNNS = {
    "resnet18": (32, {"layers": (1, 1, 1, 1), "width": 0.25}),
    "resnext50_32x4d": (32, {"layers": (1, 1, 1, 1), "groups": 2}),
    "resnet18d": (33, {"layers": (1, 1, 1, 1), "width": 0.25}),
    "repvgg_a0_32": (32, {"depths": (1, 1, 2, 1), "channels": (8, 12, 16, 24)}),
    "mobilenetv2_100": (32, {"width": 0.25}),
    "efficientnet_b0": (32, {"width": 0.25}),
    "tf_efficientnet_lite0": (33, {"width": 0.25}),
    "tf_efficientnetv2_b0_32": (32, {"width": 0.1, "depth": 0.1}),
    "efficientnetv2_rw_t": (33, {"width": 0.1, "depth": 0.1}),
    "mobilenetv3_small_100_32": (32, {"width": 0.1}),
    "mobilenetv4_conv_small_32": (32, {"width": 0.1, "depth": 0.1}),
    "ghostnet_100_32": (32, {"width": 0.1}),
    "regnety_004_32": (32, {"depth": 6, "w0": 8, "wa": 8.0, "wm": 2.0}),
    "convnext_atto_32": (32, {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}),
    # With 2x2 positions in the last stage, and with a single one.
    "convnextv2_atto": (64, {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}),
    "convnextv2_nano": (32, {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}),
    "legacy_xception": (71, {"width": 0.05}),
    "inception_v3": (75, {}),
    "resnet8": (32, {}),
    "wrn_16_1": (32, {}),
    "vgg8": (32, {}),
}
# Their matrices have a row per position of a single image, which fixes LiteRT's batch.
FIXED = ("convnext_atto_32", "convnextv2_atto", "convnextv2_nano")
NAMES = ("cat", "dog", "emu", "fox", "gnu")


def create(name, size, args):
    """With weights of usual sizes that differ by channel, BatchNorm's statistics included."""
    args = {"num_classes": 5} | args
    model = create_model(name, image_size=size, class_names=NAMES, **args)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if len(leaf.shape) > 1:
            values = rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5
        elif path[-1].key in ("var", "scale", "gamma"):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = rng.normal(size=leaf.shape) / 10
        return values.astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(fill, model.shapes)
    return dataclasses.replace(model, variables=variables)


def photos(model, count):
    shape = (count, model.image_size, model.image_size, 3)
    return np.random.default_rng(count).integers(0, 256, shape, np.uint8)


def assert_close(found, expected):
    scale = np.abs(expected).max()
    assert_allclose(found / scale, np.asarray(expected) / scale, atol=1e-4)


# Those that are exported in every way in CI: plain convolutions, squeeze-and-excitation, no
# BatchNorm, pooling within the network. The others are exported to ONNX with BatchNorm folded.
EVERY_WAY = ("resnet18", "efficientnet_b0", "convnext_atto_32", "inception_v3")
OTHER_WAYS = [
    pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in EVERY_WAY)) for name in CNNS
]


@pytest.fixture(scope="module")
def cnn(request):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    return create(request.param, *CNNS[request.param])


@pytest.mark.slow
@pytest.mark.parametrize("cnn", CNNS, indirect=True)
def test_onnx_runtime_computes_the_same_logits(cnn, tmp_path):
    compare_with_onnx_runtime(cnn, tmp_path, fold=True)


@pytest.mark.slow
@pytest.mark.parametrize("cnn", OTHER_WAYS, indirect=True)
def test_onnx_runtime_computes_the_same_logits_with_batch_norm(cnn, tmp_path):
    compare_with_onnx_runtime(cnn, tmp_path, fold=False)


def compare_with_onnx_runtime(cnn, tmp_path, fold):
    import onnx
    import onnxruntime

    options = student.Options(0.9, fold, uint8=True)
    file, about = student.export(cnn, "onnx", tmp_path, options)
    session = onnxruntime.InferenceSession(file)
    for count in (1, 3):
        images = photos(cnn, count)
        (found,) = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
        assert_close(found, cnn(images))
    proto = onnx.load(file)
    kinds = collections.Counter(node.op_type for node in proto.graph.node)
    assert not kinds["Transpose"]
    recorded = {prop.key: json.loads(prop.value) for prop in proto.metadata_props}
    assert recorded["class_names"] == list(NAMES)
    assert json.loads(about.read_text()) == recorded | {"images": "[N, 3, H, W]"}


@pytest.mark.slow
@pytest.mark.parametrize("cnn", OTHER_WAYS, indirect=True)
def test_litert_computes_the_same_logits(cnn, tmp_path):
    pytest.importorskip("litert_converter", reason="needs LiteRT, see docs/export.md")
    file, about = student.export(cnn, "litert", tmp_path, student.Options(0.9, uint8=True))
    layout = "[1, H, W, 3]" if cnn.name in FIXED else "[N, H, W, 3]"
    assert json.loads(about.read_text())["images"] == layout
    exported, crop_pct = runtime.load(file)
    assert (exported.class_names, crop_pct) == (NAMES, 0.9)
    for count in (1, 3):
        images = photos(cnn, count)
        assert_close(exported(images), cnn(images))


# Networks with attention, and the side of their images.
ATTENTION = {
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2}),
    "mobilenetv4_hybrid_medium": (64, {"width": 0.1, "depth": 0.1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
def test_litert_runs_attention_on_one_image_at_a_time(tmp_path, name):
    pytest.importorskip("litert_converter", reason="needs LiteRT, see docs/export.md")
    model = create(name, *ATTENTION[name])
    file, about = student.export(model, "litert", tmp_path, student.Options())
    assert json.loads(about.read_text())["images"] == "[1, H, W, 3]"
    images = photos(model, 3)
    assert_close(runtime.load(file)[0](images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize("cnn", ["resnet18", "mobilenetv2_100", "efficientnet_b0"], indirect=True)
def test_openvino_computes_the_same_logits(cnn, tmp_path):
    openvino = pytest.importorskip("openvino", reason="openvino isn't installed")
    options = student.Options(fold=True, uint8=True)
    file, _ = student.export(cnn, "onnx", tmp_path, options)
    # Its CPU plugin may compute in bfloat16 otherwise.
    compiled = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 3):
        images = photos(cnn, count)
        assert_close(compiled(images.transpose(0, 3, 1, 2))[0], cnn(images))


@pytest.mark.slow
def test_folding_leaves_no_batch_norm(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    model = create("resnet18", *CNNS["resnet18"])
    counts = []
    for fold in (False, True):
        file, _ = student.export(model, "onnx", tmp_path, student.Options(fold=fold))
        nodes = onnx.load(file).graph.node
        counts.append(collections.Counter(node.op_type for node in nodes))
    assert counts[0]["Mul"] == counts[0]["Conv"] == counts[1]["Conv"] == 12
    assert not counts[1]["Mul"]
    assert counts[1]["Add"] == 4  # of the blocks' shortcuts


@pytest.mark.slow
def test_branches_that_only_training_needs_are_folded(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    model = create("repvgg_a0_32", *CNNS["repvgg_a0_32"])
    images, options = photos(model, 2), student.Options(uint8=True)
    file, _ = student.export(model, "onnx", tmp_path, options)
    kinds = collections.Counter(node.op_type for node in onnx.load(file).graph.node)
    assert kinds["Conv"] == kinds["Relu"] == 6  # the stem and five blocks
    inputs = {"images": images.transpose(0, 3, 1, 2)}
    assert_close(onnxruntime.InferenceSession(file).run(None, inputs)[0], model(images))
    file, _ = student.export(model, "stablehlo", tmp_path, options)
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    count = exported.mlir_module().count("stablehlo.convolution(")
    assert count == 6 * len(exported.platforms)  # each has its own
    assert_close(exported.call(images), model(images))


@pytest.mark.slow
def test_a_convnext_consists_of_convolutions(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    model = create("convnextv2_atto", *CNNS["convnextv2_atto"])
    file, _ = student.export(model, "onnx", tmp_path, student.Options(fold=True))
    nodes = onnx.load(file).graph.node
    shapes = [
        tuple(attribute.ints)
        for node in nodes
        for attribute in node.attribute
        if attribute.name == "kernel_shape"
    ]
    # The stem; in each stage a depthwise convolution and two layers; three reductions.
    counts = {(4, 4): 1, (7, 7): 4, (1, 1): 8, (2, 2): 3}
    assert collections.Counter(shapes) == counts
    kinds = collections.Counter(node.op_type for node in nodes)
    assert (kinds["Erf"], kinds["Gemm"], kinds["Reshape"]) == (4, 1, 0)


@pytest.mark.slow
def test_relu6_is_one_operator(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    model = create("mobilenetv2_100", *CNNS["mobilenetv2_100"])
    file, _ = student.export(model, "onnx", tmp_path, student.Options(fold=True))
    kinds = collections.Counter(node.op_type for node in onnx.load(file).graph.node)
    # At this width, 11 blocks keep their number of channels and have a shortcut.
    assert kinds == {"Conv": 52, "Clip": 35, "Add": 11, "ReduceMean": 1, "Gemm": 1, "Identity": 1}


@pytest.mark.slow
def test_normalised_images_are_the_default(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    model = create("resnet8", *CNNS["resnet8"])
    file, about = student.export(model, "onnx", tmp_path, student.Options())
    images, how = photos(model, 2), json.loads(about.read_text())["normalize"]
    prepared = (images * how["scale"] - how["mean"]) / how["std"]
    inputs = prepared.transpose(0, 3, 1, 2).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(file).run(None, {"images": inputs})
    assert_close(found, model(images))


@pytest.mark.slow
@pytest.mark.parametrize("uint8", [False, True])
def test_stablehlo_is_read_back_and_computes_the_same(tmp_path, uint8):
    pytest.importorskip("flatbuffers", reason="needs the extra export")
    model = create("resnet8", 32, {})
    file, _ = student.export(model, "stablehlo", tmp_path, student.Options(uint8=uint8))
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    for count in (1, 3):
        images = photos(model, count)
        prepared = images if uint8 else np.asarray(student.normalized(model, images))
        assert_close(exported.call(prepared), model(images))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "size", "args"),
    [("resnet18", 32, {"layers": (1, 1, 1, 1)}), ("mobilenetv2_100", 64, {}),
     ("repvgg_a0", 64, {}),
     ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2})],
)  # fmt: skip
def test_timm_loads_the_folder(tmp_path, name, size, args):
    from tests.parity.reference import timm, torch

    model = create(name, size, args)
    student.export(model, "timm", tmp_path, student.Options(crop_pct=0.9))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = photos(model, 3)
    prepared = np.array(student.normalized(model, images).transpose(0, 3, 1, 2))
    with torch.no_grad():
        assert_close(theirs(torch.from_numpy(prepared)).numpy(), model(images))
    config = timm.data.resolve_model_data_config(theirs)
    assert config["crop_pct"] == 0.9
    assert tuple(config["input_size"]) == (3, size, size)
    assert_allclose(config["mean"], model.mean)


def test_the_commands_targets_are_these():
    assert tuple(student.TARGETS) == command.TARGETS


def test_the_command_writes_what_it_says(tmp_path, capsys):
    model = create("mobilenetv2_100", 32, {})
    model.save(tmp_path / "s.safetensors", crop_pct=0.8)
    out = tmp_path / "out"
    assert command.main([str(tmp_path / "s.safetensors"), "--to=timm", f"--out={out}"]) == 0
    assert capsys.readouterr().out.split() == [
        "wrote", str(out / "model.safetensors"), "wrote", str(out / "config.json"),
    ]  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "mobilenetv2_100"
    assert config["pretrained_cfg"]["crop_pct"] == 0.8
    assert config["pretrained_cfg"]["label_names"] == list(NAMES)


def test_the_model_card_is_the_readme_of_an_exported_run(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    create("mobilenetv2_100", 32, {}).save(run / "student.safetensors", crop_pct=0.8)
    (run / "model_card.md").write_text("the card")
    argv = [str(run), "--to=timm", f"--out={out}"]
    assert command.main(argv) == 0
    assert capsys.readouterr().out.endswith(f"wrote {out / 'README.md'}\n")
    assert (out / "README.md").read_text() == "the card"
    (out / "README.md").write_text("of another project")
    (out / "config.json").unlink()
    assert command.main(argv) == 2
    assert "README.md isn't a model card and would be overwritten" in capsys.readouterr().err
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "args", "options", "message"),
    [
        ("resnet8", {}, ["--to=timm"], "timm has no resnet8; take --to onnx or --to stablehlo."),
        ("resnet50x2", {}, ["--to=timm"], "timm has no resnet50x2; take"),
        ("resnet18", {"width": 0.125}, ["--to=timm"], "has no equivalent of width=0.125; take"),
        ("resnet8", {}, ["--to=timm", "--uint8"], "--uint8 is for --to onnx, litert and"),
        ("resnet8", {}, ["--to=stablehlo", "--fold"], "--fold is for --to onnx and --to litert;"),
        ("resnet8", {}, ["--to=onnx", "--int8"], "--int8 needs --data, images to calibrate with"),
        ("resnet8", {}, ["--to=litert", "--int8", "--data=x"], "--int8 is for --to onnx; leave it"),
        ("resnet8", {}, ["--to=onnx", "--split=test"], "--split is for --int8; leave it out"),
        pytest.param(
            "resnet8",
            {},
            ["--to=onnx", "--int8", "--data=folder:/nowhere"],
            "/nowhere",
            marks=pytest.mark.skipif(not find_spec("onnxruntime"), reason="needs onnxruntime"),
        ),
        ("resnet8", {}, ["--to=tflite"], "invalid choice: 'tflite'"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, capsys, name, args, options, message):
    model = create_model(name, num_classes=5, image_size=32, **args)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.shapes)
    dataclasses.replace(model, variables=zeros).save(tmp_path / "s.safetensors")
    out = tmp_path / "out"
    assert command.main([str(tmp_path / "s.safetensors"), *options, f"--out={out}"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("target", "package", "source"),
    [("onnx", "onnx", "'xkd_jax[export]'"), ("litert", "ai_edge_litert", "'xkd_jax[litert]'"),
     ("litert", "litert_converter", "--no-deps 'litert-converter>=0.5,<0.6'"),
     ("stablehlo", "flatbuffers", "'xkd_jax[export]'")],
)  # fmt: skip
def test_a_missing_package_is_named(tmp_path, monkeypatch, target, package, source):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: name != package or None)
    model = create_model("resnet8", num_classes=5, image_size=32)
    message = f"--to {target} needs the package {package}; pip install {source} brings it."
    with pytest.raises(UserError, match=re.escape(message)):
        student.export(model, target, tmp_path / "out", student.Options())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_refused_by_onnx(tmp_path, capsys, name):
    pytest.importorskip("onnx", reason="needs the extra export")
    create(name, *ATTENTION[name]).save(tmp_path / "s.safetensors")
    code = command.main([str(tmp_path / "s.safetensors"), "--to=onnx", f"--out={tmp_path}"])
    assert code == 2
    err = capsys.readouterr().err
    assert "because it covers CNNs without attention only; export such a network, or take" in err
    assert len(err.splitlines()) == 1
