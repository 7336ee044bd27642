"""torchvision's names for the tensors of detectors, and which detector they belong to."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD
from xkd_jax.convert.layout import Layout
from xkd_jax.convert.networks import recognize
from xkd_jax.errors import UserError
from xkd_jax.models import DETECTORS

_BODY = "backbone.body."

DETECTOR = Layout(
    "torchvision's",
    r"roi_heads\.box_predictor\.cls_score\.weight",
    (  # of its published weights, which are older than the names that its networks have now
        (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
        (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
        *(
            (rf"^roi_heads\.mask_head\.mask_fcn{i + 1}\.", f"roi_heads.mask_head.{i}.0.")
            for i in range(4)
        ),
    ),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)


def recognize_detector(
    name: str, state: Mapping[str, np.ndarray], changes: list[str]
) -> tuple[str, dict[str, Any]]:
    """The network's name in `DETECTORS` and its arguments; adds a sentence to `changes`.

    Args:
      name: the checkpoint's, for messages.
      state: tensors by torchvision's name, in PyTorch's layout.
      changes: sentences about the conversion.

    Raises:
      UserError: the backbone is not a known CNN.
    """
    body = {key.removeprefix(_BODY): array.shape for key, array in state.items() if _BODY in key}
    found, score = recognize(body) if body else ([], 0.0)
    if score < 0.9:  # all but the classifier
        raise UserError(
            f"{name} is a detector whose backbone is not among the networks here; name both, "
            "such as --model fasterrcnn_resnet50_fpn --arg backbone=resnet18."
        )
    masks = any(key.startswith("roi_heads.mask_head.") for key in state)
    family = "maskrcnn" if masks else "fasterrcnn"
    args: dict[str, Any] = {}
    model = f"{family}_{found[0]}_fpn"
    if model not in DETECTORS:
        model, args = f"{family}_resnet50_fpn", {"backbone": found[0]}
    changes.append(f"recognised {model}" + "".join(f" with {k}={v}" for k, v in args.items()))
    return model, args
