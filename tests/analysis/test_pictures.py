"""The pictures of finished runs: which are drawn, for which runs, and where they end up."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests.analysis.finished_run import write_run
from xkd_jax.analysis import pictures
from xkd_jax.analysis.finished import load_runs
from xkd_jax.cli.analysis import main
from xkd_jax.errors import UserError
from xkd_jax.reporting import report

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A folder with the runs none and cakd, as far as reports and analyses read them."""
    folder = tmp_path_factory.mktemp("all")
    for method in ("none", "cakd"):
        write_run(folder / method, method)
        summary = {"method": method, "student": {"top1": 0.5}}
        (folder / method / "summary.json").write_text(json.dumps(summary))
        (folder / method / "metrics.jsonl").write_text('{"step": 1, "label_loss": 1.0}\n')
    return folder


@pytest.fixture(scope="module")
def runs(comparison):
    return {run.folder.name: run for run in load_runs([comparison])}


def drawn(folder):
    """The names of the pictures in a folder, all of which have captions."""
    names = {path.stem for path in folder.glob("*.png")}
    captions = json.loads((folder / "captions.json").read_text())
    assert captions.keys() == {f"{name}.png" for name in names}
    return names


def test_changes_are_the_images_that_one_classifier_alone_gets_right():
    rng = np.random.default_rng(0)
    student, baseline = rng.dirichlet(np.ones(3), size=(2, 60))
    labels = rng.integers(0, 3, 60)
    gained, lost = pictures.find_changes(student, baseline, labels)
    right = [{i for i in range(60) if p[i].argmax() == labels[i]} for p in (student, baseline)]
    assert set(gained) == right[0] - right[1]
    assert set(lost) == right[1] - right[0]
    for indices in (gained, lost):
        changes = [abs(student[i, labels[i]] - baseline[i, labels[i]]) for i in indices]
        assert changes == sorted(changes, reverse=True)


@pytest.mark.slow
def test_a_run_is_drawn_into_its_folder_report_and_tensorboard(comparison, capsys):
    run = comparison / "none"
    report.write(run)
    assert f"xkd-jax analysis pictures {run} adds" in (run / "report.html").read_text()
    arguments = ["--images", "20", "--baseline", str(comparison / "cakd")]
    assert main(["pictures", str(run), *arguments]) == 0
    assert capsys.readouterr().out == f"pictures: {run}/pictures/\npage: {run}/report.html\n"
    names = {"attention", "features", "gained_lost", "confusion"}
    assert drawn(run / "pictures") == names
    (events,) = (run / "tensorboard").iterdir()
    for name in names:
        assert f"pictures/{name}".encode() in events.read_bytes()
        pixels = np.asarray(Image.open(run / "pictures" / f"{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 250
        assert max(pixels.shape[:2]) <= 1600
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    captions = json.loads((run / "pictures" / "captions.json").read_text())
    assert "Attn_S" not in captions["attention.png"]
    assert "Of 20 test images, the student of none has" in captions["gained_lost.png"]
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "xkd-jax analysis pictures" not in page
    assert "(pictures/attention.png)" in (run / "report.md").read_text()


@pytest.mark.slow
def test_what_a_run_lacks_is_left_out_with_a_word(runs, tmp_path, capsys):
    run = dataclasses.replace(runs["none"], teacher=None, folder=tmp_path / "run")
    assert pictures.draw([run], runs["cakd"], 20, tmp_path) == [tmp_path]
    assert drawn(tmp_path) == {"gained_lost", "confusion"}
    assert f"{run.name} has no attention maps and no features" in capsys.readouterr().err
    assert not run.folder.exists()
    # Pictures that a new call doesn't draw are removed.
    assert pictures.draw([run], None, 20, tmp_path) == [tmp_path]
    assert drawn(tmp_path) == {"confusion"}
    assert f"{run.name} has no run 'none' beside it" in capsys.readouterr().err
    train = dataclasses.replace(run.experiment.train, class_names=())
    unlabelled = dataclasses.replace(run.experiment, train=train)
    pictures.draw([dataclasses.replace(run, experiment=unlabelled)], None, 20, tmp_path)
    assert drawn(tmp_path) == set()
    assert f"{run.name} was trained without labels: no images gained" in capsys.readouterr().err


@pytest.mark.slow
def test_a_baseline_that_does_not_fit_is_refused(comparison, runs, tmp_path):
    run, other = runs["cakd"], runs["none"]
    names = tuple("abcdefghij")
    for changes, reason in (
        ({"class_names": names}, "their classes differ"),
        ({"labels": run.test.labels[::-1]}, "their test images differ"),
        ({"images": run.test.images[::-1]}, "their test images differ"),
    ):
        test = dataclasses.replace(other.test, examples_digest=None, **changes)
        with pytest.raises(UserError, match=f"the baseline .*none can't be compared .*: {reason};"):
            pictures.draw([run], dataclasses.replace(other, test=test), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"holds several runs; give one of them: none, cakd\."):
        pictures.load_baseline(comparison)
