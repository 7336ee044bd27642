"""The teacher's cache on several devices and in several processes."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.runs import MAIN, TINY, finish, start
from xkd_jax.reporting.files import read_metrics

pytestmark = pytest.mark.slow


def test_eight_devices_read_shares_of_the_rows(tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "tests.teacher.devices", str(tmp_path)]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["alone"] < 1e-3
    assert found["online"] < 0.02  # float16
    assert (found["shards"], found["shard"]) == (8, [2, 49, 16])


@pytest.mark.exhaustive
def test_the_first_of_two_processes_writes_for_both(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        f"--config={TINY}:fitnet", "--config.epochs=1",
        f"--config.teacher.cache={tmp_path / 'cache'}",
        "--config.teacher.cache_views=2", f"--workdir={tmp_path / 'run'}",
        f"--coordinator=127.0.0.1:{port}", "--num_processes=2",
    ]  # fmt: skip
    both = [start(*arguments, f"--process_id={i}", program=MAIN) for i in range(2)]
    for code, _, err in map(finish, both):
        assert code == 0, err
    alone = [*arguments[:-2], f"--workdir={tmp_path / 'alone'}"]
    code, _, err = finish(start(*alone))
    assert code == 0, err
    assert "writing the teacher's" not in err
    ours, theirs = (read_metrics(tmp_path / name)[0] for name in ("run", "alone"))
    assert abs(ours["loss"] - theirs["loss"]) < 1e-3 * theirs["loss"]
