"""A network together with its preprocessing, weights and class names."""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import models, weights
from xkd_jax.augment import ops
from xkd_jax.convert.conversion import find_weights
from xkd_jax.errors import UserError, unknown
from xkd_jax.methods.base import Outputs, apply, arrays_of, split_static
from xkd_jax.models import layers


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network with its preprocessing and, optionally, weights; callable on images.

    Attributes:
      module: the Flax module.
      image_size: side of its input, pixels.
      mean: mean per channel, of images in [0, 1].
      std: standard deviation per channel, of images in [0, 1].
      variables: `params` and `batch_stats`, or None for a model without weights.
      name: its name in `xkd_jax.models.NETWORKS`.
      args: arguments of `create_model` that differ from the network's defaults.
      class_names: class names by label; empty if unknown.
      fingerprint: fingerprint of `variables`, see `weights.fingerprint`; empty if not needed.
      class_order: for each label the module's logit, if the module has another order of classes.
      sources: published weights that `variables` were made from, see `weights.list_sources`.
    """

    module: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    variables: Any = None
    name: str = ""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    fingerprint: str = ""
    class_order: tuple[int, ...] = ()
    sources: tuple[dict[str, str], ...] = ()

    def __call__(self, images: Any) -> jax.Array:
        """The logits [N, K] of images [N, H, W, 3], uint8 or float in [0, 1], of any size.

        Raises:
          UserError: the model has no weights or no classifier, or the images have the wrong shape
            or dtype.
        """
        if self.variables is None:
            raise UserError("the model has no weights; load a file or train it first.")
        ops.check_images(images)
        return self._logits(self.variables, images)

    @functools.cached_property
    def _logits(self) -> Any:
        def logits(variables: Any, images: jax.Array) -> jax.Array:
            logits, _ = self.forward(variables, self.preprocess(ops.to_float(images)))
            if logits is None:
                raise UserError("the model has no classifier; use `forward` for its features.")
            return logits

        return jax.jit(logits)

    def preprocess(self, images: jax.Array) -> jax.Array:
        """Resizes and normalises float32 images [N, H, W, 3] in [0, 1] for the network."""
        return ops.normalize(ops.resize(images, self.image_size), self.mean, self.std)

    def forward(
        self, variables: Any, images: jax.Array, *, batch_statistics: bool = False, **options: Any
    ) -> tuple[Any, Outputs]:
        """Inference on preprocessed images: the logits and `out`, in `class_order`.

        Without a classifier the logits are None.

        Args:
          variables: the module's.
          images: from `preprocess`.
          batch_statistics: whether BatchNorm uses the batch's statistics.
          **options: further arguments of the module.
        """
        if batch_statistics:
            with layers.batch_statistics():
                (logits, out), _ = apply(
                    self.module, variables, images, train=False, mutable=["batch_stats"], **options
                )
        else:
            logits, out = apply(self.module, variables, images, train=False, **options)
        if not self.class_order or logits is None:
            return logits, out
        order = jnp.asarray(self.class_order)
        heads = {key: out[key][..., order] for key in out if key.endswith("logits")}
        return logits[..., order], out | heads

    def init(self, key: jax.Array) -> Any:
        """Random variables."""
        return self.module.init(key, jnp.zeros((1, self.image_size, self.image_size, 3)))

    @functools.cached_property
    def shapes(self) -> Any:
        """The variables as `jax.ShapeDtypeStruct`s."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @functools.cached_property
    def output_shapes(self) -> Outputs:
        """`out` for one image as `jax.ShapeDtypeStruct`s; `grid` keeps its values.

        So does `side`, the side of the images in pixels, which methods get in addition.
        """
        static: dict[str, Any] = {"side": self.image_size}

        def forward(key: jax.Array) -> Outputs:
            images = jnp.zeros((1, self.image_size, self.image_size, 3))
            return self.module.init_with_output(key, images)[0][1]

        return jax.eval_shape(arrays_of(forward, static), jax.random.key(0)) | static

    def zero_outputs(self) -> Outputs:
        """`out` for one image, with all arrays zero."""
        arrays, static = split_static(self.output_shapes)
        return {key: jnp.zeros_like(value) for key, value in arrays.items()} | static

    @property
    def is_detector(self) -> bool:
        """Whether the network finds objects; others classify images."""
        return getattr(self.module, "kind", "") == "detector"

    @property
    def num_classes(self) -> int:
        """The number of logits, or of a detector's classes; 0 without a classifier."""
        if self.is_detector:
            return self.module.num_classes  # pyright: ignore[reportAttributeAccessIssue]
        outs = self.output_shapes
        return outs["logits"].shape[-1] if "logits" in outs else 0

    def metadata(self) -> dict[str, Any]:
        """The metadata of a weights file, see `weights.save_weights`."""
        return {
            "model": self.name,
            "args": self.args,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "sources": list(self.sources),
        }

    def save(self, path: str | os.PathLike, **metadata: Any) -> None:
        """Writes a .safetensors file for `load`, `teacher.weights` or `student.weights`.

        Args:
          path: path of the file.
          **metadata: further entries of the file's metadata, such as scores.
        """
        weights.save_weights(path, self.variables, self.metadata() | metadata)


def load(path: str | os.PathLike, dtype: Any = jnp.float32) -> Model:
    """The model in a .safetensors file of this library, such as a run's student.safetensors.

    Args:
      path: path of the file; or "packaged:NAME" for weights that are installed with xkd_jax; or
        "timm:NAME" for timm's, which are downloaded and converted once.
      dtype: the network's compute dtype.

    Raises:
      UserError: the file is missing, damaged, or wasn't written by this library; or the download
        fails.
    """
    name = os.fspath(path)
    path = find_weights(name)
    variables, metadata = weights.load_weights(path)
    check_metadata(path, metadata)
    model = create_model(
        metadata["model"],
        num_classes=metadata["num_classes"],
        image_size=metadata.get("image_size", 0),
        mean=metadata.get("mean", ()),
        std=metadata.get("std", ()),
        class_names=metadata.get("class_names", ()),
        dtype=dtype,
        **metadata.get("args", {}),
    )
    weights.check_weights(path, variables, model.shapes, model.name)
    sources = weights.list_sources(name, metadata)
    return dataclasses.replace(model, variables=variables, sources=sources)


def check_metadata(path: str | os.PathLike, metadata: dict[str, Any]) -> None:
    """Checks what a weights file says of its network.

    Args:
      path: of the file.
      metadata: from `weights.load_weights`; entries other than `model` may be missing.

    Raises:
      UserError: an entry is missing or has another form.
    """

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(v, int | float) for v in value)

    def names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)

    def sources(value: Any) -> bool:
        fields = {"weights", "license"}
        return isinstance(value, list) and all(
            isinstance(v, dict) and v.keys() == fields and names([*v.values()]) for v in value
        )

    forms = {
        "model": ("the name of a network", lambda value: isinstance(value, str)),
        "args": ("an object", lambda value: isinstance(value, dict)),
        "num_classes": ("an integer from 0", lambda value: type(value) is int and value >= 0),
        "image_size": ("a positive integer", lambda value: type(value) is int and value > 0),
        "mean": ("three numbers", lambda value: numbers(value) and len(value) == 3),
        "std": ("three numbers", lambda value: numbers(value) and len(value) == 3),
        "class_names": ("a list of names", names),
        "sources": ("a list of objects with weights and license", sources),
        "license": ("a name", lambda value: isinstance(value, str)),
    }
    for entry, (form, fits) in forms.items():
        value = metadata.get(entry)
        if (entry in metadata or entry == "model") and not fits(value):
            raise UserError(
                f"the metadata of {path} has {entry}={value!r}, but it must be {form}; convert or "
                "write the file again."
            )
    if metadata["model"] not in models.NETWORKS:
        raise unknown(f"network in {path}", metadata["model"], models.NETWORKS)


def create_model(
    name: str,
    *,
    num_classes: int,
    image_size: int = 0,
    mean: Any = (),
    std: Any = (),
    class_names: Any = (),
    dtype: Any = jnp.float32,
    **args: Any,
) -> Model:
    """A network by its timm name, or a detector by its torchvision name, without weights.

    Args:
      name: a key of `xkd_jax.models.MODELS`, which `python -m xkd_jax.models` lists, or of
        `xkd_jax.models.DETECTORS`.
      num_classes: number of logits, or of a detector's classes; 0: no classifier.
      image_size: side of its input, pixels; the network's default if not given.
      mean: mean per channel, of images in [0, 1]; the network's default if not given.
      std: standard deviation per channel, of images in [0, 1]; the network's default if not given.
      class_names: class names by label.
      dtype: compute dtype of the layers; parameters and logits are always float32.
      **args: fields of the network's module, such as `width=0.5` or `img_size=96`; see
        `xkd_jax.models.create_model` for a detector's.

    Raises:
      UserError: there is no such network or argument.
    """
    module = models.create_model(name, num_classes=num_classes, dtype=dtype, **args)
    variant = models.NETWORKS[name]
    size = image_size or getattr(module, "img_size", variant.image_size)
    return Model(
        module,
        size,
        tuple(mean) or variant.mean,
        tuple(std) or variant.std,
        name=name,
        args=args,
        class_names=tuple(class_names),
    )


def merge_sources(student: Model, teacher: Model | None) -> tuple[dict[str, str], ...]:
    """The published weights that a trained student is made from: its own and its teacher's."""
    found = student.sources + (teacher.sources if teacher else ())
    return tuple(source for i, source in enumerate(found) if source not in found[:i])


def freeze(model: Model, blocks: int) -> Model:
    """`model` with its embedding and its first `blocks` blocks frozen during training.

    Raises:
      UserError: it isn't a ViT, DeiT, EVA-02 or DINOv3, or has fewer blocks.
    """
    if not hasattr(model.module, "frozen"):
        raise UserError(
            f"freeze={blocks} needs a ViT, DeiT, EVA-02 or DINOv3, but {model.name} isn't."
        )
    depth = getattr(model.module, "depth", 0)
    if blocks > depth:
        raise UserError(f"freeze={blocks} is more than the {depth} blocks of {model.name}.")
    return dataclasses.replace(model, module=model.module.clone(frozen=blocks))
