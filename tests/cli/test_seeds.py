"""`config.seeds`: several runs side by side, in folders of their own."""

import json
import signal

import pytest

from tests import tiny
from tests.runs import final_state, timeless
from xkd_jax import train
from xkd_jax.cli import runs
from xkd_jax.reporting import nan_guard, table_report
from xkd_jax.reporting.files import SUMMARY
from xkd_jax.weights import load_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def config(**changes):
    config = tiny.get_config("none")
    config.seeds = (2, 0)
    config.epochs = 4  # of 4 steps
    config.update(changes)
    return config


class StopsAfter(train.StopSignal):
    """A signal that comes during the ninth dispatch."""

    def asked(self, number):
        if number == 9:
            self.received = signal.SIGTERM
        return super().asked(number)


def students(folder):
    return {seed: (folder / f"none/seed{seed}/student.safetensors").read_bytes() for seed in (2, 0)}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, quick_compilation):
    folder = tmp_path_factory.mktemp("unbroken")
    assert runs.run(config(), folder) == 0
    return folder


def test_every_seed_has_a_whole_run(unbroken):
    for seed in (2, 0):
        folder = unbroken / f"none/seed{seed}"
        assert json.loads((folder / SUMMARY).read_text())["seed"] == seed
        lines = timeless(folder)
        assert [line["step"] for line in lines if "loss" in line] == [*range(1, 17)]
        assert [line["step"] for line in lines if "eval_top1" in line] == [4, 8, 12, 16]
    assert load_weights(folder / "best.safetensors")[1]["eval_top1"] >= 0
    assert timeless(unbroken / "none/seed0") != timeless(unbroken / "none/seed2")
    assert "2 of 2" in (unbroken / "report.md").read_text()


def test_a_complete_table_is_not_trained_again(unbroken, capsys):
    before = students(unbroken)
    assert runs.run(config(), unbroken) == 0
    assert students(unbroken) == before
    assert "2 of 2 runs are complete." in capsys.readouterr().err


def test_a_resumed_table_ends_bit_identical(unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignal", StopsAfter)
        assert runs.run(config(), tmp_path) == 0
    assert not list(tmp_path.glob(f"none/*/{SUMMARY}"))
    assert runs.run(config(), tmp_path) == 0
    assert students(tmp_path) == students(unbroken)
    for seed in (2, 0):
        folder = f"none/seed{seed}"
        assert timeless(tmp_path / folder) == timeless(unbroken / folder)
    step, state = final_state(tmp_path / "none/seeds_2_0")
    assert step == 16
    expected = final_state(unbroken / "none/seeds_2_0")[1]
    assert [leaf.tobytes() for _, leaf in state] == [leaf.tobytes() for _, leaf in expected]


def test_a_run_that_is_left_is_finished_from_its_groups_checkpoint(unbroken, tmp_path, monkeypatch):
    assert runs.run(config(), tmp_path) == 0
    kept = students(tmp_path)
    (tmp_path / "none/seed0" / SUMMARY).unlink()
    monkeypatch.setattr(train, "_loop", None)  # nothing is trained
    assert runs.run(config(), tmp_path) == 0
    assert (tmp_path / "none/seed0" / SUMMARY).exists()
    assert students(tmp_path) == kept


def test_a_seed_that_diverges_is_left_out(tmp_path, monkeypatch, capsys):
    check = nan_guard.Guard.check

    def diverges(self, step, metrics):
        if self.folder.name == "seed2" and step == 3:
            metrics = metrics | {"loss": float("nan")}
        check(self, step, metrics)

    monkeypatch.setattr(nan_guard.Guard, "check", diverges)
    assert runs.run(config(), tmp_path) == 1
    assert (tmp_path / "none/seed2" / table_report.FAILED).exists()
    assert (tmp_path / "none/seed0" / SUMMARY).exists()
    assert "Non-finite values at step 3" in capsys.readouterr().err
