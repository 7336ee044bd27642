"""Reports of detectors: average precision in place of top-1."""

import json

import pytest

from tests.reporting.folders import write_run
from tests.reporting.test_model_card import section
from xkd_jax.reporting import model_card, report
from xkd_jax.reporting.logger import Reporter
from xkd_jax.reporting.scores import main_score
from xkd_jax.reporting.table_runs import get_score

BOXES = {"AP": 0.345, "AP50": 0.5, "AP75": 0.4}
MASKS = {f"mask_{name}": score / 2 for name, score in BOXES.items()}


@pytest.fixture(params=[BOXES, BOXES | MASKS], ids=["boxes", "masks"])
def run(request, tmp_path):
    student = {"model": "fasterrcnn_resnet50_fpn", "image_size": 1344, "parameters": 9}
    teacher = {"model": "vit", "weights": "a.safetensors"}
    summary = {"student": student | request.param, "teacher": teacher}
    write_run(tmp_path, 0.0, summary=summary)
    (tmp_path / "data.json").write_text(json.dumps({"train": {"class_names": ["cat", "dog"]}}))
    masks = "mask_AP" in request.param
    lines = [{"step": 2, "label_loss": 1.0}]
    for step, box, mask in ((2, 0.2, 0.1), (4, 0.3, 0.05)):
        lines.append({"step": step, "eval_AP": box} | ({"eval_mask_AP": mask} if masks else {}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path, masks


def test_runs_are_compared_by_the_first_score_that_they_have(run):
    folder, masks = run
    summary = json.loads((folder / "summary.json").read_text())
    assert get_score(summary) == (MASKS["mask_AP"] if masks else BOXES["AP"])
    assert main_score({"probe_top1", "top1"}) == "top1"
    assert main_score({"loss"}) == ""


def test_a_report_has_a_detectors_scores(run):
    folder, masks = run
    text = report.write(folder)
    header, _, *rows = (line for line in text.splitlines() if line.startswith("|"))
    names = [cell.strip() for cell in header.split("|")[2:-1]]
    assert names[:2] == ["AP %", "AP50 %"]
    assert ("mask AP %" in names) == masks
    assert "34.50" in rows[-1]
    best = "best evaluation 10.00% at step 2" if masks else "best evaluation 30.00% at step 4"
    assert best in text
    assert (folder / report.CURVES).exists()


def test_a_model_card_says_that_it_is_a_detector(run):
    folder, masks = run
    text = model_card.describe(folder)
    assert f"pipeline_tag: {'image-segmentation' if masks else 'object-detection'}" in text
    kind = "Detector with masks" if masks else "Detector"
    assert f"{kind} for 2 classes, 1344 x 1344 pixels, 9 parameters." in text
    assert "| average precision of boxes % " in section(text, "Accuracy")
    assert "It assigns one of" not in section(text, "Limits")
    assert section(text, "Method") == "The detector's losses with the labels alone."


def test_the_progress_shows_the_main_score(tmp_path, capsys):
    reporter = Reporter(tmp_path, 0, 4, 2, 1, lambda step, metrics: None)
    reporter.evaluated(2, BOXES | MASKS, 0.1)
    reporter.evaluated(4, BOXES, 0.1)
    reporter.close()
    err = capsys.readouterr().err
    assert "eval mask AP 17.2%" in err
    assert "eval AP 34.5%" in err
