"""Logging to the terminal and metrics.jsonl."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import types

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
    reporter.take(
        range(3, 4), {"loss": np.array(2.0), "accuracy": np.array(0.5), "flags": np.ones(3)}
    )
    reporter.flush()
    reporter.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert read_metrics(tmp_path)[-1].items() >= {"loss": 2.0, "accuracy": 0.5}.items()
    assert "flags" not in read_metrics(tmp_path)[-1]


def test_a_pipe_gets_lines_with_speed_and_time_left(tmp_path, capsys):
    reporter = Reporter(tmp_path, 0, 4, 8, 2, check=lambda step, metrics: None)
    for step in (1, 2, 3, 4):
        reporter.take(range(step, step + 1), {"loss": np.array(step), "accuracy": np.array(0.25)})
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


class Terminal(io.TextIOWrapper):
    """A terminal of 80 columns, to write to; `line` is what its last line shows."""

    def __init__(self):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        super().__init__(io.BufferedWriter(io.FileIO(slave, "w")), encoding="utf-8")

    def line(self):
        self.flush()
        written = b""
        while select.select([self._master], [], [], 0.2)[0]:  # it arrives in pieces
            written += os.read(self._master, 65536)
        return written.decode().split("\r")[-1]

    def close(self):
        super().close()
        os.close(self._master)


@contextlib.contextmanager
def bar(folder, monkeypatch, total):
    """A run after 1,001 steps at 50 steps a second: its reporter and what the terminal shows."""
    folder.mkdir()
    now = [0.0]
    with Terminal() as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setattr("tqdm.std.time", lambda: now[0])
        clock = types.SimpleNamespace(monotonic=lambda: now[0])
        patch.setattr("xkd_jax.reporting.logger.time", clock)
        reporter = Reporter(folder, 0, total, 64, 1, check=lambda step, metrics: None)
        for step in (1, 1000, 1001):
            now[0] = step / 50
            reporter.take(
                range(step, step + 1), {"loss": np.array(1.8014), "accuracy": np.array(0.6812)}
            )
            reporter.flush()
        yield reporter, terminal.line
        reporter.close()


def test_the_bar_shows_the_evaluation_in_80_columns(tmp_path, monkeypatch):
    with bar(tmp_path / "fashion_cakd", monkeypatch, total=250_000) as (reporter, line):
        # Before an evaluation, there is room for the accuracy on the training images.
        start = r"fashion_cakd:   0%\|.+\| 1001/250000 1:2\d:\d\d left, loss 1.801, "
        before = line()
        assert re.fullmatch(start + "accuracy 68.1%", before), before
        assert len(before) <= 80
        reporter.evaluated(1001, {"top1": 0.6423}, seconds=0.0)
        after = line()
        assert re.fullmatch(start + "eval top-1 64.2%", after), after
        assert len(after) <= 80
        reporter.take(range(1002, 1003), {"loss": np.array(1.8), "accuracy": np.array(0.6)})
        reporter.flush()
        assert "left, loss 1.800, eval top-1 64.2%" in line()


def test_a_short_run_has_room_for_accuracy_and_speed(tmp_path, monkeypatch):
    with bar(tmp_path / "none", monkeypatch, total=1600) as (_, line):
        shown = line()
    assert shown.endswith(" left, loss 1.801, accuracy 68.1%, 3200 images/s"), shown
    assert len(shown) <= 80


def test_a_long_name_does_not_push_values_out_of_the_bar(tmp_path, monkeypatch):
    name = "imagenet_vit_b16_resnet50_cakd_seed3"
    with bar(tmp_path / name, monkeypatch, total=250_000) as (reporter, line):
        reporter.evaluated(1001, {"top1": 1.0}, seconds=0.0)
        shown = line()
    assert shown.startswith("imagenet_v..: ")
    assert shown.endswith(" left, loss 1.801, eval top-1 100.0%"), shown
    assert len(shown) <= 80


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
