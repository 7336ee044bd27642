"""CIFAR-100 as in the paper's Table 1: a ViT-B/16 teaches a ResNet-50 at 224 x 224.

Claim: none yet; the full schedule has not been run with this code. The paper's teacher is
an ImageNet ViT-B/16 fine-tuned on CIFAR-100, with 90.9% top-1.
Cost: 200 epochs of 781 steps, each one ViT-B/16 forward and one ResNet-50 forward and backward at
batch 64. `:smoke` takes under two minutes on two CPU cores.
Command:
  python -m xkd_jax.main --config configs/cifar100.py --config.data.dir=DIR \
    --config.teacher.weights=vit_base_patch16_224_cifar100.safetensors --workdir runs/cifar100
"""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke",))
    config = default_config()
    config.epochs = 200
    config.batch_size = 64
    config.image_size = 224
    config.method.name = "cakd"
    config.student.model = "resnet50"
    config.teacher.model = "vit_base_patch16_224"
    config.teacher.weights = "vit_base_patch16_224_cifar100.safetensors"
    config.data.name = "tfds:cifar100"
    # The paper's optimizer and schedule are default_config's: SGD with momentum 0.9, weight decay
    # 1e-4, learning rate 0.1, times 0.1 at epochs 100 and 150.
    config.optimizer.clip_norm = 2.0
    config.views.mask_patch = 16
    if variant == "smoke":
        common.smoke(
            config, epochs=1, batch_size=8, log_every=2, train="train[:64]", test="test[:64]"
        )
        common.untrained_teacher(config, "vit_tiny_patch16_224", depth=2)
        config.method.name = "none"
        config.compare = ("none", "cakd")
        config.student.model = "resnet18"
    return config
