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
_BATCH_NORM_EPSILON = 1e-5

# The categories of torchvision's published weights, by COCO's ids from 1; some ids aren't used.
COCO_CATEGORIES = (
    """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
N/A, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra,
giraffe, N/A, backpack, umbrella, N/A, N/A, handbag, tie, suitcase, frisbee, skis, snowboard,
sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, N/A,
wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, N/A, dining table, N/A, N/A, toilet,
N/A, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator,
N/A, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
""".strip()
    .replace(",\n", ", ")
    .split(", ")
)

DETECTOR = Layout(
    "torchvision's",
    r"roi_heads\.box_predictor\.cls_score\.weight",
    (  # of weights from before version 0.13, such as those that it publishes
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


def is_published(state: Mapping[str, np.ndarray]) -> bool:
    """Whether `state` has the names and the classes of the weights that torchvision publishes.

    Args:
      state: tensors by their own names, in PyTorch's layout.
    """
    scores = state.get("roi_heads.box_predictor.cls_score.weight", np.zeros(0))
    return "rpn.head.conv.weight" in state and len(scores) == len(COCO_CATEGORIES) + 1


def cancel_epsilon(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Lowers running variances by the epsilon that our BatchNorm adds.

    torchvision sets it to 0 for the weights that it publishes (`overwrite_eps`).

    Args:
      state: tensors by name.
    """
    return {
        name: array - np.float32(_BATCH_NORM_EPSILON) if name.endswith("running_var") else array
        for name, array in state.items()
    }


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
    body = {
        key.removeprefix(_BODY): array.shape
        for key, array in state.items()
        if key.startswith(_BODY)
    }
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
