"""ReviewKD, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import cnn, init, learn, pair, reached, step_down, vit
from tests.methods.reference import LEVELS, level_map, on_grid
from tests.methods.test_align import adaptive_average
from xkd_jax.errors import UserError
from xkd_jax.methods.review import ReviewKD, context_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")
WARM = 20.0  # epochs after which the weight has its full value


def conv_norm(params, x):
    """A zero-padded convolution of stride 1, and batch normalisation."""
    kernel = np.float64(params["conv"]["kernel"])
    side, (n, h, w, _) = len(kernel), x.shape
    edge = side // 2
    padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    y = np.zeros((n, h, w, kernel.shape[-1]))
    for i, j in np.ndindex(side, side):
        y += padded[:, i : i + h, j : j + w] @ kernel[i, j]
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
    return y * params["scale"] + params["bias"]


def repeat(x, grid):
    """Each position of the finer grid takes the value of the one that contains it."""
    for axis, target in zip((1, 2), grid, strict=True):
        places = [i * x.shape[axis] // target for i in range(target)]
        x = np.take(x, places, axis)
    return x


def fuse(params, level, deeper, grid):
    fused = conv_norm(params["reduce"], level)
    if deeper is not None:
        deeper = repeat(deeper, fused.shape[1:3])
        kernel = np.float64(params["attention"]["kernel"][0, 0])
        scores = np.concatenate([fused, deeper], -1) @ kernel + params["attention"]["bias"]
        attention = 1 / (1 + np.exp(-scores))
        fused = fused * attention[..., [0]] + deeper * attention[..., [1]]
    fused = on_grid(fused, grid)
    return conv_norm(params["expand"], fused), fused


def context(teacher, student):
    """The mean squared distance of the maps and of their 4x4, 2x2 and 1x1 averages."""
    terms = [np.mean((teacher - student) ** 2)]
    for size in (4, 2, 1):
        if size < student.shape[1]:
            small = [
                adaptive_average(adaptive_average(x, 1, size), 2, size) for x in (teacher, student)
            ]
            terms.append(np.mean((small[0] - small[1]) ** 2))
    weights = [1, 1 / 2, 1 / 4, 1 / 8][: len(terms)]
    return np.average(terms, weights=weights)


def pooled(out):
    return level_map({**out, "pooled": out["pooled"][:, None, None]}, "pooled")


def maps(name):
    """The teacher's and the student's map at each level of a pair, the pooled features last."""
    teacher, student = pair(name)
    for of_teacher, of_student in zip(*LEVELS[name], strict=True):
        yield level_map(teacher, of_teacher, before_activation=True), level_map(student, of_student)
    yield pooled(teacher), pooled(student)


@pytest.fixture(scope="module", params=["CNN to CNN", "ViT to CNN", "Swin to ViT"])
def learnt(request):
    return request.param, *learn(ReviewKD(), request.param, WARM)


def test_loss_compares_every_level_fused_with_the_deeper_ones(learnt):
    name, params, _, loss, _ = learnt
    total, fused = 0.0, None
    levels = list(maps(name))
    for number, (teacher, student) in reversed(list(enumerate(levels, start=1))):
        fusion = params["params"][f"fusion{number}"]
        imitation, fused = fuse(fusion, student, fused, teacher.shape[1:3])
        assert imitation.shape == teacher.shape
        assert ("attention" in fusion) == (number < len(levels))
        total += context(teacher, imitation)
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_every_level_and_fusion_learns_and_the_teacher_does_not(learnt):
    name, _, _, _, (of_params, of_teacher, of_student) = learnt
    assert reached(of_teacher) == set()
    assert reached(of_student) == {*LEVELS[name][1], "pooled"}
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(of_params))


def test_a_step_down_the_gradient_lowers_the_loss(learnt):
    name, params, gradient, loss, (of_params, _, _) = learnt
    assert gradient(step_down(params, of_params, loss), *pair(name), WARM)[0] < loss


def test_the_weight_grows_to_its_full_value_over_the_warm_up(learnt):
    name, params, gradient, loss, _ = learnt
    for epoch, share in ((0.0, 0), (5.0, 1 / 4), (19.0, 19 / 20), (200.0, 1)):
        np.testing.assert_allclose(gradient(params, *pair(name), epoch)[0], share * loss, rtol=1e-5)


def test_the_weight_scales_the_loss_and_the_warm_up_can_be_left_out():
    outs = cnn(0), cnn(1)
    method = ReviewKD(weight=0.6, warmup_epochs=0)
    params, state = init(method, *outs)
    rest = state, *outs, {}, jax.random.key(0), jnp.zeros(())
    loss, state, metrics, _ = jax.jit(lambda: method.loss(params, *rest))()
    np.testing.assert_allclose(loss, 0.6 * metrics["review"], rtol=1e-6)
    assert loss > 0
    assert state == {}


@pytest.mark.parametrize("side", [1, 2, 4, 7])
def test_context_loss(side):
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 3, side, side, 5)).astype(np.float32)
    expected = context(np.float64(teacher), np.float64(student))
    np.testing.assert_allclose(context_loss(teacher, student), expected, rtol=1e-5)
    assert context_loss(teacher, teacher) == 0
    # A constant error is unchanged by averaging.
    np.testing.assert_allclose(context_loss(teacher, teacher + 3), 9, rtol=1e-5)


def test_a_negative_warm_up_is_refused():
    with pytest.raises(UserError, match="warmup_epochs=-1 must be at least 0"):
        ReviewKD(warmup_epochs=-1).check(vit(0), cnn(1))


def test_on_imagenet_the_student_is_taken_before_its_activation():
    method = ReviewKD(**ReviewKD.imagenet)
    _, _, _, (_, _, of_student) = learn(method, "CNN to CNN", 1.0)
    assert reached(of_student) == {*(f"{name}_pre" for name in LEVELS["CNN to CNN"][1]), "pooled"}
    assert ReviewKD().before_activation is False


def test_the_width_of_the_fused_maps_is_an_option():
    for options, width in (({}, 6), ({"fused_width": 9}, 9)):
        params, _ = init(ReviewKD(**options), *pair("CNN to CNN"))
        kernel = params["params"]["fusion1"]["reduce"]["conv"]["kernel"]
        assert kernel.shape[-1] == width
    with pytest.raises(UserError, match="fused_width=-1 must be at least 0"):
        ReviewKD(fused_width=-1).check(vit(0), cnn(1))
