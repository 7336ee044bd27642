"""Face anti-spoofing, two classes: a Swin teaches a MobileNetV2; reports the Equal Error Rate too.

FOLDER has CelebA-Spoof's layout: FOLDER/train/SUBJECT/live/*.png and .../spoof/*.png, and the same
under test; "leaf:" takes the class from the last folder. For train/live/*.png use "folder:".

Claim: none yet; it has not been run at full size with this code.
Cost: 20 epochs at 224 x 224. `:smoke` takes about a minute on two CPU cores.
Command:
  python -m xkd_jax.main --config configs/spoof.py --config.data.name=leaf:FOLDER \
    --config.teacher.weights=runs/spoof_teacher/student.safetensors --workdir runs/spoof
The pairs of the paper's Table 4 are variants: `:vit_l16-resnet18`, `:vit_l16-inception_v3` and
`:vit_l16-resnext26`, each with a ViT-L/16 at 384 pixels as the teacher.
"""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke", *common.TABLE_4))
    config = default_config()
    config.epochs = 20
    config.batch_size = 64
    config.image_size = 224
    config.method.name = "cakd"
    config.student.model = "mobilenetv2_100"
    config.teacher.weights = "runs/spoof_teacher/student.safetensors"
    config.data.name = "leaf:FOLDER"
    config.data.workers = 4
    config.data.on_error = "skip"
    config.augment.crop_padding = 0
    config.crop_scale = (0.5, 1.0)
    config.optimizer.learning_rate = 0.05
    config.optimizer.clip_norm = 2.0
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 1.0
    config.views.mask_patch = 16
    if variant in common.TABLE_4:
        common.paper_pair(config, variant)
    if variant == "smoke":
        common.smoke(config, epochs=2, batch_size=8, image_size=64, log_every=1)
        sizes = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
        common.untrained_teacher(config, "swin_tiny_patch4_window7_224", img_size=64, **sizes)
        config.student.args = {"width": 0.35}
        config.data.workers = 0
    return config
