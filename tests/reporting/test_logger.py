"""Logging to the terminal and metrics.jsonl."""

import json
import os
import subprocess
import sys

import numpy as np

from xkd_jax.reporting.files import read_metrics
from xkd_jax.reporting.logger import Averages, Reporter, RunLog


def test_averages_skip_what_a_step_did_not_measure():
    averages = Averages()
    averages.add({"loss": 1.0, "discriminator": np.nan})
    averages.add({"loss": 3.0, "discriminator": 5.0})
    assert averages.take() == {"loss": 2.0, "discriminator": 5.0}
    assert averages.take() == {}


def test_resuming_drops_lines_that_will_be_written_again(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "lo')
    assert read_metrics(tmp_path) == lines
    reporter = Reporter(tmp_path, 2, 4, 8, 1, check=lambda step, metrics: None)
    reporter.take(3, {"loss": np.array(2.0), "accuracy": np.array(0.5), "flags": np.ones(3)})
    reporter.flush()
    reporter.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert read_metrics(tmp_path)[-1].items() >= {"loss": 2.0, "accuracy": 0.5}.items()
    assert "flags" not in read_metrics(tmp_path)[-1]


def test_a_pipe_gets_lines_with_speed_and_time_left(tmp_path, capsys):
    reporter = Reporter(tmp_path, 0, 4, 8, 2, check=lambda step, metrics: None)
    for step in (1, 2, 3, 4):
        reporter.take(step, {"loss": np.array(step), "accuracy": np.array(0.25)})
        reporter.flush()
        if step == 2:
            reporter.evaluated(2, {"top1": 0.5}, seconds=0.0)
    reporter.close()
    err = capsys.readouterr().err
    assert "\r" not in err
    first, evaluation, last = err.strip().splitlines()
    assert "step 2/4" in first
    assert "loss 1.500  accuracy 25.0%" in first
    assert "step 2/4" in evaluation
    assert evaluation.endswith("eval top-1 50.0%")
    assert "images/s" in last
    assert "0 s left  loss 3.500  accuracy 25.0%  eval top-1 50.0%" in last


def test_tensorboard_has_groups_and_the_config(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 7}')
    log = RunLog(tmp_path, 0)
    log.write(1, {"loss": 2.0})
    log.write(1, {"top1": 0.5}, prefix="eval_")
    log.close()
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train/loss" in events
    assert b"eval/top1" in events
    assert b'"seed": 7' in events
    assert [set(line) for line in read_metrics(tmp_path)] == [
        {"step", "loss"},
        {"step", "eval_top1"},
    ]


def test_the_log_does_not_import_pytorch(tmp_path):
    """tensorboardX does where it is installed: six seconds at every start."""
    (tmp_path / "run").mkdir()
    (tmp_path / "torch.py").write_text("raise AssertionError('torch is imported')")
    code = (
        "import sys\nfrom pathlib import Path\nfrom xkd_jax.reporting.logger import RunLog\n"
        "RunLog(Path(sys.argv[1]), 0).close()\nassert 'torch' not in sys.modules\n"
    )
    path = f"{tmp_path}:{os.getcwd()}"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], check=True,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
