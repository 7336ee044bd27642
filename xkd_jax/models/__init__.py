"""Networks by name: `create_model("resnet50", num_classes=10)`.

A family is a file of its own with its module class and `VARIANTS`, a `Variant` by timm name.
Adding one: an import, and an entry in `_FAMILIES`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import errors
from xkd_jax.models import (
    cifar,
    deit,
    efficientnet,
    inception,
    mobilenetv2,
    resnet,
    swin,
    vit,
    xception,
)
from xkd_jax.models.variant import Variant

_FAMILIES = (
    vit,
    deit,
    swin,
    resnet,
    mobilenetv2,
    efficientnet,
    xception,
    inception,
    cifar,
)

MODELS: dict[str, Variant] = {
    name: variant for family in _FAMILIES for name, variant in family.VARIANTS.items()
}


def create_model(name: str, *, num_classes: int, dtype: Any = jnp.float32, **args) -> nn.Module:
    """The network called `name`, without weights.

    `logits, out = model.apply(variables, images, train=...)`, where `images` is
    `[N, H, W, 3]` and the keys of `out` depend on `model.kind`, "cnn" or "transformer" alone.
    With `remat=True`, which all but VGGs have, gradients compute the insides of blocks anew.

    Args:
      name: a key of `MODELS`.
      num_classes: how many logits.
      dtype: what the layers compute in; parameters and logits are float32 always.
      **args: fields of the module, over the variant's; a list becomes a tuple, so that what
        went through JSON still hashes.

    Raises:
      UserError: no network or no argument has that name.
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
