"""ImageNet with the recipe of the first author's released code: strong augmentation, 600 epochs.

Warm-up, TrivialAugment, random erasing, mixup, CutMix, label smoothing, repeated augmentation and
EMA: torchvision's recipe of 2021, on which the released code builds. The method is `cakd_release`
with its presets.

Claim: none yet; the full schedule has not been run with this code. The released code's own numbers
(ResNet-50: 73.82 alone, 76.21 distilled) come from different recipes and can't be compared.
Cost: 600 epochs of 1251 steps at batch 1024. `:smoke` takes about a minute on two CPU cores.
Command:
  python -m xkd_jax.main --config configs/imagenet_release.py --config.data.dir=DIR \
    --workdir runs/imagenet_release
"""

from xkd_jax.config import Config
from xkd_jax.configs import imagenet


def get_config(variant: str = "") -> Config:
    config = imagenet.get_config(variant)
    config.method.name = "cakd_release"
    config.label_smoothing = 0.1
    config.data.repeats = 4
    config.augment.auto = "trivialaugment"
    config.augment.erasing = 0.1
    config.augment.mixup = 0.2
    config.augment.cutmix = 1.0
    config.optimizer.weight_decay = 2e-5
    config.optimizer.weight_decay_skip_1d = True
    config.schedule.name = "cosine"
    config.ema.decay = 0.9999
    config.ema.warmup = True
    if variant == "":
        config.epochs = 600
        config.batch_size = 1024
        config.optimizer.learning_rate = 0.5
        config.schedule.warmup_epochs = 5.0
    return config
