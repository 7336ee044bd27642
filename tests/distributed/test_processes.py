"""Multi-process training: start-up, and that two processes train, stop and fail together."""

import os
import re
import shutil
import signal
import socket
import sys
import time

import jax
import numpy as np
import pytest

from tests import tiny
from tests.distributed.devices import difference
from tests.runs import spawn, wait_for_step
from xkd_jax.checkpoint import Checkpoints
from xkd_jax.distributed import processes
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.reporting.files import read_metrics
from xkd_jax.reporting.logger import Reporter, say

# The runs compile quickly, and so do the experiments here: a random teacher's last bits are theirs.
pytestmark = pytest.mark.usefixtures("quick_compilation")

METHOD = "crd+rkd"  # a bank that is split over the devices, and a loss over all pairs
DEVICES = "--xla_force_host_platform_device_count="


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # a job's batch script, outside srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "16"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_a_cluster_is_seen_in_the_environment(variables, expected):
    assert processes.in_cluster(variables) == expected


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("host:1", None, None), "go together: set all three or none"),
        ((None, 2, None), "go together"),
        ((None, 2, 0), "go together"),
        (("host", 2, 0), "--coordinator=host must be HOST:PORT"),
        (("host:p", 2, 0), "--coordinator=host:p must be HOST:PORT"),
        (("host:1", 2, 2), "--process_id=2 must be from 0 to 1, because --num_processes=2"),
        (("host:1", 2, -1), "--process_id=-1 must be"),
    ],
)
def test_wrong_flags_are_refused(flags, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        processes.start(*flags)


def test_one_process_starts_alone(monkeypatch):
    def initialize(*_, **__):
        raise AssertionError("joins a cluster")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    processes.start(None, None, None)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    processes.start(None, 1, None)
    assert processes.is_first()


def test_a_tpu_of_no_pod_and_a_cluster_that_cannot_be_joined(monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match=r"can't connect .*\(coordinator.*--num_processes 1"):
        processes.start(None, None, None)
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    processes.start(None, None, None)


def test_a_process_can_leave_although_jax_has_no_backend(monkeypatch):
    def process_index():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    slept, codes = [], []
    monkeypatch.setattr(jax, "process_index", process_index)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    monkeypatch.setattr(processes.os, "_exit", codes.append)
    processes._leave(2)  # process 0, as none has been started
    monkeypatch.setattr("jax._src.distributed.global_state.process_id", 1)
    processes._leave(2)
    assert (len(slept), codes) == (1, [2, 2])


def test_only_the_first_process_prints_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    looked_at = []
    reporter = Reporter(tmp_path, 0, 2, 8, 1, lambda step, _: looked_at.append(step))
    for step in (1, 2):
        reporter.take(range(step, step + 1), {"loss": np.float32(1), "accuracy": np.float32(0.5)})
        reporter.flush()
    reporter.evaluated(2, {"top1": 0.5}, 0.0)
    reporter.close()
    say("hello")
    assert looked_at == [1, 2]  # all processes stop at a non-finite loss
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def environment():
    """A process's share of 8 devices; XLA's optimizations change none of the claims."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | quick | {"XLA_FLAGS": f"{DEVICES}4", "JAX_PLATFORMS": "cpu"}


def main(folder, changes, method=METHOD):
    """The arguments of `xkd_jax.main`."""
    options = [f"--config.{name}={value}" for name, value in changes.items()]
    return ["--config", f"tests/tiny.py:{method}", "--workdir", folder, *options]


def start_two(environment, *arguments, variables=({}, {})):
    """Two processes, connected through flags; with one list of arguments for both or one each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joined = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", 2, "--process_id"]
    python = [sys.executable, "-m", "xkd_jax.main"]
    return [
        spawn([*python, *arguments[number % len(arguments)], *joined, number], environment)
        for number in range(2)
    ]


def finish(*running):
    """The exit codes and standard errors."""
    said = [process.communicate(timeout=400)[1] for process in running]
    return [process.returncode for process in running], said


def newest_step(folder):
    return max(int(path.name) for path in (folder / "checkpoints").iterdir())


def last_state(folder, changes, method=METHOD):
    """The last checkpoint, restored on one device."""
    config = tiny.get_config(method)
    config.update_from_flattened_dict(changes)
    experiment = create_experiment(config)
    checkpoints = Checkpoints(folder / "checkpoints", 2, experiment.distiller.teacher.fingerprint)
    state = checkpoints.restore(experiment.distiller.state_shapes)
    checkpoints.close()
    return state


# Rounding flips the sign of some activation sooner or later, and the step's result with it: 1e-3 to
# 1e-2 of a leaf. Few steps seldom meet one.
SHORT = {"epochs": 1, "checkpoint_every": 2}  # four steps


@pytest.mark.slow
def test_two_processes_train_like_one(environment, tmp_path):
    """Four steps on 2 x 4 devices (launch/local.sh), on 1 x 1, and on 2 x 4, then 1 x 1."""
    alone = [sys.executable, "-m", "xkd_jax.main"]
    runs = {
        "2 x 4": (["launch/local.sh", 2], environment | {"PYTHON": sys.executable}),
        "1 x 1": (alone, environment | {"XLA_FLAGS": ""}),
        "2 x 4, then 1 x 1": (alone, environment | {"XLA_FLAGS": ""}),
    }
    states, scores = {}, {}
    for name, (command, variables) in runs.items():
        folder = tmp_path / name
        if name == "2 x 4, then 1 x 1":
            shutil.copytree(tmp_path / "2 x 4" / "checkpoints" / "2", folder / "checkpoints" / "2")
        process = spawn([*command, *main(folder, SHORT)], variables)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        assert out.count("| teacher ") == 1
        assert len(re.findall(r"step 4/4 .* loss", err)) == 1  # another line is the evaluation's
        states[name] = last_state(folder, SHORT)
        (scores[name],) = (line for line in read_metrics(folder) if "eval_top1" in line)
    assert read_metrics(folder)[0]["step"] == 3
    for name in ("2 x 4", "2 x 4, then 1 x 1"):
        assert difference(states["1 x 1"], states[name]) < 1e-2
        # The 50 images don't fill a batch: any counted twice or not at all would change the scores.
        for score in ("eval_top1", "eval_top5", "eval_loss"):
            assert scores[name][score] == pytest.approx(scores["1 x 1"][score], rel=1e-3)


LONG = {"epochs": 8, "eval_every": 8, "checkpoint_every": 20}


@pytest.fixture(scope="module")
def one_each(environment):
    """One device per process: whole runs with eight threads on two cores would take minutes."""
    return environment | {"XLA_FLAGS": ""}


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_the_same_step(one_each, tmp_path):
    unbroken, folder = tmp_path / "unbroken", tmp_path / "broken"
    codes, said = finish(*start_two(one_each, main(unbroken, LONG, "logits")))
    assert codes == [0, 0], said
    running = start_two(one_each, main(folder, LONG, "logits"))
    wait_for_step(folder, 5, *running)
    running[1].send_signal(signal.SIGTERM)
    codes, said = finish(*running)
    assert codes == [0, 0], said
    assert "stopped by SIGTERM" in said[0]
    assert "run the same command again to resume" not in said[1]
    stopped_at = newest_step(folder)
    assert stopped_at == read_metrics(folder)[-1]["step"] < 32
    codes, said = finish(*start_two(one_each, main(folder, LONG, "logits")))
    assert codes == [0, 0], said
    assert f"step {stopped_at + 1}/32" in said[0]
    pairs = zip(
        *(jax.tree.leaves_with_path(last_state(run, LONG, "logits")) for run in (unbroken, folder)),
        strict=True,
    )
    for (path, leaf), (_, other) in pairs:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        np.testing.assert_array_equal(leaf, other, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_when_one_process_dies_the_other_ends_with_a_message(one_each, tmp_path, victim):
    running = start_two(one_each, main(tmp_path / "run", LONG, "logits"))
    wait_for_step(tmp_path / "run", 3, *running)
    running[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    codes, said = finish(*running)
    assert time.monotonic() - begun < 60
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] != 0
    assert re.search("another experiment died|killed|Connection|Socket closed", said[1 - victim])


@pytest.mark.slow
def test_a_mistake_ends_both_processes_and_is_said_once(environment, tmp_path):
    running = start_two(environment, main(tmp_path / "run", {"data.train": "trian"}))
    codes, said = finish(*running)
    assert codes == [2, 2]
    (line,) = [line for line in "".join(said).splitlines() if line.startswith("xkd_jax: ")]
    assert "unknown split 'trian'" in line
    assert "Traceback" not in "".join(said)


@pytest.mark.slow
def test_one_process_that_fails_ends_the_other(environment, tmp_path):
    """The other process is still at work and would otherwise wait forever."""
    (tmp_path / "file").touch()
    folders = tmp_path / "run", tmp_path / "file" / "run"
    running = start_two(environment, *(main(folder, SHORT, "logits") for folder in folders))
    codes, said = finish(*running)
    assert codes == [2, 2], said
    assert "can't be written" in said[1]
    assert "xkd_jax: " not in said[0]


@pytest.mark.slow
def test_jax_finds_the_processes_of_a_slurm_step(environment, tmp_path):
    """With the variables that srun sets; the same mistake in both is reported once."""
    step = {
        "SLURM_JOB_ID": str(os.getpid()),  # the port depends on it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    command = [sys.executable, "-m", "xkd_jax.main"]
    command += main(tmp_path / "run", {"data.train": "trian"})
    running = [
        spawn(command, environment | step | {"SLURM_PROCID": number, "SLURM_LOCALID": number})
        for number in ("0", "1")
    ]
    codes, said = finish(*running)
    assert codes == [2, 2]
    assert "".join(said).count("unknown split 'trian'") == 1
