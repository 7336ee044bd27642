"""The GPU campaign: its steps exist, and go on over calls after a deadline or a failure."""

import functools
import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu_campaign
from gpu_campaign import Step

# A run that needs two calls: the first one is stopped, and leaves a file for the second.
LONG = """
import pathlib, signal, sys, time
saved = pathlib.Path("saved")
if saved.exists():
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: (saved.touch(), sys.exit(0)))
time.sleep(60)
"""


@pytest.mark.parametrize("smoke", [False, True])
def test_every_step_names_a_recipe(smoke):
    steps = gpu_campaign.campaign("DIR", smoke)
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        recipe = step.arguments[step.arguments.index("--config") + 1]
        name, _, variant = recipe.partition(":")
        module = importlib.import_module(f"xkd_jax.configs.{name.replace('/', '.')}")
        config = module.get_config(variant)
        for field in step.arguments:
            if field.startswith("--config."):
                path = field.removeprefix("--config.").partition("=")[0]
                functools.reduce(getattr, path.split("."), config)


def call(monkeypatch, capsys, out, minutes=1.0):
    arguments = ["gpu_campaign.py", "--out", str(out), "--minutes", str(minutes)]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu_campaign.main()
    states = json.loads((out / gpu_campaign.RECORD).read_text())
    return {name: state["state"] for name, state in states.items()}, capsys.readouterr().out


@pytest.mark.slow
def test_it_goes_on_after_a_deadline_and_a_failure(tmp_path, monkeypatch, capsys):
    fails = Step("fails", ("-c", "import os; os.write(2, b'why'); raise SystemExit(3)"), 0.0)
    steps = [fails, Step("short", ("-c", "print('once')"), 0.0), Step("long", ("-c", LONG), 0.0)]
    monkeypatch.setattr(gpu_campaign, "campaign", lambda data, smoke: list(steps))
    states, printed = call(monkeypatch, capsys, tmp_path, minutes=5 / 60)
    assert states == {"fails": "failed", "short": "done", "long": "interrupted"}
    assert printed.splitlines()[-1] == "not done: fails, long"
    assert "why" in (tmp_path / "fails.log").read_text()
    assert (tmp_path / "saved").exists()

    steps[0] = Step("fails", ("-c", "print('mended')"), 0.0)
    states, printed = call(monkeypatch, capsys, tmp_path)
    assert set(states.values()) == {"done"}
    # What had failed came last, and what was done did not run again.
    assert [line.partition(":")[0] for line in printed.splitlines()[:-1]] == ["long", "fails"]
    assert (tmp_path / "short.log").read_text().count("once") == 2  # the command and its output


def test_a_step_that_needs_more_time_waits(tmp_path, monkeypatch, capsys):
    steps = [Step("long", ("-c", ""), 120.0), Step("short", ("-c", ""), 0.0)]
    monkeypatch.setattr(gpu_campaign, "campaign", lambda data, smoke: steps)
    states, printed = call(monkeypatch, capsys, tmp_path)
    assert states == {"long": "", "short": "done"}
    assert printed.splitlines()[-1] == "not done: long"


def test_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(gpu_campaign, "PACKAGES", ("jax", "no_such_package.part", "no_such"))
    monkeypatch.setattr(sys, "argv", ["gpu_campaign.py", "--out", "nowhere", "--needs"])
    gpu_campaign.main()
    assert "missing here: no_such_package.part, no_such" in capsys.readouterr().out
    assert not Path("nowhere").exists()
