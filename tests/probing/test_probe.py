"""A linear probe as a run: its file, resuming, and wrong input."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests import tiny
from tests.methods.pairs import NETWORKS
from xkd_jax import experiment
from xkd_jax.cli import runs
from xkd_jax.configs import probe_teacher
from xkd_jax.errors import UserError
from xkd_jax.model import create_model, load
from xkd_jax.probing import features, probe
from xkd_jax.probing.linear import Linear

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIGLIP = (
    "vit_base_patch16_siglip_224",
    {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2},
)


def smoke(**fields):
    config = probe_teacher.get_config("smoke")
    config.data.update(train="train[:100]", test="test[:50]")
    config.probe.l2 = (0.1, 0.01)
    config.update(fields)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    assert runs.run(smoke(), folder) == 0
    return folder


@pytest.mark.slow
def test_the_smoke_variant_makes_a_teacher(finished, tmp_path, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["student"]["top1"] > 0.2
    assert summary["student"]["knn_top1"] > 0.2
    assert summary["probe"]["l2"] in (0.1, 0.01)
    card = (finished / "model_card.md").read_text()
    assert "# vit_tiny_patch16_224 with a linear classifier" in card
    assert "None: this is random, frozen, with a classifier fitted to it." in card
    assert "(50 images)" in card
    table = (finished / "report.md").read_text()
    assert "| k-NN % |" in table
    teacher = load(finished / "teacher.safetensors")
    split = experiment.load_split(smoke(), "test[:50]")
    assert teacher.class_names == split.class_names
    best = np.argmax(teacher(split.images), axis=-1)
    assert np.mean(best == split.labels) == pytest.approx(summary["student"]["top1"], abs=1e-9)
    assert runs.run(smoke(), finished) == 0
    assert "is complete" in capsys.readouterr().err
    config = tiny.get_config("logits")  # reads the logits, which only a teacher of 10 classes has
    config.teacher.update(model="", weights=str(finished / "teacher.safetensors"))
    with config.unlocked():
        config.teacher.args = {}
    assert experiment.create_experiment(config).distiller.teacher.num_classes == 10


@pytest.mark.slow
def test_features_are_resumed(finished, tmp_path):
    job = probe.create_probe(smoke())
    step = features.create_feature_step(job.teacher)
    whole = features.compute(step, job.teacher.variables, job.train, job.mesh)
    assert whole.shape == (100, 64)
    np.testing.assert_array_equal(whole, np.load(finished / "features" / "train.npy"))
    torn = (finished / "features" / "train.npy").read_bytes()
    for size in (0, 50, 128 + 30 * 256 + 7, len(torn)):
        (tmp_path / "train.npy").write_bytes(torn[:size])
        arguments = tmp_path / "train.npy", step, job.teacher.variables, job.train, job.mesh
        np.testing.assert_allclose(
            features.compute_to_file(*arguments), whole, rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pool"), [("vit", p) for p in ("pooled", "cls", "mean", "both")]
                         + [(kind, "pooled") for kind in ("deit", "swin", "resnet", "siglip")]
                         + [("siglip", "mean")])  # fmt: skip
def test_the_network_has_the_fitted_logits(kind, pool, tmp_path):
    name, args = {**NETWORKS, "siglip": SIGLIP}[kind]
    model = create_model(name, num_classes=0, image_size=args.get("img_size", 28), **args)
    variables = jax.jit(model.init)(jax.random.key(0))
    model = probe.with_pool(dataclasses.replace(model, variables=variables), pool)
    images = np.random.default_rng(0).integers(0, 256, (2, *[model.image_size] * 2, 3), np.uint8)
    pooled = np.asarray(features.create_feature_step(model)(model.variables, images))
    rng = np.random.default_rng(1)
    linear = Linear(rng.normal(size=(pooled.shape[1], 3)).astype(np.float32), np.ones(3, "f"))
    probe.with_classifier(model, linear, tuple("abc")).save(tmp_path / "w.safetensors")
    np.testing.assert_allclose(load(tmp_path / "w.safetensors")(images), linear(pooled), atol=1e-4)


@pytest.mark.slow
def test_both_is_the_class_token_and_the_mean_of_the_tokens():
    name, args = NETWORKS["vit"]
    model = probe.with_pool(create_model(name, num_classes=0, image_size=28, **args), "both")
    variables = jax.jit(model.init)(jax.random.key(0))
    _, out = model.forward(variables, np.ones((2, 28, 28, 3), np.float32))
    expected = np.hstack([out["cls"], np.mean(out["tokens"], axis=1)])
    np.testing.assert_allclose(out["pooled"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("a probe trains no student", {"method.name": "cakd"}),
        ("unknown probe.pool 'token'", {"probe.pool": "token"}),
        ("probe.l2 is .*, but must be one or more numbers above 0", {"probe.l2": (0.0,)}),
        (r"train\[:15\] has 1 image of the class 'Sandal', but a probe needs at least 2 of every",
         {"data.train": "train[:15]"}),
        (r"train\[:5\] has 0 images of the class", {"data.train": "train[:5]"}),
        ("the teacher has no weights", {"teacher.weights": ""}),
        ("probe.pool=both needs a ViT with a class token and one head, but the teacher is a res",
         {"teacher.model": "resnet18", "teacher.args": {}}),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_input(tmp_path, match, changes):
    config = smoke()
    with config.unlocked():
        for name, value in changes.items():
            *path, last = name.split(".")
            (config[path[0]] if path else config)[last] = value
    with pytest.raises(UserError, match=match):
        runs.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_features_of_another_teacher_are_refused(finished, tmp_path):
    job = probe.create_probe(smoke())
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "teacher.json").write_text('{"fingerprint": "0"}')
    with pytest.raises(UserError, match="holds the features of another teacher than random"):
        probe.run(job, tmp_path, command="")
