"""Runs in separate processes: starts them, waits for steps, compares their results."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from xkd_jax.reporting.files import read_metrics

ROOT = Path(__file__).parent.parent
TINY = "tests/tiny.py"
MAIN = ("-m", "xkd_jax.main")


def start(*arguments, program=MAIN, **variables):
    """Starts `python -m xkd_jax.main`, or another program of Python's."""
    return spawn([sys.executable, *program, *arguments], os.environ | variables)


def spawn(command, environment):
    """Starts any command, with pipes for what it says."""
    return subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def wait_for_step(folder, step, *running):
    """Returns as soon as metrics.jsonl reports `step`; all processes must still be running."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and all(process.poll() is None for process in running):
        lines = read_metrics(folder)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached: {[finish(one) for one in running]}")


def timeless(folder):
    """The run's metrics without speeds."""
    lines = read_metrics(folder)
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def final_state(folder):
    """Every leaf of the last checkpoint, as NumPy arrays."""
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(folder / "checkpoints")
    args = ocp.args.Composite(state=ocp.args.StandardRestore())
    state = manager.restore(manager.latest_step(), args=args)["state"]
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    state = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)
    return manager.latest_step(), jax.tree.leaves_with_path(jax.device_get(state))


def assert_same_run(folder, unbroken):
    """Bit-identical weights, optimizer states, adversary, key, students' files and metrics."""
    step, state = final_state(folder)
    expected_step, expected = final_state(unbroken)
    assert step == expected_step
    assert [path for path, _ in state] == [path for path, _ in expected]
    for (path, leaf), (_, other) in zip(state, expected, strict=True):
        np.testing.assert_array_equal(leaf, other, err_msg=str(path))
    for student in ("student.safetensors", "best.safetensors"):
        assert (folder / student).read_bytes() == (unbroken / student).read_bytes()
    assert timeless(folder) == timeless(unbroken)
