"""CIFAR-10 at its native 32 x 32: cifar100_32.py with another data set.

Claim: none yet; the full schedule has not been run with this code.
Cost: 200 epochs of 781 steps. `:smoke` takes under two minutes on two CPU cores.
Command:
  python -m xkd_jax.main --config configs/cifar10_32.py --config.data.dir=DIR \
    --config.teacher.weights=teacher.safetensors --workdir runs/cifar10_32
"""

from xkd_jax.config import Config
from xkd_jax.configs import cifar100_32


def get_config(variant: str = "") -> Config:
    config = cifar100_32.get_config(variant)
    config.data.name = "tfds:cifar10"
    return config
