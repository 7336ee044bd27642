"""Recipes are found by name, from any folder."""

import subprocess
import sys

import pytest

from tests.runs import ROOT
from xkd_jax.cli import recipes
from xkd_jax.errors import UserError
from xkd_jax.experiment import load_teacher_file
from xkd_jax.weights import locate

CHECK = """
import sys
from xkd_jax.cli import train
from xkd_jax.validation import validate
config, workdir = train.parse(sys.argv[1:])
validate(config)
print(workdir, config.batch_size, config.teacher.weights)
"""


@pytest.mark.parametrize(
    "recipe", ["quickstart", "quickstart.py", "configs/quickstart", "configs/quickstart.py"]
)
def test_names(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = f"{ROOT}/xkd_jax/configs/quickstart.py"
    assert recipes.locate(recipe) == found
    assert recipes.locate(f"{recipe}:smoke") == f"{found}:smoke"


def test_a_file_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.py").write_text("")
    assert recipes.locate("quickstart.py:smoke") == "quickstart.py:smoke"
    (tmp_path / "quickstart").mkdir()  # not a file
    assert recipes.locate("quickstart") == f"{ROOT}/xkd_jax/configs/quickstart.py"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("quickstrat:smoke", "recipe 'quickstrat'; did you mean quickstart or"),
        ("configs/cifar10_23.py", "'configs/cifar10_23.py'; did you mean cifar10_32"),
        ("runs/x.py", "'runs/x.py'; known: cifar100, "),
        ("common", "unknown config file or recipe 'common'"),
        ("", "unknown config file or recipe ''"),
    ],
)
def test_unknown_names_are_refused(name, sentence):
    with pytest.raises(UserError, match=sentence):
        recipes.locate(name)


def test_tables_are_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = f"{ROOT}/xkd_jax/configs/tables/table1.py:smoke"
    assert recipes.locate("tables/table1:smoke") == found
    assert recipes.locate("configs/tables/table1.py:smoke") == found


def test_helpers_are_not_recipes():
    assert {"quickstart", "imagenet", "tables/ablation"} < set(recipes.names())
    assert not {"common", "__init__", "tables/common"} & set(recipes.names())


@pytest.mark.parametrize(
    ("recipe", "loaded"),
    [
        ("cifar10_32", "runs/cifar10_32 64 teacher.safetensors"),
        ("imagenet_release", "runs/imagenet_release 32 timm:"),
        ("configs/quickstart.py:smoke", "runs/quickstart_smoke 32 packaged:quickstart_teacher"),
    ],
)
def test_recipes_load_outside_the_clone(recipe, loaded, tmp_path):
    command = [sys.executable, "-c", CHECK, "--config", recipe, "--config.epochs=1"]
    if "cifar" not in recipe:
        command.append("--config.batch_size=32")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(loaded)


def test_packaged_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("packaged:quickstart_teacher").is_file()
    assert str(locate("a/b.safetensors")) == "a/b.safetensors"
    with pytest.raises(UserError, match="unknown packaged weights 'quickstart'; did you mean"):
        locate("packaged:quickstart")
    from xkd_jax.configs import quickstart

    variables, metadata = load_teacher_file(quickstart.get_config())
    assert metadata["model"] == "vit_tiny_patch16_224"
    assert variables["params"]


def test_recipes_are_installed_with_the_package():
    setuptools = pytest.importorskip("setuptools")
    found = setuptools.find_packages(str(ROOT), include=["xkd_jax*"])
    assert {"xkd_jax.configs", "xkd_jax.configs.tables"} < set(found)
