"""Sharded weights on eight devices: memory per device, and collectives of a step."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

BATCH = 16
BATCH_IMAGES = BATCH * 28 * 28 * 3


@pytest.fixture(scope="module")
def cases():
    """Facts about each case, from one process with eight devices."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.distributed.fsdp"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def moved(case, kind):
    """All collectives of a kind."""
    return [c for c in case["collectives"] if c["kind"] == kind]


def total(found):
    return sum(c["bytes"] * c["times"] for c in found)


@pytest.mark.parametrize("case", ["teacher", "student", "deep"])
def test_split_weights_train_as_replicated_ones_do(cases, case):
    assert cases[case]["difference"] < 1e-5


def test_nothing_is_split_unasked(cases):
    assert set(cases["replicated"]["split"].values()) == {0}
    assert cases["replicated"]["sizes"]["teacher"] == cases["replicated"]["teacher"]


def test_a_split_teacher_takes_little_of_each_device(cases):
    case = cases["teacher"]
    assert case["split"] | {"teacher": 0} == cases["replicated"]["split"]
    # Norms and biases are replicated.
    assert case["teacher"] / 8 < case["sizes"]["teacher"] < case["teacher"] / 4


def test_a_split_student_has_split_states(cases):
    case, whole = cases["student"], cases["replicated"]["sizes"]
    assert case["split"]["teacher"] == case["split"]["method_params"] == 0
    # Weights, momentum and moving average have the same shardings.
    assert case["split"]["params"] == case["split"]["opt_state"] == case["split"]["ema"] > 10
    assert case["sizes"]["student"] < whole["student"] / 4
    assert case["sizes"]["optimizer"] < whole["optimizer"]


def test_gradients_are_reduced_once(cases):
    """In addition to them, only BatchNorm's statistics and a few scalars."""
    for case in ("replicated", "teacher", "student"):
        reduced = moved(cases[case], "all-reduce") + moved(cases[case], "reduce-scatter")
        assert cases[case]["trained"] <= total(reduced) < 1.1 * cases[case]["trained"]


def test_images_travel_once(cases):
    for case in (cases["replicated"], cases["teacher"], cases["student"]):
        assert total(moved(case, "all-to-all")) == BATCH_IMAGES + 4 * BATCH  # and labels


def test_only_split_weights_are_gathered(cases):
    """No images or activations: apart from weights, only the batch's indices."""
    split = {
        "replicated": 0,
        "teacher": cases["teacher"]["teacher"],
        "student": cases["student"]["student"],
    }
    for case, most in split.items():
        gathered = moved(cases[case], "all-gather")
        weights = [c for c in gathered if c["source"].endswith("sharding_constraint")]
        assert 0.8 * most <= total(weights) <= most
        assert all(c["bytes"] == 4 * BATCH for c in gathered if c not in weights)
        assert not moved(cases[case], "collective-permute")


def test_a_deep_teacher_is_gathered_block_by_block(cases):
    """All but the last of 14 blocks, of four kernels each, are gathered one per loop iteration."""
    gathered = moved(cases["deep"], "all-gather")
    in_loop = [c for c in gathered if c["times"] == 13]
    assert len(in_loop) == 4
    assert {c["times"] for c in gathered} == {1, 13}
    assert 0.8 * cases["deep"]["teacher"] <= total(gathered) <= cases["deep"]["teacher"]
