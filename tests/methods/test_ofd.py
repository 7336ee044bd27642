"""OFD, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import assert_levels_learn, cnn, init, learn, pair, step_down, vit
from tests.methods.reference import LEVELS, conv_norm, level_map, level_maps, on_grid
from xkd_jax.distiller import Distiller, create_teacher_fn
from xkd_jax.methods import METHODS, create_method
from xkd_jax.methods.ofd import OFD, margin, partial_distance, update_negatives
from xkd_jax.model import create_model
from xkd_jax.optim import create_optimizer

pytestmark = pytest.mark.usefixtures("quick_compilation")


def mean_of_negatives(teacher):
    """m_C, channel by channel."""
    channels = np.moveaxis(np.float64(teacher), -1, 0)
    return np.array([c[c < 0].mean() if np.any(c < 0) else 0.0 for c in channels])


def distance(t, s):
    """The paper's cases, for one response."""
    return 0.0 if s <= t <= 0 else (t - s) ** 2


def partial(teacher, student, margins):
    target = np.maximum(teacher, margins)
    total = sum(distance(t, s) for t, s in zip(target.flat, student.flat, strict=True))
    return total / len(teacher)


def connected(name, params):
    """The maps of each level on the teacher's grid and in its channels."""
    levels = zip(LEVELS[name][1], level_maps(name, before_activation=True), strict=True)
    for level, (teacher, student) in levels:
        yield teacher, conv_norm(params[level], on_grid(student, teacher.shape[1:3]))


def zeros(width):
    return {"sum": jnp.zeros(width), "share": jnp.zeros(width)}


@pytest.fixture(scope="module", params=["CNN to CNN", "ViT to CNN", "Swin to ViT"])
def learnt(request):
    return request.param, *learn(OFD(), request.param)


def test_loss_is_the_partial_distance_over_all_levels(learnt):
    name, params, _, loss, _ = learnt
    total = 0.0
    for k, (teacher, student) in enumerate(reversed(list(connected(name, params)))):
        total += partial(teacher, student, mean_of_negatives(teacher)) / 2**k
    np.testing.assert_allclose(loss, 1e-3 * total, rtol=1e-5)


def test_every_level_and_connector_learns_and_the_teacher_does_not(learnt):
    name, *_, gradients = learnt
    assert_levels_learn(name, LEVELS[name][1], gradients)


def test_a_step_down_the_gradient_lowers_the_loss(learnt):
    name, params, gradient, loss, (of_params, _, _) = learnt
    nearer = step_down(params, of_params, loss)
    assert gradient(nearer, *pair(name))[0] < loss


def test_the_margin_is_the_mean_of_all_the_negative_responses_so_far():
    first, second = (cnn(i)["stage2_pre"] + shift for i, shift in ((0, 0.5), (1, -1)))
    negatives = update_negatives(zeros(4), first)
    np.testing.assert_allclose(margin(negatives), mean_of_negatives(first), rtol=1e-5)
    negatives = update_negatives(negatives, second)
    both = np.concatenate([first, second])
    np.testing.assert_allclose(margin(negatives), mean_of_negatives(both), rtol=1e-5)


def test_the_method_carries_the_margins_from_batch_to_batch():
    method, student = OFD(), vit(2)
    params, state = init(method, vit(0), student)
    for seed in (0, 1):
        rest = student, {}, jax.random.key(0), jnp.zeros(())
        _, state, metrics, _ = method.loss(params, state, vit(seed), *rest)
    for block in LEVELS["ViT to CNN"][0]:
        both = np.concatenate([level_map(vit(seed), block) for seed in (0, 1)])
        np.testing.assert_allclose(margin(state[block]), mean_of_negatives(both), rtol=1e-5)
    assert metrics.keys() == {"partial_distance", "partial_distance_weighted"}


def test_a_channel_that_is_never_negative_has_margin_0():
    teacher = jax.nn.relu(cnn(0)["stage1_pre"])
    np.testing.assert_array_equal(margin(update_negatives(zeros(3), teacher)), 0)


def test_the_distance_is_0_where_neither_would_pass_a_relu():
    teacher, student = (-1 - jnp.abs(cnn(i)["stage1_pre"]) for i in (0, 1))
    low = jnp.full(3, -1.0)  # every one of the teacher's responses is below it
    loss, gradient = jax.value_and_grad(partial_distance, 1)(teacher, student, low)
    assert loss == 0
    assert not np.any(gradient)
    # Above the margin the student is pulled down to it, however low the teacher's response is.
    responses = student[0].size
    np.testing.assert_allclose(partial_distance(teacher, 0 * student, low), responses)
    np.testing.assert_allclose(partial_distance(9 * teacher, 0 * student, low), responses)
    # Where the teacher's response is positive, deviations on both sides count.
    for response in (3.0, -1.0):
        loss = partial_distance(0 * teacher + 1, 0 * student + response, low)
        np.testing.assert_allclose(loss, 4 * responses)


def test_responses_at_the_margin_or_equal_to_the_teachers_have_distance_0():
    teacher = cnn(0)["stage1_pre"]
    margins = jnp.asarray(mean_of_negatives(teacher), jnp.float32)
    assert partial_distance(teacher, jnp.maximum(teacher, margins), margins) == 0
    assert partial_distance(teacher, teacher, margins) == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ofd", "london", "logits+ofd"])
def test_a_cnn_teacher_uses_the_statistics_of_the_batch(method):
    """As in training mode; and the running ones if the option is off."""
    teacher = create_model("resnet8", num_classes=3, channels=(2, 2, 3, 4))
    variables = teacher.init(jax.random.key(0))
    teacher = dataclasses.replace(teacher, variables=variables)
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))

    def seen(method):
        optimizer = create_optimizer({}, lambda step: 0.1)
        distiller = Distiller(teacher, teacher, method, optimizer)
        return jax.jit(create_teacher_fn(distiller, distiller.teacher_variables))(images)

    def expected(train):
        return teacher.module.apply(variables, images, train=train, mutable=["batch_stats"])[0][1]

    options = {part: {"teacher_batch_stats": False} for part in ("ofd", "london")}
    for of_method, train in ((method, True), (create_method(method, options), False)):
        out = seen(of_method)
        for name in ("stage2_pre", "stage4", "logits"):
            np.testing.assert_allclose(out[name], expected(train)[name], atol=1e-5)
    assert np.abs(expected(True)["stage4"] - expected(False)["stage4"]).max() > 0.1


def test_other_methods_see_the_running_statistics():
    assert {name for name, method in METHODS.items() if method.teacher_batch_stats} == {
        "ofd", "london",
    }  # fmt: skip
