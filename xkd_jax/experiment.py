"""An experiment: everything that a config builds, such as data, networks and optimizers.

All wrong input is reported here, before anything is compiled.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from xkd_jax import backend, data, dispatch, models, weights
from xkd_jax.augment.multiview import MultiView
from xkd_jax.augment.pipeline import Pipeline
from xkd_jax.config import Config, augmentation
from xkd_jax.convert.conversion import convert, find_weights
from xkd_jax.convert.files import read_checkpoint
from xkd_jax.data.coco import check_categories
from xkd_jax.data.detection_split import DetectionSplit
from xkd_jax.data.encoded import EncodedImages, open_split
from xkd_jax.data.loader import resident_shapes
from xkd_jax.distiller import Distiller
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError
from xkd_jax.inputs import AnySplit, Inputs
from xkd_jax.methods import create_method
from xkd_jax.methods.base import Method
from xkd_jax.model import Model, check_metadata, create_model, freeze
from xkd_jax.optim import create_optimizer, layer_ids
from xkd_jax.reporting.logger import say
from xkd_jax.schedules import create_learning_rate_fn
from xkd_jax.tasks import build
from xkd_jax.teacher import classes

RANDOM = "random"  # teacher.weights of an untrained teacher, as a control


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment(Inputs):
    """Everything that is constant during a run; `Inputs` has the first three attributes.

    Attributes:
      evaluation: the split of the learning curves.
      learning_rate_fn: the student's learning rate as a function of the step.
      total_steps: number of steps of the run, including the method's first phase.
      compiled_steps: the compiled training steps, by whether they donate the state, and by the
        number of steps in one program.
    """

    evaluation: AnySplit
    learning_rate_fn: Callable[[Any], Any]
    total_steps: int
    # Not an argument: `dataclasses.replace` must not keep the step for other parts.
    compiled_steps: dict[tuple[bool, int], jax.stages.Compiled] = dataclasses.field(
        default_factory=dict, init=False
    )

    def with_seed(self, config: Config) -> "Experiment":
        """The experiment with another seed, which shares the compiled step."""
        other = dataclasses.replace(self, config=config)
        other.compiled_steps.update(self.compiled_steps)
        return other


def create_experiment(config: Config, mesh: Mesh | None = None) -> Experiment:
    """Loads everything that `config` names and checks that it fits together.

    Args:
      config: a valid config.
      mesh: the devices to train on; all if not given.

    Raises:
      UserError: something is missing, damaged or incompatible.
    """
    method = create_method(config.method.name, config.method)
    mesh = mesh or sharding.create_mesh()
    check_batch(config, mesh)
    teacher_file = load_teacher_file(config) if method.needs_teacher else None
    train = load_split(config, config.data.train, training=True)
    if config.batch_size > len(train):
        raise UserError(
            f"batch_size={config.batch_size} is larger than the {len(train)} images of "
            f"{config.data.train!r}; take a smaller batch."
        )
    if config.augment.crop_padding >= min(train.images.shape[1:3]):
        raise UserError(
            f"augment.crop_padding={config.augment.crop_padding} is not smaller than the images, "
            f"{train.images.shape[1]} pixels."
        )
    if not train.num_classes:
        method = classes.without_labels(method, config.method.name, config.data.name, _say_once)
    student = create_student(config, train, train)
    teacher = create_teacher(config, train, teacher_file) if teacher_file else None
    names = classes.Names(config.method.name, config.teacher.weights, config.data.name)
    if teacher and isinstance(train, DetectionSplit):
        teacher = build.fit_teacher(teacher, student, method, train, names)
    elif teacher and config.teacher.weights != RANDOM:
        if not train.num_classes and classes.taught_by(teacher, student, method):
            _say_once(
                f"{config.data.name} has no labels: the student learns the "
                f"{teacher.num_classes} classes of {config.teacher.weights}."
            )
            student = create_student(config, train, teacher)
        teacher = classes.fit_teacher(teacher, student, method, train, names, _say_once)
    evaluation = train  # which is not evaluated on without labels
    if train.num_classes:
        test = load_split(config, config.data.test)  # report problems now, not after training
        evaluation = load_split(config, config.data.eval)
        if isinstance(train, DetectionSplit):
            for split in (test, evaluation):
                check_categories(train, split)
    load_monitor(config)
    experiment = assemble(config, method, mesh, (train, evaluation), student, teacher)
    resident = bool(resident_shapes(train, mesh))
    dispatch.check(config.steps_per_dispatch, resident, experiment.cache is not None)
    if experiment.cache is not None:
        experiment.cache.check()
    warn(config, labelled=train.num_classes > 0)  # last: a refusal stands alone
    return experiment


def warn(config: Config, labelled: bool = True) -> None:
    """Says what is allowed but hardly meant."""
    beyond = [epoch for epoch in config.schedule.boundaries if epoch >= config.epochs]
    if config.schedule.name == "step" and beyond:
        _say_once(f"schedule.boundaries: {beyond} are after the last epoch and have no effect.")
    train, evaluation = (
        spec.strip().partition("[") for spec in (config.data.train, config.data.eval)
    )
    whole = not train[1] or not evaluation[1] or train == evaluation
    if labelled and train[0] == evaluation[0] and whole:
        _say_once(
            f"data.eval={config.data.eval} overlaps data.train={config.data.train}: the curves "
            "show accuracy on training images."
        )


def check_batch(config: Config, mesh: Mesh) -> None:
    """Checks that the batch can be split over the devices and `config.accumulate` microbatches.

    Raises:
      UserError: it can't.
    """
    share = mesh.size * config.accumulate
    if config.batch_size % share:
        parts = f" and accumulate={config.accumulate}" if config.accumulate > 1 else ""
        raise UserError(
            f"batch_size={config.batch_size} doesn't divide evenly over the {mesh.size} devices "
            f"of the mesh{parts}; take a multiple of {share}."
        )


def assemble(
    config: Config,
    method: Method,
    mesh: Mesh,
    splits: tuple[AnySplit, AnySplit],
    student: Model,
    teacher: Model | None,
) -> Experiment:
    """The experiment made of these parts; `splits` are the training and the evaluation split.

    Raises:
      UserError: the method doesn't support this pair, or the optimizer's options are invalid.
    """
    train, evaluation = splits
    steps_per_epoch = len(train) // config.batch_size
    if config.layer_decay < 1:
        layer_ids(student.shapes["params"])
    first_steps = round(method.first_phase * steps_per_epoch)
    of_method = config.method_optimizer if config.method_optimizer.name else config.optimizer
    rate, rate_of_method = (
        create_learning_rate_fn(
            config.schedule, options.learning_rate, config.epochs, steps_per_epoch, first_steps
        )
        for options in (config.optimizer, of_method)
    )
    adversary_rate = optax.constant_schedule(config.adversary_optimizer.learning_rate)
    distiller = Distiller(
        teacher,
        student,
        method,
        create_optimizer(config.optimizer, rate, config.layer_decay),
        create_optimizer(of_method, rate_of_method),
        create_optimizer(config.adversary_optimizer, adversary_rate),
        augment=Pipeline(
            config.augment.crop_padding,
            config.augment.flip,
            augmentation(config),
            MultiView(**config.views),
            config.label_smoothing,
            student.image_size if isinstance(train.images, EncodedImages) else 0,
        ),
        steps_per_epoch=steps_per_epoch,
        labels=() if isinstance(train, DetectionSplit) else train.labels,
        accumulate=config.accumulate,
        ema_decay=config.ema.decay,
        ema_warmup=config.ema.warmup,
        view_seed=config.data.seed,
        mesh=mesh,
        teacher_rule=config.mesh.teacher,
        student_rule=config.mesh.student,
        task=build.create_task(config, labelled=train.num_classes > 0),
    )
    total_steps = first_steps + steps_per_epoch * config.epochs
    return Experiment(distiller, train, config, evaluation, rate, total_steps)


def compute_dtype(name: str) -> Any:
    """The networks' compute dtype, given `config.dtype`: "auto" is bfloat16 on a GPU or TPU."""
    if name == "auto":
        name = "float32" if backend.current() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load_split(config: Config, split: str, training: bool = False) -> Any:
    """One split of the config's data set, cached for the other runs of a comparison.

    Args:
      config: the config.
      split: as in `data.train`.
      training: whether to train on it: a detector's then lacks the images without objects.

    Returns:
      A `data.Split`, or a detector's `DetectionSplit`.

    Raises:
      UserError: as for `data.load` and `coco.open_split`.
    """
    if config.student.model in models.DETECTORS:
        return build.open_split(config, split, training)
    options = config.data
    return _cached_open(
        options.name, split, options.dir, config.image_size, options.feed, options.on_error,
        config.crop_pct, options.labels,
    )  # fmt: skip


def load_monitor(config: Config) -> tuple[data.Split, data.Split] | None:
    """The splits of `config.monitor` that probes are fitted to and measured on, if it names any.

    Raises:
      UserError: it has no labels, or as for `data.load`.
    """
    if not config.monitor.name:
        return None
    config = copy.deepcopy(config)
    config.data.update(name=config.monitor.name, dir=config.monitor.dir, labels=True)
    train, test = (load_split(config, config.monitor[split]) for split in ("train", "test"))
    if not train.num_classes:
        raise UserError(f"monitor.name={config.monitor.name} has no labels; take a labelled set.")
    return train, test


_cached_open = functools.lru_cache(maxsize=6)(open_split)


def create_student(config: Config, train: AnySplit, labels: classes.Classifier) -> Model:
    """The student for the images of `train` and the classes of `labels`.

    `labels` is `train`, or the teacher if `train` has none.

    Raises:
      UserError: there is no such network, or its weights don't fit.
    """
    args = config.student.args.to_dict()
    model = create_model(
        config.student.model,
        num_classes=labels.num_classes,
        # Smaller images, such as CIFAR's, are enlarged on the device.
        image_size=args.get("img_size") or _data_size(config, train),
        mean=train.mean,
        std=train.std,
        class_names=labels.class_names,
        dtype=compute_dtype(config.dtype),
        **args,
    )
    if config.remat:
        if not hasattr(model.module, "remat"):
            raise UserError(
                f"{config.student.model} has no blocks that remat could recompute; set "
                "remat=False, and increase accumulate to save memory."
            )
        model = dataclasses.replace(model, module=model.module.clone(remat=True))
    detector = config.student.model in models.DETECTORS
    if config.freeze and not detector:
        model = freeze(model, config.freeze)
    if not config.student.weights:
        # Without weights, statistics that are worth keeping have yet to be found.
        return build.with_batch_norm(model, args) if detector else model
    # Weights for other classes or image sizes are adapted: the head, say, is re-initialised.
    checkpoint = read_checkpoint(find_weights(config.student.weights))
    if detector and build.is_backbone(checkpoint):
        return build.with_backbone(config, model, checkpoint, _say_once)
    converted = convert(
        checkpoint,
        config.student.model,
        num_classes=labels.num_classes,
        image_size=model.image_size,
        args=args,
    )
    for change in (*checkpoint.notes, *converted.changes):
        _say_once(f"student.weights {config.student.weights}: {change}")
    weights.check_weights(
        config.student.weights, converted.variables, model.shapes, config.student.model
    )
    # Normalised as the weights expect, not by the data's statistics.
    mean, std = (tuple(converted.metadata[name]) for name in ("mean", "std"))
    sources = weights.list_sources(config.student.weights, converted.metadata)
    return dataclasses.replace(
        model, variables=converted.variables, mean=mean, std=std, sources=sources
    )


@functools.cache
def _say_once(text: str) -> None:
    say(text)  # once, although a run creates its experiment twice


def _data_size(config: Config, train: AnySplit) -> int:
    return config.image_size or train.images.shape[1]


def load_teacher_file(config: Config) -> tuple[Any, dict[str, Any]]:
    """The teacher's variables (None for random ones) and metadata, checked before anything slow.

    Raises:
      UserError: the file is missing or damaged, or holds another network than `teacher.model`.
    """
    wanted = config.teacher
    if wanted.weights == RANDOM or not wanted.weights:
        if wanted.weights != RANDOM or not wanted.model:
            raise UserError(
                "the teacher has no weights; set teacher.weights to a .safetensors file, "
                "timm:NAME or packaged:NAME, or, as a control, to 'random' with teacher.model."
            )
        return None, {"model": wanted.model, "args": wanted.args.to_dict()}
    path = find_weights(wanted.weights)
    variables, metadata = weights.load_weights(path)
    check_metadata(path, metadata)
    args = json.loads(json.dumps(wanted.args.to_dict()))  # tuples as the file has them
    if config.student.model in models.DETECTORS and "img_size" in args:
        variables, metadata = build.resize_teacher(config, path, args.pop("img_size"))
    if args and args != metadata.get("args", {}):
        if wanted.model:
            raise UserError(
                f"teacher.args is not what {wanted.weights} was trained with, which its metadata "
                "says; leave teacher.args empty."
            )
        _say_once(f"teacher.args is ignored: {wanted.weights} says its own.")
    if wanted.model and wanted.model != metadata["model"]:
        raise UserError(
            f"{wanted.weights} holds a {metadata['model']}, but teacher.model is {wanted.model}; "
            "leave teacher.model empty to use the file's network."
        )
    return variables, metadata


def create_teacher(config: Config, train: AnySplit, file: tuple[Any, dict[str, Any]]) -> Model:
    """The teacher that its file describes, with the file's own image size, mean and std.

    Raises:
      UserError: its tensors don't fit.
    """
    variables, metadata = file
    model = describe_teacher(config, train, metadata)
    if variables is None:
        variables, sources = jax.device_get(jax.jit(model.init)(jax.random.key(config.seed))), ()
    else:
        weights.check_weights(config.teacher.weights, variables, model.shapes, metadata["model"])
        sources = weights.list_sources(config.teacher.weights, metadata)
    fingerprint = weights.fingerprint(variables)
    return dataclasses.replace(model, variables=variables, fingerprint=fingerprint, sources=sources)


def describe_teacher(config: Config, train: AnySplit, metadata: dict[str, Any]) -> Model:
    """The teacher that its file's metadata describes, without weights."""
    size = metadata.get("image_size", 0)
    model = create_model(
        metadata["model"],
        num_classes=metadata.get("num_classes", train.num_classes),
        image_size=size,
        mean=metadata.get("mean", train.mean),
        std=metadata.get("std", train.std),
        class_names=metadata.get("class_names", ()),
        dtype=compute_dtype(config.dtype),
        **metadata.get("args", {}),
    )
    if size or hasattr(model.module, "img_size"):
        return model
    return dataclasses.replace(model, image_size=_data_size(config, train))
