"""Networks by name: `create_model("resnet50", num_classes=10)`.

Each family is one file with its module class and `VARIANTS`, which maps timm's names to `Variant`s.
To add a family, import it here and list it in `_FAMILIES`.
"""

import dataclasses
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


def create_model(name: str, *, num_classes: int, dtype: Any = jnp.float32, **args) -> nn.Module:
    """Creates the network called `name`, without weights.

    `logits, out = model.apply(variables, images, train=...)`, where `images` is `[N, H, W, 3]`
    and the keys of `out` depend only on `model.kind`, "cnn" or "transformer". With `remat=True`,
    an option of all networks except VGGs, the backward pass recomputes the insides of blocks.

    Args:
      name: a key of `MODELS`.
      num_classes: the number of logits; 0: no classifier, `logits` is None and not in `out`.
      dtype: the dtype that layers compute in; parameters and logits are always float32.
      **args: fields of the module, which override the variant's; lists become tuples, so that
        values read from JSON are hashable.

    Raises:
      UserError: the network or an argument is unknown.
    """
    if name not in MODELS:
        raise errors.unknown("network", name, MODELS)
    variant = MODELS[name]
    known = {field.name for field in dataclasses.fields(variant.network)} - {"parent", "name"}
    for arg in args:
        if arg not in known:
            raise errors.unknown(f"{name} argument", arg, known)
    args = {key: _hashable(value) for key, value in args.items()}
    args = {**variant.args, **args, "num_classes": num_classes, "dtype": dtype}
    return variant.network(**args)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value
