"""Face anti-spoofing: the paper's three students, from a folder of faces to the report's row."""

import functools
import json
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from xkd_jax import load
from xkd_jax.cli import runs
from xkd_jax.configs import common, spoof
from xkd_jax.data.decode import eval_crop
from xkd_jax.evaluate import IMAGES_PER_DEVICE, create_eval_step, evaluate
from xkd_jax.experiment import create_experiment
from xkd_jax.train import experiment_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

SIDE = 75  # the least that Inception-v3 takes
CROP = 0.9
# Small versions of the students; Inception-v3 has no width.
ARGS = {
    "resnet18": {"layers": (1, 1, 1, 1), "width": 0.25},
    "inception_v3": {"aux_logits": False},  # which needs images of 299 pixels
    "resnext26": {"layers": (1, 1, 1, 1), "groups": 4},
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """CelebA-Spoof's layout: a printed picture has a line screen, a live face doesn't.

    Of several sizes, so that they are cropped batch by batch.
    """
    folder, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 15)):
        for i in range(count):
            kind = ("live", "spoof")[i % 2]
            image = rng.normal(rng.uniform(80, 150), 30, (90 + i, 80, 3))
            if kind == "spoof":
                image += 40 * (np.arange(len(image)) % 4 < 2)[:, None, None]
            path = folder / split / f"subject{i % 3}" / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(path), np.clip(image, 0, 255).astype(np.uint8))
    return folder


def small(student: str, folder: Path):
    """The recipe's row with small networks, on `folder`."""
    config = spoof.get_config(f"vit_l16-{student}")
    common.smoke(config, epochs=1, batch_size=8, image_size=SIDE, crop_pct=CROP, log_every=1)
    config.schedule.warmup_epochs = 0.0
    teacher = {"img_size": 80, "embed_dim": 16, "depth": 1, "num_heads": 2}
    common.untrained_teacher(config, config.teacher.model, **teacher)
    config.student.args = ARGS[student]
    config.data.update(name=f"leaf:{folder}", workers=0)
    return config


def faces_of(folder: Path) -> list[np.ndarray]:
    """The cropped test images of live faces and of spoofs."""
    kinds = (sorted(folder.glob(f"test/*/{kind}/*.png")) for kind in ("live", "spoof"))
    return [
        np.stack([eval_crop(path.read_bytes(), SIDE, CROP) for path in paths]) for paths in kinds
    ]


def assert_equal_error_rate(rate: float, live: np.ndarray, fake: np.ndarray) -> None:
    """`rate` lies where the two error rates cross, between neighbouring thresholds."""
    thresholds = [*np.sort(np.concatenate([live, fake])), np.inf]
    # The shares of live faces taken for spoofs, and of spoofs taken for live faces.
    errors = np.array([(np.mean(live >= t), np.mean(fake < t)) for t in thresholds])
    crossing = np.argmax(errors[:, 0] <= errors[:, 1])
    around = errors[crossing - 1 : crossing + 1]
    assert around.min() <= rate <= around.max()


# The other one is trained.
@pytest.mark.parametrize(
    "student", [pytest.param("inception_v3", marks=pytest.mark.exhaustive), "resnext26"]
)
def test_the_row_fits_together_and_its_error_rate_is_measured(student, faces):
    experiment = create_experiment(small(student, faces))
    distiller = experiment.distiller
    before, batch = distiller.state_shapes, experiment.batch_shapes()
    step = functools.partial(experiment_step, experiment)
    after, metrics = jax.eval_shape(step, before, distiller.teacher.variables, {}, batch)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert metrics["loss"].shape == ()

    model, split, rng = distiller.student, experiment.evaluation, np.random.default_rng(0)
    assert (model.name, model.class_names) == (common.STUDENTS[student][0], ("live", "spoof"))

    def fill(leaf):
        if len(leaf.shape) == 1:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)

    variables = jax.tree.map(fill, model.shapes)
    step = create_eval_step(model, split.crop_pct)
    rate = evaluate(step, variables, split, experiment.mesh)["eer"]
    live, fake = faces_of(faces)
    images = np.zeros((IMAGES_PER_DEVICE, SIDE, SIDE, 3), np.uint8)  # compiled already
    images[: len(split)] = np.concatenate([live, fake])
    every = np.zeros(len(images), np.int32)
    scores = step(variables, images, every, every == 0, jax.random.key(0))["scores"]
    assert_equal_error_rate(rate, scores[: len(live)], scores[len(live) : len(split)])


@pytest.mark.parametrize(
    "student",
    [
        pytest.param(name, marks=() if name == "resnet18" else pytest.mark.exhaustive)
        for name in ARGS
    ],
)
def test_the_error_rate_of_a_trained_student_is_in_the_report(student, faces, tmp_path, capsys):
    assert runs.run(small(student, faces), tmp_path) == 0
    scores = json.loads((tmp_path / "summary.json").read_text())["student"]
    model = load(tmp_path / "student.safetensors")
    logits = [np.asarray(model(images)) for images in faces_of(faces)]
    assert_equal_error_rate(scores["eer"], *(each[:, 1] - each[:, 0] for each in logits))
    for text in (capsys.readouterr().out, (tmp_path / "report.md").read_text()):
        table = [line.split("|") for line in text.splitlines() if line.startswith("|")]
        header, _, *rows = ([cell.strip() for cell in cells] for cells in table)
        (row,) = (row for row in rows if row[1] == "cakd")
        assert row[header.index("EER %")] == f"{100 * scores['eer']:.2f}"
