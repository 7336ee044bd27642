"""Frozen blocks: no gradient, no weight decay, and no backward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.experiments import changed, run, tiny_experiment
from xkd_jax import models
from xkd_jax.analysis.flops import count_flops
from xkd_jax.config import default_config
from xkd_jax.errors import UserError
from xkd_jax.model import create_model, freeze
from xkd_jax.optim import layer_ids
from xkd_jax.validation import validate

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCANNED = pytest.param(14, marks=pytest.mark.slow)  # so many blocks are scanned
ARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2}


def vit(depth, frozen=0):
    args = ARGS | {"depth": depth, "frozen": frozen}
    return models.create_model("vit_tiny_patch16_224", num_classes=3, **args)


def gradients(module, tap="logits"):
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    params = jax.jit(module.init)(jax.random.key(0), images)["params"]

    def loss(params):
        logits, out = module.apply({"params": params}, images, train=True)
        return jnp.sum(logits**2) + jnp.sum(out[tap] ** 2)

    return jax.jit(jax.grad(loss)), params


@pytest.mark.parametrize("depth", [3, SCANNED])
def test_only_the_frozen_layers_have_no_gradient(depth):
    frozen = 2
    grad_fn, params = gradients(vit(depth, frozen))
    ours, theirs = grad_fn(params), gradients(vit(depth))[0](params)
    for layer, our, their in zip(
        *map(jax.tree.leaves, (layer_ids(params), ours, theirs)), strict=True
    ):
        if layer <= frozen:
            assert not our.any()
        else:
            np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [3, SCANNED])
def test_a_loss_on_a_frozen_block_has_no_gradient(depth):
    grad_fn, params = gradients(vit(depth, 2), "block02_query")
    grads = grad_fn(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["blocks_0"]))
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["blocks_1"]))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [4, SCANNED])
def test_the_backward_pass_of_frozen_blocks_is_not_computed(depth):
    def flops(frozen):
        grad_fn, params = gradients(vit(depth, frozen))
        return count_flops(grad_fn, params)

    # Forward costs 1 and backward 2: with all blocks but one frozen, about a third is left.
    assert flops(depth - 1) < (1 + 3 / depth) / 3 * flops(0)


@pytest.mark.slow
def test_frozen_layers_are_left_out_of_the_optimizer():
    experiment = tiny_experiment("none")
    student = create_model("vit_tiny_patch16_224", num_classes=10, depth=3, **ARGS)
    distiller = dataclasses.replace(experiment.distiller, student=freeze(student, 2))
    done = run(dataclasses.replace(experiment, distiller=distiller), 2)
    first, last = done.states[0], done.states[-1]
    moved = changed(first.params["student"], last.params["student"])
    frozen = {path for path in moved if "blocks_2" not in path and "head" not in path}
    assert frozen == {"['norm']['scale']", "['norm']['bias']"}
    assert any("blocks_2" in path for path in moved)


def test_wrong_numbers_of_blocks_are_refused():
    student = create_model("vit_tiny_patch16_224", num_classes=10, depth=3, **ARGS)
    with pytest.raises(UserError, match="freeze=4 is more than the 3 blocks"):
        freeze(student, 4)
    with pytest.raises(UserError, match=r"freeze=1 needs a ViT, .* but resnet18 isn't"):
        freeze(create_model("resnet18", num_classes=10), 1)


def test_a_random_student_is_not_frozen():
    config = default_config()
    config.freeze = 3
    with pytest.raises(UserError, match=r"freeze=3 .* set student.weights"):
        validate(config)
