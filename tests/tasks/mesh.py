"""A detector's step on two devices is that on one: `python -m tests.tasks.mesh` says so."""

import dataclasses

import jax
import numpy as np

from tests.tasks.detectors import batch_of, detector, vit
from tests.tasks.test_detection import distiller
from xkd_jax.distributed.sharding import create_mesh


def step(devices):
    """The parameters and the metrics after one step."""
    teacher = vit()
    teacher = dataclasses.replace(teacher, variables=jax.jit(teacher.init)(jax.random.key(1)))
    taught = distiller(detector(frozen_norm=False), teacher, "fitnet")
    taught = dataclasses.replace(taught, mesh=create_mesh(jax.devices()[:devices]))
    batch = batch_of(4)
    images, index = batch.pop("image"), batch.pop("index")
    state, metrics = taught.step(taught.init(jax.random.key(0)), images, batch, index)
    return jax.device_get((state.params, metrics))


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    (params, metrics), (want, expected) = step(2), step(1)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, want)
    print("equal")
