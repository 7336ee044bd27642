"""The released code's variant: its terms against NumPy, and a few steps of training."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.experiments import run
from xkd_jax.config import default_config
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.methods.cakd_release import CAKDRelease, LinearProjector, PatchGAN

GRID, WIDTH = (3, 5), 24  # 16 student heads of 2; the teacher has 4 heads of 6


pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def random_like(shapes):
    """Random values in place of a tree of shapes, kernels scaled by their fan-in."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 1
        return (rng.normal(size=leaf.shape) * fan_in**-0.5).astype(np.float32)

    return jax.tree.map(draw, shapes)


def outputs():
    tokens = math.prod(GRID)
    teacher = {name: normal(2, 4, tokens, 6, seed=i) for i, name in enumerate(("query", "key"))}
    teacher |= {
        "value": normal(2, 4, tokens, 6, seed=2),
        "tokens": normal(2, tokens, WIDTH),
        "cls": normal(2, WIDTH),
        "pooled": normal(2, WIDTH, seed=1),
        "logits": normal(2, 5),
        "block01": normal(2, tokens, WIDTH),
    }
    student = {"pooled": normal(2, 9), "logits": normal(2, 5, seed=1)}
    student |= {"stage2": normal(2, 6, 10, 8), "stage3": normal(2, *GRID, 32)}
    return {"grid": GRID} | teacher, student


def all_params(method):
    key = jax.random.key(0)
    shapes = jax.eval_shape(
        lambda: (method.init(key, *outputs())[0], method.init_adversary(key, *outputs()))
    )
    return random_like(shapes)


def full_loss(method, progress=0.0, outs=None):
    params, adversary = all_params(method)
    outs = outs or outputs()
    key, progress = jax.random.key(0), jnp.float32(progress)
    return method.loss(params, {}, *outs, {}, key, progress, adversary)


def run_loss(method, progress=0.0, outs=None):
    loss, _, metrics, _ = full_loss(method, progress, outs)
    return loss, jax.device_get(metrics)


def dense(params, x):
    return np.float64(x) @ params["params"]["kernel"] + params["params"]["bias"]


def linear_heads(params, features):
    """One linear layer without bias, [N, h, w, C] -> Q, K, V [N, 16, T, 2]: channels Q | K | V."""
    n, h, w, c = features.shape
    assert params["params"]["Dense_0"].keys() == {"kernel"}
    projected = np.float64(features.reshape(n, h * w, c)) @ params["params"]["Dense_0"]["kernel"]
    width = projected.shape[-1] // 3
    return [
        np.stack([projected[..., m * width + 2 * i : m * width + 2 * i + 2] for i in range(16)], 1)
        for m in range(3)
    ]


def mean_scores(query, keys):
    """Q K^T / sqrt(d), averaged over heads."""
    n, heads, tokens, d = query.shape
    out = np.zeros((n, tokens, tokens))
    for i, head in np.ndindex(n, heads):
        out[i] += np.float64(query[i, head]) @ keys[i, head].T / math.sqrt(d) / heads
    return out


def same_conv4x4(x, params, stride):
    """SAME padding, with the larger half at the end."""
    n, h, w, _ = x.shape
    out_h, out_w = -(-h // stride), -(-w // stride)
    pad = [(max((o - 1) * stride + 4 - s, 0)) for o, s in ((out_h, h), (out_w, w))]
    x = np.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in pad), (0, 0)))
    out = np.zeros((n, out_h, out_w, params["kernel"].shape[-1]))
    for i, j in np.ndindex(out_h, out_w):
        patch = x[:, i * stride : i * stride + 4, j * stride : j * stride + 4]
        out[:, i, j] = np.einsum("nabc,abcf->nf", patch, np.float64(params["kernel"]))
    return out + params.get("bias", 0)


def patch_gan(adversary, scores):
    x, params = np.float64(scores)[..., None], adversary["params"]
    for i, stride in enumerate((2, 2, 2, 1)):
        x = same_conv4x4(x, params[f"Conv_{i}"], stride)
        if i:
            x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
            x = x * params[f"scale_{i}"] + params[f"bias_{i}"]
        x = np.where(x > 0, x, 0.2 * x)
    return same_conv4x4(x, params["Conv_4"], 1).mean((1, 2, 3))


@pytest.mark.slow
def test_terms_are_the_released_codes():
    teacher, student = outputs()
    params, adversary = all_params(CAKDRelease())
    q, k, v = linear_heads(params["pca"], student["stage3"])
    assert params["gl"]["params"]["kernel"].shape == (2, 32, WIDTH)
    kernel, bias = (params["gl"]["params"][name] for name in ("kernel", "bias"))
    tokens = np.stack(
        [
            np.float64(student["stage3"][:, row, column]) @ kernel[column // 4] + bias[column // 4]
            for row, column in np.ndindex(*GRID)
        ],
        1,
    )
    scores = mean_scores(q, k)
    # The slip: the student's value relation is scaled by 1/sqrt(d), the teacher's is not.
    target = mean_scores(teacher["value"], teacher["value"]) * math.sqrt(6)
    fooled = 1 / (1 + np.exp(-patch_gan(adversary, scores)))
    expected = {
        "attention": mean_scores(teacher["query"], teacher["key"]) - scores,
        "value_relation": target - mean_scores(v, v),
        "tokens": teacher["tokens"] - tokens,
        "logits_mse": teacher["logits"] - student["logits"],
        "class_token": teacher["cls"] - dense(params["class_token"], student["pooled"]),
    }
    expected = {name: np.mean(np.float64(x) ** 2) for name, x in expected.items()}
    expected["generator"] = -np.mean(np.log(fooled))
    loss, metrics = run_loss(CAKDRelease(), progress=30.0)
    assert metrics.keys() == expected.keys() | {f"{name}_weighted" for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    weights = {"attention": 0.2, "value_relation": 0.05, "tokens": 0.05}
    total = sum(weights.get(name, 1.0) * value for name, value in expected.items())
    np.testing.assert_allclose(loss, 0.1 * total, rtol=1e-4)  # (30 - 25) / 50


@pytest.mark.slow
def test_weights_are_options():
    weights = ("attention", "value", "token", "logit", "class_token")
    names = ("attention", "value_relation", "tokens", "logits_mse", "class_token")
    options = {f"{name}_weight": 0.5 * i for i, name in enumerate(weights)}
    options |= {"adversarial_weight": 0.0, "ramp_start": 3.0, "ramp_epochs": 4.0, "ramp_limit": 0.5}
    loss, metrics = run_loss(CAKDRelease(**options), progress=4.9)
    for i, name in enumerate(names):
        expected = 0.25 * 0.5 * i * metrics[name]
        np.testing.assert_allclose(metrics[f"{name}_weighted"], expected, rtol=1e-6)
    np.testing.assert_allclose(loss, sum(metrics[f"{n}_weighted"] for n in names), rtol=1e-6)


@pytest.mark.parametrize(
    ("progress", "factor"), [(0, 0), (25.9, 0), (30, 0.1), (32.5, 0.14), (36, 0.2), (200, 0.2)]
)
def test_the_ramp_is_a_factor_of_every_term(progress, factor):
    """min(max(epoch - 25, 0) / 50, 0.2), as in the released code's line, of whole epochs."""
    method = CAKDRelease()
    loss, metrics = run_loss(method, progress)
    weights = {
        "attention": 0.2, "value_relation": 0.05, "tokens": 0.05, "logits_mse": 1.0,
        "class_token": 1.0, "generator": 1.0,
    }  # fmt: skip
    for name, weight in weights.items():
        expected = factor * weight * metrics[name]
        np.testing.assert_allclose(metrics[f"{name}_weighted"], expected, rtol=1e-5)
    total = sum(weight * metrics[name] for name, weight in weights.items())
    np.testing.assert_allclose(loss, factor * total, rtol=1e-5)
    assert method.label_weight == 1  # of the cross-entropy beside it, whatever the ramp


def test_a_ramp_without_length_is_refused():
    CAKDRelease().check(*outputs())
    with pytest.raises(UserError, match=r"ramp_epochs=0\.0 must be above 0"):
        CAKDRelease(ramp_epochs=0.0).check(*outputs())


def test_a_teacher_without_class_token_gives_its_pooled_features():
    teacher, student = outputs()
    without = {name: x for name, x in teacher.items() if name != "cls"}
    swapped = teacher | {"cls": teacher["pooled"]}
    terms = [
        run_loss(CAKDRelease(), outs=(out, student))[1]["class_token"]
        for out in (teacher, without, swapped)
    ]
    assert terms[0] != terms[1] == terms[2]


def test_patch_gan_halves_the_map_three_times():
    scores = jnp.zeros((2, 49, 49))
    (logits, state), params = jax.eval_shape(
        lambda k: (
            PatchGAN().apply(PatchGAN().init(k, scores), scores, capture_intermediates=True),
            PatchGAN().init(k, scores)["params"],
        ),
        jax.random.key(0),
    )
    assert logits.shape == (2,)
    channels = [1, 8, 16, 32, 64, 1]
    for i, side in enumerate((25, 13, 7, 7, 7)):
        assert params[f"Conv_{i}"]["kernel"].shape == (4, 4, channels[i], channels[i + 1])
        (out,) = state["intermediates"][f"Conv_{i}"]["__call__"]
        assert out.shape == (2, side, side, channels[i + 1])


@pytest.mark.parametrize(("channels", "width"), [(1024, 64), (40, 2), (7, 1)])
def test_linear_projector_has_16_heads_of_a_sixteenth_of_the_channels(channels, width):
    shapes = jax.eval_shape(
        lambda k: LinearProjector().init_with_output(k, jnp.zeros((2, 3, 5, channels)))[0],
        jax.random.key(0),
    )
    assert [x.shape for x in shapes] == [(2, 16, 15, width)] * 3


@pytest.mark.slow
def test_the_adversary_judges_score_maps():
    teacher, student = outputs()
    params, adversary = all_params(CAKDRelease())
    q, k, _ = linear_heads(params["pca"], student["stage3"])
    real = patch_gan(adversary, mean_scores(teacher["query"], teacher["key"]))
    fake = patch_gan(adversary, mean_scores(q, k))
    expected = np.mean(np.log1p(np.exp(-real)) + np.log1p(np.exp(fake))) / 2
    judged = full_loss(CAKDRelease()).judged
    loss, metrics = CAKDRelease().adversary_loss(adversary, judged)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert metrics["discriminator_accuracy"] == (np.mean(real > 0) + np.mean(fake < 0)) / 2

    def gradient(of_teacher):
        loss = lambda a: CAKDRelease().adversary_loss(a, (of_teacher, judged[1]))[0]  # noqa: E731
        return jax.tree.leaves(jax.grad(loss)(adversary))

    # The teacher's half is detached: other maps of the teacher give the same gradient.
    for one, other in zip(gradient(judged[0]), gradient(2 * judged[0]), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.any() or one.shape[-1] > 1


# In CI tests/methods/test_methods_train.py trains it.
@pytest.mark.exhaustive
def test_it_trains():
    config = default_config()
    config.batch_size = 16
    config.method.name = "cakd_release"
    config.method.cakd_release.update(ramp_start=-50.0, ramp_limit=1.0)  # all terms from the start
    config.data.update(name="fashion_mnist_mini", train="train[:64]", eval="validation[:64]")
    config.student.args = {"layers": (1, 1, 1, 1), "width": 0.125, "stem": "cifar"}
    config.teacher.update(model="vit_tiny_patch16_224", weights="random")
    config.teacher.args = {
        "img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 1, "num_heads": 2,
        "class_token": False, "global_pool": "avg",
    }  # fmt: skip
    config.augment.update(crop_padding=0, flip=False)
    config.optimizer.learning_rate = 0.05
    experiment = create_experiment(config)
    assert experiment.distiller.method == CAKDRelease(ramp_start=-50.0, ramp_limit=1.0)
    assert experiment.distiller.teacher is not None
    states, losses = (trained := run(experiment, 12)).states, []
    for metrics, (before, after) in zip(trained.metrics, itertools.pairwise(states), strict=True):
        losses.append(metrics["loss"])
        assert np.isfinite(metrics["discriminator"])  # the adversary is updated at every step
        for old, new in zip(
            jax.tree.leaves(before.params["adversary"]),
            jax.tree.leaves(after.params["adversary"]),
            strict=True,
        ):
            assert not np.array_equal(old, new)
    assert metrics["generator_weighted"] == metrics["generator"] > 0
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])
