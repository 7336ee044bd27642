"""Small experiments for tests: creates them, changes them and runs a few steps."""

import collections
import dataclasses

import jax
import numpy as np

from xkd_jax.config import default_config
from xkd_jax.experiment import create_experiment
from xkd_jax.train import Stepper, init_state

Run = collections.namedtuple("Run", "experiment step_fn states metrics")


def tiny_experiment(method, seed=0):
    return create_experiment(tiny_config(method, seed))


def tiny_config(method, seed=0):
    config = default_config()
    config.seed = seed
    config.batch_size = 16
    config.label_smoothing = 0.1
    config.method.name = method
    if method in config.method:
        config.method[method].label_weight = 0.5
    config.data.update(name="fashion_mnist_mini", train="train[:64]", eval="validation[:64]")
    config.student.args = {"layers": (1, 1, 1, 1), "width": 0.125, "stem": "cifar"}
    config.teacher.update(model="vit_tiny_patch16_224", weights="random")
    config.teacher.args = {
        "img_size": 28, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2,
        "class_token": False, "global_pool": "avg",
    }  # fmt: skip
    config.augment.update(crop_padding=0, flip=False)
    config.optimizer.learning_rate = 0.05
    return config


def change(experiment, **changes):
    """The experiment with another distiller."""
    distiller = dataclasses.replace(experiment.distiller, **changes)
    return dataclasses.replace(experiment, distiller=distiller)


def run(experiment, steps, *, step_fn=None, state=None):
    """The states before, between and after the steps, and the metrics of each step.

    Pass the `step_fn` of a similar experiment to avoid compiling again.
    """
    state = init_state(experiment) if state is None else state
    step_fn = step_fn or Stepper(experiment, state, donate=False)
    states, metrics, loader = [state], [], experiment.create_loader()
    for _, batch in zip(range(steps), loader.batches(0), strict=False):
        state, of_step = step_fn(state, batch)
        states.append(state)
        metrics.append(jax.device_get(of_step))
    return Run(experiment, step_fn, states, metrics)


def leaves(tree):
    """Host arrays by path; random keys as their data."""
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }  # fmt: skip


def changed(before, after):
    """The paths of the leaves that are not bit-identical."""
    before, after = leaves(before), leaves(after)
    assert before.keys() == after.keys()
    return {path for path in before if before[path].tobytes() != after[path].tobytes()}
