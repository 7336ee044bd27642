"""Tables from run folders."""

import json
import os

import pytest

from tests.reporting.folders import write_run
from xkd_jax.errors import UserError
from xkd_jax.reporting.report import find_runs, format_table, write

SCORES = {"top1": 0.5, "top5": 0.75, "parameters": 1234, "flops": 2_500_000}


def make_run(folder, method, started, **extra):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    os.utime(folder / "config.json", (started, started))
    summary = {"method": method, "student": SCORES} | extra
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": 1, "label_loss": 2.0}, {"step": 1, "eval_top1": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_table_has_the_teacher_first_and_runs_in_order_of_starting(tmp_path):
    teacher = SCORES | {"top1": 0.9, "model": "vit_tiny_patch16_224", "weights": "a.safetensors"}
    about = {"train": "fashion train[:9]", "test": "fashion test", "seed": 3}
    make_run(tmp_path / "a", "cakd", started=2, teacher=teacher, **about)
    make_run(tmp_path / "b", "none", started=1)
    (tmp_path / "unfinished").mkdir()
    assert list(find_runs(tmp_path)) == ["b", "a"]
    text = write(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[0] == ["", "top-1 %", "top-5 %", "parameters", "MFLOPs"]
    assert cells[2] == ["teacher", "90.00", "75.00", "1,234", "2.5"]
    assert "cross-entropy alone" in rows[3]
    assert "cakd" in rows[4]
    report = (tmp_path / "report.md").read_text()
    assert "\n".join(rows) in report
    assert "![learning curves](curves.png)" in report
    assert "Trained on fashion train[:9], measured on fashion test." in report
    assert "Teacher: vit_tiny_patch16_224, a.safetensors. Seed 3. Finished on 20" in report
    assert f"a: best evaluation 50.00% at step 1, in {tmp_path / 'a' / 'best.safetensors'}" in text
    assert "\n- a: best evaluation 50.00% at step 1, in a/best.safetensors\n" in report
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_noisy_column_appears_when_everything_has_it():
    noisy = {"method": "none", "student": SCORES | {"noisy_top1": 0.25}}
    assert "25.00" in format_table({"run": noisy})
    assert "noisy" not in format_table({"run": noisy, "b": {"method": "cakd", "student": SCORES}})


def test_the_table_fits_into_80_columns():
    large = SCORES | {"noisy_top1": 1.0, "parameters": 303_301_632, "flops": 59_696_000_000}
    text = format_table({"a": {"method": "none", "student": large, "teacher": large}, "b": {
        "method": "cakd+logits", "student": large}})  # fmt: skip
    assert "| 303,301,632 | 59,696 |" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_teacher_without_a_classifier_has_no_scores():
    teacher = {"model": "vit_tiny_patch16_224", "parameters": 9, "flops": 1_000_000}
    text = format_table({"run": {"method": "cakd", "student": SCORES, "teacher": teacher}})
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    assert rows[0] == ["", "top-1 %", "top-5 %", "parameters", "MFLOPs"]
    assert rows[2] == ["teacher", "", "", "9", "1.0"]
    assert rows[3] == ["cakd", "50.00", "75.00", "1,234", "2.5"]


def test_without_labels_the_probe_is_the_score(tmp_path):
    student = {"probe_top1": 0.5, "knn_top1": 0.25, "parameters": 9, "flops": 1_000_000}
    make_run(tmp_path / "a", "cakd", started=1, student=student)
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_probe_top1": 0.5, "eval_knn_top1": 0.4}]
    contents = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "a" / "metrics.jsonl").write_text(contents)
    text = write(tmp_path / "a")
    assert "| linear probe % | k-NN % |" in text
    assert "best evaluation 50.00% at step 1" in text


def test_a_comparison_shows_what_is_sound(tmp_path):
    for name in ("a", "b", "c", "unfinished", "cut"):
        write_run(tmp_path / name, 0.5, epochs=3 if name == "b" else 2)
    (tmp_path / "unfinished" / "summary.json").unlink()
    (tmp_path / "cut" / "summary.json").write_text('{"student"')
    metrics = tmp_path / "c" / "metrics.jsonl"
    metrics.write_text("{\n" + metrics.read_text())
    write_run(tmp_path / "old", 0.5, summary={"student": 0.5})
    text = write(tmp_path)
    assert sum(line.startswith("| cross-entropy alone") for line in text.splitlines()) == 3
    report = (tmp_path / "report.md").read_text()
    for note in (
        "b was trained with another recipe: epochs is 3, but 2 in most runs.",
        "unfinished isn't finished, and is left out.",
        f"{tmp_path / 'cut' / 'summary.json'} is damaged",
        "c: damaged lines of metrics.jsonl left out: 1.",
        f"{tmp_path / 'old' / 'summary.json'} has no 'student', so another version of xkd_jax",
    ):
        assert note in text
        assert f"- {note}" in report


def test_no_finished_run(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        find_runs(tmp_path)


def test_two_classes_show_the_equal_error_rate():
    summary = {"method": "none", "student": SCORES | {"eer": 0.125}}
    header, _, row = (line.split("|") for line in format_table({"run": summary}).splitlines())
    assert [cell.strip() for cell in header[2:4]] == ["top-1 %", "EER %"]
    assert [cell.strip() for cell in row[2:4]] == ["50.00", "12.50"]


def test_a_teacher_of_its_own_is_named_by_its_network():
    summary = {"method": "none", "student": SCORES | {"model": "vit_tiny_patch16_224"}}
    assert "| vit_tiny_patch16_224 |" in format_table({"run": summary})
    assert "student" not in format_table({"run": summary})
