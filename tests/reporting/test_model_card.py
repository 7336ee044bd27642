"""Model cards say what a run's files record, and nothing else."""

import json

import pytest

from tests.reporting.folders import write_run
from xkd_jax.cli import report as command
from xkd_jax.errors import UserError
from xkd_jax.reporting import model_card

RECORDED = {
    "command": "xkd-jax train --config folder",
    "versions": {"xkd_jax": "0.1.0", "jax": "0.10.0"},
    "test_images": 1234,
    "crop_pct": 0.875,
    "sources": [
        {"weights": "https://huggingface.co/timm/resnet18.a1_in1k", "license": "apache-2.0"},
        {"weights": "vit.safetensors", "license": ""},
    ],
}


def section(text, name):
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0].strip()


def test_everything_recorded_is_on_the_card(tmp_path):
    student = {"model": "resnet18", "image_size": 64, "top1": 0.75, "parameters": 9_000}
    write_run(tmp_path, 0.75, summary=RECORDED | {"student": student}, method__name="rkd+at",
              method__rkd={"weight": 25.0})  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(
        {"train": {"digest": "0123", "examples": 100, "class_names": ["cat", "dog"]}}
    ))  # fmt: skip
    text = model_card.describe(tmp_path)
    header, title = text.split("---\n")[1:]
    assert header.splitlines()[0] == "pipeline_tag: image-classification"
    assert title.splitlines()[1] == "# resnet18, distilled from vit with rkd+at"
    assert "Classifier for 2 classes, 64 x 64 pixels, 9,000 parameters." in text
    assert "| top-1 % |        75.00 |   87.50 |" in section(text, "Accuracy")
    assert "Measured on photos test (1,234 images)" in section(text, "Accuracy")
    data = section(text, "Data")
    assert "Trained on photos train, 100 images." in data
    assert "Classes, in the order of the logits: cat, dog." in data
    assert section(text, "Teacher") == "vit, a.safetensors."
    assert section(text, "Method") == "- `rkd`: weight 25.0\n- `at`: not recorded"
    assert "- optimizer: learning_rate 0.1" in section(text, "Recipe")
    assert section(text, "Seeds").startswith("Seed 0: one run.")
    assert "64 x 64 pixels from a centre crop of 0.875 of" in section(text, "Limits")
    assert "It assigns one of its 2 classes" in section(text, "Limits")
    assert "learning curves" not in text  # of another split
    reproduce = section(text, "Reproduce")
    assert reproduce.startswith("```\nxkd-jax train --config folder\n```")
    assert reproduce.endswith("on 1 cpu, with xkd_jax 0.1.0, jax 0.10.0.")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in
            section(text, "Licences of the source weights").splitlines()[2:]]  # fmt: skip
    assert rows == [
        ["https://huggingface.co/timm/resnet18.a1_in1k", "apache-2.0"],
        ["vit.safetensors", "not recorded"],
    ]


def test_a_run_of_an_older_version_gets_a_card_from_the_report(tmp_path, capsys):
    write_run(tmp_path / "none", 0.5)
    (tmp_path / "none" / "data.json").unlink()
    assert command.main([str(tmp_path)]) == 0
    text = (tmp_path / "none" / "model_card.md").read_text()
    assert text == model_card.describe(tmp_path / "none")
    assert "not recorded x not recorded pixels" in text
    assert section(text, "Reproduce").startswith("The command is not recorded.")
    assert section(text, "Licences of the source weights").endswith("licences are not recorded.")
    assert "assigns one of" not in text  # its classes are unknown


def test_random_weights_have_no_licence(tmp_path):
    write_run(tmp_path, 0.5, summary={"sources": [], "teacher": None})
    text = model_card.describe(tmp_path)
    assert section(text, "Licences of the source weights").startswith("None: all networks")
    assert section(text, "Teacher") == "None."
    assert "# resnet18, trained without a teacher" in text


def test_a_test_split_that_was_watched_is_named(tmp_path):
    write_run(tmp_path, 0.5, data__eval="test")
    (tmp_path / "data.json").write_text(json.dumps({"train": {"class_names": ["cat", "dog"]}}))
    text = model_card.describe(tmp_path)
    assert "- The learning curves are those of the same images" in section(text, "Limits")


def test_a_damaged_config_is_named_by_the_report(tmp_path, capsys):
    write_run(tmp_path, 0.5)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is damaged: it has no fields"):
        model_card.write(tmp_path)
    assert command.main([str(tmp_path)]) == 0
    assert "config.json is damaged" in capsys.readouterr().out
    assert not (tmp_path / "model_card.md").exists()


def test_only_a_runs_student_has_a_card(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, 0.5)
    model_card.write(run)
    card = (run / "model_card.md").read_bytes()
    assert model_card.find(str(run), out) == card
    assert model_card.find(str(run / "student.safetensors"), out) == card
    assert model_card.find(str(run / "best.safetensors"), out) is None  # of another step
    assert model_card.find("packaged:quickstart_teacher", out) is None
    out.mkdir()
    (out / "README.md").write_bytes(card)
    assert model_card.find(str(run), out) == card  # an earlier export's
    (out / "README.md").write_text("# My project\n")
    with pytest.raises(UserError, match=r"README\.md isn't a model card and would be overwritten"):
        model_card.find(str(run), out)
