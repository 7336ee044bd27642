"""Your own photos: FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg.

A teacher fine-tuned on the same folder (finetune_teacher.py) teaches a ResNet-18 that starts from
ImageNet weights. docs/data.md walks through it.

Claim: none; the images are yours.
Cost: 30 epochs at 224 x 224. `:smoke` takes about a minute on two CPU cores. `:scratch` downloads
nothing: it starts from random weights at 96 x 96, with the teacher of finetune_teacher.py:scratch.
Command:
  python -m xkd_jax.main --config configs/folder.py --config.data.name=folder:FOLDER \
    --config.teacher.weights=runs/teacher/student.safetensors --workdir runs/folder
"""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke", "scratch"))
    config = default_config()
    config.epochs = 30
    config.batch_size = 64
    config.image_size = 224
    config.method.name = "cakd"
    config.student.model = "resnet18"
    config.student.weights = "timm:resnet18.a1_in1k"
    config.teacher.weights = "runs/teacher/student.safetensors"
    config.data.name = "folder:FOLDER"
    config.data.eval = config.data.test = "val"
    config.data.workers = 4
    config.augment.crop_padding = 0
    config.crop_scale = (0.35, 1.0)  # for few images: milder than for ImageNet
    config.optimizer.learning_rate = 0.02
    config.optimizer.clip_norm = 2.0
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 1.0
    config.views.mask_patch = 16
    if variant == "smoke":
        common.smoke(config, epochs=2, batch_size=8, image_size=64, log_every=1)
        common.untrained_teacher(config, "vit_tiny_patch16_224", img_size=64, depth=2)
        config.student.weights = ""
        config.data.workers = 0
    elif variant == "scratch":
        config.batch_size = 16
        config.image_size = 96
        config.student.weights = ""
        config.data.workers = 0
    return config
