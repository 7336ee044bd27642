"""A recipe for tests: 40 steps of tiny networks on a few packaged images."""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common


def get_config(method: str = "cakd") -> Config:
    config = default_config()
    config.epochs = 10
    config.batch_size = 16
    config.method.name = method
    config.student.args = {"layers": (1, 1, 1, 1), "width": 0.125, "stem": "cifar"}
    teacher = common.VIT_28 | {"embed_dim": 16, "depth": 2}
    common.untrained_teacher(config, "vit_tiny_patch16_224", **teacher)
    config.data.name = "fashion_mnist_mini"
    config.data.train = "train[:64]"
    config.data.eval = config.data.test = "validation[:50]"
    config.optimizer.learning_rate = 0.02
    config.optimizer.clip_norm = 2.0
    config.log_every = 1
    config.checkpoint_every = 7
    return config


def set_fields(config, changes):
    """Sets fields by path, such as `optimizer__name`, also to values of another type."""
    with config.unlocked():
        for name, value in changes.items():
            parent = config
            *path, last = name.split("__")
            for part in path:
                parent = parent[part]
            parent[last] = value
