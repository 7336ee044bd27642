"""CIFAR-10 at its own 32 x 32: a ViT with patch 4 teaches a ResNet-18 with the CIFAR stem.

As cifar100_32.py but for the data. Both networks see an 8 x 8 grid: the ViT's tokens and the
ResNet's third stage.

Claim: none yet; nobody has run the full schedule with this code.
Cost: 200 epochs of 781 steps. `:smoke` takes under two minutes on two CPU cores.
Command:
  python -m xkd_jax.main --config configs/cifar10_32.py --config.data.dir=DIR \
    --config.teacher.weights=teacher.safetensors --workdir runs/cifar10_32
"""

from xkd_jax.config import Config, default_config
from xkd_jax.errors import unknown


def get_config(variant: str = "") -> Config:
    config = default_config()
    config.epochs = 200
    config.batch_size = 64
    config.method.name = "cakd"
    config.student.model = "resnet18"
    config.student.args = {"stem": "cifar"}
    config.teacher.model = "vit_small_patch4_32"
    config.teacher.weights = "teacher.safetensors"
    config.data.name = "tfds:cifar10"
    # The optimizer and its schedule are the paper's, and default_config's: SGD with momentum 0.9,
    # weight decay 1e-4, rate 0.1, times 0.1 at epochs 100 and 150.
    config.optimizer.clip_norm = 2.0
    if variant == "smoke":
        config.epochs = 2
        config.method.name = "none"
        config.compare = ("none", "cakd")
        config.student.args = {"stem": "cifar", "width": 0.25}
        config.teacher.model = "vit_tiny_patch4_32"
        config.teacher.args = {"depth": 2}
        config.teacher.weights = "random"
        config.data.train = "train[:640]"
        config.data.eval = config.data.test = "test[:500]"
        config.log_every = 5
    elif variant:
        raise unknown("variant", variant, ("smoke",))
    return config
