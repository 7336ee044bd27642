"""Compares cached and uncached steps on one device and on eight; prints the differences.

python -m tests.teacher.devices FOLDER (run by test_devices.py)
"""

import json
import sys

import jax

from tests.distributed.devices import difference
from tests.experiments import change, run, tiny_config
from xkd_jax.distributed import sharding
from xkd_jax.experiment import create_experiment

STEPS = 3


def main(folder: str) -> None:
    config = tiny_config("fitnet")
    config.optimizer.clip_norm = 1.0  # rounding errors grow less
    config.teacher.update(cache=folder, cache_views=2)
    eight = create_experiment(config)
    assert eight.mesh.size == 8
    alone = change(eight, mesh=sharding.create_mesh(jax.devices()[:1]))
    with config.unlocked():
        config.teacher.cache = ""
    online = create_experiment(config)
    states = {name: run(e, STEPS).states[-1] for name, e in
              {"eight": eight, "alone": alone, "online": online}.items()}  # fmt: skip
    (outputs,) = next(iter(eight.create_loader().batches(0)))["teacher"].values()
    found = {
        "alone": difference(states["eight"], states["alone"]),
        "online": difference(states["eight"], states["online"]),
        "shards": len(outputs.addressable_shards),
        "shard": outputs.addressable_shards[0].data.shape,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    main(sys.argv[1])
