"""Where the gradients of both CAKD methods go, through real networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.cakd_reference import key, method_params, normal, random_params
from xkd_jax.methods.cakd import CAKD
from xkd_jax.methods.cakd_release import CAKDRelease
from xkd_jax.models import create_model

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=[CAKD(), CAKDRelease(student_stage="auto")], ids=type)
def gradients(request):
    """Values and gradients of the whole loss, of the generator term alone, of the adversary's."""
    method, images = request.param, normal(2, 32, 32, 3)
    networks = {
        "teacher": create_model(
            "vit_tiny_patch4_32", num_classes=5, patch_size=8, embed_dim=16, depth=2, num_heads=2
        ),
        "student": create_model(
            "resnet18", num_classes=5, layers=(1, 1, 1, 1), width=0.125, stem="cifar"
        ),
    }
    variables = {name: random_params(module, images) for name, module in networks.items()}
    stats = variables["student"].pop("batch_stats")

    def forward(variables):
        student = variables["student"] | {"batch_stats": stats}
        return (
            networks["teacher"].apply(variables["teacher"], images)[1],
            networks["student"].apply(student, images)[1],
        )

    shapes = jax.eval_shape(forward, variables)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    variables["method"], variables["adversary"] = method_params(method, *zeros)

    def method_loss(variables, weights):
        weighted, rest = dataclasses.replace(method, **weights), ({}, key(0), jnp.float32(100))
        params, adversary = variables["method"], variables["adversary"]
        return weighted.loss(params, {}, *forward(variables), *rest, adversary)

    def loss(variables, weights):
        return method_loss(variables, weights).value

    def adversary_loss(variables):
        judged = method_loss(variables, {}).judged
        return method.adversary_loss(variables["adversary"], judged)[0]

    names = [f.name for f in dataclasses.fields(method) if f.name.endswith("_weight")]
    alone = dict.fromkeys(names, 0.0) | {"adversarial_weight": 1.0}
    grad = jax.jit(jax.value_and_grad(loss))
    return {
        "method": method,
        "all": grad(variables, dict.fromkeys(names, 1.0)),
        "generator": grad(variables, alone),
        "adversary": jax.jit(jax.value_and_grad(adversary_loss))(variables),
    }


def reached(tree):
    """The paths of the leaves that have any gradient."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    assert all(np.isfinite(leaf).all() for _, leaf in leaves)
    return {jax.tree_util.keystr(path) for path, leaf in leaves if leaf.any()}


def paths(tree):
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_students_loss_reaches_neither_teacher_nor_adversary(gradients):
    _, grads = gradients["all"]
    assert not reached(grads["teacher"])
    assert not reached(grads["adversary"])
    assert reached(grads["method"]) == paths(grads["method"])
    blind = set()
    if type(gradients["method"]) is CAKD:  # without the label term, nothing trains the classifier
        blind = {"['params']['fc']['bias']", "['params']['fc']['kernel']"}
    assert reached(grads["student"]) == paths(grads["student"]) - blind


def test_the_adversarys_loss_reaches_the_adversary_alone(gradients):
    _, grads = gradients["adversary"]
    assert reached(grads["adversary"]) == paths(grads["adversary"])
    for part in ("teacher", "student", "method"):
        assert not reached(grads[part])


def test_the_generator_term_reaches_the_student_unless_detached(gradients):
    value, grads = gradients["generator"]
    assert value != 0
    if type(gradients["method"]) is CAKD:
        assert "['params']['conv1']['kernel']" in reached(grads["student"])
        assert reached(grads["method"]) == {
            "['gl']['params']['bias']",
            "['gl']['params']['kernel']",
        }
    else:
        assert not reached(grads)
