"""The tensors of each network, and which network a checkpoint's tensors belong to."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from xkd_jax.analysis import counts
from xkd_jax.convert.resize import is_resizable
from xkd_jax.convert.rules import family_of, timm_name, torch_shape
from xkd_jax.models import DETECTORS, MODELS, NETWORKS, create_model

_RESIZING = {"img_size", "patch_size", "window_size", "pretrained_window_sizes"}
_CLASSES = 999_983  # a prime that no other axis has as length: it marks the axis of classes


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor belongs.

    Attributes:
      path: in our variables, such as "params/conv1/kernel".
      shape: in our layout; -1 stands for the number of classes, which only heads have, and -4 for
        four times as many. A detector's background is one of them.
    """

    path: str
    shape: tuple[int, ...]

    @property
    def in_head(self) -> bool:
        """Whether the shape depends on the number of classes."""
        return min(self.shape, default=0) < 0

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape in PyTorch's layout."""
        return torch_shape(self.path, self.shape)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of PyTorch's `shape` fits, for some number of classes.

        Outside the head, axes of length 1 don't count: a 1x1 convolution is a linear layer.
        """
        want = self.torch_shape
        if not self.in_head:
            return [side for side in shape if side != 1] == [side for side in want if side != 1]
        return len(shape) == len(want) and all(
            have % side == 0 if side < 0 else side == have
            for side, have in zip(want, shape, strict=True)
        )

    def count_classes(self, shape: tuple[int, ...]) -> int:
        """The number of classes of a head's tensor of PyTorch's `shape`, which `takes` accepts."""
        sides = zip(self.torch_shape, shape, strict=True)
        return next(have // -side for side, have in sides if side < 0)

    def shape_for(self, classes: int) -> tuple[int, ...]:
        """The shape, in our layout, for a number of classes."""
        return tuple(-side * classes if side < 0 else side for side in self.shape)


def get_places(
    model: str, args: Mapping[str, Any], num_classes: int = _CLASSES
) -> dict[str, Place]:
    """The place of every tensor of a network with these arguments, by timm's name.

    With `num_classes=0` the classifier has none.

    Raises:
      UserError: the name or an argument is unknown, or the arguments contradict each other.
    """
    classes = max(num_classes - background(model), 0)
    module = create_model(model, num_classes=classes, **args)
    side = getattr(module, "img_size", NETWORKS[model].image_size)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)
    flat: dict[str, Any] = traverse_util.flatten_dict(shapes, sep="/")
    family = family_of(model)
    return {
        timm_name(path, family): Place(
            path, tuple(side if side % _CLASSES else -side // _CLASSES for side in leaf.shape)
        )
        for path, leaf in flat.items()
    }


def background(model: str) -> int:
    """How many of the classes of a network's head are not the user's: 1 for detectors."""
    return int(model in DETECTORS)


def fit(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Place]) -> float:
    """The share of tensors, by name and shape, that a checkpoint and a network have in common.

    The number of classes and the shapes of resizable tensors don't count.

    Args:
      shapes: of the checkpoint's tensors, by timm's name, in PyTorch's layout.
      wanted: the network's places, by timm's name.
    """
    same = sum(
        name in shapes and (is_resizable(name) or place.takes(shapes[name]))
        for name, place in wanted.items()
    )
    return same / max(len(shapes.keys() | wanted.keys()), 1)


def recognize(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], float]:
    """The networks that a checkpoint fits best, and how well, by `fit`.

    Several networks can have the same tensors, such as DeiT and ViT; none is named if no class of
    networks has even a tenth of the names.

    Args:
      shapes: of the checkpoint's tensors, by timm's name, in PyTorch's layout.
    """
    likeness = _likeness(shapes)
    if max(likeness.values()) < 0.1:
        return [], 0.0
    bound = 0.5 * max(likeness.values())
    dims = {side for shape in shapes.values() for side in shape}

    def promise(name: str) -> tuple[float, int]:
        return likeness[MODELS[name].network], len(dims.intersection(_sizes(name)))

    scores: dict[Any, float] = {}
    sizes = None  # of a network that fits completely: those with other sizes can't
    for name in sorted(MODELS, key=promise, reverse=True):
        if likeness[MODELS[name].network] < bound or sizes not in (None, _sizes(name)):
            continue
        if _build(name) not in scores:
            scores[_build(name)] = fit(shapes, _places_of(name))
        if scores[_build(name)] == 1:
            sizes = _sizes(name)
    best = max(scores.values())
    alike = {name: 0 for name in MODELS if scores.get(_build(name)) == best}
    for name in alike:
        places = _places_of(name).items()
        alike[name] = sum(place.takes(shapes.get(key, ())) for key, place in places)
    return [name for name in alike if alike[name] == max(alike.values())], best


def equal_networks(names: Iterable[str]) -> bool:
    """Whether networks compute the same from the same tensors and images."""
    return len({create_model(name, num_classes=1) for name in names}) == 1


def _likeness(shapes: Iterable[str]) -> dict[type, float]:
    """The share of names in common for each class of network, ignoring numbers."""
    kinds = {_pattern(name) for name in shapes}
    likeness = {}
    for name, variant in MODELS.items():
        if variant.network not in likeness:
            family = family_of(name)
            theirs = {_pattern(timm_name(path, family)) for path in counts.tensors(name)}
            likeness[variant.network] = len(kinds & theirs) / len(kinds | theirs)
    return likeness


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


@functools.cache
def _build(name: str) -> nn.Module:
    """A network without the options that only affect resizable tensors."""
    fields = {field.name for field in dataclasses.fields(MODELS[name].network)}
    return create_model(name, num_classes=1, **dict.fromkeys(_RESIZING & fields, 0))


@functools.cache
def _sizes(name: str) -> tuple:
    """The numeric fields of a network that its tensors' shapes depend on."""
    fields = {field.name for field in dataclasses.fields(_build(name))}
    fields -= {"init_values", "norm_epsilon"}
    values = [getattr(_build(name), field) for field in sorted(fields)]
    leaves = jax.tree.leaves([value for value in values if not isinstance(value, nn.Module)])
    return tuple(leaf for leaf in leaves if type(leaf) in (int, float) and leaf)


@functools.cache
def _places_of(name: str) -> dict[str, Place]:
    return get_places(name, {})
