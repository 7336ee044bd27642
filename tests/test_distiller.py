"""The training step, with tiny networks on 64 small images."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.experiments import change, changed, leaves, run, tiny_experiment
from xkd_jax.augment.policies import Augment
from xkd_jax.data.order import batch_indices
from xkd_jax.methods.base import Method, MethodLoss
from xkd_jax.methods.label import label_loss, label_term
from xkd_jax.model import Model
from xkd_jax.state import TrainState, student_variables
from xkd_jax.tasks.classification import create_views

METHOD_TERMS = ("attention", "value_relation", "tokens", "generator")

pytestmark = pytest.mark.usefixtures("quick_compilation")


def start(method):
    return run(tiny_experiment(method), 30)


@pytest.fixture(scope="module")
def none():
    return start("none")


@pytest.fixture(scope="module")
def cakd():
    return start("cakd")


# ---- cakd


def test_the_adversary_moves_at_every_fifth_step_only(cakd):
    moved = []
    for step, (before, after) in enumerate(itertools.pairwise(cakd.states)):
        parameters = changed(before.params["adversary"], after.params["adversary"])
        optimizer = changed(before.opt_state["adversary"], after.opt_state["adversary"])
        assert bool(parameters) == bool(optimizer)
        if parameters:
            moved.append(step)
            assert parameters == leaves(before.params["adversary"]).keys()
            assert optimizer == leaves(before.opt_state["adversary"]).keys()
    assert moved == [0, 5, 10, 15, 20, 25]


def test_discriminator_metrics_are_nan_between_updates(cakd):
    for step, metrics in enumerate(cakd.metrics):
        for name in ("discriminator", "discriminator_accuracy"):
            assert np.isnan(metrics[name]) == (step % 5 != 0)
    others = cakd.metrics[0].keys() - {"discriminator", "discriminator_accuracy"}
    assert {f"{name}_weighted" for name in METHOD_TERMS} < others
    assert all(np.isfinite(metrics[name]).all() for metrics in cakd.metrics for name in others)


def test_every_step_moves_student_and_projectors(cakd):
    # From the second step on: at first, residual branches end in zeros, which block gradients.
    for before, after in itertools.pairwise(cakd.states[1:]):
        for old, new in (
            (before.params["student"], after.params["student"]),
            (before.params["method"], after.params["method"]),
            (before.batch_stats, after.batch_stats),
        ):
            assert changed(old, new) == leaves(old).keys()
        assert after.step == before.step + 1
        assert not changed(before.key, after.key)


def test_the_teacher_is_not_in_the_state(cakd):
    assert {field.name for field in dataclasses.fields(TrainState)} == {
        "step", "key", "params", "opt_state", "batch_stats", "method_state", "ema",
    }  # fmt: skip
    assert set(cakd.states[0].params) == {"student", "method", "adversary"}
    teacher = {
        leaf.tobytes()
        for leaf in jax.tree.leaves(cakd.experiment.distiller.teacher.variables)
        if leaf.any()
    }
    state = {leaf.tobytes() for leaf in leaves(cakd.states[0]).values()}
    shapes = {leaf.shape for leaf in leaves(cakd.states[-1]).values()}
    assert (1, 49, 16) not in shapes  # the shape of the position embedding
    assert (16, 48) not in shapes  # the shape of the query, key and value kernel
    ones = np.ones(16, np.float32).tobytes()  # the initial scale of any normalisation
    assert not (teacher - {ones}) & state


def test_the_loss_is_the_sum_of_its_weighted_terms(cakd):
    for metrics in cakd.metrics:
        total = 0.5 * metrics["label_loss"]
        total += sum(metrics[f"{name}_weighted"] for name in METHOD_TERMS)
        np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


def test_teacher_accuracy_is_reported_only_with_a_teacher(none, cakd):
    assert 0 <= cakd.metrics[0]["teacher_accuracy"] <= 1
    assert none.experiment.distiller.teacher is None
    assert none.metrics[0].keys() == {
        "loss", "label_loss", "accuracy", "gradient_norm", "learning_rate", "finite",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["none", "cakd"])
def test_the_loss_falls(request, method):
    metrics = request.getfixturevalue(method).metrics
    for name in ("loss", "label_loss"):
        values = [m[name] for m in metrics]
        assert np.mean(values[-5:]) < 0.96 * np.mean(values[:5])


def test_the_same_seed_gives_the_same_bits(cakd):
    experiment = tiny_experiment("cakd")
    assert not changed(
        experiment.distiller.teacher.variables, cakd.experiment.distiller.teacher.variables
    )
    again = run(experiment, 11, step_fn=cakd.step_fn)
    assert not changed(again.states[0], cakd.states[0])
    assert not changed(again.states[11], cakd.states[11])


def test_another_seed_gives_another_run(none):
    experiment = tiny_experiment("none", seed=1)
    other = run(experiment, 1, step_fn=none.step_fn)
    kernels = {path for path in leaves(none.states[0].params["student"]) if "kernel" in path}
    assert changed(other.states[0].params["student"], none.states[0].params["student"]) == kernels
    assert changed(other.states[0].key, none.states[0].key)
    assert other.metrics[0]["loss"] != none.metrics[0]["loss"]


def test_the_steps_draws_follow_the_states_key(cakd):
    state = cakd.states[0]
    key = jax.device_put(jax.random.key(123), state.key.sharding)  # so as not to compile again
    redrawn = run(
        cakd.experiment, 1, step_fn=cakd.step_fn, state=dataclasses.replace(state, key=key)
    ).metrics[0]
    for name in ("label_loss", "attention", "tokens"):
        assert redrawn[name] != cakd.metrics[0][name]


def test_student_variables_are_the_plain_network(none, cakd):
    for trained in (none, cakd):
        variables = student_variables(trained.states[-1])
        shapes = jax.eval_shape(trained.experiment.distiller.student.init, jax.random.key(0))
        assert jax.tree.structure(variables) == jax.tree.structure(shapes)


# ---- the step's arithmetic, with a network of one layer


class Linear(nn.Module):
    """A linear layer on the mean colour."""

    @nn.compact
    def __call__(self, images, train=False):
        logits = nn.Dense(10)(images.mean((1, 2)))
        return logits, {"logits": logits}


class TwoHeads(nn.Module):
    """A network with a second classifier in training, like Inception-v3."""

    @nn.compact
    def __call__(self, images, train=False):
        logits, _ = Linear(name="linear")(images)
        return logits, {"logits": logits, **({"aux_logits": 2 * logits} if train else {})}


class Probe(Method):
    """A method that reports its inputs."""

    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary):
        seen = {"key": jax.random.key_data(key), "progress": progress, **batch}
        seen = {name: value for name, value in seen.items() if name not in ("image", "target")}
        return MethodLoss(jnp.zeros(()), {"calls": state.get("calls", 0) + 1}, seen)

    def init(self, key, teacher_out, student_out, labels):
        return {}, {"calls": jnp.zeros((), jnp.int32)}


class Adversarial(Probe):
    """A method whose adversary is a number that every update increases."""

    adversary_period = 2

    def __init__(self, clock):
        object.__setattr__(self, "adversary_clock", clock)

    def init_adversary(self, key, teacher_out, student_out):
        return jnp.zeros(())

    def adversary_loss(self, adversary, judged):
        return -adversary, {"discriminator": -adversary}


def probe(method):
    student = Model(Linear(), 28, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    experiment = change(tiny_experiment("none"), method=method, student=student)
    return run(experiment, 9)


def test_a_second_classifier_learns_too_with_weight_0_4():
    targets = optax.smooth_labels(jax.nn.one_hot(jnp.array([3, 7]), 10), 0.1)
    logits = jax.random.normal(jax.random.key(0), (2, 10))
    term = label_term(Method(), {"logits": logits, "aux_logits": 2 * logits}, targets)
    first, second = (label_loss(x, targets) for x in (logits, 2 * logits))
    np.testing.assert_allclose(term, first + 0.4 * second, rtol=1e-6)
    # In the step: without a distillation loss, the loss is this term for the module's two heads.
    student = Model(TwoHeads(), 28, (0.5,) * 3, (0.5,) * 3)
    (metrics,) = run(change(tiny_experiment("none"), method=Probe(), student=student), 1).metrics
    one = Model(Linear(), 28, (0.5,) * 3, (0.5,) * 3)
    (alone,) = run(change(tiny_experiment("none"), method=Probe(), student=one), 1).metrics
    assert metrics["label_loss"] > 1.2 * alone["label_loss"]


@pytest.fixture(scope="module")
def probed():
    return probe(Probe(label_weight=0.5))


def test_every_step_has_a_key_of_its_own(probed):
    """For new random draws of partial replacement and dropout (test_cakd.py)."""
    keys = {metrics["key"].tobytes() for metrics in probed.metrics}
    assert len(keys) == len(probed.metrics)
    masks = {
        np.asarray(jax.random.bits(jax.random.wrap_key_data(m["key"]), (4,))).tobytes()
        for m in probed.metrics
    }
    assert len(masks) == len(probed.metrics)


def test_methods_see_the_batch_and_the_epochs_so_far(probed):
    assert probed.experiment.distiller.steps_per_epoch == 4
    for step, metrics in enumerate(probed.metrics):
        indices = batch_indices(64, 16, 0, step)
        np.testing.assert_array_equal(metrics["index"], indices)
        np.testing.assert_array_equal(metrics["label"], probed.experiment.train.labels[indices])
        assert metrics["progress"] == step / 4
    assert probed.states[9].method_state == {"calls": 9}


@pytest.mark.parametrize(
    ("clock", "turns"), [("step", [0, 2, 4, 6, 8]), ("epoch", [0, 1, 2, 3, 8])]
)
def test_the_adversary_counts_steps_or_epochs_of_four_steps(clock, turns):
    states = probe(Adversarial(clock)).states
    moved = [b.params["adversary"] != a.params["adversary"] for b, a in itertools.pairwise(states)]
    assert [step for step, move in enumerate(moved) if move] == turns


def test_training_is_sgd_on_normalised_images(probed):
    """In NumPy: cross-entropy, its gradient, weight decay, momentum and learning rate."""
    params = leaves(probed.states[0].params["student"])
    layer = np.vstack([params["['Dense_0']['kernel']"], params["['Dense_0']['bias']"]])
    layer, buffer = np.float64(layer), 0
    for step, metrics in enumerate(probed.metrics):
        indices = batch_indices(64, 16, 0, step)
        pixels = np.float64(probed.experiment.train.images[indices]) / 255
        x = ((pixels - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).mean((1, 2))
        x = np.hstack([x, np.ones((16, 1))])
        p = np.exp(x @ layer) / np.exp(x @ layer).sum(1, keepdims=True)
        labels = probed.experiment.train.labels[indices]
        targets = 0.9 * np.eye(10)[labels] + 0.01
        gradient = 0.5 * x.T @ (p - targets) / 16
        expected = {
            "label_loss": -np.mean(np.sum(targets * np.log(p), 1)),
            "loss": -0.5 * np.mean(np.sum(targets * np.log(p), 1)),
            "accuracy": np.mean(p.argmax(1) == labels),
            "gradient_norm": np.sqrt((gradient**2).sum()),
            "learning_rate": 0.05,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
        buffer = 0.9 * buffer + gradient + 1e-4 * layer
        layer = layer - 0.05 * buffer
    params = leaves(probed.states[-1].params["student"])
    np.testing.assert_allclose(params["['Dense_0']['kernel']"], layer[:-1], atol=1e-5)
    np.testing.assert_allclose(params["['Dense_0']['bias']"], layer[-1], atol=1e-5)


def view(distiller, n=8, labels=None, **augment):
    """`create_views` of the first training images, with a changed augmentation."""
    distiller = dataclasses.replace(
        distiller, augment=dataclasses.replace(distiller.augment, **augment)
    )
    labels = jnp.zeros(n, int) if labels is None else labels
    images = jnp.asarray(tiny_experiment("none").train.images[:n])
    return create_views(distiller, jax.random.key(0), images, labels)


def test_each_network_sees_the_same_crop_normalised_its_own_way(probed):
    teacher = Model(Linear(), 28, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    distiller = dataclasses.replace(probed.experiment.distiller, teacher=teacher)
    *seen, _ = view(distiller, crop_padding=3, flip=True)
    pixels = [
        np.asarray(view) * model.std + model.mean
        for view, model in zip(seen, (teacher, distiller.student), strict=True)
    ]
    np.testing.assert_allclose(*pixels, atol=1e-6)
    assert not np.allclose(pixels[0], probed.experiment.train.images[:8] / 255, atol=0.01)
    larger = dataclasses.replace(teacher, image_size=42)
    distiller = dataclasses.replace(distiller, teacher=larger)
    shapes = jax.eval_shape(lambda: view(distiller)[:2])
    assert [view.shape for view in shapes] == [(8, 42, 42, 3), (8, 28, 28, 3)]


# ---- the label term


def test_label_loss_is_cross_entropy():
    rng = np.random.default_rng(0)
    logits, targets = 3 * rng.normal(size=(6, 5)), rng.dirichlet(np.ones(5), 6)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    ours = label_loss(jnp.float32(logits), jnp.float32(targets))
    np.testing.assert_allclose(ours, -np.sum(targets * log_p) / 6, rtol=1e-5)


def test_targets_are_smoothed_labels_and_mixed(probed):
    distiller, labels = probed.experiment.distiller, jnp.arange(8)
    _, plain, targets = view(distiller, labels=labels, label_smoothing=0.2)
    np.testing.assert_allclose(targets, 0.8 * np.eye(10)[:8] + 0.02, rtol=1e-6)
    mixed = {"policy": Augment(mixup=0.4), "label_smoothing": 0.2}
    teacher_view, student_view, new = view(distiller, labels=labels, **mixed)
    np.testing.assert_array_equal(teacher_view, student_view)
    share = (new[0, 0] - new[0, 1]) / 0.8
    assert 0 < share < 1
    np.testing.assert_allclose(new, share * targets + (1 - share) * targets[::-1], atol=1e-6)
    expected = share * plain + (1 - share) * plain[::-1]
    np.testing.assert_allclose(student_view, expected, atol=1e-5)


@pytest.mark.slow
def test_strong_augmentation_changes_both_networks_views_alike(probed):
    distiller = probed.experiment.distiller
    teacher_view, strong, _ = view(distiller, policy=Augment(auto="trivialaugment"))
    _, plain, _ = view(distiller)
    np.testing.assert_array_equal(teacher_view, strong)
    assert not np.allclose(strong, plain, atol=0.01)


@pytest.mark.slow
def test_the_average_is_evaluated_and_saved_where_there_is_one():
    states = run(change(tiny_experiment("none"), ema_decay=0.75), 3).states
    # The average doesn't depend on the initialisation.
    average = states[1].params["student"]
    for state in states[2:]:
        average = jax.tree.map(
            lambda old, new: 0.75 * old + 0.25 * new, average, state.params["student"]
        )
    got = student_variables(states[3])
    for a, b in zip(jax.tree.leaves(got["params"]), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert got["batch_stats"]
    kernel = states[3].params["student"]["fc"]["kernel"]
    assert not np.allclose(kernel, got["params"]["fc"]["kernel"])


def test_a_batch_in_parts_makes_the_same_step():
    student = Model(Linear(), 28, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))  # no batch normalisation
    whole = change(tiny_experiment("none"), student=student)
    ends = [run(experiment, 3) for experiment in (whole, change(whole, accumulate=4))]
    params = (jax.tree.leaves(end.states[3].params["student"]) for end in ends)
    for a, b in zip(*params, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name in ("loss", "accuracy", "gradient_norm", "learning_rate"):
        values = [[metrics[name] for metrics in end.metrics] for end in ends]
        np.testing.assert_allclose(*values, rtol=1e-5)


def test_label_loss_is_computed_in_float32_and_finite():
    logits = jnp.asarray([[1.3, 0.7, -2.1]], jnp.bfloat16)
    for x, label in ((logits, 0), (100 * logits, 2)):
        loss = label_loss(x, jax.nn.one_hot(jnp.array([label]), 3))
        assert loss.dtype == jnp.float32
        row = np.asarray(x, np.float64)[0]
        expected = row.max() - row[label] + np.log(np.sum(np.exp(row - row.max())))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
