"""Pairs whose training step is measured: networks with random weights, on packaged images.

The images are enlarged to the networks' size on the device. Nothing is learnt from such a teacher:
use it with `xkd-jax bench` and `benchmarks/torch_peer.py`.

Claim and cost: docs/performance.md.
Command:
  python -m xkd_jax.bench --config configs/speed.py:vit_s16-resnet18
`:vit_s16-resnet18`, the default, has images of 224 x 224 and batches of 8, `:vit_ti4-resnet18`
32 x 32 and 64; `:vit_s4-resnet18`, `:vit_b16-resnet50` and `:swin_b-resnet50` are for a GPU, with
batches of 512 and 128 images in bfloat16. `:smoke` has tiny networks.
"""

from xkd_jax.config import Config
from xkd_jax.configs import common, quickstart

# Teacher, student, its stem, pixels, batch and dtype.
PAIRS = {
    "vit_s16-resnet18": ("vit_small_patch16_224", "resnet18", 224, 8, "float32"),
    "vit_ti4-resnet18": ("vit_tiny_patch4_32", "resnet18_32", 32, 64, "float32"),
    "vit_s4-resnet18": ("vit_small_patch4_32", "resnet18_32", 32, 512, "bfloat16"),
    "vit_b16-resnet50": ("vit_base_patch16_224", "resnet50", 224, 128, "bfloat16"),
    "swin_b-resnet50": ("swin_base_patch4_window7_224", "resnet50", 224, 128, "bfloat16"),
}


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke", *PAIRS))
    pair = "vit_ti4-resnet18" if variant == "smoke" else variant or "vit_s16-resnet18"
    teacher, student, size, batch, dtype = PAIRS[pair]
    config = quickstart.get_config()
    config.pictures = False
    config.teacher.update(model=teacher, weights="random")
    config.student.model = student
    config.student.args = {}  # `update` would keep the quickstart's
    config.image_size = size
    config.batch_size = batch
    config.dtype = dtype
    config.epochs = 1
    if variant == "smoke":
        common.smoke(
            config,
            epochs=1,
            train="train[:64]",
            batch_size=8,
            log_every=1,
            compare=("none", "cakd"),
        )
        common.untrained_teacher(config, teacher, depth=1)
        config.student.args = {"layers": (1, 1, 1, 1), "width": 0.125}
    return config
