"""ImageNet with the recipe of the first author's released code, its run_cakd.sh: ResNet-50.

120 epochs, batch 8 x 32, SGD with learning rate 0.1, times 0.1 every 30 epochs after 5 epochs of
warm-up, weight decay 2e-5 but not of norms, TrivialAugment, random erasing, mixup, no CutMix, label
smoothing, repeated augmentation and an average of the weights. The method is `cakd_release` with
its presets.

Claim: none yet; the full schedule has not been run with this code. The released code's own numbers
(ResNet-50: 73.82 alone, 76.21 distilled) come from different recipes and can't be compared.
Cost: 120 epochs of 5004 steps at batch 256. `:smoke` takes about a minute on two CPU cores.
The released code's teacher is torchvision's ViT-B/16, `ViT_B_16_Weights.IMAGENET1K_V1` (81.07%), in
https://download.pytorch.org/models/vit_b_16-c867db91.pth. timm's hub does not have it: the default
is imagenet.py's teacher, timm's ViT-B/16, and teacher.weights takes a converted file.
Command:
  python -m xkd_jax.main --config configs/imagenet_release.py --config.data.dir=DIR \
    --workdir runs/imagenet_release
"""

from xkd_jax.config import Config
from xkd_jax.configs import common, imagenet


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke",))
    config = imagenet.get_config(variant)
    config.method.name = "cakd_release"
    config.label_smoothing = 0.1
    config.data.repeats = 4
    config.crop_pct = 1.0  # --val-resize-size 224
    config.augment.auto = "trivialaugment"
    config.augment.erasing = 0.1
    config.augment.mixup = 0.2
    config.optimizer.weight_decay = 2e-5
    # The released code decays biases, which are few beside the norms.
    config.optimizer.weight_decay_skip_1d = True
    config.optimizer.clip_norm = 0.0
    # A hundredth of the student's rate; there it also follows the schedule.
    config.adversary_optimizer.update(name="sgd", learning_rate=1e-3, weight_decay=2e-5)
    # There 0.99998, adjusted for 32 steps between updates and 120 epochs of batches of 256.
    config.ema.decay = 0.99996
    config.ema.warmup = True
    if variant == "":
        config.schedule.boundaries = (35, 65, 95)  # its steps of 30 epochs begin after the warm-up
        config.schedule.warmup_epochs = 5.0
    return config
