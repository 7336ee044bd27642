"""The verb `analysis`: its kinds, and wrong input."""

import pytest

from tests.analysis.finished_run import write_run
from xkd_jax.cli.analysis import main

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: kind"),
        (["robustnes"], "argument kind: invalid choice: 'robustnes'"),
        (["robustness"], "the following arguments are required: RUN"),
        (["robustness", "nowhere"], "nowhere holds no finished run"),
        (["transferability"], "there is nothing to analyse; give a run, or --teacher"),
        (["transferability", "--teacher", "a"], "--teacher, --student and --data belong together"),
        (["robustness", "a", "--images", "-1"], "--images is -1, but must be at least 0"),
        (["pictures", "nowhere"], "nowhere holds no finished run"),
        (["pictures", "a", "--images", "-1"], "--images is -1, but must be at least 0"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("xkd_jax: ")
    assert sentence in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_both_kinds_write_into_the_runs_folder(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert main(["transferability", str(tmp_path / "run"), "--images", "30"]) == 0
    assert "GL projector" in capsys.readouterr().out
    arguments = ["--images", "20", "--corruptions", "jpeg", "--out", str(tmp_path / "out")]
    assert main(["robustness", str(tmp_path / "run"), *arguments]) == 0
    assert "digital" in capsys.readouterr().out
    for folder, name in ((tmp_path / "run" / "analysis", "transferability"),
                         (tmp_path / "out", "robustness")):  # fmt: skip
        assert {path.name for path in folder.iterdir()} == {
            f"{name}.{s}" for s in ("md", "csv", "png")
        }
