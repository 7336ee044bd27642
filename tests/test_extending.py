"""The files in docs/extending.md, each run as it is written there."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from tests.experiments import run
from xkd_jax.data import SOURCES, load
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.methods import METHODS
from xkd_jax.models import MODELS

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture
def example(tmp_path):
    """Writes the file of this name and runs it: returns its names."""
    registries = MODELS, METHODS, SOURCES
    known = [dict(registry) for registry in registries]

    def start(name, run_name="__main__"):
        (code,) = re.findall(rf'```python\n("""{name}.*?)```', PAGE.read_text(), re.S)
        (tmp_path / name).write_text(code)
        return runpy.run_path(str(tmp_path / name), run_name=run_name)

    yield start
    for registry, entries in zip(registries, known, strict=True):
        registry.clear()
        registry.update(entries)


def test_a_network(example):
    names = example("small_cnn.py")
    assert names["student"].name == "small_cnn"
    assert names["metrics"]["attention_maps"] > 0
    assert int(names["state"].step) == 2


def test_a_method(example):
    names = example("similarity.py")
    metrics, features = names["metrics"], np.array([[3.0, 4.0], [4.0, 3.0]])
    assert metrics["similarity"] > 0
    assert metrics["similarity_weighted"] == pytest.approx(100 * metrics["similarity"])
    expected = np.array([[25, 24], [24, 25]]) / 1201**0.5
    np.testing.assert_allclose(names["similarities"](features), expected, rtol=1e-6)


def test_a_data_source(example, tmp_path):
    config = example("npz_recipe.py", "npz_recipe")["get_config"]()
    rng, arrays = np.random.default_rng(0), {}
    for split, size in (("train", 32), ("test", 16)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (size, 16, 16, 3), np.uint8)
        arrays[f"{split}_labels"] = np.arange(size) % 3
    path = tmp_path / "toy.npz"
    np.savez(path, **arrays)
    np.testing.assert_array_equal(
        load(f"npz:{path}", "test[4:8]").images, arrays["test_images"][4:8]
    )
    config.data.name = f"npz:{path}"
    trained = run(create_experiment(config), 2)
    assert trained.experiment.distiller.student.num_classes == 3
    assert np.isfinite([metrics["loss"] for metrics in trained.metrics]).all()
    with pytest.raises(UserError, match=r"nope.npz can't be read .*write it with np.savez"):
        load("npz:nope.npz", "train")
