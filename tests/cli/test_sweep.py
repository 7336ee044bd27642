"""Tables: choices on the evaluation split, seeds, resuming, and the report."""

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from xkd_jax.cli import report, run_folder, runs, sweep, tables
from xkd_jax.config import default_config
from xkd_jax.errors import UserError
from xkd_jax.reporting import table_report
from xkd_jax.reporting.files import STUDENT
from xkd_jax.reporting.summary import SUMMARY
from xkd_jax.table import Cell, Table, grid, label, scaled


def recipe():
    config = default_config()
    config.epochs = 1
    config.batch_size = 16
    config.data.update(name="fashion_mnist_mini", train="train[:32]", eval="validation[:32]")
    config.data.test = "test[:32]"
    config.student.args = {"layers": (1, 1, 1, 1), "width": 0.125, "stem": "cifar"}
    config.augment.update(crop_padding=0, flip=False)
    return config


def test_alternatives():
    assert grid(optimizer__learning_rate=(0.1, 0.3), epochs=(1,)) == (
        {"optimizer.learning_rate": 0.1, "epochs": 1},
        {"optimizer.learning_rate": 0.3, "epochs": 1},
    )
    assert scaled((1.0, 2.0), method__cakd__token_weight=5.0)[1] == {
        "method.cakd.token_weight": 10.0
    }
    assert label({"optimizer.learning_rate": 0.3, "student.weights": "a/b"}) == (
        "learning_rate=0.3,weights=a_b"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_table_is_trained_once(tmp_path, capsys):
    rates = grid(optimizer__learning_rate=(0.01, 0.1))
    cells = {
        "none": Cell({"method.name": "none"}, (rates,)),
        "broken": Cell({"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0}),
    }
    table = Table(cells, "none", seeds=(0, 1))
    assert tables.run(table, recipe(), tmp_path) == 1  # a run has failed
    tuned = json.loads((tmp_path / "none" / table_report.CHOSEN).read_text())
    best = max(tuned["evaluation_top1"], key=tuned["evaluation_top1"].get)
    assert f"learning_rate={tuned['fields']['optimizer.learning_rate']:g}" in best
    tuning = sorted((tmp_path / "none" / "tuning").glob(f"*/{SUMMARY}"))
    assert len(tuning) == 2
    assert all("validation[:32]" in json.loads(path.read_text())["test"] for path in tuning)
    summaries = [tmp_path / "none" / f"seed{seed}" / SUMMARY for seed in (0, 1)]
    assert [json.loads(path.read_text())["seed"] for path in summaries] == [0, 1]
    # The chosen run has the first seed: it is tested, not trained again. Its lines of metrics have
    # the speed, which a second training would not repeat.
    chosen = tmp_path / "none" / "tuning" / f"{best},seed=0"
    taken, trained = (path / "metrics.jsonl" for path in (summaries[0].parent, chosen))
    assert taken.read_text() == trained.read_text()
    taken, trained = (load_file(path / STUDENT) for path in (summaries[0].parent, chosen))
    jax.tree.map(np.testing.assert_array_equal, taken, trained)
    assert taken
    assert "\nSeed 1: one run." in (summaries[1].parent / "model_card.md").read_text()
    assert "Non-finite" in (tmp_path / "broken" / "seed0" / table_report.FAILED).read_text()
    before = [path.stat().st_mtime_ns for path in (*tuning, *summaries)]
    capsys.readouterr()
    assert tables.run(table, recipe(), tmp_path) == 1
    assert "seed0 has failed before; remove" in capsys.readouterr().err
    assert before == [path.stat().st_mtime_ns for path in (*tuning, *summaries)]
    capsys.readouterr()
    assert report.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| broken | 0 of 2 |" in printed
    assert "| none   | 2 of 2 |" in printed


def test_a_chosen_run_that_cannot_be_copied_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"can't be copied to .*new \(.*run the same command again"):
        run_folder.copy_training(tmp_path / "absent", tmp_path / "new")


def test_paired_gain(tmp_path):
    table = Table({"none": Cell({}), "logits": Cell({"method.name": "logits"})}, "none", (0, 1, 2))
    table_report.describe(table, tmp_path)
    for name, scores in {"none": (0.5, 0.6, 0.7), "logits": (0.52, 0.63, 0.74)}.items():
        for seed, top1 in enumerate(scores):
            folder = tmp_path / name / f"seed{seed}"
            folder.mkdir(parents=True)
            (folder / SUMMARY).write_text(json.dumps({"student": {"top1": top1}}))
    row = table_report.write(tmp_path).splitlines()[-1]
    half = 4.302653 * 1 / math.sqrt(3)  # t for two degrees of freedom; the gains are 2, 3 and 4
    assert f"+3.00 | {3 - half:+.2f} to {3 + half:+.2f}" in row
    assert (
        (tmp_path / "table.csv").read_text().splitlines()[1].startswith("none,3 of 3,60.00,10.00")
    )


def test_wrong_tables_are_refused_before_training(tmp_path):
    def run(fields):
        return tables.run(Table({"a": Cell(fields)}, "a"), recipe(), tmp_path / "new")

    with pytest.raises(UserError, match="don't fit the config"):
        run({"optimizer.rate": 0.1})
    with pytest.raises(UserError, match="needs a teacher"):
        run({"method.name": "logits"})
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="--shard is '3/2'"):
        sweep.parse_shard("3/2")


def test_tables_and_comparisons_in_each_others_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a comparison; choose another --workdir"):
        tables.run(Table({"a": Cell({})}, "a"), recipe(), tmp_path)
    (tmp_path / table_report.CELLS).write_text("{}")
    config = recipe()
    config.compare = ("none",)
    with pytest.raises(UserError, match="holds a table; choose another --workdir"):
        runs.run(config, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_comparison_goes_on_after_a_method_that_diverges(tmp_path, capsys):
    config = recipe()
    config.compare = ("logits", "none")
    config.teacher.weights = "packaged:quickstart_teacher"
    config.method.logits.weight = 1e38
    assert runs.run(config, tmp_path) == 1
    assert "Non-finite" in (tmp_path / "logits" / table_report.FAILED).read_text()
    said = capsys.readouterr()
    assert "run 2 of 2" in said.err
    assert "none/student.safetensors" in said.out
    assert "logits isn't finished, and is left out" in said.out
