"""Detectors in the one training loop: they learn, and they resume bit by bit."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.runs import assert_same_run, finish, start
from tests.tasks.detectors import TINY, detector
from tests.tasks.shapes import COLOURS, write_coco
from xkd_jax import train
from xkd_jax.cli import run_folder
from xkd_jax.config import default_config
from xkd_jax.model import create_model
from xkd_jax.reporting.files import read_json
from xkd_jax.validation import validate
from xkd_jax.weights import load_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), 6)


def config_of(data, method="none", weights=""):
    config = default_config()
    config.student.model = "fasterrcnn_resnet50_fpn"
    config.student.args = TINY
    config.method.name = method
    config.teacher.weights = weights
    config.data.update(name=data, train="train2017", eval="train2017", test="train2017")
    config.data.update(min_size=96, max_size=128, max_objects=4)
    config.augment.crop_padding = 0
    config.batch_size = 2
    config.epochs = 2
    config.log_every = 1
    config.optimizer.learning_rate = 0.01
    config.schedule.boundaries = ()
    validate(config)
    return config


def backbone(folder):
    """A student's file of the tiny detector's backbone, trained on other classes."""
    cnn = create_model("resnet18", num_classes=5, image_size=64, **TINY["backbone_args"])
    variables = jax.device_get(jax.jit(cnn.init)(jax.random.key(9)))
    dataclasses.replace(cnn, variables=variables).save(folder / "cnn.safetensors")
    return str(folder / "cnn.safetensors"), variables


def teacher(folder):
    """A detector's file, of the data's classes."""
    model, rng = detector(), np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: 0.05 * abs(rng.normal(size=leaf.shape)), model.shapes)
    variables = jax.tree.map(np.float32, variables)
    model = dataclasses.replace(model, variables=variables, class_names=tuple(COLOURS))
    model.save(folder / "teacher.safetensors")
    return str(folder / "teacher.safetensors")


def test_a_detector_learns_six_images_by_heart(coco, tmp_path):
    config = config_of(coco)
    config.epochs = 80
    config.eval_every = 80
    config.batch_size = 6
    config.optimizer.learning_rate = 0.02
    config.optimizer.clip_norm = 10.0
    config.schedule.update(name="cosine", warmup_steps=20, warmup_factor=1e-3)
    run_folder.train_one(config, tmp_path)
    scores = read_json(tmp_path / "summary.json")["student"]
    assert scores["AP"] > 0.5
    assert scores["AP50"] > 0.9


@pytest.mark.usefixtures("quick_compilation")
def test_a_detector_that_a_detector_teaches_resumes_bit_by_bit(coco, tmp_path):
    """Its backbone starts from another run's, and what is frozen of it stays as it was."""
    config = config_of(coco, "logits+fitnet", teacher(tmp_path))
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        folder.mkdir()
    config.student.weights, given = backbone(tmp_path)
    config.freeze = 1
    config.optimizer.weight_decay = 0.01
    config.checkpoint_every = 2
    run_folder.train_one(config, unbroken)

    class Killed(Exception):
        pass

    save = train.Checkpoints.save

    def stop(self, step, state):
        save(self, step, state)
        if step == 4:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Checkpoints, "save", stop)
        with pytest.raises(Killed):
            run_folder.train_one(config, broken)
    run_folder.train_one(config, broken)
    assert_same_run(broken, unbroken)
    summary = read_json(broken / "summary.json")
    assert {"AP", "AP50"} <= summary["teacher"].keys() & summary["student"].keys()
    body, parts = of_backbone(broken), given["params"]
    assert not np.array_equal(
        body["layer2_0"]["conv1"]["kernel"], parts["layer2_0"]["conv1"]["kernel"]
    )
    for still in ("conv1", "layer1_0"):
        jax.tree.map(np.testing.assert_array_equal, body[still], parts[still])
    for norm in ("bn1", "bn2"):
        jax.tree.map(np.testing.assert_array_equal, body["layer2_0"][norm], parts["layer2_0"][norm])


# In CI tests/distributed compares devices, with the other task.
@pytest.mark.exhaustive
def test_two_devices_train_as_one():
    flags = "--xla_force_host_platform_device_count=2"
    run = start("-m", "tests.tasks.mesh", program=(), XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    done = finish(run)
    assert done[:2] == (0, "equal\n"), done[2]


def of_backbone(folder):
    """The parameters of a run's student's backbone."""
    variables, _ = load_weights(folder / "student.safetensors")
    return variables["params"]["backbone"]["body"]
