"""Bad input is refused in one sentence, before anything is compiled."""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from xkd_jax import train as loop
from xkd_jax.cli import recipes, runs
from xkd_jax.config import default_config, used, validate
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.models import create_model
from xkd_jax.weights import save_weights

CONFIGS = [recipes.FOLDER / f"{name}.py" for name in recipes.names()]


def teacher_file(path, **changes):
    """A tiny ViT's weights, all zeros."""
    metadata = {
        "model": "vit_tiny_patch16_224",
        "args": tiny.get_config().teacher.args.to_dict(),
        "num_classes": 10,
        "image_size": 28,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    } | changes.pop("metadata", {})
    model = create_model("vit_tiny_patch16_224", num_classes=10, **metadata["args"])
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
    with config.unlocked():
        for name, value in changes.items():
            parent = config
            *path, last = name.split("__")
            for part in path:
                parent = parent[part]
            parent[last] = value
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
        ("has none; for this pair take", {"student__model": "vit_tiny_patch4_32",
                                    "student__args": {"img_size": 28}}),
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
    other = teacher_file(tmp_path / "o.safetensors", metadata={"num_classes": 7})
    refuse(tmp_path / "c", "has 7 classes but fashion_mnist_mini has 10",
           teacher__weights=other)  # fmt: skip
    misfit = tmp_path / "misfit.safetensors"
    teacher_file(misfit)
    from xkd_jax.weights import load_weights

    variables, metadata = load_weights(misfit)
    metadata["args"]["embed_dim"] = 32
    save_weights(misfit, variables, metadata)
    refuse(tmp_path / "d", "does not fit vit_tiny_patch16_224", teacher__weights=str(misfit))


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    recipe = runpy.run_path(str(path))
    validate(recipe["get_config"]())
    assert "--config configs/" + path.name in " ".join(recipe["__doc__"].split())
    validate(recipe["get_config"]("smoke"))
    with pytest.raises(UserError, match="unknown variant 'smoek'; did you mean smoke"):
        recipe["get_config"]("smoek")


def test_default_config_is_locked():
    with pytest.raises(AttributeError, match="epoch"):
        default_config().epoch = 3
