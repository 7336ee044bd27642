"""Detectors by name: `create_model("maskrcnn_resnet50_fpn", num_classes=80)`."""

from collections.abc import Mapping
from typing import Any

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


def put_backbone(variables: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
    """A detector's variables with those of a trained CNN in its backbone.

    Args:
      variables: the detector's `params` and `batch_stats`.
      network: the CNN's; what the backbone doesn't have, its classifier, is left out.
    """
    merged = dict(variables)
    for collection in variables:
        backbone = variables[collection]["backbone"]
        body = {name: network[collection][name] for name in backbone["body"]}
        merged[collection] = {
            **variables[collection],
            "backbone": {**backbone, "body": body},
        }
    return merged
