"""Bad input is refused in one sentence, before anything is compiled."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from xkd_jax import train as loop
from xkd_jax.cli import run_folder, runs
from xkd_jax.config import used
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.models import create_model
from xkd_jax.weights import save_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")


def teacher_file(path, **changes):
    """A tiny ViT's weights, all zeros; without `classes`, of ten."""
    classes = changes.pop("classes", 10)
    metadata = {
        "model": "vit_tiny_patch16_224",
        "args": tiny.get_config().teacher.args.to_dict(),
        "num_classes": classes,
        "image_size": 28,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    } | changes.pop("metadata", {})
    args = tiny.get_config().teacher.args.to_dict()
    model = create_model("vit_tiny_patch16_224", num_classes=classes, **args)
    images = jax.ShapeDtypeStruct((1, 28, 28, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    save_weights(path, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), metadata)
    return str(path)


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
    """Fails if wrong input reaches the training loop."""

    def run(experiment, folder):
        raise AssertionError("training started")

    monkeypatch.setattr(loop, "run", run)


def refuse(tmp_path, match, method="cakd", **changes):
    config = tiny.get_config(method)
    tiny.set_fields(config, changes)
    with pytest.raises(UserError, match=match) as error:
        runs.run(config, tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("unknown optimizer.name 'sdg'; did you mean sgd", {"optimizer__name": "sdg"}),
        ("unknown schedule.name 'cosin'; did you mean cosine", {"schedule__name": "cosin"}),
        ("unknown geometry mode 'share'; did you mean shared", {"views__geometry": "share"}),
        ("unknown dtype 'float8'", {"dtype": "float8"}),
        ("epochs is 0, but must be at least 1", {"epochs": 0}),
        (r"label_smoothing is 1.0, but must be in \[0, 1\)", {"label_smoothing": 1.0}),
        ("unknown method 'none2'", {"method__name": "none2"}),
        ("unknown method 'x'", {"method__name": "none", "compare": ("none", "x")}),
        ("has no effect with compare", {"compare": ("none", "cakd")}),
        ("method cakd needs a teacher", {"teacher__weights": "", "teacher__model": ""}),
        ("unknown network 'resnt18'; did you mean resnet18", {"student__model": "resnt18"}),
        ("unknown resnet18 argument 'widht'; did you mean width", {"student__args": {"widht": 1}}),
        ("unknown data set 'fashion'", {"data__name": "fashion"}),
        ("unknown split 'trian'", {"data__train": "trian"}),
        ("unknown split 'tset'", {"data__test": "tset"}),
        (r"crop_pct is 1.5, but must be in \(0, 1\]", {"crop_pct": 1.5}),
        ("blurred images, which training must not have seen; set augment.blur=0",
         {"data__noisy": True, "augment__blur": 0.5}),
        ("vgg8 has no blocks that remat could recompute; set remat=False",
         {"remat": True, "student__model": "vgg8", "student__args": {}}),
        ("batch_size=128 is larger than the 64 images", {"batch_size": 128}),
        ("there is no weights file at nope.safe", {"teacher__weights": "nope.safetensors"}),
        ("no stage 'stage9'; it has stage1", {"method__cakd__student_stage": "stage9"}),
        ("teacher_block=-7 doesn't exist", {"method__cakd__teacher_block": -7}),
        ("unknown adversary clock 'eon'", {"method__cakd__adversary_clock": "eon"}),
        ("unknown generator loss 'saturate'", {"method__cakd__generator": "saturate"}),
        ("this teacher is a CNN", {"teacher__model": "resnet18", "teacher__args": {}}),
        ("; for this pair take", {"method__name": "minilm"}),
        ("seed is -1, but must be at least 0", {"seed": -1}),
        ("augment.crop_padding is -1, but must be at least 0", {"augment__crop_padding": -1}),
        ("augment.crop_padding=28 is not smaller than the images", {"augment__crop_padding": 28}),
        ("image_size is -5, but must be at least 8 pixels", {"image_size": -5}),
        ("image_size is 1, but must be at least 8 pixels", {"image_size": 1}),
        (r"schedule.boundaries are \('a',\)", {"schedule__boundaries": ("a",)}),
        (r"crop_scale is \(0.5,\), but must be two", {"crop_scale": (0.5,)}),
        (r"crop_scale is \('a', 1\), but must be two", {"crop_scale": ("a", 1)}),
        ("augment.mixup is nan, but must be a number", {"augment__mixup": float("nan")}),
        ("views.rotation is nan", {"views__rotation": float("nan")}),
        ("adversary_optimizer.learning_rate is nan",
         {"adversary_optimizer__learning_rate": float("nan")}),
        ("adversary_optimizer.learning_rate is -1.0, but must be at least 0",
         {"adversary_optimizer__learning_rate": -1.0}),
        ("method_optimizer.learning_rate is -1.0, but must be at least 0",
         {"method_optimizer__learning_rate": -1.0}),
        ("unknown method_optimizer.name 'adma'; did you mean adam",
         {"method_optimizer__name": "adma"}),
        ("method.cakd.token_weight is -1.0, but must be at least 0",
         {"method__cakd__token_weight": -1.0}),
        ("method.cakd.token_weight is nan", {"method__cakd__token_weight": float("nan")}),
        (r"method.cakd.token_dropout is 2.0, but must be in \[0, 1\)",
         {"method__cakd__token_dropout": 2.0}),
        (r"'cakd\+none' adds 'none', which has no loss; take 'cakd'",
         {"method__name": "cakd+none"}),
        ("names a method twice", {"method__name": "none", "compare": ("none", "none")}),
        ("crd needs one class per image, which mixed images don't have",
         {"method__name": "crd", "augment__mixup": 0.2}),
        ("for fixed views of the images; set teacher.cache_views", {"teacher__cache": "x"}),
        ("mixup and cutmix mix several images", {"teacher__cache_views": 2, "augment__cutmix": 1}),
        ("steps_per_dispatch is -1, but must be at least 0", {"steps_per_dispatch": -1}),
        ("27 must be a multiple of patch_size 4", {"teacher__args": {"img_size": 27,
                                                                     "patch_size": 4}}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_wrong_values_are_refused(tmp_path, match, changes):
    refuse(tmp_path, match, **changes)


@pytest.fixture
def photos(tmp_path):
    """Twelve training images and four test images, of several sizes."""
    for split, count in (("train", 12), ("val", 4)):
        for i in range(count):
            path = tmp_path / "photos" / split / ("cat", "dog")[i % 2] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 30 + i % 3)).save(path)
    return tmp_path / "photos"


def refuse_photos(photos, match, **changes):
    names = {"data__name": f"folder:{photos}", "data__train": "train", "data__eval": "train",
             "data__test": "val", "image_size": 28, "batch_size": 4}  # fmt: skip
    refuse(photos.parent, match, "none", **names | changes)


def test_folders(photos):
    refuse_photos(photos, r"unknown split 'test'; known: train \(12\)", data__test="test")
    refuse_photos(photos, "batch_size=16 is larger than the 12 images of 'train'", batch_size=16)
    refuse_photos(photos, "set image_size, such as image_size=224", image_size=0)


@pytest.mark.parametrize("feed", ["resident", "host"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_damaged_images(photos, feed, split, capsys):
    """In any split, including the one that is evaluated only at the end."""
    (photos / split / "cat" / "00.png").write_bytes(b"")
    whole = (photos / split / "dog" / "01.png").read_bytes()
    (photos / split / "dog" / "01.png").write_bytes(whole[: len(whole) // 2])
    message = r"found 2 of \d+ images(?=.*cat/00.png .*it is empty)(?=.*dog/01.png ).*on_error=skip"
    refuse_photos(photos, message, data__feed=feed)
    count = "10" if split == "train" else "12"
    refuse_photos(photos, f"larger than the {count} images", data__feed=feed,
                  data__on_error="skip", batch_size=13)  # fmt: skip
    with pytest.raises(AssertionError, match="training started"):
        refuse_photos(photos, "nothing", data__feed=feed, data__on_error="skip")
    assert "left out 2 of" in capsys.readouterr().err


def test_batch_that_does_not_divide_over_the_mesh(tmp_path, monkeypatch):
    class Mesh:
        size = 3

    monkeypatch.setattr("xkd_jax.distributed.sharding.create_mesh", lambda: Mesh)
    refuse(tmp_path, "batch_size=16 doesn't divide evenly over the 3 devices of the mesh; take a")


def test_teacher_files(tmp_path):
    path = teacher_file(tmp_path / "teacher.safetensors")
    refuse(
        tmp_path,
        "holds a vit_tiny_patch16_224, but teacher.model is vit_base",
        teacher__weights=path,
        teacher__model="vit_base_patch16_224",
    )
    whole = Path(path).read_bytes()
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path / "b", "is not a valid safetensors file", teacher__weights=str(torn))
    other = teacher_file(tmp_path / "o.safetensors", classes=7)
    refuse(tmp_path / "c", "has 7 classes but fashion_mnist_mini has 10; fit a classifier",
           "cakd+logits", teacher__weights=other)  # fmt: skip
    misfit = tmp_path / "misfit.safetensors"
    teacher_file(misfit)
    from xkd_jax.weights import load_weights

    variables, metadata = load_weights(misfit)
    metadata["args"]["embed_dim"] = 32
    save_weights(misfit, variables, metadata)
    refuse(tmp_path / "d", "teacher.args is not what", teacher__weights=str(misfit))
    refuse(tmp_path / "d", "does not fit vit_tiny_patch16_224", teacher__weights=str(misfit),
           teacher__args={})  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("model", None, "has model=None, but it must be the name of a network"),
        ("model", "vit_tiny", "unknown network in .*'vit_tiny'; did you mean .*vit_tiny_patch"),
        ("args", "none", "has args='none', but it must be an object"),
        ("image_size", "28", "has image_size='28', but it must be a positive integer"),
        ("num_classes", -1, "has num_classes=-1"),
        ("mean", [0.5, 0.5], "but it must be three numbers"),
        ("class_names", [1, 2], "but it must be a list of names"),
    ],
)
def test_metadata_of_another_form_are_named(tmp_path, entry, value, message):
    path = teacher_file(tmp_path / "teacher.safetensors", metadata={entry: value})
    refuse(tmp_path, message, teacher__weights=path)


FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    names = ["T-shirt/top", "Trousers", *FASHION[2:]]
    path = teacher_file(tmp_path / "teacher.safetensors", metadata={"class_names": names})
    message = r"class 1 is 'Trousers' there and 'Trouser' here\); fit a .*, or fine-tune it on this"
    refuse(tmp_path, message, "logits", teacher__weights=path)


@pytest.mark.parametrize("method", ["logits", "cakd_release", "rkd+logits"])
def test_a_teacher_without_a_classifier_is_refused_where_logits_are_read(tmp_path, method):
    path = teacher_file(tmp_path / "teacher.safetensors", classes=0)
    message = f"method {re.escape(method)} reads the teacher's logits, but .*safetensors has no "
    message += "classifier; fit a classifier to it with configs/probe_teacher.py"
    refuse(tmp_path, message, method, teacher__weights=path)


def test_a_comparison_names_the_method_that_reads_logits(tmp_path):
    path = teacher_file(tmp_path / "teacher.safetensors", classes=0)
    changes = {"compare": ("cakd", "logits"), "teacher__weights": path}
    refuse(tmp_path, "method logits reads the teacher's logits", "none", **changes)


def test_a_teacher_with_the_classes_in_another_order_is_reordered_by_name(tmp_path, capsys):
    config = tiny.get_config()
    path = config.teacher.weights = teacher_file(tmp_path / "teacher.safetensors")
    plain = create_experiment(config).distiller.teacher
    assert "their order is trusted" in capsys.readouterr().err
    names = [*FASHION[5:], *FASHION[:5]]
    config.teacher.weights = teacher_file(
        tmp_path / "other.safetensors", metadata={"class_names": names}
    )
    teacher = create_experiment(config).distiller.teacher
    assert "its logits are reordered by name" in capsys.readouterr().err
    rng = np.random.default_rng(0)  # a new head is zero
    drawn = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), plain.variables)
    plain, teacher = (dataclasses.replace(model, variables=drawn) for model in (plain, teacher))
    images = rng.integers(0, 256, (4, 28, 28, 3), np.uint8)
    expected = np.roll(plain(images), -5, axis=1)
    np.testing.assert_array_equal(teacher(images), expected)
    assert not np.allclose(plain(images), expected)
    assert path != config.teacher.weights


def test_what_is_hardly_meant_is_said(capsys):
    config = tiny.get_config("none")
    config.data.eval = "train"
    config.schedule.boundaries = (5, 60)
    create_experiment(config)
    err = capsys.readouterr().err
    assert "schedule.boundaries: [60] are after the last epoch and have no effect" in err
    assert "data.eval=train overlaps data.train=train[:64]" in err


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json"])
def test_damaged_files_of_a_run_are_named(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    if name != "config.json":
        files = {"config.json": used(tiny.get_config("none")), "summary.json": {}}
        for file, contents in files.items():
            (folder / file).write_text(json.dumps(contents))
    (folder / name).write_text("{\n}" if name == "metrics.jsonl" else "")
    if name == "metrics.jsonl":
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
    refuse(tmp_path, f"{folder / name} is damaged", method="none")


SUMMARY = {
    "method": "none",
    "student": {"model": "resnet18", "top1": 0.5, "top5": 1.0, "parameters": 1, "flops": 1},
}


def test_the_folder_of_a_refused_run_is_not_left_behind(tmp_path):
    refuse(tmp_path, "unknown split", data__train="trian")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    refuse(tmp_path, "unknown split", data__train="trian")
    assert (tmp_path / "run").exists()


def test_64_bit_mode_is_switched_off_and_said(tmp_path, capsys):
    jax.config.update("jax_enable_x64", True)
    try:
        with pytest.raises(AssertionError, match="training started"):
            runs.run(tiny.get_config("none"), tmp_path / "run")
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", False)
    assert "64-bit mode is switched off" in capsys.readouterr().err


def test_teacher_brings_its_own_mean_and_std(tmp_path):
    config = tiny.get_config()
    config.teacher.weights = teacher_file(tmp_path / "teacher.safetensors")
    experiment = create_experiment(config)
    teacher, student = experiment.distiller.teacher, experiment.distiller.student
    assert teacher.mean == (0.5, 0.5, 0.5)
    assert student.mean == experiment.train.mean != teacher.mean


def test_comparison_checks_every_run_before_the_first(tmp_path):
    refuse(
        tmp_path,
        "there is no weights file",
        method="none",
        compare=("none", "cakd"),
        teacher__weights="nope.safetensors",
    )


def test_workdir_of_another_run(tmp_path):
    there = json.loads(json.dumps(used(tiny.get_config()))) | {"seed": 3, "log_every": 9}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(there))
    refuse(tmp_path, "run holds another run: seed is 3 there and 0 here; choose another --workdir")


def test_fields_that_are_newer_than_a_run_have_their_defaults(tmp_path):
    there = json.loads(json.dumps(used(tiny.get_config("none"))))
    del there["probe"], there["monitor"], there["data"]["labels"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(there))
    refuse(tmp_path, "holds another run: data.labels is True there and False here; choose",
           "none", data__labels=False)  # fmt: skip
    with pytest.raises(AssertionError, match="training started"):
        runs.run(tiny.get_config("none"), tmp_path / "run")


def test_comparison_in_the_folder_of_a_single_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    refuse(tmp_path, "holds a single run", method="none", compare=("none",))


def test_what_was_refused_leaves_the_workdir_free(tmp_path):
    refuse(tmp_path, "unknown split", data__train="trian")
    with pytest.raises(AssertionError, match="training started"):
        runs.run(tiny.get_config(), tmp_path / "run")


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        runs.run(tiny.get_config("none"), tmp_path / "file" / "run")


def test_a_run_resumes_with_the_same_data_only(photos, tmp_path):
    """The folder may move; its classes, images and labels may not change."""
    (tmp_path / "run").mkdir()
    config, roots = tiny.get_config("none"), iter("abcd")
    names = {"train": "train", "eval": "train", "test": "val"}

    def check(*changes):
        root = tmp_path / next(roots)  # another one each time: what was read is cached
        shutil.copytree(photos, root)
        for old, new in changes:
            (root / old).rename(root / new)
        config.data.update(name=f"folder:{root}", **names)
        config.update(image_size=28, batch_size=4)
        run_folder._check_data(create_experiment(config), tmp_path / "run")

    check()
    check()
    with pytest.raises(UserError, match=r"data\.train: the images' names or labels have changed"):
        check(("train/cat/00.png", "train/dog/00.png"))
    message = r"data\.train: class 0 was 'cat' and is 'a dog' now; restore the data, or choose"
    with pytest.raises(UserError, match=message):
        check(("train/dog", "train/a dog"), ("val/dog", "val/a dog"))
