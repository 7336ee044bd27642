"""Logging to the terminal and metrics.jsonl."""

import json

import numpy as np

from xkd_jax.reporting.files import read_metrics
from xkd_jax.reporting.logger import Averages, Reporter


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
    first, last = err.strip().splitlines()
    assert "step 2/4" in first
    assert "loss 1.500  accuracy 0.250" in first
    assert "images/s" in last
    assert "0 s left  loss 3.500  accuracy 0.250  eval top-1 0.500" in last
