"""OFA, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import (
    cnn,
    gradient_fn,
    init,
    learn,
    pair,
    reached,
    step_down,
    teacher_cnn,
    vit,
)
from tests.methods.reference import conv_norm, level_map
from xkd_jax.errors import UserError
from xkd_jax.methods.logits import softened_kl
from xkd_jax.methods.ofa import OFA, Branch, SeparableConv, enhanced_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

LABELS = np.arange(4)
STAGES = ("stage1", "stage2", "stage3", "stage4")
BLOCKS = ("block01", "block02", "block03")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
    e = np.exp(np.float64(x) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def depthwise(kernel, x, stride):
    """A zero-padded 3x3 convolution with one filter per channel."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    n, h, w, channels = x.shape
    y = np.zeros((n, -(-h // stride), -(-w // stride), channels))
    for image, i, j, c in np.ndindex(*y.shape):
        window = padded[image, i * stride : i * stride + 3, j * stride : j * stride + 3, c]
        y[image, i, j, c] = np.sum(window * np.float64(kernel)[:, :, 0, c])
    return y


def halve(params, x):
    for number, stride in ((1, 2), (2, 1)):
        x = depthwise(params[f"depthwise{number}"]["kernel"], x, stride)
        x = np.maximum(conv_norm({"params": params[f"pointwise{number}"]}, x), 0)
    return x


def branch(params, x):
    """A branch's logits, and the number of its separable convolutions."""
    params = params["params"]
    halvings = sum(name.startswith("halving") for name in params)
    for i in range(1, halvings + 1):
        x = halve(params[f"halving{i}"], x)
    if not halvings:
        x = x @ np.float64(params["conv"]["kernel"][0, 0]) + params["conv"]["bias"]
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], halvings


def expected_loss(student, teacher, labels, gamma, temperature=1.0):
    total = 0.0
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    for i, label in enumerate(labels):
        for c in range(p.shape[1]):
            weight = (1 + p[i, c]) ** gamma - 1 if c == label else p[i, c] ** gamma
            total -= weight * np.log(q[i, c])
    return total / len(labels)


@pytest.mark.parametrize(("gamma", "temperature"), [(1.0, 1.0), (1.4, 1.0), (2.0, 3.0)])
def test_the_target_is_enhanced_as_in_the_released_code(gamma, temperature):
    student, teacher = 3 * draw(0, 4, 6), 3 * draw(1, 4, 6)
    loss = enhanced_loss(student, teacher, LABELS, gamma, temperature)
    expected = expected_loss(student, teacher, LABELS, gamma, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_case_by_hand():
    """The teacher is sure of 3/4 for the target, the student undecided; gamma is 2."""
    teacher, student = np.log([[3.0, 1.0]]), np.zeros((1, 2))
    loss = enhanced_loss(student, teacher, np.array([0]), 2.0, 1.0)
    np.testing.assert_allclose(loss, (49 / 16 - 1 + 1 / 16) * np.log(2), rtol=1e-6)


def test_gamma_1_is_the_divergence_plus_the_teachers_entropy():
    student, teacher = 3 * draw(0, 4, 6), 3 * draw(1, 4, 6)
    entropy = -np.mean(np.sum(softmax(teacher) * np.log(softmax(teacher)), -1))
    of_kl, of_ofa = (
        jax.value_and_grad(fn)(student)
        for fn in (
            lambda x: softened_kl(x, teacher, 1.0),
            lambda x: enhanced_loss(x, teacher, LABELS, 1.0, 1.0),
        )
    )
    np.testing.assert_allclose(of_ofa[0], of_kl[0] + entropy, rtol=1e-5)
    np.testing.assert_allclose(of_ofa[1], of_kl[1], atol=1e-6)


def test_a_larger_gamma_favours_confident_targets():
    """The share of the target in the weights of all classes grows, and most for sure teachers."""
    shares = []
    for sure in (0.5, 0.9):
        p = np.array([sure, 1 - sure])
        for gamma in (1.0, 1.5):
            target = np.array([1, 0])
            enhanced = (p + target) ** gamma - target
            shares.append(enhanced[0] / enhanced.sum())
            loss = enhanced_loss(np.zeros((1, 2)), np.log(p)[None], np.array([0]), gamma, 1.0)
            np.testing.assert_allclose(loss, enhanced.sum() * np.log(2), rtol=1e-6)
    assert shares[1] > shares[0]
    assert shares[3] > shares[2]


def test_bfloat16_and_extreme_logits():
    student, teacher = (jnp.asarray(3 * draw(i, 4, 6), jnp.bfloat16) for i in (0, 1))
    half = enhanced_loss(student, teacher, LABELS, 1.5, 2.0)
    full = [x.astype(jnp.float32) for x in (student, teacher)]
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, enhanced_loss(*full, LABELS, 1.5, 2.0))
    far = jnp.array([[1e4, -1e4]]), jnp.array([[-1e4, 1e4]]), jnp.array([0]), 1.5, 1.0
    loss, gradient = jax.value_and_grad(enhanced_loss)(*far)
    assert loss == 2e4
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (1, 1)])
def test_a_separable_convolution_halves_the_grid(grid):
    x, module = draw(0, 3, *grid, 2), SeparableConv(5)
    params = module.init(jax.random.key(0), x)
    y = module.apply(params, x)
    assert y.shape == (3, -(-grid[0] // 2), -(-grid[1] // 2), 5)
    np.testing.assert_allclose(y, halve(params["params"], np.float64(x)), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("halvings", [0, 1, 3])
def test_a_branch_doubles_the_width_up_to_the_last_convolution(halvings):
    x, module = draw(0, 3, 6, 6, 2), Branch(halvings, width=7, classes=4)
    params = module.init(jax.random.key(0), x)
    logits, counted = branch(params, np.float64(x))
    assert counted == halvings
    np.testing.assert_allclose(module.apply(params, x), logits, atol=1e-4)
    widths = [
        params["params"][f"halving{i}"]["pointwise2"]["conv"]["kernel"].shape[-1]
        for i in range(1, halvings + 1)
    ]
    assert widths == {0: [], 1: [7], 3: [4, 8, 7]}[halvings]


@pytest.fixture(
    scope="module",
    params=[
        "ViT to CNN",
        pytest.param("CNN to ViT", marks=pytest.mark.exhaustive),
        pytest.param("CNN to CNN", marks=pytest.mark.exhaustive),
        pytest.param("Swin to CNN", marks=pytest.mark.slow),
    ],
)
def learnt(request):
    return request.param, *learn(OFA(gamma=1.4), request.param)


def test_loss_is_that_of_every_branch_and_of_the_students_logits(learnt):
    name, params, _, loss, _ = learnt
    teacher, student = pair(name)
    names = BLOCKS if name.endswith("ViT") else STAGES
    of_teacher = np.asarray(teacher["logits"])
    total = expected_loss(np.asarray(student["logits"]), of_teacher, LABELS, 1.4)
    for left, level in enumerate(reversed(names)):
        logits, halvings = branch(params[level], level_map(student, level))
        assert halvings == left
        total += expected_loss(logits, of_teacher, LABELS, 1.4)
    assert params.keys() == set(names)
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_the_student_and_all_branches_learn_and_the_teacher_does_not(learnt):
    _, params, _, _, (of_params, of_teacher, of_student) = learnt
    assert reached(of_teacher) == set()
    assert reached(of_student) == {*params, "logits"}
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(of_params))


@pytest.mark.slow
def test_a_step_down_the_gradient_lowers_the_loss(learnt):
    name, params, gradient, loss, (of_params, _, _) = learnt
    assert gradient(step_down(params, of_params, loss), *pair(name))[0] < loss


def test_a_cifar_resnet_has_three_branches():
    teacher, student = cnn(0), teacher_cnn(1)  # whose first stage is the stem
    params, state = init(OFA(), teacher, student)
    assert params.keys() == {"stage2", "stage3", "stage4"}
    assert state == {}
    assert OFA().describe(teacher, student).endswith("student's stage2, stage3, stage4")


@pytest.mark.slow
@pytest.mark.parametrize("teacher_width", [3, 16])
def test_branches_have_the_width_of_the_wider_network(teacher_width):
    teacher = vit(0) | {"pooled": jnp.zeros((4, teacher_width))}
    params, _ = init(OFA(), teacher, cnn(1))
    assert params["stage4"]["params"]["head"]["kernel"].shape == (max(6, teacher_width), 5)


@pytest.mark.slow
def test_each_branch_can_have_its_own_gamma():
    outs = pair("ViT to CNN")
    method = OFA(gamma=1.2, level_gammas=(1.0, 1.1, 1.3, 1.5), weight=0.1, logits_weight=2.0)
    method.check(*outs)
    params, _ = init(method, *outs)
    loss, _ = gradient_fn(method, *outs)(params, *outs)
    teacher = np.asarray(outs[0]["logits"])
    total = 2 * expected_loss(np.asarray(outs[1]["logits"]), teacher, LABELS, 1.2)
    for i, gamma in enumerate(method.level_gammas, start=1):
        logits, _ = branch(params[f"stage{i}"], level_map(outs[1], f"stage{i}"))
        total += 0.1 * expected_loss(logits, teacher, LABELS, gamma)
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_the_defaults_are_the_authors():
    method = OFA()
    assert (method.label_weight, method.logits_weight, method.weight) == (1, 1, 1)
    assert (method.gamma, method.temperature) == (1, 1)
    assert method.hard_labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"method.ofa.temperature=0\.0 must be above 0"),
        ({"gamma": -1.0}, r"method.ofa.gamma=-1\.0 must be above 0"),
        ({"level_gammas": (1.0, 1.0, 0.0, 1.0)}, r"method.ofa.level_gammas=.* must be above 0"),
        ({"level_gammas": (1.0, 1.2)}, "one number for each .* levels: stage1, stage2, stage3, st"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        OFA(**options).check(*pair("ViT to CNN"))
