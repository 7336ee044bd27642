"""A teacher for your data: timm's ViT-B/16, fine-tuned with layer-wise learning rates.

Use the run's `student.safetensors` as teacher.weights of a distillation.

Claim: none yet; it has not been run at full size with this code. AdamW, cosine, layer decay 0.75,
as in BEiT (arXiv:2106.08254) and MAE (arXiv:2111.06377); layer_decay=1 turns the decay off.
Cost: 10 epochs of ViT-B/16 forward and backward. `:smoke` takes about a minute on two CPU cores.
`:scratch` downloads nothing: it trains a small ViT at 96 x 96 from scratch, for a first try.
`:dinov2` fine-tunes the last four blocks of DINOv2's ViT-S/14 on CIFAR-100, whose images it
enlarges to 112 x 112 (8 x 8 tokens), for docs/results/foundation.md.
Command:
  python -m xkd_jax.main --config configs/finetune_teacher.py --config.data.name=folder:FOLDER \
    --config.data.eval=val --config.data.test=val --workdir runs/teacher
"""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke", "scratch", "dinov2"))
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
    elif variant == "dinov2":
        config.epochs = 3
        config.batch_size = 50
        config.image_size = 0
        config.student.model = "vit_small_patch14_dinov2"
        config.student.weights = "dinov2_vits14.safetensors"
        # The mean of the tokens is classified, so that each patch token learns about the classes.
        config.student.args = {"img_size": 112, "global_pool": "avg", "fc_norm": False}
        config.data.update(train="train[:45000]", eval="train[45000:]", workers=0)
        config.augment.auto = ""
        config.freeze = 8
        config.schedule.warmup_epochs = 0.2
        config.checkpoint_every = 100
    return config
