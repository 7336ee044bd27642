"""Every method in the training step, on every pair of networks that it supports."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from tests.experiments import changed, run
from tests.methods.pairs import PAIRS, pair_experiment
from xkd_jax import train
from xkd_jax.errors import UserError
from xkd_jax.methods import METHODS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
DISTILLING = [name for name, method in METHODS.items() if method.needs_teacher]
REFUSED = {
    "deit": {"ViT to ResNet", "Swin to MobileNetV2", "ResNet to ResNet"},
    "minilm": {"ViT to ResNet", "Swin to MobileNetV2", "ResNet to ResNet"},
    "cakd": {"ResNet to ResNet"},
    "cakd_release": {"ResNet to ResNet", "ViT to ViT"},
}

# Sums of terms of the two networks' outputs, as `logits` is.
TERMS_ONLY = {"at", "deit", "dist", "dkd", "irg", "rkd"}


def step_through(experiment, count=2, first=None):
    """Trains from step `first`, by default the last of the method's first phase, or step 0."""
    if first is None:
        distiller = experiment.distiller
        first = max(round(distiller.method.first_phase * distiller.steps_per_epoch) - 1, 0)
    state = train.init_state(experiment)
    state = dataclasses.replace(state, step=state.step + first)
    trained = run(experiment, count, state=state)
    return trained.states, trained.metrics


def cases():
    """Every method on every pair.

    In CI, on the pair that it is made for, each method that has parameters, a state or phases; each
    pair with a method that uses most of its outputs; and every refusal. The others differ in terms
    that their own tests compare with NumPy, or compile the same code for other shapes.
    """
    demanding = {("cakd", "Swin to MobileNetV2"), ("review", "ResNet to ResNet")}
    for method, pair in itertools.product(DISTILLING, PAIRS):
        kept = pair == made_for(method) and method not in TERMS_ONLY
        kept |= pair in REFUSED.get(method, ()) or (method, pair) in demanding
        marks = () if kept else pytest.mark.exhaustive
        yield pytest.param(method, pair, marks=marks, id=f"{method}-{pair}")


def made_for(method):
    return "ViT to ViT" if method in ("deit", "minilm") else "ViT to ResNet"


@pytest.mark.parametrize(("method", "pair"), list(cases()))
def test_every_method_trains_every_pair_or_says_what_would(method, pair):
    if pair in REFUSED.get(method, ()):
        with pytest.raises(UserError, match=r"; for this pair take .*logits"):
            pair_experiment(method, PAIRS[pair])
        return
    experiment = pair_experiment(method, PAIRS[pair], **OPTIONS.get(method, {}))
    dozens = pair == made_for(method)
    steps, first = (36, 0 if method == "ab" else None) if dozens else (2, None)
    states, metrics = step_through(experiment, steps, first)
    assert all(np.isfinite(of_step["loss"]) for of_step in metrics)
    assert changed(states[-2].params, states[-1].params)
    if dozens:  # on real images, the method's loss falls
        terms = [sum(terms_of(of_step).values()) for of_step in metrics]
        start = 1 if METHODS[method].first_phase else 0
        assert np.mean(terms[-6:]) < np.mean(terms[start : start + 6])


LIKE_THEM = ("ofd", "london", "ft")  # a state that training changes, or phases

# A random teacher's attention is nearly uniform: there is little to learn from it.
OPTIONS = {
    "minilm": {"method": {"minilm": {"weight": 1e4}}},
    # Its ramp starts after 25 epochs, the pair's run ends after nine.
    "cakd_release": {"method": {"cakd_release": {"ramp_start": -1000.0, "ramp_limit": 1.0}}},
}


def terms_of(metrics):
    """Unweighted, because ReviewKD's weight grows; the generator term needn't fall."""
    return {k: float(v) for k, v in metrics.items() if f"{k}_weighted" in metrics
            and k != "generator"}  # fmt: skip


@pytest.mark.parametrize(
    "method",
    ["crd", "ab", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in LIKE_THEM)],
)
def test_a_run_resumed_with_the_methods_state_ends_bit_identical(method, tmp_path):
    """Methods with a state or with phases, interrupted in the middle of each phase."""
    options = {"epochs": 1} | {"method": {name: {"first_epochs": 1} for name in ("ab", "ft")}}
    experiment = pair_experiment(method, PAIRS["ResNet to ResNet"], **options)
    unbroken, _ = train.run(experiment, tmp_path / "unbroken")
    for steps in {2, experiment.total_steps - 2}:
        train.run(dataclasses.replace(experiment, total_steps=steps), tmp_path / "resumed")
    resumed, _ = train.run(experiment, tmp_path / "resumed")
    assert int(resumed.step) == experiment.total_steps
    assert not changed(unbroken, resumed)
    if method in ("crd", "ofd", "london"):
        assert jax.tree.leaves(resumed.method_state)


def test_eighteen_methods_and_the_papers_own():
    assert len(set(DISTILLING) - {"cakd", "cakd_release"}) == 18
