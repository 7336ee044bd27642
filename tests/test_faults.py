"""Faults in long runs, with real processes: kills, full disks, truncated checkpoints, NaN."""

import json
import random
import re
import resource
import shutil
import signal
import time

import numpy as np
import pytest

from tests.runs import TINY, assert_same_run, final_state, finish, timeless, wait_for_step
from xkd_jax.data.order import batch_indices
from xkd_jax.reporting.files import read_metrics

pytestmark = pytest.mark.slow

STEPS = 40  # one past a multiple of 3
OFTEN = "--config.checkpoint_every=3"
# A discriminator with its own optimizer, and memory banks.
RUN = ("--config", f"{TINY}:cakd+crd", f"--config.epochs={STEPS // 4}", OFTEN)

# One weight's gradient is NaN at the eleventh step.
POISONED = """
import sys
import jax.numpy as jnp
from xkd_jax import distiller
from xkd_jax.cli import train

plain = distiller.gradients

def poisoned(of, state, *rest):
    carry, (grads, metrics) = plain(of, state, *rest)
    poison = jnp.where(state.step == 10, jnp.nan, 0)
    grads["student"]["fc"]["kernel"] += poison
    metrics["loss"] += poison
    return carry, (grads, metrics)

distiller.gradients = poisoned
sys.exit(train.main(sys.argv[1:]))
"""


def run_to_the_end(start, folder, *arguments, **variables):
    code, _, err = finish(start(*RUN, "--workdir", folder, *arguments, **variables))
    assert code == 0, err
    return err


def steps_saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def assert_one_sentence(err, start):
    """Other lines may come from Orbax's and TensorBoard's threads whose writes fail."""
    (line,) = [line for line in err.splitlines() if line.startswith("xkd_jax: ")]
    assert re.match(f"xkd_jax: {start}", line), err


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    run_to_the_end(start, folder)
    return folder


@pytest.fixture
def unfinished(unbroken, tmp_path):
    """A copy of the unbroken run, as if it had been killed right after its last step."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (folder / "summary.json").unlink()
    return folder


def kill(start, times, folder, *arguments):
    """Kills a run that many times, each a few steps after the last; returns the step reached."""
    rng, reached = random.Random(0), 0
    for _ in range(times):
        process = start(*RUN, *arguments, "--workdir", folder)
        wait_for_step(folder, reached + rng.randint(1, 5), process)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL
        reached = read_metrics(folder)[-1]["step"]
    return reached


def test_a_run_killed_twice_ends_bit_identical(start, unbroken, tmp_path):
    folder = tmp_path / "run"
    assert 2 < kill(start, 2, folder) < STEPS
    run_to_the_end(start, folder)
    assert_same_run(folder, unbroken)


@pytest.mark.exhaustive
def test_a_run_killed_twenty_times_ends_bit_identical(start, tmp_path):
    """For more moments than two kills meet; run it when checkpoint.py or the loop change."""
    unbroken, folder, longer = tmp_path / "unbroken", tmp_path / "run", "--config.epochs=40"
    run_to_the_end(start, unbroken, longer)
    assert 20 < kill(start, 20, folder, longer) < 160
    run_to_the_end(start, folder, longer)
    assert_same_run(folder, unbroken)


def fill_disk(process, folder):
    """Every write fails from now on, as if the disk were full."""
    del folder
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def fill_for_checkpoints(process, folder):
    """A checkpoint's large files can't be written any more."""
    del folder
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def block_folder(process, folder):
    """The checkpoints' folder can't be written, not even by root."""
    del process
    (folder / "checkpoints").rename(folder / "kept")
    (folder / "checkpoints").write_text("")


@pytest.mark.parametrize(
    "harm",
    [
        fill_disk,
        pytest.param(block_folder, marks=pytest.mark.exhaustive),
        pytest.param(fill_for_checkpoints, marks=pytest.mark.exhaustive),
    ],
)
def test_a_failed_save_stops_the_run_which_resumes_after_the_repair(
    start, unbroken, tmp_path, harm
):
    folder = tmp_path / "run"
    process = start(*RUN, "--workdir", folder)
    wait_for_step(folder, 20, process)
    harm(process, folder)
    code, _, err = finish(process)
    assert code == 2, err
    assert_one_sentence(err, r".*checkpoints are kept: .* run the same command again to resume")
    assert 20 <= read_metrics(folder)[-1]["step"] < STEPS
    if harm is block_folder:
        (folder / "checkpoints").unlink()
        (folder / "kept").rename(folder / "checkpoints")
    err = run_to_the_end(start, folder)
    assert int(re.search(rf"step (\d+)/{STEPS}", err)[1]) > 12  # from a checkpoint
    assert_same_run(folder, unbroken)


def test_a_truncated_checkpoint_is_replaced_by_the_previous_one(start, unbroken, unfinished):
    assert steps_saved(unfinished) == [STEPS - 1, STEPS]
    files = (unfinished / "checkpoints" / str(STEPS)).rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("rb+") as file:
        file.truncate(largest.stat().st_size // 2)
    err = run_to_the_end(start, unfinished)
    assert f"the checkpoint of step {STEPS} is damaged" in err
    assert f"training resumes from step {STEPS - 1}." in err
    assert_same_run(unfinished, unbroken)


def test_a_checkpoint_without_its_commit_marker_does_not_count(start, unbroken, unfinished):
    newest = unfinished / "checkpoints" / str(STEPS)
    newest.rename(newest.with_name(f"{STEPS}.orbax-checkpoint-tmp"))
    err = run_to_the_end(start, unfinished)
    assert re.search(r"step (\d+)/", err)[1] == str(STEPS)
    assert steps_saved(unfinished) == [STEPS - 1, STEPS]
    assert_same_run(unfinished, unbroken)


# In CI tests/distributed/test_processes.py resumes on one device what eight have begun.
@pytest.mark.exhaustive
def test_it_resumes_on_two_devices_after_four_and_on_one_after_two(start, tmp_path):
    unbroken, folder = tmp_path / "unbroken", tmp_path / "run"
    banks = "--config.method.name=crd"  # split over the devices
    run_to_the_end(start, unbroken, banks)
    for devices, until in ((4, 4), (2, 8)):
        flags = f"--xla_force_host_platform_device_count={devices}"
        process = start(*RUN, banks, "--workdir", folder, XLA_FLAGS=flags)
        wait_for_step(folder, until, process)
        process.send_signal(signal.SIGTERM)
        code, _, err = finish(process)
        assert code == 0, err
        assert until <= steps_saved(folder)[-1] < STEPS
    run_to_the_end(start, folder, banks)
    losses = [
        [line["loss"] for line in timeless(run) if "loss" in line] for run in (folder, unbroken)
    ]
    assert len(losses[0]) == len(losses[1]) == STEPS
    # Sums are in another order, and the difference grows with the steps.
    assert losses[0][:12] == pytest.approx(losses[1][:12], rel=2e-3)


def test_nan_stops_the_run_and_names_step_parameters_and_examples(start, tmp_path):
    folder = tmp_path / "run"
    run = "--config", f"{TINY}:logits", OFTEN
    process = start(*run, "--workdir", folder, program=("-c", POISONED))
    code, _, err = finish(process)
    assert code == 2, err
    assert_one_sentence(
        err,
        r"Non-finite values at step 11: loss nan; gradients student/fc/kernel; "
        r"examples \d+, .* and 8 more",
    )
    report = json.loads((folder / "not_finite.json").read_text())
    assert report["examples"] == batch_indices(64, 16, 0, 10).tolist()
    assert steps_saved(folder) == [6, 9]
    assert all(np.isfinite(leaf).all() for _, leaf in final_state(folder)[1])
