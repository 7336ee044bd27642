"""The public API, as used in a notebook."""

import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import xkd_jax as xkd
from xkd_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[1]
TINY = {"layers": (1, 1, 1, 1), "width": 0.125, "stem": "cifar"}


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_distil(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?import xkd_jax as xkd.*?)```", text, flags=re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("import")]
    assert len(lines) == 10
    monkeypatch.chdir(tmp_path)
    names = {}
    # Five steps instead of hundreds.
    exec(re.sub(r"range\(\d+\)", "range(5)", code), names)
    assert np.isfinite(names["metrics"]["loss"])
    assert int(names["state"].step) == 5
    names["student"].save("student.safetensors")
    again = xkd.load("student.safetensors")
    images = names["test"].images[:4]
    np.testing.assert_allclose(again(images), names["student"](images), rtol=1e-5, atol=1e-5)
    assert again.sources == names["teacher"].sources


def test_importing_is_quick_and_brings_no_jax():
    code = "import sys, xkd_jax; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], cwd=ROOT, check=True)
    bare = time.perf_counter() - begun
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import xkd_jax"], cwd=ROOT, check=True)
    assert time.perf_counter() - begun < bare + 1  # takes 0.01 s on an idle machine


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        _ = xkd.distill
    assert set(xkd.__all__) <= set(dir(xkd)) | set(xkd.__all__)


@pytest.fixture(scope="module")
def teacher():
    return xkd.load("packaged:quickstart_teacher")


@pytest.fixture(scope="module")
def student():
    return xkd.create_model("resnet18", num_classes=10, image_size=28, **TINY)


def test_models_take_uint8_and_float_images_of_any_size(teacher):
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    logits = teacher(images)
    assert logits.shape == (2, 10)
    np.testing.assert_allclose(teacher(images / np.float32(255)), logits, rtol=1e-5, atol=1e-5)
    assert teacher(np.zeros((1, 40, 30, 3), np.uint8)).shape == (1, 10)
    assert teacher.class_names[9] == "Ankle boot"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((28, 28, 3), np.uint8), r"shape \[28, 28, 3\], but must be \[N, H, W, 3\]"),
        (np.zeros((1, 28, 28, 1), np.uint8), r"must be \[N, H, W, 3\]"),
        (np.zeros((1, 28, 28, 3), np.int64), "are int64, but must be uint8, or float"),
    ],
)
def test_images_of_another_form_are_refused(teacher, student, images, message):
    distiller = xkd.Distiller(teacher, student, "logits", optax.sgd(0.1))
    for take in (teacher, lambda images: distiller.init(jax.random.key(0), images)):
        with pytest.raises(UserError, match=message):
            take(images)


def test_wrong_pieces_are_refused(teacher, student):
    with pytest.raises(UserError, match="has no weights"):
        student(np.zeros((1, 28, 28, 3), np.uint8))
    with pytest.raises(UserError, match="needs a teacher"):
        xkd.Distiller(None, student, "logits", optax.sgd(0.1))
    with pytest.raises(UserError, match="unknown method 'logit'; did you mean logits"):
        xkd.Distiller(teacher, student, "logit", optax.sgd(0.1))
    with pytest.raises(UserError, match="for this pair take"):
        xkd.Distiller(teacher, student, "deit", optax.sgd(0.1))
    with pytest.raises(UserError, match="unknown packaged weights 'quickstart'; did you mean"):
        xkd.load("packaged:quickstart")
    with pytest.raises(UserError, match=r"no weights file at nope\.safetensors"):
        xkd.load("nope.safetensors")


@pytest.mark.slow
def test_any_optax_optimizer_and_a_method_with_options(teacher, student):
    method = xkd.methods.create_method("cakd", {"cakd": {"adversary_every": 2}})
    distiller = xkd.Distiller(teacher, student, method, optax.adamw(1e-3), accumulate=2)
    data = xkd.data.load("fashion_mnist_mini", "train[:8]")
    state, seen = distiller.init(jax.random.key(0), data.images), []
    for _ in range(3):
        state, metrics = distiller.step(state, data.images, data.labels)
        seen.append(metrics)
    assert [bool(jnp.isnan(m["discriminator"])) for m in seen] == [False, True, False]
    assert all(value.ndim == 0 for value in seen[0].values())
    with pytest.raises(UserError, match="a batch of 7 doesn't divide evenly over"):
        distiller.step(state, data.images[:7], data.labels[:7])
    trained = distiller.student_model(state)
    assert trained(data.images).shape == (8, 10)
    distiller.step(state, data.images, data.labels)  # its memory is donated, the model's is not
    assert np.isfinite(trained(data.images)).all()
