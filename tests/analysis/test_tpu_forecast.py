"""Compiling for TPUs that aren't attached. Tests that don't need the TPU compiler come first."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks.scaling import IMAGES, PAIRS, create_config
from tests.tiny import get_config
from xkd_jax import backend
from xkd_jax.analysis import hlo, tpu_forecast
from xkd_jax.analysis.tpu_forecast import (
    CHIPS,
    Prediction,
    experiment_of_shapes,
    predict_train_step,
    table,
)
from xkd_jax.data.loader import batch_shapes, resident_shapes
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.train import init_state

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra `pods`"
)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype), leaf.sharding), tree)


def recipe(*pair, data="tfds:imagenet2012"):
    """The benchmark's config, with nothing on disk."""
    config = create_config(*pair)
    config.data.update(name=data, dir="nowhere")
    return config


# ---- without a compiler


@pytest.fixture(scope="module")
def mesh():
    return sharding.create_mesh()


def test_shapes_are_those_of_the_run(mesh):
    experiment, real = experiment_of_shapes(get_config(), mesh), create_experiment(get_config())
    loader, distiller, train = real.create_loader(), experiment.distiller, experiment.train
    assert shapes(distiller.state_shapes) == shapes(init_state(real))
    assert shapes(resident_shapes(train, mesh)) == shapes(loader.arrays)
    batch = batch_shapes(train, mesh, experiment.config.batch_size)
    assert shapes(batch) == shapes(next(loader.batches(0)))
    assert experiment.total_steps == real.total_steps


def test_imagenet_needs_neither_data_nor_weights(mesh):
    experiment = experiment_of_shapes(
        recipe("vit_large_patch16_384.augreg", "resnet50", 224, 64), mesh
    )
    assert experiment.distiller.teacher
    teacher: Any = experiment.distiller.teacher.module
    assert (experiment.distiller.teacher.image_size, teacher.depth) == (384, 24)
    assert experiment.train.num_classes == 1000
    assert experiment.distiller.steps_per_epoch == 1_281_167 // 64
    assert resident_shapes(experiment.train, mesh) == {}
    assert batch_shapes(experiment.train, mesh, 64)["image"].shape == (64, 224, 224, 3)


def test_cifar_is_resident_on_the_devices(mesh):
    config = recipe("vit_tiny_patch16_224", "resnet18", 224, 64, data="tfds:cifar100")
    config.data.update(eval="test", test="test", train="train[:10%]")
    experiment = experiment_of_shapes(config, mesh)
    assert experiment.train.num_classes == 100
    assert resident_shapes(experiment.train, mesh)["image"].shape == (5000, 32, 32, 3)
    assert set(batch_shapes(experiment.train, mesh, 64)) == {"index"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.name", "tfds:stanford_dogs", "prepare"),
        ("data.name", "folder:nowhere", "nowhere"),
        ("image_size", 0, "image_size"),
        ("data.train", "trian", "unknown split"),
        ("teacher.weights", "nowhere.safetensors", "nowhere"),
    ],
)
def test_unknown_facts_are_reported(mesh, field, value, message):
    config = recipe("vit_tiny_patch16_224", "resnet18", 224, 64)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        experiment_of_shapes(config, mesh)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'xkd_jax\[pods\]'"):
        tpu_forecast.topology("v5e:4x4")


def test_table():
    found = [hlo.Collective("all-reduce", 2**20, 3, ""), hlo.Collective("all-reduce", 2**19, 1, "")]
    prediction = Prediction(
        arguments=2**30, temporaries=2**29, flops=197 * 10**10, compute=0.015,
        communication=0.005, collectives=found,
    )  # fmt: skip
    assert prediction.memory == 3 * 2**29
    # 1.97 TFLOP in 20 ms on 2 chips of 197 TFLOP/s: a quarter.
    assert prediction.mfu(2, CHIPS["v5e"]) == pytest.approx(0.25)
    rows = table({"training": (prediction, 64)}, 2, CHIPS["v5e"]).splitlines()
    cells = dict(row.strip("| ").split(" | ") for row in rows[2:])
    assert cells["images/s"] == "3,200"
    assert cells["MFU, %"] == "25.0"
    assert cells["arguments, GiB per chip"] == "1.000"
    assert cells["all-reduce"] == "4, 3.50 MiB"
    assert "all-gather" not in cells


def test_peaks_are_those_of_the_matrix_units():
    """Clock times multiply-adds per cycle: v4, v5p 8 units of 128 x 128, v5e 4, v6e 4 of 256."""
    units = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
    for name, chip in CHIPS.items():
        assert 2 * units[name] * chip.clock == pytest.approx(chip.peak, rel=0.01)


# ---- with the compiler


@needs_compiler
@pytest.mark.slow
def test_command_line(tmp_path):
    def call(topology):
        command = [sys.executable, "-m", "xkd_jax.main", "--config", "tests/tiny.py:logits"]
        command += ["--compile_for", topology, "--workdir", str(tmp_path / "run")]
        return subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
        )

    done = call("v5e:2x2")
    assert done.returncode == 0, done.stderr
    assert "logits on v5e:2x2, 4 chips" in done.stdout
    assert re.search(r"It fits: \d+\.\d GiB of a chip's 16 GiB", done.stdout)
    wrong = call("v5e:3x3")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "take one such as v5e:4x4" in wrong.stderr
    assert not (tmp_path / "run").exists()


def sizes(experiment):
    """The sizes of the trained parameters and BatchNorm's statistics; bytes of sharded weights."""

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    state, teacher = experiment.distiller.state_shapes, experiment.distiller.teacher.shapes
    sharded = experiment.distiller.shardings.teacher
    split = [
        leaf.size * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(teacher), jax.tree.leaves(sharded), strict=True)
        if sharding.spec
    ]
    return count(state.params), count(state.batch_stats), sum(split)


def check_step(config, mesh, chip):
    """That it fits and communicates little; returns its MFU and the bytes of split weights."""
    with backend.assume("tpu"):
        experiment = experiment_of_shapes(config, mesh)
        prediction = predict_train_step(experiment, chip)
        trained, statistics, split = sizes(experiment)
    assert prediction.memory < chip.memory
    moved = {
        kind: hlo.total_bytes([c for c in prediction.collectives if c.kind == kind])
        for kind in hlo.KINDS
    }
    # Weights alone are gathered, and only if they are split: no images, no activations.
    assert moved["all-gather"] <= 1.05 * split
    assert moved["all-to-all"] == 0
    assert moved["collective-permute"] < 2**20
    # One reduction of gradients, in bfloat16 where the network computes in it; BatchNorm's sums,
    # forward and backward. From 64 chips on this compiler writes all-gathers as all-reduces.
    reduced = moved["all-reduce"] + moved["reduce-scatter"]
    most = 4 * trained + 3 * 4 * statistics + split + 2**20
    assert 2 * trained + split / 2 < reduced + moved["all-gather"] < most
    return prediction.mfu(mesh.size, chip), split


@needs_compiler
@pytest.mark.exhaustive
def test_a_small_pair_fits_and_sends_little():
    mesh, chip = tpu_forecast.topology("v5e:2x2")
    config = recipe("vit_tiny_patch16_224", "resnet18", 64, IMAGES * mesh.size)
    config.teacher.update(model="vit_tiny_patch16_224", weights="random")
    config.teacher.args = {"img_size": 64, "depth": 2}
    # Its gradients are tens of MiB, more than all images together.
    config.student.args = {"layers": (1, 1, 1, 1)}
    assert check_step(config, mesh, chip)[1] == 0


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("pair", "topology"),
    [
        ("base", "v4:2x2x1"),
        ("base384", "v5e:4x4"),
        ("large", "v5e:4x4"),
        ("large384", "v5e:16x16"),
        ("swin", "v5e:16x16"),
        ("swin384", "v4:2x2x1"),
    ],
)
def test_the_papers_pairs_fit_and_send_little(pair, topology):
    """Takes minutes each, so only some pairs; benchmarks/scaling.py compiles all of them.

    Run them when the step, distributed/ or models/scan.py change,
    and before a release.
    """
    mesh, chip = tpu_forecast.topology(topology)
    config = recipe(*PAIRS[pair], IMAGES * mesh.size)
    config.mesh.teacher = "fsdp" if pair == "large384" else "auto"
    mfu, split = check_step(config, mesh, chip)
    assert 0.05 < mfu < 0.9
    assert (split > 0) == (pair == "large384")
