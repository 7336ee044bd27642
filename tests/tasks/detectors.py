"""Tiny detectors, teachers and batches for them."""

import jax.numpy as jnp
import numpy as np

from xkd_jax.model import create_model

SIDE, CLASSES = 128, 2
TINY = {
    "backbone": "resnet18",
    "backbone_args": {"width": 0.125, "layers": (1, 1, 1, 1)},
    "fpn_width": 16,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "rpn_pre_nms_train": 64,
    "rpn_pre_nms_test": 64,
    "rpn_post_nms_train": 32,
    "rpn_post_nms_test": 16,
    "rpn_samples": 32,
    "box_samples": 16,
    "max_detections": 8,
}


def detector(name="fasterrcnn_resnet50_fpn", **args):
    return create_model(name, num_classes=CLASSES, image_size=SIDE, **TINY | args)


def vit(img_size=64, num_classes=0):
    args = {"img_size": img_size, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return create_model("vit_tiny_patch16_224", num_classes=num_classes, **args)


def batch_of(count=2, objects=3):
    """Images of noise with a box each."""
    boxes = np.zeros((count, objects, 4), np.float32)
    boxes[:, 0] = (20, 30, 60, 70)
    classes = np.zeros((count, objects), np.int32)
    classes[:, 0] = 1 + np.arange(count) % CLASSES
    image = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    return {
        "image": jnp.asarray(image),
        "index": jnp.arange(count, dtype=jnp.int32),
        "size": jnp.asarray([(96.0, 112.0)] * count, jnp.float32),
        "boxes": jnp.asarray(boxes),
        "classes": jnp.asarray(classes),
    }
