"""Networks by name: `create_model("resnet50", num_classes=10)`.

Each family is one file with its module class and `VARIANTS`, which maps timm's names to `Variant`s.
To add a family, import it here and list it in `_FAMILIES`. Detectors, in `detection`, take their
backbones from these families.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.models import (
    beit,
    cifar,
    clip,
    convnext,
    deit,
    efficientnet,
    efficientnetv2,
    eva,
    ghostnet,
    inception,
    mixer,
    mobilenetv2,
    mobilenetv3,
    mobilenetv4,
    regnet,
    repvgg,
    resnet,
    swin,
    swinv2,
    vit,
    xception,
)
from xkd_jax.models.detection import DETECTORS
from xkd_jax.models.detection.fpn import Backbone
from xkd_jax.models.variant import Variant

_FAMILIES = (
    vit,
    deit,
    clip,
    beit,
    eva,
    swin,
    swinv2,
    mixer,
    resnet,
    repvgg,
    mobilenetv2,
    mobilenetv3,
    mobilenetv4,
    efficientnet,
    efficientnetv2,
    regnet,
    ghostnet,
    xception,
    inception,
    convnext,
    cifar,
)

MODELS: dict[str, Variant] = {
    name: variant for family in _FAMILIES for name, variant in family.VARIANTS.items()
}
# A view: users add networks to `MODELS`.
NETWORKS: Mapping[str, Variant] = collections.ChainMap(MODELS, DETECTORS)


def create_model(name: str, *, num_classes: int, dtype: Any = jnp.float32, **args) -> nn.Module:
    """Creates the network called `name`, without weights.

    `logits, out = model.apply(variables, images, train=...)`, where `images` is `[N, H, W, 3]`
    and the keys of `out` depend only on `model.kind`, "cnn" or "transformer". With `remat=True`,
    an option of all networks except VGGs, the backward pass recomputes the insides of blocks.

    A model of the kind "detector" returns `Detections` in place of logits. Its arguments are the
    fields of `detection.detector.Detector`, and: `backbone`, the name of a CNN; `backbone_args`,
    that network's arguments; `frozen_norm=False`, if its BatchNorm is to be trained; and
    `fpn_width`, the channels of its pyramid, 256 by default.

    Args:
      name: a key of `NETWORKS`: of `MODELS`, or of `DETECTORS`.
      num_classes: the number of logits, or of a detector's classes without the background; 0: no
        classifier, `logits` is None and not in `out`.
      dtype: the dtype that layers compute in; parameters and logits are always float32.
      **args: fields of the module, which override the variant's; lists become tuples, so that
        values read from JSON are hashable.

    Raises:
      UserError: the network or an argument is unknown, or it is no backbone.
    """
    if name not in NETWORKS:
        raise errors.unknown("network", name, NETWORKS)
    variant = NETWORKS[name]
    args = {**variant.args, **args}
    fields = {field.name for field in dataclasses.fields(variant.network)} - {"parent", "name"}
    known = fields | ({"backbone_args", "frozen_norm", "fpn_width"} if name in DETECTORS else set())
    for arg in args:
        if arg not in known:
            raise errors.unknown(f"{name} argument", arg, known)
    if name in DETECTORS:
        args["backbone"] = _create_backbone(
            args["backbone"],
            args.pop("backbone_args", {}),
            (args.pop("frozen_norm", True), args.pop("fpn_width", 256)),
            dtype,
        )
        if num_classes < 1:
            raise errors.UserError(f"{name} needs at least one class, not {num_classes}.")
    args = {key: _hashable(value) for key, value in args.items()}
    return variant.network(**args, num_classes=num_classes, dtype=dtype)


def _create_backbone(
    name: str, args: Mapping[str, Any], options: tuple[bool, int], dtype: Any
) -> nn.Module:
    """A detector's backbone, the CNN called `name` without its classifier.

    Args:
      name: the CNN's.
      args: the CNN's.
      options: fields of `Backbone`: `frozen_norm` and `width`.
      dtype: as for `create_model`.

    Raises:
      UserError: the network or an argument is unknown, or it isn't a CNN.
    """
    if name not in MODELS:
        raise errors.unknown("backbone", name, MODELS)
    body = create_model(name, num_classes=0, dtype=dtype, **args)
    if getattr(body, "kind", "") != "cnn":
        raise errors.UserError(
            f"the backbone {name} is a Transformer; a detector needs a CNN, such as resnet50."
        )
    return Backbone(body, *options, dtype)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value
