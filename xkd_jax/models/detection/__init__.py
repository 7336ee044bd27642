"""Detectors by name: `create_model("maskrcnn_resnet50_fpn", num_classes=80)`."""

from xkd_jax.models.detection.detector import Detector
from xkd_jax.models.variant import Variant

# torchvision's default images have a longer side of at most 1333 pixels.
_IMAGE_SIZE = 1344

# "backbone" is the name of another network, from which `create_model` makes the module.
DETECTORS = {
    f"{family}_{backbone}_fpn": Variant(
        Detector, {"backbone": backbone, "mask": family == "maskrcnn"}, _IMAGE_SIZE
    )
    for family in ("fasterrcnn", "maskrcnn")
    for backbone in ("resnet50", "resnet101", "resnext101_32x8d")
}
