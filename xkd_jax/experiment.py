"""What a run trains, made from its config: data, networks, method, optimizers.

Every wrong input shows here, before anything is compiled.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from xkd_jax import backend, data
from xkd_jax.augment.multiview import MultiView
from xkd_jax.augment.policies import Augment
from xkd_jax.config import Config, augmentation
from xkd_jax.convert.conversion import convert, fetch
from xkd_jax.convert.files import read_checkpoint
from xkd_jax.data.encoded import open_split
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError
from xkd_jax.methods import check_pair, create_method
from xkd_jax.methods.base import Method, Outputs
from xkd_jax.models import create_model
from xkd_jax.optim import create_learning_rate_fn, create_optimizer, layer_ids
from xkd_jax.reporting.logger import say
from xkd_jax.weights import check_weights, fingerprint, load_weights, locate

TIMM = "timm:"  # before a name: timm's weights from the hub, converted once
RANDOM = "random"  # teacher.weights of a teacher that knows nothing: a control


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, how its images are prepared, and the variables that it starts from.

    Attributes:
      module: the Flax module.
      image_size: the side that it sees, pixels.
      mean: per channel, of images in [0, 1].
      std: likewise.
      variables: host arrays, or None for those that `module.init` makes.
      fingerprint: of `variables`.
    """

    module: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    variables: Any = None
    fingerprint: str = ""

    def init(self, key: jax.Array) -> Any:
        """Random variables."""
        return self.module.init(key, jnp.zeros((1, self.image_size, self.image_size, 3)))

    def output_shapes(self) -> Outputs:
        """`out` for one image, shapes in place of arrays; `grid` is itself."""
        static = {}

        def forward(key):
            images = jnp.zeros((1, self.image_size, self.image_size, 3))
            (_, out), _ = self.module.init_with_output(key, images)
            static.update({k: v for k, v in out.items() if not isinstance(v, jax.Array)})
            return {k: v for k, v in out.items() if k not in static}

        return jax.eval_shape(forward, jax.random.key(0)) | static


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that stays the same from the first step to the last.

    Attributes:
      mesh: the devices.
      train: the split to learn from.
      evaluation: the split of the learning curves.
      student: what is trained.
      teacher: what it learns from, if the method needs it.
      method: how.
      optimizers: of "student", "method" and "adversary".
      learning_rate_fn: of the student.
      config: the rest.
      augment: the strong augmentation.
      views: the multi-view generator's strengths.
      steps_per_epoch: whole batches.
      total_steps: of the run, the method's first phase included.
    """

    mesh: Mesh
    train: data.Split
    evaluation: data.Split
    student: Network
    teacher: Network | None
    method: Method
    optimizers: dict[str, optax.GradientTransformation]
    learning_rate_fn: Callable[[Any], Any]
    config: Config
    augment: Augment
    views: MultiView
    steps_per_epoch: int
    total_steps: int


def create_experiment(config: Config) -> Experiment:
    """Loads what `config` names and checks that it fits together.

    Raises:
      UserError: something is missing, damaged or doesn't fit.
    """
    method = create_method(config.method.name, config.method)
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.model)
    check_batch(config, mesh)
    teacher_file = load_teacher_file(config) if method.needs_teacher else None
    train = load_split(config, config.data.train)
    if config.batch_size > len(train):
        raise UserError(
            f"batch_size={config.batch_size} is larger than the {len(train)} images of "
            f"{config.data.train!r}; take a smaller batch."
        )
    student = create_student(config, train)
    teacher = create_teacher(config, train, teacher_file) if teacher_file else None
    load_split(config, config.data.test)  # what is wrong with it must not show at the end
    splits = train, load_split(config, config.data.eval)
    return assemble(config, method, mesh, splits, student, teacher)


def check_batch(config: Config, mesh: Mesh) -> None:
    """Refuses a batch that doesn't divide.

    Raises:
      UserError: over the devices, or into the parts of `config.accumulate`.
    """
    share = mesh.shape["data"] * config.accumulate
    if config.batch_size % share:
        parts = f" in accumulate={config.accumulate} parts" if config.accumulate > 1 else ""
        raise UserError(
            f"batch_size={config.batch_size} doesn't divide over the {mesh.shape['data']} devices "
            f"of the mesh{parts}; take a multiple of {share}."
        )


def assemble(
    config: Config,
    method: Method,
    mesh: Mesh,
    splits: tuple[data.Split, data.Split],
    student: Network,
    teacher: Network | None,
) -> Experiment:
    """The experiment of these parts; `splits` are those to learn from and to evaluate on.

    Raises:
      UserError: the method can't take this pair, or the optimizer's options are wrong.
    """
    train, evaluation = splits
    if teacher:
        check_pair(method, teacher.output_shapes(), student.output_shapes())
    steps_per_epoch = len(train) // config.batch_size
    if config.layer_decay < 1:
        layer_ids(jax.eval_shape(student.init, jax.random.key(0))["params"])
    first_steps = round(method.first_phase * steps_per_epoch)
    rate = create_learning_rate_fn(
        config.schedule,
        config.optimizer.learning_rate,
        config.epochs,
        steps_per_epoch,
        first_steps,
    )
    adversary_rate = optax.constant_schedule(config.adversary_optimizer.learning_rate)
    return Experiment(
        mesh=mesh,
        train=train,
        evaluation=evaluation,
        student=student,
        teacher=teacher,
        method=method,
        optimizers={
            "student": create_optimizer(config.optimizer, rate, config.layer_decay),
            "method": create_optimizer(config.optimizer, rate),
            "adversary": create_optimizer(config.adversary_optimizer, adversary_rate),
        },
        learning_rate_fn=rate,
        config=config,
        augment=augmentation(config),
        views=MultiView(**config.views),
        steps_per_epoch=steps_per_epoch,
        total_steps=first_steps + steps_per_epoch * config.epochs,
    )


def compute_dtype(name: str) -> Any:
    """What networks compute in: `config.dtype`, where "auto" is bfloat16 on a GPU or TPU."""
    if name == "auto":
        name = "float32" if backend.current() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load_split(config: Config, split: str) -> data.Split:
    """One split of the config's data set; runs of one comparison share it."""
    options = config.data
    return _cached_open(
        options.name, split, options.dir, config.image_size, options.feed, options.on_error,
        config.crop_pct,
    )  # fmt: skip


_cached_open = functools.lru_cache(maxsize=4)(open_split)


def create_student(config: Config, train: data.Split) -> Network:
    """The student for `train`'s classes, images and statistics."""
    module = create_model(
        config.student.model,
        num_classes=train.num_classes,
        dtype=compute_dtype(config.dtype),
        **config.student.args.to_dict(),
    )
    if config.remat:
        if not hasattr(module, "remat"):
            raise UserError(
                f"{config.student.model} has no blocks that remat could compute anew; set "
                "remat=False, or more parts with accumulate."
            )
        module = module.clone(remat=True)
    network = Network(module, _data_size(config, train), train.mean, train.std)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    if not config.student.weights:
        return network
    # Weights for other classes or images are a start too: the head and the like are made anew.
    converted = convert(
        read_checkpoint(_weights_file(config.student.weights)),
        config.student.model,
        num_classes=train.num_classes,
        image_size=network.image_size,
        args=config.student.args.to_dict(),
    )
    for change in converted.changes:
        _say_once(f"student.weights {config.student.weights}: {change}")
    check_weights(config.student.weights, converted.variables, shapes, config.student.model)
    return dataclasses.replace(network, variables=converted.variables)


@functools.cache
def _say_once(text: str) -> None:
    say(text)  # a run makes its experiment twice


def _weights_file(weights: str) -> str | Path:
    """The file of `student.weights` or `teacher.weights`, made first if they are timm's."""
    return fetch(weights.removeprefix(TIMM)) if weights.startswith(TIMM) else locate(weights)


def _data_size(config: Config, train: data.Split) -> int:
    return config.image_size or train.images.shape[1]


def load_teacher_file(config: Config) -> tuple[Any, dict[str, Any]]:
    """The teacher's variables and metadata, before anything slow.

    Raises:
      UserError: the file is missing or damaged, or holds another network than `teacher.model`.
    """
    wanted = config.teacher
    if wanted.weights == RANDOM or not wanted.weights:
        if wanted.weights != RANDOM or not wanted.model:
            raise UserError(
                "the teacher has no weights; set teacher.weights to a .safetensors file, to "
                "timm:NAME, or to 'random', with teacher.model, for a control."
            )
        return None, {"model": wanted.model, "args": wanted.args.to_dict()}
    variables, metadata = load_weights(_weights_file(wanted.weights))
    if wanted.model and wanted.model != metadata["model"]:
        raise UserError(
            f"{wanted.weights} holds a {metadata['model']}, and teacher.model is {wanted.model}; "
            "leave teacher.model empty to take what the file holds."
        )
    return variables, metadata


def create_teacher(config: Config, train: data.Split, file: tuple[Any, dict[str, Any]]) -> Network:
    """The teacher that its file describes, with the file's own image size, mean and std.

    Raises:
      UserError: it was trained for other classes, or its tensors don't fit.
    """
    variables, metadata = file
    network = describe_teacher(config, train, metadata)
    if variables is None:
        variables = jax.device_get(jax.jit(network.init)(jax.random.key(config.seed)))
    else:
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        check_weights(config.teacher.weights, variables, shapes, metadata["model"])
    return dataclasses.replace(network, variables=variables, fingerprint=fingerprint(variables))


def describe_teacher(config: Config, train: data.Split, metadata: dict[str, Any]) -> Network:
    """The teacher that its file's metadata describe, without its weights.

    Raises:
      UserError: it was trained for other classes.
    """
    classes = metadata.get("num_classes", train.num_classes)
    if classes != train.num_classes:
        raise UserError(
            f"{config.teacher.weights} tells {classes} classes apart, and {config.data.name} has "
            f"{train.num_classes}; fine-tune the teacher on this data set first."
        )
    module = create_model(
        metadata["model"],
        num_classes=classes,
        dtype=compute_dtype(config.dtype),
        **metadata["args"],
    )
    return Network(
        module,
        metadata.get("image_size", getattr(module, "img_size", _data_size(config, train))),
        tuple(metadata.get("mean", train.mean)),
        tuple(metadata.get("std", train.std)),
    )
