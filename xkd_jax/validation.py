"""The checks of a config that need no data."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from xkd_jax import optim
from xkd_jax.augment.multiview import MultiView
from xkd_jax.augment.policies import Augment
from xkd_jax.config import Config, augmentation, default_config, fields, has_field
from xkd_jax.data.encoded import FEEDS
from xkd_jax.data.examples import ON_ERROR
from xkd_jax.errors import UserError, unknown
from xkd_jax.methods import create_method
from xkd_jax.models import DETECTORS
from xkd_jax.optim import OptimizerOptions
from xkd_jax.schedules import SCHEDULES, ScheduleOptions

DTYPES = ("auto", "float32", "bfloat16")
SMALLEST_IMAGE = 8  # pixels: below, networks have nothing left to pool

CHOICES: dict[str, Sequence[str]] = {
    "optimizer.name": optim.OPTIMIZERS,
    "method_optimizer.name": ("", *optim.OPTIMIZERS),
    "adversary_optimizer.name": optim.OPTIMIZERS,
    "schedule.name": SCHEDULES,
    "dtype": DTYPES,
    "data.feed": FEEDS,
    "data.on_error": ON_ERROR,
    "probe.pool": ("", "pooled", "cls", "mean", "both"),
    "mesh.teacher": ("auto", "replicated", "fsdp"),
    "mesh.student": ("replicated", "fsdp"),
}
AT_LEAST = {
    "seed": 0,
    "epochs": 1,
    "batch_size": 1,
    "log_every": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "accumulate": 1,
    "freeze": 0,
    "keep_checkpoints": 1,
    "steps_per_dispatch": 0,
    "data.seed": -1,
    "data.repeats": 1,
    "data.workers": 0,
    "data.min_size": 32,
    "data.max_size": 32,
    "data.max_objects": 1,
    "augment.crop_padding": 0,
    "teacher.cache_views": 0,
}

# Fields that detectors don't know, and their neutral values.
_NOT_OF_DETECTORS: dict[str, Any] = {
    "image_size": 0,
    "crop_pct": 0.0,
    "label_smoothing": 0.0,
    "layer_decay": 1.0,
    "seeds": (),
    "pictures": False,
    "augment.crop_padding": 0,
    "data.noisy": False,
    "data.labels": True,
    "monitor.name": "",
    "probe.pool": "",
    "teacher.cache": "",
    "teacher.cache_views": 0,
} | {f"augment.{name}": value for name, value in dataclasses.asdict(Augment()).items()}


def validate(config: Config) -> None:
    """Checks everything that can be checked without data.

    Raises:
      UserError: names the first invalid value and what would be valid.
    """
    for name, _ in fields(default_config()):
        if not has_field(config, name):
            raise UserError(f"the config lacks {name}; a recipe starts from default_config().")
    values: dict[str, Any] = dict(fields(config))
    for name, known in CHOICES.items():
        if values[name] not in known:
            raise unknown(name, values[name], known)
    for name, value in values.items():
        _check_numbers(name, value)
    for name, least in AT_LEAST.items():
        if values[name] < least:
            raise UserError(f"{name} is {values[name]}, but must be at least {least}.")
    _check_images(config)
    if config.batch_size % config.accumulate:
        raise UserError(
            f"batch_size={config.batch_size} isn't divisible by accumulate={config.accumulate}; "
            f"take a multiple of {config.accumulate}."
        )
    if not 0 <= config.label_smoothing < 1:
        raise UserError(f"label_smoothing is {config.label_smoothing}, but must be in [0, 1).")
    if not 0 <= config.ema.decay < 1:
        raise UserError(f"ema.decay is {config.ema.decay}, but must be in [0, 1); 0 turns it off.")
    MultiView(**config.views)
    augmentation(config)
    for name in ("optimizer", "method_optimizer", "adversary_optimizer"):
        try:
            OptimizerOptions(**config[name])
        except UserError as error:  # the options don't know whose they are
            raise UserError(str(error).replace("optimizer.", f"{name}.", 1)) from None
    ScheduleOptions(**config.schedule)
    if config.freeze and not config.student.weights:
        raise UserError(
            f"freeze={config.freeze} would keep random blocks as they are; set student.weights."
        )
    _check_cache(config)
    _check_seeds(config)
    if not config.data.name:
        raise UserError("data.name is empty; name a data set such as 'tfds:cifar100'.")
    _check_task(config)
    strengths: tuple[Any, ...] = tuple(config.probe.l2)
    if not strengths or not all(isinstance(s, int | float) and s > 0 for s in strengths):
        raise UserError(f"probe.l2 is {strengths}, but must be one or more numbers above 0.")
    _check_methods(config)


def _check_task(config: Config) -> None:
    """Checks that data and student are of one task, and that a detector's options have an effect.

    Raises:
      UserError: they are not, or one hasn't.
    """
    model, name = config.student.model, config.data.name
    if (model in DETECTORS) != name.startswith("coco:"):
        if model in DETECTORS:
            raise UserError(f"{model} is a detector, but {name} has no boxes; take 'coco:DIR'.")
        raise UserError(
            f"{name} has boxes, which {model} doesn't learn; take {next(iter(DETECTORS))} or "
            "another detector."
        )
    if model not in DETECTORS:
        return
    for field, neutral in _NOT_OF_DETECTORS.items():
        value = functools.reduce(getattr, field.split("."), config)
        if value != neutral:
            raise UserError(
                f"{field}={value!r} is not for detectors, whose images are resized, padded and at "
                f"most mirrored; set it to {neutral!r}."
            )
    if config.data.min_size > config.data.max_size:
        raise UserError(
            f"data.min_size={config.data.min_size} is larger than "
            f"data.max_size={config.data.max_size}; make it the smaller one."
        )
    for method in "+".join(config.compare or (config.method.name,)).split("+"):
        if create_method(method, config.method).multi_view:
            raise UserError(
                f"method {method} would crop, rotate and mask the student's view, which moves and "
                f"hides objects; set method.{method}.multi_view=False."
            )


def _check_numbers(name: str, value: Any) -> None:
    """Refuses NaN anywhere, and weights and rates of methods that make no sense."""
    last = name.rpartition(".")[2]
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{name} is nan, but must be a number.")
    if not name.startswith("method.") or not isinstance(value, int | float):
        return
    if last.endswith("weight") and value < 0:
        raise UserError(f"{name} is {value}, but must be at least 0.")
    if last.endswith("dropout") and not 0 <= value < 1:
        raise UserError(f"{name} is {value}, but must be in [0, 1).")


def _check_images(config: Config) -> None:
    size: int = config.image_size
    scale: tuple[Any, ...] = tuple(config.crop_scale)
    if size and size < SMALLEST_IMAGE:
        raise UserError(
            f"image_size is {size}, but must be at least {SMALLEST_IMAGE} pixels, or 0 for the "
            "data's own."
        )
    numeric = all(isinstance(share, int | float) for share in scale)
    if len(scale) != 2 or not numeric or not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"crop_scale is {scale}, but must be two increasing fractions in (0, 1].")
    if not 0 <= config.crop_pct <= 1:
        raise UserError(
            f"crop_pct is {config.crop_pct}, but must be in (0, 1], or 0 for the default."
        )
    if config.data.noisy and config.augment.blur > 0:
        raise UserError(
            "data.noisy evaluates on blurred images, which training must not have seen; set "
            "augment.blur=0 or data.noisy=False."
        )


def _check_cache(config: Config) -> None:
    if config.teacher.cache and not config.teacher.cache_views:
        raise UserError(
            "teacher.cache stores the teacher's outputs for fixed views of the images; set "
            "teacher.cache_views, such as 4."
        )
    if config.teacher.cache_views and (config.augment.mixup or config.augment.cutmix):
        raise UserError(
            "mixup and cutmix mix several images, but teacher.cache_views fixes the views of each "
            "one; set augment.mixup=0 and augment.cutmix=0, or teacher.cache_views=0."
        )


def _check_seeds(config: Config) -> None:
    seeds: tuple[Any, ...] = tuple(config.seeds)
    if not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds is {seeds}, but must be different integers of at least 0.")
    if seeds and config.probe.pool:
        raise UserError("a probe has no seeds, for it starts from nothing random; set seeds=().")
    names = config.compare or (config.method.name,)
    taught = any(create_method(name, config.method).needs_teacher for name in names)
    if seeds and taught and config.teacher.weights == "random":
        raise UserError(
            "seeds share one teacher, but a random one depends on the seed; give teacher.weights a "
            "file, or train the seeds one by one."
        )


def _check_methods(config: Config) -> None:
    if len(set(config.compare)) < len(config.compare):
        raise UserError(f"compare={config.compare} names a method twice; name each once.")
    if config.compare and config.method.name != "none":
        raise UserError(
            f"method.name={config.method.name} has no effect with compare={config.compare}; "
            "add it there, or set compare=() for a single run."
        )
    if config.probe.pool and (config.compare or config.method.name != "none"):
        raise UserError("a probe trains no student; leave method.name and compare as they are.")
    for name in config.compare or (config.method.name,):
        if not isinstance(name, str):
            raise UserError(f"compare must be a tuple of method names, but holds {name!r}.")
        method, parts = create_method(name, config.method), name.split("+")
        if len(parts) > 1 and "none" in parts:
            rest = "+".join(part for part in parts if part != "none")
            raise UserError(f"method {name!r} adds 'none', which has no loss; take {rest!r}.")
        if method.needs_teacher and not (config.teacher.model or config.teacher.weights):
            raise UserError(
                f"method {name} needs a teacher; set teacher.weights to a .safetensors file, "
                "timm:NAME or packaged:NAME."
            )
        if method.hard_labels and (config.augment.mixup or config.augment.cutmix):
            raise UserError(
                f"{name} needs one class per image, which mixed images don't have; set "
                "augment.mixup=0 and augment.cutmix=0."
            )
