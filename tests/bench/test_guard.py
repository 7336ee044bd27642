"""A guard that needs no clock: what compiled steps of cakd compute and move, pinned.

A change that makes a step do more work fails here and says what has grown. If it is worth it, pin
the new numbers. Measured with jax 0.10.2 on a CPU; XLA's numbers differ a little between CPUs.
"""

import functools
import re

import pytest

from tests import tiny
from xkd_jax.analysis import memory
from xkd_jax.analysis.flops import count_flops
from xkd_jax.config import for_method
from xkd_jax.configs import quickstart
from xkd_jax.experiment import create_experiment
from xkd_jax.train import compile_step, experiment_step

pytestmark = pytest.mark.slow

# How much larger than pinned each may be; multiply-adds are counted exactly, in what JAX traces.
ALLOWED = {"multiply-adds": 1.01, "FLOPs": 1.1, "bytes": 1.25, "fusions": 1.25, "temporaries": 1.25}
PINNED = {
    "tiny": {
        "multiply-adds": 211_340_592, "FLOPs": 426_566_848, "bytes": 111_910_120, "fusions": 790,
        "temporaries": 8_500_032,
    },
    "quickstart": {
        "multiply-adds": 2_185_953_280, "FLOPs": 4_572_125_184, "bytes": 682_266_112,
        "fusions": 801, "temporaries": 40_853_056,
    },
}  # fmt: skip
CONFIGS = {
    "tiny": lambda: tiny.get_config("cakd"),
    "quickstart": lambda: for_method(quickstart.get_config(), "cakd"),
}


def work_of(config):
    """What a step computes and moves, by the names of `ALLOWED`."""
    experiment = create_experiment(config)
    resident = experiment.create_loader().arrays
    args = experiment.distiller.state_shapes, experiment.teacher_shapes(), resident
    step = functools.partial(experiment_step, experiment)
    compiled = compile_step(experiment, *args)
    counted = compiled.cost_analysis()
    return {
        "multiply-adds": count_flops(step, *args, experiment.batch_shapes()),
        "FLOPs": counted["flops"],
        "bytes": counted["bytes accessed"],
        "fusions": len(re.findall(r" fusion\(", compiled.as_text())),
        "temporaries": memory.temporaries(compiled),
    }


@pytest.mark.parametrize("name", PINNED)
def test_a_step_does_no_more_work_than_it_did(name):
    found = work_of(CONFIGS[name]())
    ratios = {kind: found[kind] / PINNED[name][kind] for kind in ALLOWED}
    grown = {kind: round(ratio, 3) for kind, ratio in ratios.items() if ratio > ALLOWED[kind]}
    assert not grown, f"relative to the pinned work: {grown}"
    # Much less: pin it, or the gain can be lost again unnoticed.
    assert all(ratio > 0.7 for ratio in ratios.values()), ratios


@pytest.mark.exhaustive
def test_it_notices_more_work():
    config = tiny.get_config("cakd")
    config.student.args = {"layers": (2, 2, 2, 2), "width": 0.125, "stem": "cifar"}
    found = work_of(config)
    assert found["FLOPs"] > 1.1 * PINNED["tiny"]["FLOPs"]
    assert found["fusions"] > 1.25 * PINNED["tiny"]["fusions"]
