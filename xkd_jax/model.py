"""A network together with what it needs to be used: preprocessing, weights, class names."""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import models, weights
from xkd_jax.augment import ops
from xkd_jax.errors import UserError
from xkd_jax.methods.base import Outputs, apply


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network, its preprocessing and, once it has them, its weights; callable on images.

    Attributes:
      module: the Flax module.
      image_size: side of its input, pixels.
      mean: per channel, of images in [0, 1].
      std: standard deviation per channel, of images in [0, 1].
      variables: `params` and `batch_stats`, or None for a model without weights.
      name: in `xkd_jax.models.MODELS`.
      args: arguments of `create_model` that differ from that network's defaults.
      class_names: by label; empty if unknown.
      fingerprint: of `variables`, see `weights.fingerprint`; empty if not needed.
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

    def __call__(self, images: Any) -> jax.Array:
        """The logits [N, K] of images [N, H, W, 3], uint8 or float in [0, 1], of any size.

        Raises:
          UserError: the model has no weights, or the images have another form.
        """
        if self.variables is None:
            raise UserError("the model has no weights; load a file, or train it first.")
        ops.check_images(images)
        return self._logits(self.variables, images)

    @functools.cached_property
    def _logits(self) -> Any:
        def logits(variables: Any, images: jax.Array) -> jax.Array:
            images = self.preprocess(ops.to_float(images))
            return apply(self.module, variables, images, train=False)[0]

        return jax.jit(logits)

    def preprocess(self, images: jax.Array) -> jax.Array:
        """float32 [N, H, W, 3] in [0, 1] to the network's input, resized and normalised."""
        return ops.normalize(ops.resize(images, self.image_size), self.mean, self.std)

    def init(self, key: jax.Array) -> Any:
        """Random variables."""
        return self.module.init(key, jnp.zeros((1, self.image_size, self.image_size, 3)))

    @functools.cached_property
    def shapes(self) -> Any:
        """The variables as `jax.ShapeDtypeStruct`."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @functools.cached_property
    def output_shapes(self) -> Outputs:
        """`out` for one image as `jax.ShapeDtypeStruct`; `grid` has its values.

        So has `side`, the side of the images in pixels, which methods get in addition.
        """
        static: dict[str, Any] = {"side": self.image_size}

        def forward(key):
            images = jnp.zeros((1, self.image_size, self.image_size, 3))
            (_, out), _ = self.module.init_with_output(key, images)
            static.update({k: v for k, v in out.items() if not isinstance(v, jax.Array)})
            return {k: v for k, v in out.items() if k not in static}

        return jax.eval_shape(forward, jax.random.key(0)) | static

    def zero_outputs(self) -> Outputs:
        """`out` for one image, with zeros in place of what the network would compute."""
        is_shape = jax.ShapeDtypeStruct
        return {
            key: jnp.zeros_like(value) if isinstance(value, is_shape) else value
            for key, value in self.output_shapes.items()
        }

    @property
    def num_classes(self) -> int:
        """The number of logits."""
        return self.output_shapes["logits"].shape[-1]

    def metadata(self) -> dict[str, Any]:
        """What a weights file records about the network, see `weights.save_weights`."""
        return {
            "model": self.name,
            "args": self.args,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def save(self, path: str | os.PathLike, **metadata: Any) -> None:
        """Writes a .safetensors that `load` reads, and that `teacher.weights` can name.

        Args:
          path: of the file.
          **metadata: further entries for the file's metadata, such as scores.
        """
        weights.save_weights(path, self.variables, self.metadata() | metadata)


def load(path: str | os.PathLike, dtype: Any = jnp.float32) -> Model:
    """The model in a .safetensors file of this library, such as a run's student.safetensors.

    Args:
      path: of the file; or "packaged:NAME" for weights that come with the package.
      dtype: what the network computes in.

    Raises:
      UserError: the file is missing, damaged, or not one of ours.
    """
    path = weights.locate(path)
    variables, metadata = weights.load_weights(path)
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
    return dataclasses.replace(model, variables=variables)


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
    """A network by its timm name, without weights.

    Args:
      name: a key of `xkd_jax.models.MODELS`; `python -m xkd_jax.models` lists them.
      num_classes: number of logits.
      image_size: side of its input, pixels; the network's usual one if not given.
      mean: per channel, of images in [0, 1]; the network's usual one if not given.
      std: likewise the standard deviation.
      class_names: by label.
      dtype: what the layers compute in; parameters and logits are always float32.
      **args: fields of the network's module, such as `width=0.5` or `img_size=96`.

    Raises:
      UserError: there is no such network or argument.
    """
    module = models.create_model(name, num_classes=num_classes, dtype=dtype, **args)
    variant = models.MODELS[name]
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
