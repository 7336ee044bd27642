"""An experiment: everything that a config builds, data, networks and optimizers.

Every wrong input shows up here, before anything is compiled.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from xkd_jax import backend, data, models, weights
from xkd_jax.augment.multiview import MultiView
from xkd_jax.augment.pipeline import Pipeline
from xkd_jax.config import Config, augmentation
from xkd_jax.convert.conversion import convert, fetch
from xkd_jax.convert.files import read_checkpoint
from xkd_jax.data.encoded import open_split
from xkd_jax.data.loader import DeviceLoader, HostLoader, Order, create_loader
from xkd_jax.distiller import Distiller
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError
from xkd_jax.methods import create_method
from xkd_jax.methods.base import Method
from xkd_jax.model import Model, create_model
from xkd_jax.optim import create_learning_rate_fn, create_optimizer, layer_ids
from xkd_jax.reporting.logger import say

TIMM = "timm:"  # prefix of a name: timm's weights from the hub, converted once
RANDOM = "random"  # teacher.weights of a teacher without knowledge: a control


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """Everything that stays the same from the first step to the last.

    Attributes:
      distiller: the networks, the method, the optimizers and the training step.
      train: the split to learn from.
      evaluation: the split of the learning curves.
      learning_rate_fn: the student's learning rate as a function of the step.
      total_steps: number of steps of the run, the method's first phase included.
      config: the rest.
    """

    distiller: Distiller
    train: data.Split
    evaluation: data.Split
    learning_rate_fn: Callable[[Any], Any]
    total_steps: int
    config: Config

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.distiller.mesh

    @property
    def order(self) -> Order:
        """Which examples each step sees."""
        config = self.config
        return Order(len(self.train), config.batch_size, config.seed, config.data.repeats)

    def create_loader(self) -> DeviceLoader | HostLoader:
        """The training batches."""
        config = self.config
        crop_scale = tuple(config.crop_scale)
        return create_loader(self.train, self.mesh, self.order, crop_scale, config.data.workers)


def create_experiment(config: Config) -> Experiment:
    """Loads what `config` names and checks that it fits together.

    Raises:
      UserError: something is missing, damaged or doesn't fit.
    """
    method = create_method(config.method.name, config.method)
    mesh = sharding.create_mesh()
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
    share = mesh.size * config.accumulate
    if config.batch_size % share:
        parts = f" in accumulate={config.accumulate} parts" if config.accumulate > 1 else ""
        raise UserError(
            f"batch_size={config.batch_size} doesn't divide over the {mesh.size} devices "
            f"of the mesh{parts}; take a multiple of {share}."
        )


def assemble(
    config: Config,
    method: Method,
    mesh: Mesh,
    splits: tuple[data.Split, data.Split],
    student: Model,
    teacher: Model | None,
) -> Experiment:
    """The experiment of these parts; `splits` are those to learn from and to evaluate on.

    Raises:
      UserError: the method can't take this pair, or the optimizer's options are wrong.
    """
    train, evaluation = splits
    steps_per_epoch = len(train) // config.batch_size
    if config.layer_decay < 1:
        layer_ids(student.shapes["params"])
    first_steps = round(method.first_phase * steps_per_epoch)
    rate = create_learning_rate_fn(
        config.schedule,
        config.optimizer.learning_rate,
        config.epochs,
        steps_per_epoch,
        first_steps,
    )
    adversary_rate = optax.constant_schedule(config.adversary_optimizer.learning_rate)
    distiller = Distiller(
        teacher,
        student,
        method,
        create_optimizer(config.optimizer, rate, config.layer_decay),
        create_optimizer(config.optimizer, rate),
        create_optimizer(config.adversary_optimizer, adversary_rate),
        augment=Pipeline(
            config.augment.crop_padding,
            config.augment.flip,
            augmentation(config),
            MultiView(**config.views),
            config.label_smoothing,
        ),
        steps_per_epoch=steps_per_epoch,
        labels=train.labels,
        accumulate=config.accumulate,
        ema_decay=config.ema.decay,
        ema_warmup=config.ema.warmup,
        mesh=mesh,
        teacher_rule=config.mesh.teacher,
        student_rule=config.mesh.student,
    )
    total_steps = first_steps + steps_per_epoch * config.epochs
    return Experiment(distiller, train, evaluation, rate, total_steps, config)


def compute_dtype(name: str) -> Any:
    """What networks compute in: `config.dtype`, where "auto" is bfloat16 on a GPU or TPU."""
    if name == "auto":
        name = "float32" if backend.current() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load_split(config: Config, split: str) -> data.Split:
    """One split of the config's data set; the runs of a comparison share it."""
    options = config.data
    return _cached_open(
        options.name, split, options.dir, config.image_size, options.feed, options.on_error,
        config.crop_pct,
    )  # fmt: skip


_cached_open = functools.lru_cache(maxsize=4)(open_split)


def create_student(config: Config, train: data.Split) -> Model:
    """The student for the classes, images and statistics of `train`.

    Raises:
      UserError: there is no such network, or its weights don't fit.
    """
    args = config.student.args.to_dict()
    model = create_model(
        config.student.model,
        num_classes=train.num_classes,
        image_size=_data_size(config, train),
        mean=train.mean,
        std=train.std,
        class_names=train.class_names,
        dtype=compute_dtype(config.dtype),
        **args,
    )
    if config.remat:
        if not hasattr(model.module, "remat"):
            raise UserError(
                f"{config.student.model} has no blocks that remat could recompute; set "
                "remat=False, or more parts with accumulate."
            )
        model = dataclasses.replace(model, module=model.module.clone(remat=True))
    if not config.student.weights:
        return model
    # Weights for other classes or images are a start too: the head and the like are made new.
    converted = convert(
        read_checkpoint(_weights_file(config.student.weights)),
        config.student.model,
        num_classes=train.num_classes,
        image_size=model.image_size,
        args=args,
    )
    for change in converted.changes:
        _say_once(f"student.weights {config.student.weights}: {change}")
    weights.check_weights(
        config.student.weights, converted.variables, model.shapes, config.student.model
    )
    return dataclasses.replace(model, variables=converted.variables)


@functools.cache
def _say_once(text: str) -> None:
    say(text)  # a run makes its experiment twice


def _weights_file(name: str) -> str | Path:
    """The file of `student.weights` or `teacher.weights`; timm's are downloaded and converted."""
    return fetch(name.removeprefix(TIMM)) if name.startswith(TIMM) else weights.locate(name)


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
    variables, metadata = weights.load_weights(_weights_file(wanted.weights))
    if wanted.model and wanted.model != metadata["model"]:
        raise UserError(
            f"{wanted.weights} holds a {metadata['model']}, and teacher.model is {wanted.model}; "
            "leave teacher.model empty to take what the file holds."
        )
    return variables, metadata


def create_teacher(config: Config, train: data.Split, file: tuple[Any, dict[str, Any]]) -> Model:
    """The teacher that its file describes, with the file's own image size, mean and std.

    Raises:
      UserError: it was trained for other classes, or its tensors don't fit.
    """
    variables, metadata = file
    model = describe_teacher(config, train, metadata)
    if variables is None:
        variables = jax.device_get(jax.jit(model.init)(jax.random.key(config.seed)))
    else:
        weights.check_weights(config.teacher.weights, variables, model.shapes, metadata["model"])
    fingerprint = weights.fingerprint(variables)
    return dataclasses.replace(model, variables=variables, fingerprint=fingerprint)


def describe_teacher(config: Config, train: data.Split, metadata: dict[str, Any]) -> Model:
    """The teacher that its file's metadata describe, without its weights.

    Raises:
      UserError: it was trained for other classes.
    """
    classes = metadata.get("num_classes", train.num_classes)
    if classes != train.num_classes:
        raise UserError(
            f"{config.teacher.weights} has {classes} classes but {config.data.name} has "
            f"{train.num_classes}; fine-tune the teacher on this data set first."
        )
    module = models.create_model(
        metadata["model"],
        num_classes=classes,
        dtype=compute_dtype(config.dtype),
        **metadata["args"],
    )
    return Model(
        module,
        metadata.get("image_size", getattr(module, "img_size", _data_size(config, train))),
        tuple(metadata.get("mean", train.mean)),
        tuple(metadata.get("std", train.std)),
        name=metadata["model"],
        args=metadata["args"],
        class_names=tuple(metadata.get("class_names", ())),
    )
