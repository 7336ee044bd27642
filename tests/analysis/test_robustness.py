"""Accuracy on corrupted images: what is measured, and its table."""

import numpy as np
import pytest

from tests.analysis.finished_run import write_run
from xkd_jax.analysis.finished import load_runs, spread
from xkd_jax.analysis.robustness import Accuracy, measure
from xkd_jax.analysis.tables import write_robustness
from xkd_jax.augment.common_corruptions import corrupt
from xkd_jax.distributed.sharding import create_mesh
from xkd_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
def test_students_and_their_teacher_see_the_same_images(tmp_path):
    for method in ("none", "logits"):
        write_run(tmp_path / "all" / method, method, checkpoint=False)
    runs = load_runs([tmp_path / "all"])
    rows = measure(runs, create_mesh(), 30, ["contrast"])
    names = ["teacher", "all/none", "all/logits"]
    versions = [("clean", 0), ("noisy", 0), *(("contrast", s) for s in range(1, 6))]
    assert [row[:3] for row in rows] == [(n, *version) for version in versions for n in names]
    test = spread(runs[0].test, 30)
    models = [runs[1].experiment.distiller.teacher, runs[0].student, runs[1].student]
    for name, model in zip(names, models, strict=True):
        for severity in (0, 4):
            images = corrupt("contrast", 4, test.images) if severity else test.images
            hits = np.asarray(model(images)).argmax(-1) == test.labels
            wanted = name, "contrast" if severity else "clean", severity
            (top1,) = (row.top1 for row in rows if row[:3] == wanted)
            assert top1 == pytest.approx(hits.mean(), abs=1e-6)
    with pytest.raises(UserError, match="unknown corruption 'contrst'; did you mean contrast"):
        measure(runs, create_mesh(), 30, ["contrst"])


def test_the_tables_have_means_over_severities_and_groups(tmp_path):
    rows = [Accuracy("a", "clean", 0, 0.9), Accuracy("a", "noisy", 0, 0.5)]
    for name, base in (("contrast", 0.1), ("jpeg", 0.3), ("fog", 0.4)):
        rows += [Accuracy("a", name, severity, base + severity / 100) for severity in range(1, 6)]
    text = write_robustness(rows, tmp_path)
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert cells[0] == ["", "runs", "clean", "noisy", "digital", "weather", "mean"]
    assert cells[2] == ["a", "1", "90.00", "50.00", "23.00", "43.00", "29.67"]
    report = (tmp_path / "robustness.md").read_text()
    (line,) = (line for line in report.splitlines() if "jpeg" in line)
    values = [cell.strip() for cell in line.split("|")[2:-1]]
    assert values == ["31.00", "32.00", "33.00", "34.00", "35.00", "33.00"]
    lines = (tmp_path / "robustness.csv").read_text().splitlines()
    assert lines[0] == "model,corruption,severity,top1"
    assert len(lines) == 1 + len(rows)
    assert (tmp_path / "robustness.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_of_a_cell_are_averaged(tmp_path):
    rows = []
    for seed, base in enumerate((0.1, 0.2, 0.6)):
        rows += [Accuracy(f"table/a/seed{seed}", name, 0, base) for name in ("clean", "noisy")]
        rows += [
            Accuracy(f"table/a/seed{seed}", "fog", severity, base + severity / 100)
            for severity in range(1, 6)
        ]
    text = write_robustness(rows, tmp_path)
    (line,) = (line for line in text.splitlines() if "table/a" in line)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    mean, fog = "30.00 ± 26.46", "33.00 ± 26.46"
    assert cells == ["table/a", "3", mean, mean, fog, fog]
    assert "31.00 ± 26.46" in (tmp_path / "robustness.md").read_text()
    assert len((tmp_path / "robustness.csv").read_text().splitlines()) == 1 + len(rows)
