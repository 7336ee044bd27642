"""What a long task reports, in a pipe and in a terminal."""

import io
import types

import pytest

from xkd_jax.data import progress
from xkd_jax.data.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_pipe_gets_a_line_every_ten_seconds_and_a_last_one(clock, capsys):
    with Progress("decoding", 50_000, "images") as shown:
        for _ in range(500):
            clock.now += 0.0625
            shown.update(100)
    assert capsys.readouterr().err.splitlines() == [
        "decoding: 16,000/50,000 images in 10 s",
        "decoding: 32,000/50,000 images in 20 s",
        "decoding: 48,000/50,000 images in 30 s",
        "decoding: 50,000/50,000 images in 31 s",
    ]


def test_the_last_line_is_written_once(clock, capsys):
    with Progress("features", 70, "images") as shown:
        clock.now += 26
        shown.update(70)
    assert capsys.readouterr().err.splitlines() == ["features: 70/70 images in 26 s"]


def test_a_short_task_is_silent(clock, capsys):
    with Progress("decoding", 10, "images") as shown:
        clock.now += 1.5
        shown.update(10)
    assert capsys.readouterr().err == ""


def test_bytes_and_an_unknown_total(clock, capsys):
    for total, unit in ((170_000_000, "B"), (None, "examples")):
        with Progress("preparing", total, unit) as shown:
            clock.now += 3
            shown.update(170_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "preparing: 170M/170M B in 3 s",
        "preparing: 170,000,000 examples in 3 s",
    ]


def test_a_failed_task_is_not_reported_as_done(clock, capsys):
    def fail():
        with Progress("decoding", 10, "images"):
            clock.now += 3
            raise OSError("torn")

    with pytest.raises(OSError, match="torn"):
        fail()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "_DELAY", 0)
    with Progress("decoding", 10, "images") as shown:
        shown.update(10)
    assert "decoding: " in terminal.getvalue()
    assert "| 0/10 [" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
