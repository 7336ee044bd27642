"""Every equation of the paper, against NumPy in float64."""

import collections
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.cakd_reference import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    full_loss,
    key,
    method_params,
    normal,
    np_attention,
    np_discriminator,
    np_proj_1,
    np_proj_2,
    np_relation,
    np_sigmoid,
    outputs,
    qkv,
    random_params,
    run_loss,
)
from xkd_jax import backend
from xkd_jax.augment import multiview
from xkd_jax.methods import cakd
from xkd_jax.methods.cakd import CAKD, Discriminator, GLProjector, PCAProjector

pytestmark = pytest.mark.usefixtures("quick_compilation")


def record_attention(monkeypatch):
    """The Q, K and V of each call of `attention`: first the teacher's, then the mixed ones."""
    calls, attention = [], cakd.attention

    def recorder(*args, bias=0.0):
        calls.append(tuple(np.asarray(a) for a in args))
        return attention(*args, bias=bias)

    monkeypatch.setattr(cakd, "attention", recorder)
    return calls


def masks_of(monkeypatch, step_key, shape):
    """Where `pca_losses` takes Q, K and V from the teacher: ones against a student of zeros."""
    with monkeypatch.context() as patch:
        calls = record_attention(patch)
        cakd.pca_losses(step_key, (jnp.zeros(shape),) * 3, (jnp.ones(shape),) * 3)
    return [m.astype(bool) for m in calls[1]]


# ---- Proj_1 and attention


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_eq_1_is_three_3x3_convolutions(platform):
    module, features = PCAProjector(HEADS, HEAD_DIM), normal(2, 4, 5, 7)
    params = random_params(module, features)
    shapes = {name: p.shape for name, p in params["params"].items()}
    assert shapes == {f"{m}_kernel": (3, 3, 7, WIDTH) for m in ("query", "key", "value")} | {
        f"{m}_bias": (WIDTH,) for m in ("query", "key", "value")
    }
    with backend.assume(platform):
        ours = module.apply(params, features)
    for one, expected in zip(ours, np_proj_1(params, features), strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-5)


def test_both_convolutions_have_the_same_gradients():
    x, kernel, weight = normal(2, 4, 5, 3), normal(3, 3, 3, 6), normal(2, 4, 5, 6)

    grads = {}
    for platform in ("cpu", "gpu"):
        with backend.assume(platform):
            # A new function for each platform: JAX caches traces by function.
            function = jax.grad(lambda *args: jnp.sum(cakd._conv3x3(*args) * weight), (0, 1))
            convolves = "conv_general_dilated" in str(jax.make_jaxpr(function)(x, kernel))
            assert convolves == (platform == "gpu")
            grads[platform] = function(x, kernel)
    for a, b in zip(grads["cpu"], grads["gpu"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    # d loss / d kernel[1, 1] needs no padding: the product of the map and the weight.
    center = np.einsum("nhwc,nhwf->cf", x, weight)
    np.testing.assert_allclose(grads["cpu"][1][1, 1], center, atol=1e-4)


def test_eq_2_is_softmax_attention():
    q, k, v = qkv(0)
    np.testing.assert_allclose(cakd.attention(q, k, v), np_attention(q, k, v), atol=1e-5)


# ---- partial replacement


def test_eq_3_takes_every_element_from_one_or_the_other():
    student, teacher = normal(10, 100, 100), normal(10, 100, 100, seed=1)
    mixed = np.asarray(cakd.partly_replace(key(0), student, teacher))
    replaced = mixed == teacher
    np.testing.assert_array_equal(mixed[~replaced], student[~replaced])
    flat = replaced.reshape(-1)
    assert abs(flat.sum() - 50_000) < 5 * math.sqrt(100_000 / 4)
    # Neighbours, and the bits at the same place of neighbouring words, are independent.
    for lag in (1, 2, 31, 32, 64):
        agree = (flat[lag:] == flat[:-lag]).sum()
        assert abs(agree - (len(flat) - lag) / 2) < 5 * math.sqrt(len(flat) / 4)


def test_eq_3_draws_new_masks_with_every_key():
    student, teacher = jnp.zeros((7, 11, 13)), jnp.ones((7, 11, 13))  # 1001: not a multiple of 32
    one, same, other = (cakd.partly_replace(key(s), student, teacher) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert abs(np.sum(np.asarray(one) == other) - 500.5) < 5 * math.sqrt(1001 / 4)


def test_eq_3_gives_the_teacher_no_gradient():
    student, teacher, weight = normal(4, 9), normal(4, 9, seed=1), normal(4, 9, seed=2)

    def loss(student, teacher):
        return jnp.sum(cakd.partly_replace(key(0), student, teacher) * weight)

    to_student, to_teacher = jax.grad(loss, (0, 1))(student, teacher)
    replaced = np.asarray(cakd.partly_replace(key(0), student, teacher)) == teacher
    assert 0 < replaced.sum() < replaced.size
    np.testing.assert_array_equal(to_student, np.where(replaced, 0, weight))
    np.testing.assert_array_equal(to_teacher, 0)


def test_query_key_and_value_have_masks_of_their_own(monkeypatch):
    masks = masks_of(monkeypatch, key(0), (2, 2, 50, 50))
    bound = 5 * math.sqrt(10_000 / 4)
    for i in range(3):
        assert abs(masks[i].sum() - 5000) < bound
        assert abs((masks[i] == masks[i - 1]).sum() - 5000) < bound
    for one, other in zip(masks, masks_of(monkeypatch, key(1), (2, 2, 50, 50)), strict=True):
        assert abs((one == other).sum() - 5000) < bound


def test_eq_4_with_the_recovered_masks(monkeypatch):
    student, teacher = qkv(0), qkv(10)
    masks = masks_of(monkeypatch, key(3), student[0].shape)
    attention_loss, relation_loss = cakd.pca_losses(key(3), student, teacher)
    mixed = [np.where(m, t, s) for m, s, t in zip(masks, student, teacher, strict=True)]
    difference = np_attention(*teacher) - np_attention(*mixed)
    np.testing.assert_allclose(attention_loss, np.mean(difference**2), rtol=1e-5)
    # The student's own value, without any of the teacher's elements.
    difference = np_relation(teacher[2]) - np_relation(student[2])
    np.testing.assert_allclose(relation_loss, np.mean(difference**2), rtol=1e-5)


def test_eq_4_gives_the_teacher_no_gradient():
    def loss(student, teacher, term):
        return cakd.pca_losses(key(0), student, teacher)[term]

    for term, reached in ((0, (True, True, True)), (1, (False, False, True))):
        to_student, to_teacher = jax.grad(loss, (0, 1))(qkv(0), qkv(10), term)
        assert tuple(bool(g.any()) for g in to_student) == reached
        assert not any(g.any() for g in to_teacher)


# ---- Proj_2


@pytest.mark.parametrize(
    ("grid", "groups"), [((14, 14), 16), ((7, 7), 4), ((8, 8), 4), ((24, 24), 36), ((5, 9), 6)]
)
def test_eq_5_has_one_layer_for_each_tile(grid, groups):
    module, features = GLProjector(WIDTH), jnp.zeros((2, *grid, 5))
    params = jax.eval_shape(lambda k: module.init(k, features, train=False), key(0))["params"]
    assert {name: p.shape for name, p in params.items()} == {
        "kernel": (groups, 5, WIDTH),
        "bias": (groups, WIDTH),
    }
    jaxpr = jax.make_jaxpr(lambda p: module.apply({"params": p}, features, train=False))(params)
    assert str(jaxpr).count("dot_general[") == 1


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (5, 9), (3, 2)])
def test_eq_5_maps_every_token_with_the_layer_of_its_tile(grid):
    module, features = GLProjector(WIDTH), normal(2, *grid, 5)
    params = random_params(module, features, train=False)
    ours = module.apply(params, features, train=False)
    np.testing.assert_allclose(ours, np_proj_2(params, features), atol=1e-5)


def test_gl_projector_starts_with_the_variance_of_one_layer():
    module = GLProjector(64)
    params = module.init(key(0), jnp.zeros((1, 8, 8, 32)), train=False)["params"]
    np.testing.assert_allclose(params["kernel"].std((1, 2)), 32**-0.5, rtol=0.1)
    assert not params["bias"].any()


def test_dropout_keeps_nine_in_ten_of_the_input_and_rescales():
    module, features = GLProjector(25), normal(4, 16, 16, 25)
    params = {"params": {"kernel": jnp.tile(jnp.eye(25), (16, 1, 1)), "bias": jnp.zeros((16, 25))}}
    passed = np.asarray(module.apply(params, features, rngs={"dropout": key(0)}))
    features = features.reshape(passed.shape)
    kept = passed != 0
    np.testing.assert_allclose(passed[kept], features[kept] / 0.9, rtol=1e-5)
    count = features.size
    assert abs(kept.sum() - 0.9 * count) < 5 * math.sqrt(0.09 * count)
    still = module.apply(params, features.reshape(4, 16, 16, 25), train=False)
    np.testing.assert_allclose(still, features, rtol=1e-6)


def test_eq_6_is_the_mean_squared_distance():
    teacher, student = normal(3, 4, WIDTH), normal(3, 4, WIDTH, seed=1)
    expected = np.mean((np.float64(teacher) - student) ** 2)
    np.testing.assert_allclose(cakd.token_loss(teacher, student), expected, rtol=1e-5)
    to_teacher, to_student = jax.grad(cakd.token_loss, (0, 1))(teacher, student)
    np.testing.assert_array_equal(to_teacher, 0)
    np.testing.assert_allclose(to_student, 2 * (student - teacher) / student.size, rtol=1e-4)


# ---- the adversary


def test_discriminator_has_three_layers_and_averages_token_logits():
    module, tokens = Discriminator(WIDTH), 3 * normal(4, 5, WIDTH)
    params = random_params(module, tokens)
    shapes = {name: p["kernel"].shape for name, p in params["params"].items()}
    square = (WIDTH, WIDTH)
    assert shapes == {"Dense_0": square, "Dense_1": square, "Dense_2": (WIDTH, 1)}
    logits = module.apply(params, tokens)
    np.testing.assert_allclose(logits, np_discriminator(params, tokens), atol=1e-5)


def test_eq_8_and_9_are_the_papers_logarithms():
    teacher, student = 3 * normal(6), 3 * normal(6, seed=1)
    d_teacher, d_student = np_sigmoid(teacher), np_sigmoid(student)
    expected = np.mean(-np.log(d_teacher) - np.log(1 - d_student))
    np.testing.assert_allclose(cakd.discriminator_loss(teacher, student), expected, rtol=1e-5)
    saturating, flipped = np.mean(np.log(1 - d_student)), -np.mean(np.log(d_student))
    np.testing.assert_allclose(cakd.generator_loss(student), saturating, rtol=1e-5)
    np.testing.assert_allclose(cakd.generator_loss(student, "saturating"), saturating, rtol=1e-5)
    np.testing.assert_allclose(cakd.generator_loss(student, "non_saturating"), flipped, rtol=1e-5)


def test_eq_8_and_9_stay_finite_at_extreme_logits():
    def values(logit):
        high, low = jnp.full(2, logit), jnp.full(2, -logit)
        return jnp.stack(
            [cakd.discriminator_loss(high, low), cakd.discriminator_loss(low, high)]
            + [cakd.generator_loss(x, kind) for kind in cakd.GENERATORS for x in (high, low)]
        )

    np.testing.assert_allclose(values(100.0), [0, 200, -100, 0, 0, 100], atol=1e-6)
    slopes = jax.jacfwd(values)(100.0)
    np.testing.assert_allclose(slopes, [0, 2, -1, 0, 0, 1], atol=1e-6)


def test_generators_pull_the_logit_up():
    for kind in cakd.GENERATORS:
        slope = jax.grad(lambda x, kind=kind: cakd.generator_loss(x, kind))(normal(4))
        assert (slope < 0).all()


def test_judge_counts_both_kinds():
    class Identity:
        def apply(self, params, logits):
            return logits

    teacher, student = jnp.array([1.0, 2, 3, -1]), jnp.array([1.0, 2, -3, 1])
    loss, metrics = cakd.judge(Identity(), {}, teacher, student)  # pyright: ignore[reportArgumentType]
    assert metrics["discriminator_accuracy"] == (3 / 4 + 1 / 4) / 2
    assert loss == metrics["discriminator"] == cakd.discriminator_loss(teacher, student)


# ---- the whole loss


@pytest.mark.parametrize("generator", ["saturating", "non_saturating"])
def test_eq_10_is_the_weighted_sum_of_every_term(monkeypatch, generator):
    monkeypatch.setattr(cakd, "partly_replace", lambda key, student, teacher: student)
    weights = {"attention": 0.5, "value_relation": 3.0, "tokens": 2.0, "generator": 0.7}
    method = CAKD(
        attention_weight=0.5,
        value_weight=3.0,
        token_weight=2.0,
        adversarial_weight=0.7,
        generator=generator,
        token_dropout=0.0,
    )
    teacher, student = outputs()
    params, adversary = method_params(method, teacher, student)
    loss, metrics = run_loss(method, teacher, student)
    mapped = np_proj_1(params["pca"], student["stage2"])
    tokens = np_proj_2(params["gl"], student["stage2"])
    fooled = np_sigmoid(np_discriminator(adversary, tokens))
    teacher_qkv = [teacher[name] for name in ("query", "key", "value")]
    terms = {
        "attention": np.mean((np_attention(*teacher_qkv) - np_attention(*mapped)) ** 2),
        "value_relation": np.mean((np_relation(teacher["value"]) - np_relation(mapped[2])) ** 2),
        "tokens": np.mean((teacher["tokens"] - tokens) ** 2),
        "generator": np.mean(np.log(1 - fooled) if generator == "saturating" else -np.log(fooled)),
    }
    weighted = {f"{name}_weighted": weights[name] * value for name, value in terms.items()}
    assert metrics.keys() == terms.keys() | weighted.keys()
    for name, value in (terms | weighted).items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(loss, sum(weighted.values()), rtol=1e-4)


def test_eq_10_with_every_weight_zero_is_zero_and_reports_nothing():
    weights = ("attention_weight", "value_weight", "token_weight", "adversarial_weight")
    loss, metrics = run_loss(CAKD(**dict.fromkeys(weights, 0.0)), *outputs())
    assert loss == 0
    assert metrics == {}


def test_terms_of_weight_zero_are_not_computed():
    """0 times infinity would not be 0."""
    method = CAKD(attention_weight=0.0, value_weight=0.0, adversarial_weight=0.0)
    teacher, student = outputs()
    teacher["query"] = np.full_like(teacher["query"], np.inf)
    loss, metrics = run_loss(method, teacher, student)
    assert metrics.keys() == {"tokens", "tokens_weighted"}
    assert np.isfinite(loss)


def test_no_adversary_is_trained_whose_verdict_has_no_weight():
    assert CAKD().adversary_period == 5
    assert CAKD(adversarial_weight=0.0).adversary_period == 0


def test_loss_draws_masks_and_dropout_from_its_key():
    teacher, student = outputs()
    (_, one), (_, same), (_, other) = (run_loss(CAKD(), teacher, student, s) for s in (0, 0, 1))
    assert one == same
    for name in ("attention", "tokens", "generator"):
        assert one[name] != other[name]
    assert one["value_relation"] == other["value_relation"]
    bare = CAKD(token_dropout=0.0)
    (_, one), (_, other) = (run_loss(bare, teacher, student, seed) for seed in (0, 1))
    assert one["tokens"] == other["tokens"]


def test_the_adversary_sees_the_tokens_of_the_students_loss():
    """L_MAD + L_MVG = -log D(h_T), which has no dropout, only if both losses see the same h'_S."""
    teacher, student = outputs()
    _, adversary = method_params(CAKD(), teacher, student)
    _, _, metrics, judged = full_loss(CAKD(), teacher, student)
    loss, _ = CAKD().adversary_loss(adversary, judged)
    expected = -np.mean(np.log(np_sigmoid(np_discriminator(adversary, teacher["tokens"]))))
    np.testing.assert_allclose(loss + metrics["generator"], expected, rtol=1e-5)


def test_every_equation_is_named_once():
    """Other methods' files refer to the equations of their own papers."""
    sources = (Path(module.__file__) for module in (cakd, multiview))
    text = "\n".join(path.read_text("utf-8") for path in sources)
    numbers = collections.Counter(int(n) for n in re.findall(r"\bEq\.\s(\d+)\b", text))
    assert numbers == dict.fromkeys(range(1, 11), 1)
