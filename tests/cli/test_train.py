"""The command line, as a user meets it: real processes."""

import importlib.metadata
import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, TINY, assert_same_run, final_state, finish, timeless, wait_for_step
from xkd_jax.reporting.files import read_metrics
from xkd_jax.reporting.pictures import NAMES
from xkd_jax.weights import load_weights

# These runs mostly compile.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """A run of 40 steps without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    code, out, err = finish(start("--config", TINY, "--workdir", folder, **QUICK))
    assert code == 0, err
    return folder, out, err


def test_a_run_shows_progress_and_ends_with_a_table_and_a_picture(unbroken):
    folder, out, err = unbroken
    assert re.search(r"unbroken: step 40/40  \d+ images/s  0 s left  loss [\d.]+  accuracy", err)
    assert "\r" not in err  # a pipe gets lines, not a progress bar
    assert re.search(r"\| teacher +\| +\d+\.\d\d \|", out)
    assert re.search(r"\| cakd +\| +\d+\.\d\d \|", out)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 40
    assert summary["student"]["parameters"] == 78_002


def test_the_model_card_has_what_the_run_measured(unbroken):
    folder, *_ = unbroken
    summary = json.loads((folder / "summary.json").read_text())
    card = (folder / "model_card.md").read_text()
    top1 = rf"\| top-1 % \| +{100 * summary['student']['top1']:.2f} \| +\d+\.\d\d \|"
    assert re.search(top1, card)
    assert f"```\nxkd-jax train --config {TINY} --workdir {folder}\n```" in card
    assert "Measured on fashion_mnist_mini validation[:50] (50 images)" in card
    assert "None: all networks were trained from random weights." in card  # the teacher, too
    assert f"jax {importlib.metadata.version('jax')}, " in card
    assert "not recorded" not in card
    _, metadata = load_weights(folder / "student.safetensors")
    assert metadata["sources"] == summary["sources"] == []


def test_the_saved_student_is_the_plain_network(unbroken):
    import jax

    from xkd_jax.models import create_model

    variables, metadata = load_weights(unbroken[0] / "student.safetensors")
    model = create_model(metadata["model"], num_classes=metadata["num_classes"], **metadata["args"])
    images = jax.numpy.zeros((1, metadata["image_size"], metadata["image_size"], 3))
    plain = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.tree.structure(variables) == jax.tree.structure(plain)


@pytest.mark.exhaustive  # in CI tests/test_faults.py kills a run twice
def test_killed_run_ends_bit_identical_to_an_unbroken_one(start, unbroken, tmp_path):
    folder = tmp_path / "unbroken"
    process = start("--config", TINY, "--workdir", folder, **QUICK)
    wait_for_step(folder, 17, process)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    code, _, err = finish(start("--config", TINY, "--workdir", folder, **QUICK))
    assert code == 0, err
    # It resumed from a checkpoint instead of starting again.
    first = int(re.search(r"step (\d+)/40", err)[1])
    assert 7 < first <= 40
    assert_same_run(folder, unbroken[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive)],
)
def test_a_signal_saves_and_says_how_to_resume(start, unbroken, tmp_path, number, code):
    folder = tmp_path / "unbroken"
    process = start("--config", TINY, "--workdir", folder, **QUICK)
    wait_for_step(folder, 11, process)
    process.send_signal(number)
    returned, _, err = finish(process)
    assert returned == code, err
    assert "run the same command again to resume" in err
    assert "Traceback" not in err
    stopped_at = final_state(folder)[0]
    assert stopped_at == read_metrics(folder)[-1]["step"] < 40
    code, _, err = finish(start("--config", TINY, "--workdir", folder, **QUICK))
    assert code == 0, err
    assert int(re.search(r"step (\d+)/40", err)[1]) == stopped_at + 1
    assert_same_run(folder, unbroken[0])


# In CI tests/distributed compares steps on several devices, and runs of several processes.
@pytest.mark.exhaustive
def test_four_devices_train_like_one(start, unbroken, tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    folder = tmp_path / "unbroken"
    code, _, err = finish(start("--config", TINY, "--workdir", folder, XLA_FLAGS=flags, **QUICK))
    assert code == 0, err
    losses = [
        [line["loss"] for line in timeless(run) if "loss" in line][:10]
        for run in (folder, unbroken[0])
    ]
    # Sums are taken in another order; the difference grows over the steps.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(losses[0]) == 10


@pytest.mark.exhaustive  # in CI the quickstart's comparison is run, and test_sweep.py's
def test_comparison_has_a_folder_for_each_method(start, tmp_path):
    folder = tmp_path / "runs"
    changes = ["--config.compare=('none','logits')", "--config.epochs=1", "--config.data.noisy"]
    code, out, err = finish(start("--config", f"{TINY}:none", "--workdir", folder, *changes))
    assert code == 0, err
    assert re.findall(r"^\| ([a-z][\w -]+?) +\|", out, re.MULTILINE) == [
        "teacher",
        "cross-entropy alone",
        "logits",
    ]
    assert "noisy top-1" in out
    losses = [read_metrics(folder / name)[0]["label_loss"] for name in ("none", "logits")]
    # Equal seeds: the same first student on the same first images.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    (folder / "none" / "summary.json").unlink()
    code, again, err = finish(start("--config", f"{TINY}:none", "--workdir", folder, *changes))
    assert code == 0, err
    assert "1 of 2 runs are complete" in err
    assert again == out


@pytest.mark.slow
def test_quickstart_smoke(start, tmp_path):
    code, out, err = finish(start("--config=configs/quickstart.py:smoke", "--workdir", tmp_path))
    assert code == 0, err
    assert "| teacher " in out
    assert "| cakd " in out
    pictures = tmp_path / "cakd" / "pictures"
    captions = json.loads((pictures / "captions.json").read_text())
    assert {path.name for path in pictures.glob("*.png")} == captions.keys()
    assert captions.keys() == {f"{name}.png" for name in NAMES}
    assert "Attn_S" in captions["attention.png"]
    assert "Of 9,600 test images, the student of cakd has gained" in captions["gained_lost.png"]
    assert "This run did not train on them." in captions["views.png"]
    # Three more are the baseline's.
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 8


def test_a_complete_run_is_not_trained_again(start, unbroken):
    folder, out, _ = unbroken
    before = (folder / "metrics.jsonl").read_bytes()
    code, again, err = finish(start("--config", TINY, "--workdir", folder, **QUICK))
    assert code == 0
    assert "is complete" in err
    assert again == out
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--config is missing"),
        (["--config=nope.py"], "unknown config file or recipe 'nope.py'; known: cifar100,"),
        (["--config", TINY, "extra"], "unexpected argument 'extra'"),
        (["--config", TINY, "--confg=1"], "Did you mean: config"),
        (["--config", TINY, "--process_id=1"], "set all three or none"),
        (["--config", TINY, "--config.data.dri=x"], "no field data.dri; did you mean data.dir?"),
        (["--config", TINY, "--config.batch_size=many"], "invalid literal for int"),
        (["--config=quickstrat"], "did you mean quickstart or quickstart_teacher?"),
        (["--config=configs/cifar100.py:smok"], "unknown variant 'smok'; did you mean smoke?"),
        (["--config", f"{TINY}:cakdd"], "unknown method 'cakdd'; did you mean cakd"),
        (["--config", TINY, "--config.student.args.zero_init=1"], "resnet18 argument 'zero_init'"),
        (
            ["--config", TINY, "--config.student.args.width=x"],
            "width is x, but must be of type float",
        ),
    ],
)
def test_wrong_command_lines_end_in_one_sentence(start, tmp_path, arguments, sentence):
    workdir = [f"--workdir={tmp_path / 'run'}"]
    code, out, err = finish(start(*arguments, *workdir))
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.startswith("xkd_jax: ")
    assert len(err.strip().splitlines()) == 1


def test_a_recipe_that_returns_nothing(start, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("def get_config(variant=''):\n    pass\n")
    code, _, err = finish(start("--config", recipe))
    assert code == 2
    assert f"xkd_jax: get_config of {recipe} returned None; return the config at its end" in err


def test_help_is_quick_and_shows_an_example(start):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, out, _ = finish(start("--help"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 0
    assert "--config configs/quickstart.py" in out
    assert "installed recipes:" in out
    # Importing JAX alone takes longer.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_importing_main_does_not_import_jax():
    code = "import sys, xkd_jax.main; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("platform", "reason"),
    [
        ("nonsense", "Backend 'nonsense' is not in the list of known backends"),
        pytest.param(
            "cuda",
            "no NVIDIA GPU is visible",
            marks=pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU"),
        ),
    ],
)
def test_a_platform_that_is_not_there_ends_in_one_sentence(start, tmp_path, platform, reason):
    process = start("--config", TINY, "--workdir", tmp_path / "run", JAX_PLATFORMS=platform)
    code, out, err = finish(process)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert err.startswith(f"xkd_jax: JAX_PLATFORMS={platform}, but JAX can't use the platform")
    assert reason in err
    assert "unset JAX_PLATFORMS, or install JAX for that platform" in err
