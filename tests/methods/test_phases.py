"""A method's first phase, and what it freezes, in the training step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typing_extensions import override

from tests.experiments import change, changed, run, tiny_experiment
from xkd_jax.methods import Sum
from xkd_jax.methods.ab import AB
from xkd_jax.methods.base import Method, MethodLoss
from xkd_jax.methods.fitnet import FitNet
from xkd_jax.schedules import create_learning_rate_fn

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class Phased(Method):
    """Trains `first` in a first phase of two steps and `then` afterwards."""

    student_waits: bool = True

    @property
    @override
    def first_phase(self):
        """Half of an epoch of four steps."""
        return 0.5

    @override
    def moves(self, progress):
        student = progress >= 0 if self.student_waits else True
        return {"student": student, "method": {"first": progress < 0, "then": progress >= 0}}

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        return {"first": {"a": jnp.ones(3)}, "then": jnp.ones(2)}, {}

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        value = jnp.sum(params["first"]["a"] ** 2) + jnp.sum(params["then"] ** 2)
        value = value + 1e-3 * jnp.mean(student_out["logits"] ** 2)
        return MethodLoss(value, state, {"progress": progress})


def steps(method, n=4):
    return run(change(tiny_experiment("none"), method=method), n)


@pytest.fixture(scope="module")
def waiting():
    return steps(Phased())


def test_progress_counts_from_the_training_proper(waiting):
    progress = [float(metrics["progress"]) for metrics in waiting.metrics]
    assert progress == [-0.5, -0.25, 0, 0.25]


def test_the_label_term_waits_for_the_first_phase_to_end(waiting):
    for metrics in waiting.metrics:
        added = metrics["loss"] - (metrics["label_loss"] if metrics["progress"] >= 0 else 0)
        assert 0 < added < 6  # the method's own


def test_a_frozen_student_is_bit_identical(waiting):
    """Weights, running statistics and momentum too."""
    before, middle, after = (waiting.states[i] for i in (0, 2, 3))
    for part in (
        lambda state: state.params["student"],
        lambda state: state.opt_state["student"],
        lambda state: state.batch_stats,
    ):
        assert not changed(part(before), part(middle))
        assert changed(part(middle), part(after))


def test_each_of_the_methods_parameters_is_trained_in_its_phase(waiting):
    moved = [
        changed(a.params["method"], b.params["method"])
        for a, b in zip(waiting.states, waiting.states[1:], strict=False)
    ]
    assert moved == [{"['first']['a']"}] * 2 + [{"['then']"}] * 2


def test_a_frozen_parameter_of_the_method_gathers_no_momentum(waiting):
    """Weight decay would fill it, and move the parameter once it is free."""
    before, middle, _, last = (waiting.states[i].opt_state["method"] for i in (0, 2, 3, 4))
    momenta = {path for path in changed(before, middle) if "trace" in path}
    assert all("first" in path for path in momenta)
    assert momenta
    assert all("then" in path for path in changed(middle, last))


@pytest.mark.slow
def test_layers_past_what_a_first_phase_learns_from_are_frozen():
    """The phase's loss reads `stage1` alone: weight decay must not shrink what lies behind it."""

    @dataclasses.dataclass(frozen=True)
    class Hint(Phased):
        @override
        def loss(self, params, state, teacher_out, student_out, *rest):
            value = jnp.mean(student_out["stage1"] ** 2)
            return MethodLoss(jnp.where(rest[2] < 0, value, 0.0), state, {})

    states = steps(Hint(student_waits=False), 3).states
    early = changed(states[0].params["student"], states[2].params["student"])
    assert early
    assert all(path.startswith(("['conv1']", "['bn1']", "['layer1")) for path in early)
    late = changed(states[2].params["student"], states[3].params["student"])
    assert any(path.startswith("['fc']") for path in late)


@pytest.mark.slow
def test_a_student_that_is_not_frozen_learns_in_the_first_phase():
    states = steps(Phased(student_waits=False), 1).states
    assert changed(states[0].params["student"], states[1].params["student"])
    assert changed(states[0].batch_stats, states[1].batch_stats)


def test_the_rate_is_the_highest_before_the_schedule_begins():
    schedule = {"name": "cosine", "warmup_epochs": 1.0}
    plain = create_learning_rate_fn(schedule, 0.1, 3, 4)
    late = create_learning_rate_fn(schedule, 0.1, 3, 4, first_steps=2)
    np.testing.assert_allclose([late(0), late(1)], [0.1, 0.1])
    np.testing.assert_allclose([late(i + 2) for i in range(12)], [plain(i) for i in range(12)])


@dataclasses.dataclass(frozen=True)
class Plain(Method):
    """Adds 1."""

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        return MethodLoss(jnp.ones(()), state, {})


@pytest.mark.parametrize(("progress", "added"), [(-0.1, 0.0), (0.0, 1.0)])
def test_in_a_sum_methods_without_a_first_phase_wait(progress, added):
    method = Sum(parts=(("phased", Phased()), ("plain", Plain())))
    params, state = method.init(jax.random.key(0), {}, {})
    out = {"logits": jnp.zeros((2, 3))}
    value, *_ = method.loss(params, state, {}, out, {}, jax.random.key(0), jnp.asarray(progress))
    assert float(value) == 5 + added
    assert method.first_phase == 0.5


def test_in_a_sum_the_student_is_trained_if_one_method_trains_it():
    early = jnp.asarray(-0.1)
    waits, learns = Phased(), Phased(student_waits=False)
    for parts, frozen in (((waits, waits), True), ((waits, learns), False)):
        method = Sum(parts=tuple(zip("ab", parts, strict=True)))
        moves = method.moves(early)
        assert bool(moves["student"]) == (not frozen)
        assert not bool(moves["method"]["a"]["then"])


@pytest.mark.slow
def test_the_label_term_reads_the_logits_that_the_method_names():
    @dataclasses.dataclass(frozen=True)
    class Second(Method):
        @override
        def label_logits(self, student_out):
            return 3 * student_out["logits"]

    plain, second = steps(Method(), 1).metrics[0], steps(Second(), 1).metrics[0]
    assert plain["label_loss"] != second["label_loss"]
    logits = jnp.asarray([[1.0, -1.0]])
    combined = Sum(parts=(("plain", Method()), ("second", Second())))
    out = {"logits": logits}
    np.testing.assert_array_equal(combined.label_logits(out), 3 * logits)
    loss = optax.softmax_cross_entropy_with_integer_labels
    assert loss(combined.label_logits(out), jnp.array([0]))[0] < loss(logits, jnp.array([0]))[0]


@pytest.mark.parametrize("method", [AB(), FitNet(hint_epochs=3)])
def test_what_only_the_first_phase_trains_is_frozen_afterwards(method):
    assert [bool(method.moves(np.float32(progress))["method"]) for progress in (-0.1, 0)] == [1, 0]
    assert method.moves(np.float32(0))["student"] is True
    assert FitNet().moves(np.float32(0)) == {"student": True, "method": True}
