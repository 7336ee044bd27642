"""A teacher for your data: timm's ViT-B/16, fine-tuned with layer-wise learning rates.

Use the run's `student.safetensors` as teacher.weights of a distillation.

Claim: none yet; it has not been run at full size with this code. AdamW, cosine, layer decay 0.75,
as in BEiT (arXiv:2106.08254) and MAE (arXiv:2111.06377); layer_decay=1 turns the decay off.
Cost: 10 epochs of ViT-B/16 forward and backward. `:smoke` takes about a minute on two CPU cores.
`:scratch` downloads nothing: it trains a small ViT at 96 x 96 from scratch, for a first try.
Command:
  python -m xkd_jax.main --config configs/finetune_teacher.py --config.data.name=folder:FOLDER \
    --config.data.eval=val --config.data.test=val --workdir runs/teacher
"""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke", "scratch"))
    config = default_config()
    config.epochs = 10
    config.batch_size = 128
    config.image_size = 224
    config.student.model = "vit_base_patch16_224"
    config.student.weights = "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k"
    config.student.args = {"drop_path_rate": 0.1}
    config.data.name = "tfds:cifar100"
    config.data.workers = 4
    config.augment.crop_padding = 4
    config.augment.auto = "randaugment"
    config.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.05
    config.optimizer.weight_decay_skip_1d = True
    config.optimizer.clip_norm = 1.0
    config.layer_decay = 0.75
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 1.0
    if variant == "smoke":
        common.smoke(config, epochs=1, log_every=2, train="train[:64]", test="test[:64]")
        config.batch_size = 8
        config.image_size = 32
        config.student.model = "vit_tiny_patch16_224"
        config.student.args = {"img_size": 32, "depth": 2}
        config.student.weights = ""
        config.schedule.warmup_epochs = 0.25
    elif variant == "scratch":
        config.epochs = 20
        config.batch_size = 16
        config.image_size = 96
        config.student.model = "vit_tiny_patch16_224"
        config.student.args = {
            "img_size": 96, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4,
            # Pooling trains every patch token, not only a class token: distillation uses them all.
            "class_token": False, "global_pool": "avg", "fc_norm": False,
        }  # fmt: skip
        config.student.weights = ""
        config.data.workers = 0
        config.layer_decay = 1.0
    return config
