"""Contrastive distillation, against a NumPy simulation in float64."""

import jax
import numpy as np
import pytest

from tests.methods.outputs import gradient_fn, pair, reached
from xkd_jax.errors import UserError
from xkd_jax.methods.crd import CRD, contrast, draw_negatives, group_by_class

pytestmark = pytest.mark.usefixtures("quick_compilation")

# 30 examples, the first four of which are the batch of `gradient_fn`; class sizes differ.
LABELS = np.array([0, 1, 2, 3, *[4] * 6, *[0] * 9, *[2] * 7, *[1] * 4], np.int32)
METHOD = CRD(negatives=16, width=8)
SIDES = {"student": "teacher", "teacher": "student"}


def begin(outs, labels=LABELS):
    return METHOD.init(jax.random.key(1), *outs, labels)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embed(params, outs):
    """Both networks' features by name, unit vectors."""
    features = {}
    for name, out in zip(("teacher", "student"), outs, strict=True):
        kernel, bias = (np.float64(params[name]["params"][k]) for k in ("kernel", "bias"))
        features[name] = unit(np.float64(out["pooled"]) @ kernel + bias)
    return features


def expected_step(features, bank, normalizer, index, negatives, temperature=0.07):
    """Both directions' losses; `bank` and `normalizer` are updated in place, as in RepDistiller."""
    losses, n, k = {}, len(index), negatives.shape[1]
    noise = k / len(LABELS)
    for name, other in SIDES.items():
        scores = np.zeros((n, k + 1))
        for i, places in enumerate(np.concatenate([index[:, None], negatives], 1)):
            for j, place in enumerate(places):
                scores[i, j] = np.exp(features[name][i] @ bank[other][place] / temperature)
        normalizer.setdefault(name, scores.mean() * len(LABELS))
        scores /= normalizer[name]
        positive = np.log(scores[:, 0] / (scores[:, 0] + noise))
        losses[name] = -(positive + np.log(noise / (scores[:, 1:] + noise)).sum(1)).mean()
    for name, rows in bank.items():
        rows[index] = unit(0.5 * rows[index] + 0.5 * features[name])
    return losses


@pytest.fixture(scope="module", params=["CNN to CNN", "ViT to CNN"])
def learnt(request):
    """A pair, parameters, gradient function, loss and gradients."""
    outs = pair(request.param)
    METHOD.check(*outs)
    params, state = begin(outs)
    gradient = gradient_fn(METHOD, *outs, state)
    return outs, params, gradient, *gradient(params, *outs)


def test_features_and_both_embeddings_learn_and_the_teacher_does_not(learnt):
    _, _, _, _, (of_params, of_teacher, of_student) = learnt
    assert reached(of_teacher) == set()
    assert reached(of_student) == {"pooled"}
    assert all(np.any(gradient != 0) for gradient in jax.tree.leaves(of_params))


def test_a_step_down_the_gradient_lowers_the_loss(learnt):
    (teacher, student), params, gradient, loss, (of_params, _, of_student) = learnt
    nearer = jax.tree.map(lambda p, g: p - 1e-3 * g, params, of_params)
    assert gradient(nearer, teacher, student)[0] < loss
    student = student | {"pooled": student["pooled"] - 1e-3 * of_student["pooled"]}
    assert gradient(params, teacher, student)[0] < loss


def test_four_steps_are_those_of_a_simulation():
    params, state = begin(pair("ViT to CNN"))
    bank = {name: np.float64(rows) for name, rows in state["bank"].items()}
    step, normalizer = jax.jit(METHOD.loss), {}
    for number, index in enumerate(([0, 1, 2, 3], [9, 4, 29, 0], [0, 1, 2, 3], [7, 9, 20, 11])):
        index, key = np.array(index), jax.random.key(number)
        outs = [{"pooled": out["pooled"] * (1 + number) + number} for out in pair("ViT to CNN")]
        batch, groups = {"index": index, "label": LABELS[index]}, group_by_class(LABELS, 5)
        drawn = np.asarray(draw_negatives(key, **groups, labels=LABELS[index], number=16))
        expected = expected_step(embed(params, outs), bank, normalizer, index, drawn)
        loss, state, metrics, _ = step(params, state, *outs, batch, key, 0.0)
        for name in SIDES:
            np.testing.assert_allclose(metrics[f"crd_{name}"], expected[name], rtol=1e-5)
            np.testing.assert_allclose(state["bank"][name], bank[name], atol=1e-6)
            z = np.exp(state["log_normalizer"][name])
            np.testing.assert_allclose(z, normalizer[name], rtol=1e-5)
        np.testing.assert_allclose(loss, 0.8 * sum(expected.values()), rtol=1e-5)


def test_negatives_are_uniform_over_the_other_classes():
    groups = group_by_class(LABELS, 5)
    anchors = np.array([0, 1, 2, 3, 4])
    drawn = np.asarray(draw_negatives(jax.random.key(0), **groups, labels=anchors, number=20000))
    for label, row in zip(anchors, drawn, strict=True):
        counts = np.bincount(row, minlength=len(LABELS))
        others = label != LABELS
        assert np.all(counts[~others] == 0)
        mean, freedom = len(row) / others.sum(), others.sum() - 1
        # The mean of Pearson's statistic is the degrees of freedom, its variance twice that.
        statistic = np.sum((counts[others] - mean) ** 2) / mean
        assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_banks_receive_no_gradient():
    x, index, drawn = np.eye(3, dtype=np.float32), np.arange(2), np.ones((2, 3))
    gradient = jax.grad(lambda a, bank: contrast(a, bank, index, drawn, 0.0, 3, 0.07)[0], (0, 1))
    of_anchors, of_bank = jax.jit(gradient)(x[:2], x)
    assert np.all(of_bank == 0)
    assert np.any(of_anchors != 0)


def test_classes_without_examples_have_an_empty_range():
    groups = group_by_class(np.array([3, 1, 3]), 5)
    np.testing.assert_array_equal(groups["by_class"], [1, 0, 2])
    np.testing.assert_array_equal(groups["starts"], [0, 0, 1, 1, 3, 3])


def test_banks_have_a_row_for_each_example_and_whole_shares_of_a_mesh():
    class Lazy:
        def __array__(self, dtype=None, copy=None):
            return np.arange(1500) % 5

    _, state = begin(pair("CNN to CNN"), labels=Lazy())
    for rows in state["bank"].values():
        assert rows.shape == (2048, 8)
        assert 0.99 < np.max(np.abs(rows)) * np.sqrt(8 / 3) <= 1.000001
    assert np.any(state["bank"]["student"] != state["bank"]["teacher"])


@pytest.mark.parametrize("labels", [(), [2, 2, 2]])
def test_a_training_set_without_other_classes_is_refused(labels):
    with pytest.raises(UserError, match="this training set has fewer than two"):
        begin(pair("CNN to CNN"), labels=labels)


@pytest.mark.parametrize(
    "option", [{"temperature": 0.0}, {"negatives": 0}, {"momentum": 1.0}, {"width": 0}]
)
def test_wrong_options_are_refused(option):
    with pytest.raises(UserError, match=f"method.crd.{next(iter(option))}=.* must be "):
        CRD(**option).check(*pair("CNN to CNN"))
