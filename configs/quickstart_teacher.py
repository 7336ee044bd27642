"""The quickstart's teacher: a small ViT on all 60,000 training images of Fashion-MNIST.

Claim and cost: see its model card in docs/quickstart.md.
Command:
  python -m xkd_jax.main --config configs/quickstart_teacher.py --config.data.name=idx:FOLDER

FOLDER contains the four idx files (Debian's package dataset-fashion-mnist installs them in
/usr/share/datasets/fashion-mnist).
"""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke",))
    config = default_config()
    config.epochs = 12
    config.batch_size = 64
    config.student.model = "vit_tiny_patch16_224"
    config.student.args = common.VIT_28
    config.data.name = "idx:/usr/share/datasets/fashion-mnist"
    # The curve is measured on training images: the student's training and validation images come
    # from the same 60,000, and the test split is evaluated only once.
    config.data.eval = "train[:5000]"
    config.data.noisy = True
    # The teacher must be trained on the views that it will see: crops, flips and the geometric part
    # of the multi-view generator; colour jitter, noise and masks are applied to the student only.
    config.method.none.multi_view = True
    config.views.rotation = 10.0
    config.views.min_scale = 0.9
    for strength in ("brightness", "contrast", "saturation", "noise", "mask_ratio"):
        config.views[strength] = 0.0
    config.augment.crop_padding = 1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 0.5
    if variant == "smoke":
        common.smoke(config, epochs=1, log_every=10, train="train[:6400]", test="test[:1000]")
    return config
