"""A teacher for cifar100_32.py from scratch at 32 x 32: a ViT with 4 x 4 patches, or `:swin`.

With 50,000 images Transformers need strong augmentation and regularisation: RandAugment, mixup,
CutMix, random erasing and stochastic depth, as in DeiT (arXiv:2012.12877).

Claim: none yet; the full schedule has not been run with this code.
Cost: 200 epochs of 390 steps at batch 128. `:smoke` and `:swin_smoke` take about a minute on two
CPU cores.
Command:
  python -m xkd_jax.main --config configs/teacher_cifar100_32.py --config.data.dir=DIR \
    --workdir runs/teacher_cifar100_32
"""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke", "swin", "swin_smoke"))
    config = default_config()
    config.epochs = 200
    config.batch_size = 128
    config.student.model = "vit_small_patch4_32"
    if variant.startswith("swin"):
        config.student.model = "swin_tiny_patch2_window4_32"
    config.student.args = {"drop_path_rate": 0.1}
    config.data.name = "tfds:cifar100"
    config.augment.auto = "randaugment"
    config.augment.erasing = 0.25
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.weight_decay_skip_1d = True
    config.optimizer.clip_norm = 1.0
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 10.0
    if variant.endswith("smoke"):
        common.smoke(config, epochs=2, log_every=5, train="train[:320]", test="test[:200]")
        config.batch_size = 32
        config.student.args = {"depth": 2, "embed_dim": 48, "num_heads": 3}
        if variant == "swin_smoke":
            sizes = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
            config.student.args = sizes
        config.schedule.warmup_epochs = 0.5
    return config
