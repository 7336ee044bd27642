"""COCO: a Faster R-CNN on a ResNet-50, with torchvision's recipe and, if wanted, a teacher.

DIR has COCO's layout: DIR/train2017/*.jpg, DIR/val2017/*.jpg, DIR/annotations/instances_*.json. SGD
with learning rate 0.02 at batch 16, 1,000 steps of warm-up, weight decay 1e-4; the backbone has
ImageNet weights, of which batch normalisation, stem and first stage stay as they are.

Claim: none yet; the full schedule has not been run with this code. torchvision's reference reaches
AP 37.0 with the schedule of `:2x`, and the paper's Table 4 has 34.5. `:overfit` learns the first
100 images of train2017 by heart, AP 74.7 (docs/detection.md).
Cost: 12 epochs of 7,329 steps, images of up to 1333 pixels; `:2x`, torchvision's reference, has 26
epochs. `:smoke` takes about a minute on two CPU cores, without a download. `:overfit` is a check
that a detector can learn: a small one learns about a hundred images by heart, from random weights.
150 epochs on ten of COCO's images gave AP 80.1 on these, in five minutes on one core.
Commands:
  python -m xkd_jax.main --config configs/coco_frcnn_r50.py --config.data.name=coco:DIR \
    --workdir runs/coco_frcnn_r50
A backbone that was distilled before, by any run of that network:
  python -m xkd_jax.main --config configs/coco_frcnn_r50.py --config.data.name=coco:DIR \
    --config.student.weights=runs/imagenet/student.safetensors --workdir runs/coco_distilled
A teacher for the detector itself: a Vision Transformer for cakd, fitnet, review and ofd, at any
size, or another detector's student file for the last three and for logits:
  python -m xkd_jax.main --config configs/coco_frcnn_r50.py --config.data.name=coco:DIR \
    --config.method.name=cakd --config.teacher.args.img_size=672 --workdir runs/coco_cakd
"""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common
from xkd_jax.methods import IMAGENET

# A detector of which a step takes two CPU cores a second.
SMALL = {
    "backbone": "resnet18",
    "backbone_args": {"width": 0.25},
    "fpn_width": 64,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "rpn_pre_nms_train": 200,
    "rpn_pre_nms_test": 200,
    "rpn_post_nms_train": 100,
    "rpn_post_nms_test": 50,
    "rpn_samples": 64,
    "box_samples": 32,
    "max_detections": 20,
}


def overfit(config: Config) -> None:
    """A small detector that learns a hundred images by heart, from random weights."""
    config.epochs = 100
    config.batch_size = 5
    config.student.weights = ""
    config.student.args = SMALL | {
        "backbone_args": {"width": 0.5},
        "rpn_pre_nms_train": 500,
        "rpn_pre_nms_test": 500,
        "rpn_post_nms_train": 300,
        "rpn_post_nms_test": 200,
        "rpn_samples": 128,
        "box_samples": 64,
        "max_detections": 100,
    }
    config.freeze = 0
    config.data.train = config.data.eval = config.data.test = "train2017"
    config.data.update(min_size=256, max_size=256, max_objects=50, workers=0)
    config.augment.flip = False
    config.eval_every = 25
    config.optimizer.clip_norm = 10.0
    config.schedule.name = "cosine"
    config.schedule.warmup_steps = 100


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("2x", "overfit", "smoke"))
    config = default_config()
    config.epochs = 12
    config.batch_size = 16
    config.student.model = "fasterrcnn_resnet50_fpn"
    config.student.weights = "timm:resnet50.tv_in1k"
    config.freeze = 1
    # Used by methods with a teacher only.
    config.teacher.weights = "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k"
    config.method.update(IMAGENET)
    config.method.logits.label_weight = 1.0  # most of a detector's losses have no counterpart in it
    config.method.cakd.multi_view = False
    config.data.name = "coco:DIR"
    config.data.train = "train2017"
    config.data.eval = config.data.test = "val2017"
    config.data.workers = 8
    config.data.on_error = "skip"
    config.augment.crop_padding = 0
    config.optimizer.learning_rate = 0.02
    config.schedule.boundaries = (8, 11)
    config.schedule.warmup_steps = 1000
    config.schedule.warmup_factor = 1e-3
    if variant == "2x":
        config.epochs = 26
        config.schedule.boundaries = (16, 22)
    if variant == "overfit":
        overfit(config)
    if variant == "smoke":
        common.smoke(config, epochs=1, log_every=1, train="train2017[:8]", test="val2017[:4]")
        common.untrained_teacher(config, "vit_tiny_patch16_224", img_size=96, depth=2)
        config.method.name = "cakd"
        config.batch_size = 2
        config.student.weights = ""
        config.student.args = SMALL
        config.freeze = 0
        config.data.update(min_size=96, max_size=128, max_objects=20, workers=0)
        config.schedule.boundaries = ()
        config.schedule.warmup_steps = 2
    return config
