"""Optimizers, compared with NumPy versions of their references."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.experiments import changed, leaves, run, tiny_config
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.models import create_model
from xkd_jax.optim import (
    OPTIMIZERS,
    OptimizerOptions,
    accumulate,
    create_optimizer,
    layer_ids,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def create(name, learning_rate, layer_decay=1.0, **options):
    fn = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    return create_optimizer({"name": name, **options}, fn, layer_decay)


def descend(optimizer, params, gradients):
    """The parameters after every step."""
    params, steps = jax.tree.map(jnp.asarray, params), []
    state = optimizer.init(params)
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update(gradient, state, params, step=step)
        params = optax.apply_updates(params, updates)
        steps.append(jax.device_get(params))
    return steps


def draws(n=5):
    rng = np.random.default_rng(0)
    return rng.normal(size=4), rng.normal(size=(n, 4))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"learning_rate": -0.1}, "optimizer.learning_rate is -0.1, but must be at least 0."),
        ({"momentum": 1.0}, "optimizer.momentum is 1.0, but must be in [0, 1)."),
        ({"betas": (0.9, 1.5)}, "optimizer.betas is 1.5, but must be in [0, 1)."),
        ({"betas": (0.9,)}, "optimizer.betas are (0.9,), but must be two numbers."),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(options, says):
    with pytest.raises(UserError) as error:
        OptimizerOptions(**options)
    assert str(error.value) == says


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_pytorchs(momentum, nesterov):
    """torch.optim.SGD: L2 decay, then momentum, then the learning rate."""
    start, gradients = draws()
    schedule = [0.5, 0.5, 0.1, 0.1, 0.02]
    optimizer = create(
        "sgd",
        lambda step: jnp.asarray(schedule)[step],
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=0.01,
    )
    ours = descend(optimizer, np.float32(start), np.float32(gradients))
    p, buffer = start.copy(), None
    for rate, gradient, result in zip(schedule, gradients, ours, strict=True):
        g = gradient + 0.01 * p
        buffer = g if buffer is None else momentum * buffer + g
        p = p - rate * (g + momentum * buffer if nesterov else buffer)
        np.testing.assert_allclose(result, p, rtol=1e-5, atol=1e-6)


def adam_directions(gradients, betas=(0.9, 0.999), epsilon=1e-8):
    """Adam's direction at every step, which is its update for a learning rate of 1."""
    (b1, b2), m, v = betas, 0, 0
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + epsilon)


def np_adam(start, gradients, rate, l2, decoupled, betas):
    """torch.optim.Adam with `l2`, torch.optim.AdamW with `decoupled` weight decay."""
    positions = [start.copy()]
    directions = adam_directions((g + l2 * positions[-1] for g in gradients), betas)
    for direction in directions:
        positions.append(positions[-1] * (1 - rate * decoupled) - rate * direction)
    return positions[1:]


@pytest.mark.parametrize(("name", "l2", "decoupled"), [("adam", 0.3, 0), ("adamw", 0, 0.3)])
def test_adam_adds_weight_decay_to_the_gradient_and_adamw_decouples_it(name, l2, decoupled):
    start, gradients = draws()
    for betas in ((0.9, 0.999), (0.8, 0.95)):
        optimizer = create(name, 0.1, weight_decay=0.3, betas=betas)
        ours = descend(optimizer, np.float32(start), np.float32(gradients))
        theirs = np_adam(start, gradients, 0.1, l2, decoupled, betas)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_lamb_moves_each_tensor_by_a_part_of_its_norm():
    """LAMB (arXiv:1904.00962), Algorithm 2, with phi(x) = x."""
    start, gradients = draws()
    optimizer = create("lamb", 0.1, weight_decay=0.3)
    ours = descend(optimizer, np.float32(start), np.float32(gradients))
    p = start
    for result, direction in zip(ours, adam_directions(gradients, epsilon=1e-6), strict=True):
        direction = direction + 0.3 * p
        p = p - 0.1 * np.linalg.norm(p) / np.linalg.norm(direction) * direction
        np.testing.assert_allclose(result, p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_moves_each_tensor_by_a_thousandth_of_its_norm(nesterov):
    """LARS (arXiv:1708.03888), Algorithm 1: the learning rate is part of the momentum."""
    start, gradients = draws()
    optimizer = create("lars", 8.0, weight_decay=0.3, nesterov=nesterov)
    ours = descend(optimizer, np.float32(start), np.float32(gradients))
    p, buffer = start, 0
    for result, g in zip(ours, gradients, strict=True):
        g = g + 0.3 * p
        step = 8.0 * 0.001 * np.linalg.norm(p) / np.linalg.norm(g) * g
        buffer = 0.9 * buffer + step
        p = p - (step + 0.9 * buffer if nesterov else buffer)
        np.testing.assert_allclose(result, p, rtol=1e-4, atol=1e-5)


def test_rmsprop_is_tensorflows():
    """As for the MobileNets: decay 0.9, epsilon 0.001 inside the root, averages that start at 1."""
    start, gradients = draws()
    optimizer = create("rmsprop", 0.1, weight_decay=0.3)
    ours = descend(optimizer, np.float32(start), np.float32(gradients))
    p, square, buffer = start, 1, 0
    for result, g in zip(ours, gradients, strict=True):
        g = g + 0.3 * p
        square = 0.9 * square + 0.1 * g**2
        buffer = 0.9 * buffer + 0.1 * g / np.sqrt(square + 1e-3)
        p = p - buffer
        np.testing.assert_allclose(result, p, rtol=1e-4, atol=1e-5)


def test_clipping_is_by_the_norm_of_all_gradients_together():
    params = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    plain = {"momentum": 0.0, "weight_decay": 0.0}
    optimizer = create("sgd", 1.0, clip_norm=1.0, **plain)
    large = {"a": np.float32([3]), "b": np.float32([-4])}  # norm 5
    (after,) = descend(optimizer, params, [large])
    np.testing.assert_allclose([after["a"][0], after["b"][0]], [-0.6, 0.8], rtol=1e-6)
    small = {"a": np.float32([0.3]), "b": np.float32([-0.4])}
    (after,) = descend(optimizer, params, [small])
    np.testing.assert_allclose([after["a"][0], after["b"][0]], [-0.3, 0.4], rtol=1e-6)
    (after,) = descend(create("sgd", 1.0, clip_norm=0.0, **plain), params, [large])
    np.testing.assert_allclose([after["a"][0], after["b"][0]], [-3, 4], rtol=1e-6)


def test_clipping_comes_before_weight_decay():
    """As PyTorch's clip_grad_norm_ before the optimizer's step."""
    optimizer = create("sgd", 1.0, momentum=0.0, weight_decay=0.1, clip_norm=1.0)
    (after,) = descend(optimizer, np.float32([10]), [np.float32([5])])
    np.testing.assert_allclose(after, [10 - 1 - 1], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill_and_decays(name):
    start = np.float32([2, -3])
    gradients = [np.float32([1, -1])] * 3
    after = descend(create(name, 0.1, weight_decay=0.0), start, gradients)[-1]
    assert (np.abs(after) < np.abs(start)).all()
    decayed = descend(create(name, 0.1, weight_decay=0.5), start, gradients)[-1]
    assert not np.allclose(decayed, after)


# ---- by parameter name: weight decay and layer decay


def tiny_vit():
    model = create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=3, img_size=16, patch_size=8, embed_dim=4, depth=2, num_heads=2,
    )  # fmt: skip
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]


def drawn_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: np.float32(rng.normal(size=s.shape) + 2), shapes)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipping_1d_leaves_norms_biases_tokens_and_position_embeddings_alone(name):
    names = ("bias", "cls_token", "pos_embed", "relative_position_bias_table")
    params = {
        "block": {"kernel": np.full((2, 2), 2.0), "bias": np.full(2, 2.0)},
        "scale": np.full(2, 2.0),
    }
    params |= {key: np.full((1, 2), 2.0) for key in names}
    params["attn"] = {"logit_scale": np.full((2, 1, 1), 2.0)}  # Swin V2's
    params["attn"]["cpb_mlp_2"] = {"kernel": np.full((2, 2), 2.0)}
    params = jax.tree.map(np.float32, params)
    gradients = [jax.tree.map(lambda p: np.full(p.shape, -0.3, np.float32), params)]
    skip = {"weight_decay_skip_1d": True}
    plain, skipped, everything = (
        descend(create(name, 0.1, **options), params, gradients)[-1]
        for options in ({"weight_decay": 0, **skip}, {"weight_decay": 0.5, **skip},
                        {"weight_decay": 0.5})
    )  # fmt: skip
    assert not np.allclose(plain["block"].pop("kernel"), skipped["block"].pop("kernel"))
    jax.tree.map(np.testing.assert_array_equal, plain, skipped)
    everything["block"].pop("kernel")
    assert not any(map(np.allclose, jax.tree.leaves(plain), jax.tree.leaves(everything)))


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_layer_adaptation_skips_what_decay_skips(name):
    params = {"kernel": np.full((2, 2), 3, np.float32), "bias": np.full(2, 3, np.float32)}
    gradients = jax.tree.map(np.ones_like, params)
    (after,) = descend(create(name, 0.1, weight_decay_skip_1d=True), params, [gradients])
    np.testing.assert_allclose(after["bias"], 2.9, rtol=1e-5)
    assert not np.allclose(after["kernel"], 2.9, rtol=1e-3)


def ids(*names):
    tree = {}
    for name in names:
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = np.zeros(1)
    found = {
        "/".join(key.key for key in keys): layer
        for keys, layer in jax.tree.leaves_with_path(layer_ids(tree))
    }
    return [found[name] for name in names]


def test_layers_are_numbered_as_beit_and_timm_number_them():
    vit = jax.tree.leaves_with_path(layer_ids(tiny_vit()))
    stem = {"patch_embed": 0, "pos_embed": 0, "cls_token": 0, "dist_token": 0}
    rest = {"blocks_0": 1, "blocks_1": 2, "norm": 2, "head": 3, "head_dist": 3}
    assert {keys[0].key: layer for keys, layer in vit} == stem | rest
    # Sorted by number, not alphabetically.
    blocks = [f"blocks_{i}/mlp/fc1/kernel" for i in range(12)]
    assert ids(*blocks, "fc_norm/scale") == [*range(1, 13), 13]
    table = "relative_position_bias_table"
    assert ids(f"rel_pos_bias/{table}", f"blocks_0/attn/{table}") == [0, 1]
    assert ids(
        "patch_embed/norm/scale", "layers_0/blocks_0/norm1/scale", "layers_0/blocks_1/norm1/scale",
        "layers_1/downsample/norm/scale", "layers_1/blocks_0/norm1/scale", "norm/scale",
        "head/fc/kernel",
    ) == [0, 1, 2, 3, 3, 3, 4]  # fmt: skip
    assert ids(
        "conv1/kernel", "bn1/scale", "layer1_0/conv1/kernel", "layer1_1/bn1/bias",
        "layer2_0/downsample_0/kernel", "fc/bias",
    ) == [0, 0, 1, 2, 3, 4]  # fmt: skip
    assert ids(
        "conv_stem/kernel", "blocks_0_0/conv_dw/kernel", "blocks_1_0/bn1/scale",
        "blocks_1_1/bn2/scale", "conv_head/kernel", "bn2/scale", "classifier/kernel",
    ) == [0, 1, 2, 3, 3, 3, 4]  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layer_decay_is_a_rate_for_each_layer(name):
    """Equal to one optimizer per layer, with learning rate 0.5^(layers above)."""
    names = {"patch_embed": 0.1 / 8, "blocks_0": 0.1 / 4, "blocks_1": 0.1 / 2, "head": 0.1}
    shapes = {name: {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)} for name in names}
    params, gradients = drawn_like(shapes, 0), [drawn_like(shapes, i) for i in (1, 2, 3)]
    together = descend(create(name, 0.1, 0.5, weight_decay=0.3), params, gradients)
    for part, rate in names.items():
        alone = descend(
            create(name, rate, weight_decay=0.3), params[part], [g[part] for g in gradients]
        )
        np.testing.assert_allclose(
            [t[part]["kernel"] for t in together], [a["kernel"] for a in alone], rtol=1e-5
        )


def test_layer_decay_of_networks_without_known_layers_is_refused():
    with pytest.raises(UserError, match="layer_decay needs a ViT, DeiT, Swin, ResNet"):
        ids("Mixed_5b/conv/kernel", "fc/kernel")
    with pytest.raises(UserError, match=r"layer_decay is 1.5, but must be in \(0, 1\]"):
        create("sgd", 0.1, 1.5)


# ---- gradient accumulation


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(steps):
    rng = np.random.default_rng(0)
    params = {"w": np.float32(rng.normal(size=(3, 2)))}
    batch = {"x": np.float32(rng.normal(size=(8, 3))), "y": np.float32(rng.normal(size=(8, 2)))}

    def loss(params, batch):
        return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2)

    def part(seen, batch, number):
        value, gradients = jax.value_and_grad(loss)(params, batch)
        seen = {"examples": seen["examples"] + len(batch["x"]), "numbers": seen["numbers"] + number}
        return seen, (gradients, {"loss": value})

    start = {"examples": jnp.zeros((), jnp.int32), "numbers": jnp.zeros((), jnp.int32)}
    seen, (gradients, metrics) = jax.jit(lambda b: accumulate(part, start, b, steps))(batch)
    value, whole = jax.value_and_grad(loss)(params, batch)
    np.testing.assert_allclose(gradients["w"], whole["w"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    assert (seen["examples"], seen["numbers"]) == (8, sum(range(steps)))


def test_each_example_is_in_one_part():
    def part(seen, batch, number):
        return seen.at[number].set(batch), ()

    seen, _ = accumulate(part, jnp.zeros((3, 4), jnp.int32), jnp.arange(12), 3)
    assert sorted(np.ravel(seen)) == list(range(12))


@pytest.mark.slow
def test_a_methods_parameters_can_have_an_optimizer_of_their_own():
    config = tiny_config("fitnet")
    config.schedule.boundaries = (1,)  # after four steps
    as_students = run(create_experiment(config), 1).states
    config.method_optimizer.update(name="adam", learning_rate=0.01)
    states = run(create_experiment(config), 5).states
    assert not changed(as_students[1].params["student"], states[1].params["student"])
    for step, rate in ((0, 0.01), (4, 0.001)):  # Adam's steps are about as long as its rate
        before, after = (leaves(state.params["method"]) for state in states[step : step + 2])
        moved = max(np.abs(after[path] - before[path]).max() for path in before)
        assert 0.7 * rate < moved < 1.5 * rate
