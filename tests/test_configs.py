"""Every recipe's `:smoke`, on random images."""

import functools
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.data.test_prepare import write_tar
from tests.tasks.shapes import write_coco
from xkd_jax.cli import recipes
from xkd_jax.config import for_method
from xkd_jax.data import prepare
from xkd_jax.experiment import create_experiment
from xkd_jax.train import experiment_step
from xkd_jax.validation import validate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="array_record has wheels for Linux only"),
]
CONFIGS = Path(__file__).parents[1] / "configs"


def jpeg(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    size = (int(rng.integers(70, 100)), int(rng.integers(70, 100)), 3)
    Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tfds(tmp_path_factory):
    """Small CIFAR-10, CIFAR-100 and ImageNet data sets of random images."""
    folder, rng = tmp_path_factory.mktemp("tfds"), np.random.default_rng(0)

    def records(count: int, *classes: int) -> bytes:
        labels = [rng.integers(0, n, (count, 1), np.uint8) for n in classes]
        return np.hstack([*labels, rng.integers(0, 256, (count, 3072), np.uint8)]).tobytes()

    ten = {f"cifar-10-batches-bin/data_batch_{i}.bin": records(140, 10) for i in range(1, 6)}
    ten["cifar-10-batches-bin/test_batch.bin"] = records(520, 10)
    ten["cifar-10-batches-bin/batches.meta.txt"] = "\n".join(f"c{i}" for i in range(10)).encode()
    hundred = {f"cifar-100-binary/{s}.bin": records(n, 20, 100) for s, n in
               (("train", 700), ("test", 520))}  # fmt: skip
    for kind, n in (("fine", 100), ("coarse", 20)):
        names = "\n".join(f"{kind}{i}" for i in range(n))
        hundred[f"cifar-100-binary/{kind}_label_names.txt"] = names.encode()
    for name, files in (("cifar10", ten), ("cifar100", hundred)):
        prepare.prepare(name, str(folder), [str(write_tar(folder / f"{name}.tar.gz", files))])
    inner = {}
    for synset in ("n01440764", "n15075141"):
        images = {f"{synset}_{i}.JPEG": jpeg(rng) for i in range(36)}
        inner[f"{synset}.tar"] = write_tar(folder / synset, images, "w").read_bytes()
    archives = [write_tar(folder / "ILSVRC2012_img_train.tar", inner, "w")]
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(rng) for i in range(1, 41)}
    archives.append(write_tar(folder / "ILSVRC2012_img_val.tar", images, "w"))
    prepare.prepare("imagenet2012", str(folder), [str(path) for path in archives])
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """SPLIT/SUBJECT/CLASS/*.jpg and SPLIT/CLASS/*.jpg."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        for i in range(count):
            for place in (f"own/{split}", f"spoof/{split}/subject{i % 3}"):
                path = folder / place / ("live", "spoof")[i % 2] / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg(rng))
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A data set in COCO's format."""
    return write_coco(tmp_path_factory.mktemp("coco"), 8)


RECIPES = {
    "cifar100.py:smoke": "--config.data.dir={tfds}",
    "cifar100_32.py:smoke": "--config.data.dir={tfds}",
    "cifar100_published.py:smoke": "--config.data.dir={tfds}",
    "cifar10_32.py:smoke": "--config.data.dir={tfds}",
    "coco_frcnn_r50.py:smoke": "--config.data.name={coco}",
    "coco_mrcnn_r50.py:smoke": "--config.data.name={coco}",
    "dinov2_cifar100.py:smoke": "--config.data.dir={tfds}",
    "finetune_teacher.py:smoke": "--config.data.dir={tfds}",
    "folder.py:smoke": "--config.data.name=folder:{photos}/own",
    "imagenet.py:smoke": "--config.data.dir={tfds}",
    "imagenet_release.py:smoke": "--config.data.dir={tfds}",
    "speed.py:smoke": "--config.dtype=float32",
    "spoof.py:smoke": "--config.data.name=leaf:{photos}/spoof",
    "teacher_cifar100_32.py:smoke": "--config.data.dir={tfds}",
    "teacher_cifar100_32.py:swin_smoke": "--config.data.dir={tfds}",
}
# Run in CI, in a process of its own: the recipe with a Transformer student. The others differ in
# options that other tests run; that they fit together is seen without running.
RUN = ("teacher_cifar100_32.py:smoke",)
# tests/cli/test_train.py runs the first one, tests/test_probe.py the last one; tables are run by
# tests/cli/test_tables.py.
ELSEWHERE = {"quickstart.py", "quickstart_teacher.py", "probe_teacher.py"}


def test_every_recipe_is_run():
    single = {f"{name}.py" for name in recipes.names() if not name.startswith("tables/")}
    assert single - ELSEWHERE == {recipe.partition(":")[0] for recipe in RECIPES}


def test_from_photos_to_a_student_by_the_page(photos, tmp_path):
    """docs/data.md's commands that download nothing, with smaller networks and fewer epochs."""
    page = (CONFIGS.parent / "docs" / "data.md").read_text()
    commands = re.findall(r"^python -m xkd_jax\.main (.*:scratch(?:.*\\\n)*.*)$", page, re.M)
    assert len(commands) == 2
    (tmp_path / "configs").symlink_to(CONFIGS)
    (tmp_path / "photos").symlink_to(photos / "own")
    small = "--config.student.args.depth=1", "--config.student.args.layers=(1, 1, 1, 1)"
    for command, option in zip(commands, small, strict=True):
        done = subprocess.run(
            [sys.executable, "-m", "xkd_jax.main", *shlex.split(command.replace("\\\n", " ")),
             "--config.epochs=2", option],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(CONFIGS.parent)},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "folder_scratch"
    assert (run / "student.safetensors").exists()
    scores = json.loads((run / "summary.json").read_text())["student"]
    assert np.isfinite(scores["loss"])
    assert "eer" in scores  # of two classes


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_fit_together(recipe, tfds, photos, coco):
    """Every run of a recipe, up to the shapes that come out of its training step."""
    stem, variant = recipe.split(".py:")
    config = importlib.import_module(f"xkd_jax.configs.{stem}").get_config(variant)
    name, value = RECIPES[recipe].format(tfds=tfds, photos=photos, coco=coco).split("=")
    config.update_from_flattened_dict({name.removeprefix("--config."): value})
    validate(config)
    for method in config.compare or [config.method.name]:
        experiment = create_experiment(for_method(config, method))
        state = experiment.distiller.state_shapes
        teacher = experiment.distiller.teacher.variables if experiment.distiller.teacher else {}
        resident = experiment.create_loader().arrays
        batch = experiment.batch_shapes()
        step = functools.partial(experiment_step, experiment)
        after, metrics = jax.eval_shape(step, state, teacher, resident, batch)
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == [
            (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)
        ]
        assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=() if name in RUN else pytest.mark.exhaustive) for name in RECIPES],
)
def test_smoke(recipe, tfds, photos, coco, tmp_path):
    data = RECIPES[recipe].format(tfds=tfds, photos=photos, coco=coco)
    command = [sys.executable, "-m", "xkd_jax.main", f"--config=configs/{recipe}", data]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}"],
        cwd=CONFIGS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summaries = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    assert summaries
    for summary in summaries:
        score = "AP" if recipe.startswith("coco") else "loss"
        assert np.isfinite(summary["student"][score])
        assert ("eer" in summary["student"]) == recipe.startswith(("folder", "spoof"))
