"""Factor transfer, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.experiments import tiny_experiment
from tests.methods.outputs import cnn, gradient_fn, init, reached, teacher_cnn, vit
from xkd_jax.errors import UserError
from xkd_jax.methods import create_method
from xkd_jax.methods.ft import FT, Paraphraser, factor_distance
from xkd_jax.optim import create_optimizer, select

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIDES = (8, 8, 4, 2)  # "energy" needs more than one position
PAIRS = {
    "CNN to CNN": lambda: (teacher_cnn(0), cnn(1, sides=SIDES)),
    "ViT to CNN": lambda: (vit(0), cnn(1, sides=SIDES)),
    "CNN to ViT": lambda: (cnn(0, sides=SIDES), vit(1)),
}


def factors(seed, side=4, width=3, n=3):
    return np.random.default_rng(seed).normal(size=(n, side, side, width)).astype(np.float32)


def normalized(maps, variant):
    """A list of unit vectors, one per image."""
    vectors = []
    for image in np.float64(maps):
        if variant == "energy":
            image = np.array([[np.mean(place**2) for place in row] for row in image])
        vectors.append(image.ravel() / np.sqrt(np.sum(image**2)))
    return vectors


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("variant", ["energy", "factor"])
def test_the_distance_is_between_unit_vectors(variant, p):
    student, teacher = factors(0), factors(1)
    total = 0.0
    for a, b in zip(normalized(student, variant), normalized(teacher, variant), strict=True):
        total += sum(abs(x - y) ** p for x, y in zip(a, b, strict=True)) / len(a)
    distance = factor_distance(student, teacher, variant, p)
    np.testing.assert_allclose(distance, total / len(student), rtol=1e-5)


def test_the_finer_grid_is_averaged_and_the_scale_does_not_matter():
    coarse, fine = factors(0, side=2), factors(1, side=4)
    pooled = fine.reshape(3, 2, 2, 2, 2, 3).mean((2, 4))
    expected = factor_distance(coarse, pooled, "factor", 1)
    for a, b in ((coarse, fine), (5 * coarse, 0.1 * fine)):
        np.testing.assert_allclose(factor_distance(a, b, "factor", 1), expected, rtol=1e-5)
        np.testing.assert_allclose(factor_distance(b, a, "factor", 1), expected, rtol=1e-5)
    np.testing.assert_allclose(factor_distance(3 * fine, fine, "energy", 1), 0, atol=1e-7)


def conv_leaky(x, params):
    """A 3x3 convolution padded with zeros, its bias and a leaky ReLU."""
    kernel, x = np.float64(params["kernel"]), np.float64(x)
    n, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((n, h, w, kernel.shape[-1]))
    for i in range(3):
        for j in range(3):
            y += padded[:, i : i + h, j : j + w] @ kernel[i, j]
    y += np.float64(params["bias"])
    return np.where(y > 0, y, 0.1 * y)


def test_the_paraphraser_is_an_auto_encoder_of_three_and_three_convolutions():
    x, module = factors(0, width=4), Paraphraser(2)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)  # biases too
    found, reconstruction = jax.jit(module.apply)(variables, x)
    stages = [variables["params"][part] for part in ("encoder", "decoder")]
    assert [len(stage) for stage in stages] == [3, 3]
    expected = []
    for stage in stages:
        for i in range(3):
            x = conv_leaky(x, stage[f"Conv_{i}"])
        expected.append(x)
    assert found.shape == (3, 4, 4, 2)
    np.testing.assert_allclose(found, expected[0], atol=1e-4)
    np.testing.assert_allclose(reconstruction, expected[1], atol=1e-4)


@pytest.fixture(scope="module", params=PAIRS)
def trained(request):
    """The method, its parameters and its gradients on a pair of networks."""
    method, outs = FT(), PAIRS[request.param]()
    method.check(*outs)
    params = jax.device_get(init(method, *outs)[0])
    return params, outs, gradient_fn(method, *outs)


def test_first_the_paraphraser_learns_and_then_the_student(trained):
    params, outs, gradient = trained
    student_level = {k for k in outs[1] if k in ("stage4", "block03")}
    parts = "translator", "paraphraser"
    for progress, (learns, waits) in ((0.0, parts), (-1.0, parts[::-1])):
        loss, (grads, teacher, student) = jax.device_get(gradient(params, *outs, progress))
        assert reached(teacher) == set()
        assert reached(student) == (student_level if progress == 0 else set())
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(grads[learns]))
        assert not any(np.any(leaf != 0) for leaf in jax.tree.leaves(grads[waits]))
        rate = 1e-3 * loss / sum(np.sum(g**2) for g in jax.tree.leaves(grads))
        stepped = jax.tree.map(lambda a, g, rate=rate: a - rate * g, params, grads)
        assert gradient(stepped, *outs, progress)[0] < loss


def test_each_phase_freezes_the_other_phases_parts():
    first, then = (FT().moves(np.float32(progress)) for progress in (-0.1, 0))
    assert first == {"student": False, "method": {"paraphraser": True, "translator": False}}
    assert then == {"student": True, "method": {"paraphraser": False, "translator": True}}
    assert FT(first_epochs=7).first_phase == 7


@pytest.mark.slow
def test_the_translator_outlasts_the_published_first_phase():
    """30 epochs of 781 steps: weight decay alone would shrink its norm by a factor of 350."""
    method, outs = FT(), PAIRS["CNN to CNN"]()
    params = init(method, *outs)[0]
    options = {"name": "sgd", "learning_rate": 0.05, "weight_decay": 5e-4}
    optimizer = create_optimizer(options, lambda step: 0.05)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(i, state):
        old, old_trace = state
        moves = method.moves(i / 781 - method.first_phase)["method"]
        updates, trace = optimizer.update(zeros, old_trace, old, step=i)
        new = optax.apply_updates(old, updates)
        return select(moves, new, old, old), select(moves, trace, old_trace, old)

    run = jax.jit(lambda n, state: jax.lax.fori_loop(0, n, step, state))
    start = params, optimizer.init(params)
    after, trace = jax.device_get(run(30 * 781, start))
    jax.tree.map(np.testing.assert_array_equal, after["translator"], params["translator"])
    momentum = optax.tree.get(trace, "trace")["translator"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(momentum))
    # The simulation does decay what is trained: the paraphraser, whose gradient is 0 only here.
    norm = {name: optax.tree.norm(tree["paraphraser"]) for name, tree in
            (("before", params), ("after", after))}  # fmt: skip
    assert norm["after"] < 0.01 * norm["before"]
    last = jax.device_get(run(31 * 781, start))[0]
    assert optax.tree.norm(last["translator"]) < optax.tree.norm(params["translator"])


def test_the_paraphraser_has_a_learning_rate_of_its_own():
    """In the optimizer that the training step uses; momentum doesn't see the factor."""
    distiller = tiny_experiment("ft").distiller
    assert distiller.method.rates == {"paraphraser": 0.2, "translator": 1.0}
    optimizer = distiller.optimizers["method"]
    params = {"paraphraser": {"a": jnp.ones(2)}, "translator": jnp.ones(3)}
    updates, state = optimizer.update(params, optimizer.init(params), params, step=0)
    np.testing.assert_allclose(updates["translator"], -0.05 * 1.0001, rtol=1e-5)
    np.testing.assert_allclose(updates["paraphraser"]["a"], -0.01 * 1.0001, rtol=1e-5)
    momentum = jax.tree.leaves(optax.tree.get(state, "trace"))
    np.testing.assert_allclose(np.concatenate(momentum), 1.0001, rtol=1e-6)
    both = create_method("logits+ft", {})
    assert both.rates == {"logits": 1.0, "ft": FT().rates}


def test_the_terms_are_weighted_and_reported():
    outs = PAIRS["CNN to CNN"]()
    method = FT(weight=3.0, k=0.75, variant="factor")
    params, _ = init(method, *outs)
    assert params["translator"]["params"]["ConvNorm_2"]["conv"]["kernel"].shape[-1] == 6  # of 8
    run = jax.jit(lambda progress: method.loss(params, {}, *outs, {}, jax.random.key(0), progress))
    loss, _, metrics, _ = run(1.0)
    np.testing.assert_allclose(loss, 3 * metrics["ft_factors"], rtol=1e-6)
    loss, _, metrics, _ = run(-1.0)
    np.testing.assert_allclose(loss, metrics["ft_reconstruction"], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "factors"}, "variant of ft 'factors'; did you mean factor"),
        ({"p": 3}, "p=3 must be 1 or 2"),
        ({"paraphraser_rate": 0.0}, r"paraphraser_rate=0\.0 must be above 0"),
        ({"k": 0.0}, r"k=0\.0 must be above 0"),
        ({"first_epochs": 0}, "first_epochs=0 must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        FT(**options).check(*PAIRS["CNN to CNN"]())


def test_energy_needs_more_than_one_position():
    outs = vit(0), cnn(1)  # the CNN's last map is 1x1
    with pytest.raises(UserError, match="variant to 'factor'"):
        FT().check(*outs)
    FT(variant="factor").check(*outs)
