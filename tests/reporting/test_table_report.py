"""Reports of tables: statistics, states of runs, and files."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from tests.reporting.folders import write_run
from tests.runs import ROOT
from xkd_jax.errors import UserError
from xkd_jax.reporting import document, table_report
from xkd_jax.reporting.figures import band
from xkd_jax.table import Cell, Table

SCORES = {
    "none": (0.501, 0.512, 0.507),
    "logits": (0.553, 0.561, 0.556),
    "cakd": (0.520, 0.524, 0.522),
}
CURVES = ((0.2, 0.4), (0.3, 0.6), (0.7, 0.5))


def write_table(folder, scores, paper=None):
    """A table whose runs are all finished."""
    cells = {name: Cell({"method.name": name}, paper=(paper or {}).get(name)) for name in scores}
    seeds = tuple(range(len(next(iter(scores.values())))))
    table_report.describe(Table(cells, next(iter(scores)), seeds=seeds), folder)
    for name, values in scores.items():
        for seed, top1 in enumerate(values):
            curve = CURVES[seed % len(CURVES)]
            write_run(folder / name / f"seed{seed}", top1, curve, seed=seed, method__name=name)


def read_csv(folder):
    with (folder / "table.csv").open() as file:
        return {line["cell"]: line for line in csv.DictReader(file)}


def test_what_a_cell_has_chosen_is_wrapped_on_the_page():
    chosen = "attention_weight=3.33333, value_weight=0.333333, learning_rate=0.2"
    page = document.Table([("", "top-1 %", "chosen"), ("cakd", "84.46", chosen)]).html()
    assert f'<td class="long">{chosen}</td>' in page
    assert "<td>84.46</td>" in page


def test_numbers(tmp_path):
    write_table(tmp_path, SCORES, {"cakd": 78.5})
    text = table_report.write(tmp_path)
    lines = read_csv(tmp_path)
    none, logits = (100 * np.array(SCORES[name]) for name in ("none", "logits"))
    interval = stats.ttest_rel(logits, none).confidence_interval(0.95)
    assert lines["logits"]["runs"] == "3 of 3"
    assert lines["logits"]["top-1 %"] == f"{logits.mean():.2f}"
    assert lines["logits"]["deviation"] == f"{logits.std(ddof=1):.2f}"
    assert float(lines["logits"]["gain"]) == pytest.approx((logits - none).mean(), rel=1e-3)
    assert float(lines["logits"]["low"]) == pytest.approx(interval.low, rel=1e-3)
    assert float(lines["logits"]["high"]) == pytest.approx(interval.high, rel=1e-3)
    # The best epochs, which aren't all the last ones.
    assert lines["logits"]["best evaluation %"] == f"{100 * np.mean((0.4, 0.6, 0.7)):.2f}"
    assert (lines["cakd"]["published %"], lines["none"]["published %"]) == ("78.50", "")
    assert f"{interval.low:+.2f} to {interval.high:+.2f}" in text
    assert "| published % |" in text
    tops = {name: 100 * np.array(scores) for name, scores in SCORES.items()}
    p = {name: stats.ttest_rel(tops[name], tops["logits"]).pvalue for name in ("none", "cakd")}
    low, high = sorted(p, key=lambda name: p[name])
    holm = {low: 2 * p[low], high: max(2 * p[low], p[high])}
    for name, value in holm.items():
        assert lines[name]["best other"] == "logits"
        assert float(lines[name]["p (Holm)"]) == pytest.approx(value, rel=1e-3)
        assert lines[name]["significant"] == ("yes" if value < 0.05 else "no")
    assert lines["logits"]["best other"] == "cakd"
    assert f"{(tops['none'] - tops['logits']).mean():+.2f} *" in text


def test_accuracy_on_noisy_images(tmp_path):
    write_table(tmp_path, SCORES)
    assert "noisy" not in table_report.write(tmp_path)
    for seed, noisy in enumerate((0.3, 0.5)):
        student = {"model": "resnet18", "top1": 0.5, "noisy_top1": noisy}
        write_run(tmp_path / "cakd" / f"seed{seed}", 0.5, seed=seed, method__name="cakd",
                  summary={"student": student})  # fmt: skip
    assert "| noisy % |" in table_report.write(tmp_path)
    lines = read_csv(tmp_path)
    assert (lines["cakd"]["noisy %"], lines["none"]["noisy %"]) == ("40.00", "")


def test_cost(tmp_path):
    write_table(tmp_path, SCORES)
    table_report.write(tmp_path)
    line = read_csv(tmp_path)["logits"]
    assert line["images/s"] == "100"
    assert float(line["hours"]) == pytest.approx(4 * 50 / 100 / 3600, rel=1e-3)
    assert (line["extra parameters"], line["devices"]) == ("1234", "1 cpu")
    report = (tmp_path / "report.md").read_text()
    assert "| images/s |   hours | parameters | extra parameters | MFLOPs | devices |" in report


def test_bands_are_those_of_numpy():
    curves = [{2: 1.0, 4: 2.0, 6: 9.0}, {2: 3.0, 4: 8.0}, {2: 4.0, 4: 5.0, 8: 1.0}]
    values = np.array([[1, 2], [3, 8], [4, 5]])
    steps, means, deviations = band(curves)
    assert steps == [2, 4]
    np.testing.assert_allclose(means, values.mean(0))
    np.testing.assert_allclose(deviations, values.std(0, ddof=1))
    assert band(curves[:1])[2] == [0, 0, 0]


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def fail(run):
    (run / "summary.json").unlink()
    (run / "failed.txt").write_text("Non-finite values at step 3: loss nan.\n")


STATES = {
    "missing": lambda run: run.rename(run.parent / "elsewhere"),
    "unfinished": lambda run: (run / "summary.json").unlink(),
    "failed": fail,
    "damaged": lambda run: cut(run / "summary.json"),
    "not evaluated": lambda run: write_run(
        run, 0.9, seed=2, method__name="logits", summary={"student": {"model": "resnet18"}}
    ),
    "other recipe": lambda run: write_run(run, 0.9, seed=2, method__name="logits", epochs=3),
}


@pytest.mark.parametrize("state", STATES)
def test_runs_that_do_not_count_are_shown_and_not_averaged(tmp_path, state):
    write_table(tmp_path, SCORES)
    STATES[state](tmp_path / "logits" / "seed2")
    text = table_report.write(tmp_path)
    lines = read_csv(tmp_path)
    assert lines["logits"]["runs"] == "2 of 3"
    assert lines["logits"]["left out"] == f"1 {state}"
    assert lines["logits"]["top-1 %"] == f"{100 * np.mean(SCORES['logits'][:2]):.2f}"
    assert f"1 {state} |" in text
    assert (lines["none"]["runs"], lines["none"]["left out"]) == ("3 of 3", "")
    for file in ("report.md", "report.html"):
        report = (tmp_path / file).read_text()
        assert f"logits, seed 2: {state}" in report or state == "missing"
        assert state in report


def test_why_a_run_does_not_count(tmp_path):
    write_table(tmp_path, SCORES)
    fail(tmp_path / "logits" / "seed0")
    STATES["unfinished"](tmp_path / "logits" / "seed1")
    write_run(tmp_path / "none" / "seed1", 0.9, seed=1, data="4567")
    write_run(tmp_path / "cakd" / "seed1", 0.9, seed=1, method__name="rkd")
    cut(tmp_path / "cakd" / "seed2" / "config.json")
    (tmp_path / "cakd" / "seed0" / "config.json").unlink()
    write_run(tmp_path / "cakd" / "seed7", 0.9)
    write_run(tmp_path / "removed" / "seed0", 0.9)
    table_report.write(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "- logits, seed 0: failed: Non-finite values at step 3: loss nan.\n" in report
    assert "- logits, seed 1: unfinished: at step 4.\n" in report
    assert "- none, seed 1: other recipe: the digest of photos train is '4567'" in report
    assert "cakd, seed 1: other recipe: method.name is 'rkd', but 'cakd' in the table" in report
    assert "cakd, seed 2: damaged" in report
    assert "cakd, seed 0: there is no config.json, so its recipe wasn't checked." in report
    assert "- cakd, seed 7: left out, because it isn't in table.json." in report
    assert "- removed, seed 0: left out" in report
    assert read_csv(tmp_path)["cakd"]["left out"] == "1 other recipe, 1 damaged"


def test_choices_are_part_of_the_recipe(tmp_path):
    write_table(tmp_path, SCORES)
    rate = {"optimizer.learning_rate": 0.4}
    path = tmp_path / "table.json"
    facts = json.loads(path.read_text())
    facts["cells"]["cakd"] |= {"optimizer.learning_rate": 0.1}  # what the cell sets before
    path.write_text(json.dumps(facts))
    fields = {"method.name": "cakd", **rate}
    chosen = {"fields": fields, "tried": list(rate), "evaluation_top1": {}}
    (tmp_path / "cakd" / "chosen.json").write_text(json.dumps(chosen))
    right = {"method__name": "cakd", "optimizer__learning_rate": 0.4}
    write_run(tmp_path / "cakd" / "seed1", 0.5, seed=1, **right)
    table_report.write(tmp_path)
    line = read_csv(tmp_path)["cakd"]
    assert (line["runs"], line["chosen"]) == ("1 of 3", "learning_rate=0.4")
    report = (tmp_path / "report.md").read_text()
    assert "cakd, seed 0: other recipe: optimizer.learning_rate is 0.1, but 0.4 in" in report
    (tmp_path / "cakd" / "chosen.json").write_text("{")
    table_report.write(tmp_path)
    assert read_csv(tmp_path)["cakd"]["left out"] == "3 damaged"


def test_a_cell_that_is_being_tuned(tmp_path):
    write_table(tmp_path, SCORES)
    for seed in range(3):
        STATES["missing"](tmp_path / "cakd" / f"seed{seed}")
        (tmp_path / "cakd" / "elsewhere").rename(tmp_path / f"elsewhere{seed}")
    (tmp_path / "cakd" / "tuning").mkdir()
    assert table_report.write(tmp_path).splitlines()[-1].endswith(" tuning |")


def test_half_written_metrics(tmp_path):
    write_table(tmp_path, SCORES)
    path = tmp_path / "logits" / "seed0" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], "17", *lines[2:], '{"step": 6, "eva']))
    table_report.write(tmp_path)
    assert read_csv(tmp_path)["logits"]["runs"] == "3 of 3"
    report = (tmp_path / "report.md").read_text()
    assert "logits, seed 0: damaged lines of metrics.jsonl left out: 2." in report


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="holds no table"):
        table_report.write(tmp_path)
    table_report.describe(Table({"none": Cell({})}, "none"), tmp_path)
    with pytest.raises(UserError, match="has no runs yet"):
        table_report.write(tmp_path)
    (tmp_path / "table.json").write_text('{"cells": {}}')
    with pytest.raises(UserError, match=r"table\.json was written by another version"):
        table_report.write(tmp_path)
    (tmp_path / "table.json").write_text('{"cells')
    with pytest.raises(UserError, match="is damaged"):
        table_report.write(tmp_path)


def test_a_table_whose_runs_all_failed(tmp_path):
    write_table(tmp_path, {"none": (0.5, 0.6)})
    for seed in (0, 1):
        fail(tmp_path / "none" / f"seed{seed}")
    assert "| none | 0 of 2 |" in table_report.write(tmp_path)


def test_reports_need_no_jax(tmp_path):
    write_table(tmp_path / "table", SCORES)
    write_run(tmp_path / "run", 0.5)
    program = (
        "import sys; sys.modules['jax'] = None; from xkd_jax.cli import report; "
        "sys.exit(max(report.main([folder]) for folder in sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "table", tmp_path / "run"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"page: {tmp_path / 'table' / 'report.html'}" in done.stdout
    assert f"page: {tmp_path / 'run' / 'report.html'}" in done.stdout
