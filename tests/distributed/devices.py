"""Compares steps on one device and on eight, in a process with eight; prints the differences.

python -m tests.distributed.devices METHOD ... (run by test_devices.py)
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from tests.experiments import change, run
from tests.methods.pairs import PAIRS, pair_experiment
from xkd_jax import train
from xkd_jax.distributed import sharding

STEPS = 10


def final_state(experiment):
    """The state after `STEPS` steps, which include the end of the method's first phase, if any."""
    distiller = experiment.distiller
    first = round(distiller.method.first_phase * distiller.steps_per_epoch)
    state = train.init_state(experiment)
    state = dataclasses.replace(state, step=state.step + max(first - STEPS // 2, 0))
    return run(experiment, STEPS, state=state).states[-1]


def difference(*states):
    """The largest difference between two states, relative to each leaf's largest value."""
    worst, hosts = 0.0, (jax.device_get(dataclasses.replace(s, key=0)) for s in states)
    for a, b in zip(*map(jax.tree.leaves, hosts), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = max(worst, np.abs(a - b).max(initial=0) / max(np.abs(a).max(initial=0), 1e-3))
    return worst


def compare(method):
    """One device against eight."""
    pair = PAIRS["ViT to ViT" if method in ("deit", "minilm") else "ViT to ResNet"]
    experiment = pair_experiment(method, pair)
    assert experiment.mesh.size == 8
    alone = change(experiment, mesh=sharding.create_mesh(jax.devices()[:1]))
    states = [final_state(e) for e in (experiment, alone)]
    bank = [x for x in jax.tree.leaves(states[0].method_state) if "data" in str(x.sharding.spec)]
    return {"difference": difference(*states), "sharded": len(bank)}


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    for name in sys.argv[1:]:
        print(json.dumps({"method": name, **compare(name)}), flush=True)
