"""Attention maps and principal components, against NumPy."""

import jax
import numpy as np
import pytest

from tests.analysis.finished_run import write_run
from xkd_jax import data
from xkd_jax.analysis.feature_maps import create_maps_step, fit_tokens, principal_colours
from xkd_jax.analysis.finished import by_class, cakd_part, load_runs
from xkd_jax.analysis.transferability import pair_of
from xkd_jax.methods.cakd import attention_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")


def softmax(scores):
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_attention_weights_are_a_softmax_of_scaled_scores():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 3, 2, 5, 4)).astype(np.float32)
    bias = rng.normal(size=(1, 2, 5, 5)).astype(np.float32)
    expected = softmax(query @ key.swapaxes(2, 3) / 2 + bias)
    np.testing.assert_allclose(attention_weights(query, key, bias), expected, rtol=1e-5)


def test_colours_are_the_principal_components():
    rng = np.random.default_rng(1)
    scales = np.array([9.0, 5.0, 3.0, 0.1, 0.1])
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    reference = rng.normal(size=(4, 50, 5)) * scales @ rotation + 7
    other = rng.normal(size=(2, 50, 5)) * scales @ rotation + 7
    colours, others = principal_colours(reference, other)
    assert (colours.shape, others.shape) == ((4, 50, 3), (2, 50, 3))
    flat = reference.reshape(-1, 5)
    components = np.linalg.svd(flat - flat.mean(0))[2][:3]
    components *= np.sign(components[range(3), np.abs(components).argmax(1)])[:, None]
    projected = (flat - flat.mean(0)) @ components.T
    low, high = np.percentile(projected, 1, axis=0), np.percentile(projected, 99, axis=0)
    for found, features in ((colours, flat), (others, other.reshape(-1, 5))):
        expected = ((features - flat.mean(0)) @ components.T - low) / (high - low)
        np.testing.assert_allclose(found.reshape(-1, 3), np.clip(expected, 0, 1), atol=1e-9)
    assert (colours == 0).any()
    assert (colours == 1).any()


@pytest.mark.slow
def test_the_projectors_attention_and_tokens(tmp_path):
    write_run(tmp_path / "cakd")
    (run,) = load_runs([tmp_path / "cakd"])
    pair = pair_of(run)
    images = run.test.images[:8]
    found = create_maps_step(pair)(images, 0.0)
    method, params = cakd_part(run)

    @jax.jit
    def reference(params):
        outs = []
        for model in (run.teacher, run.student):
            pixels = (images / np.float32(255) - np.array(model.mean)) / np.array(model.std)
            out = model.forward(model.variables, pixels.astype(np.float32))[1]
            outs.append(out | {"side": model.image_size})
        return outs[0]["tokens"], method.project(params, *outs)

    tokens, done = jax.device_get(reference(params))
    for name, (query, key, _) in (("Attn_T", done.teacher_qkv), ("Attn_S", done.student_qkv)):
        heads = softmax(query @ key.swapaxes(2, 3) / np.sqrt(query.shape[-1]))
        assert found[name].shape == (8, 49, 49)
        np.testing.assert_allclose(found[name], heads.mean(1), atol=1e-5)
    np.testing.assert_allclose(found["teacher"], tokens, atol=1e-4)
    np.testing.assert_allclose(found["student"], done.student_tokens, atol=1e-4)
    np.testing.assert_allclose(found["pixels"], images / 255, atol=1e-6)


@pytest.mark.slow
def test_without_projectors_the_student_is_mapped_to_the_teacher(tmp_path):
    write_run(tmp_path / "none", "none", checkpoint=False)
    (run,) = load_runs([tmp_path / "none"])
    pair = pair_of(run)
    step = create_maps_step(pair)
    train = by_class(pair.train, 64)
    found = step(train.images[:8], 0.0)
    assert found.keys() == {"pixels", "teacher", "student", "Attn_T"}
    np.testing.assert_allclose(found["Attn_T"].sum(-1), 1, atol=1e-5)
    error = np.mean((fit_tokens(step, pair)(found["student"]) - found["teacher"]) ** 2)
    assert error < 0.9 * found["teacher"].var((0, 1)).mean()


def test_images_are_taken_from_all_classes():
    split = data.load("fashion_mnist_mini", "validation[:50]")
    few = by_class(split, 10)
    order = np.argsort(split.labels, kind="stable")[::5]
    np.testing.assert_array_equal(few.labels, range(10))
    np.testing.assert_array_equal(few.images, split.images[order])
    assert len(by_class(split, 99)) == 50
