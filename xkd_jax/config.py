"""The config of a run: every field with its default, and the checks that need no data.

A recipe in `configs/` calls `default_config()` and changes fields. The config is locked, so that a
misspelt field fails where it is set.
"""

import copy
import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from xkd_jax import optim
from xkd_jax.augment.multiview import MultiView
from xkd_jax.augment.policies import Augment
from xkd_jax.data.encoded import FEEDS
from xkd_jax.data.examples import ON_ERROR
from xkd_jax.errors import UserError, unknown
from xkd_jax.methods import METHODS, create_method
from xkd_jax.optim import OptimizerOptions, ScheduleOptions
from xkd_jax.probing.linear import STRENGTHS

Config = Any  # a ConfigDict, whose fields are only known at run time

DTYPES = ("auto", "float32", "bfloat16")
SMALLEST_IMAGE = 8  # pixels: below, networks have nothing left to pool

CHOICES: dict[str, Sequence[str]] = {
    "optimizer.name": optim.OPTIMIZERS,
    "adversary_optimizer.name": optim.OPTIMIZERS,
    "schedule.name": optim.SCHEDULES,
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
    "data.repeats": 1,
    "data.workers": 0,
    "augment.crop_padding": 0,
    "teacher.cache_views": 0,
}


def default_config() -> Config:
    """All fields; by default plain supervised training with the paper's optimizer.

    docs/config.md shows each field with the comment on its line or directly above it.
    """
    config = ConfigDict()
    config.seed = 0  # of the initial weights, the order of the examples and every random view
    config.epochs = 200  # a method's first phase comes in addition
    config.batch_size = 64  # over all devices
    config.dtype = "auto"  # compute dtype of the networks; auto: bfloat16 on a GPU or TPU

    # Methods to compare, trained in turn with everything else equal; empty: only `method.name`.
    config.compare = ()
    config.label_smoothing = 0.0  # of the cross-entropy with the labels, in [0, 1)
    # A method, or several joined by "+", whose losses are added; "none": the labels alone.
    config.method = ConfigDict({"name": "none"})
    for name, method in METHODS.items():
        config.method[name] = ConfigDict(dataclasses.asdict(method))

    config.update(_network_defaults())
    config.data = _data_defaults()
    config.monitor = ConfigDict(
        {
            # A labelled data set that the student's pooled features are measured on at every
            # evaluation, by k-NN and a linear probe, for training without labels; "": none.
            "name": "",
            "dir": "",  # as data.dir
            "train": "train",  # split to fit the probe to
            "test": "test",  # split to measure on
        }
    )
    config.update(_image_defaults())
    config.update(_optimization_defaults())
    config.probe = ConfigDict(
        {
            # "": off. Otherwise the job is a linear probe of the teacher: "pooled", the network's
            # own features, or a ViT's "cls", "mean" (of its patch tokens) or "both".
            "pool": "",
            "l2": STRENGTHS,  # strengths of the probe's L2 penalty to choose from
        }
    )
    config.mesh = ConfigDict(
        {
            # "replicated"; "fsdp": large weights are sharded and gathered in every step; "auto":
            # "fsdp" above 2 GiB.
            "teacher": "auto",
            "student": "replicated",  # "fsdp": weights, optimizer state and EMA are sharded
        }
    )
    config.update(_run_defaults())
    return config.lock()


def _image_defaults() -> ConfigDict:
    config = ConfigDict()
    config.image_size = 0  # side of the networks' input, pixels; 0: that of the data
    config.crop_scale = (0.08, 1.0)  # "host" feed: range of a random crop's share of the area
    # Evaluation crop as a fraction of the side: 0.875 is "resize 256, crop 224". 0: 0.875 for the
    # "host" feed; resident images are resized without a crop.
    config.crop_pct = 0.0
    config.augment = ConfigDict(
        {
            "crop_padding": 4,  # pixels added on each side before a random crop; 0: off
            "flip": True,  # whether half of the images are mirrored
        }
    )
    config.augment.update(dataclasses.asdict(Augment()))
    config.views = ConfigDict(dataclasses.asdict(MultiView()))
    return config


def _optimization_defaults() -> ConfigDict:
    config = ConfigDict()
    config.optimizer = ConfigDict(dataclasses.asdict(OptimizerOptions()))
    config.schedule = ConfigDict(dataclasses.asdict(ScheduleOptions()))
    # The paper doesn't specify it. The learning rate is constant.
    adversary = OptimizerOptions(name="adam", learning_rate=1e-3, weight_decay=0.0)
    config.adversary_optimizer = ConfigDict(dataclasses.asdict(adversary))
    config.accumulate = 1  # microbatches per batch (gradient accumulation): less memory
    config.remat = False  # recompute the student's blocks: less memory, a third more time
    # The embedding and this many first blocks of a ViT or DeiT keep the values of student.weights;
    # their gradients are not computed. 0: none.
    config.freeze = 0
    config.layer_decay = 1.0  # factor of the student's learning rate per layer, top down; 1: off
    config.ema = ConfigDict(
        {
            "decay": 0.0,  # of the student's moving average, which is evaluated and saved; 0: off
            "warmup": False,  # whether the decay grows up to `decay`, for short runs
        }
    )
    return config


def _network_defaults() -> ConfigDict:
    student = ConfigDict(
        {
            "model": "resnet18",  # by timm's name; `xkd-jax models` lists them
            "args": {},  # fields of the network's module
            # A .safetensors, .pth or .bin file of this library or timm; "timm:NAME" to download it;
            # "packaged:NAME" for weights that are installed with xkd_jax; "": random values.
            "weights": "",
        }
    )
    teacher = ConfigDict(
        {
            "model": "",  # by timm's name; "": the one in the metadata of the weights
            "args": {},  # fields of the network's module
            # A .safetensors file of this library; "timm:NAME"; "packaged:NAME"; or "random", as a
            # control.
            "weights": "",
            # A folder in which the teacher's outputs for fixed views are stored, so that they are
            # computed once, for all further runs too; "": computed in every step.
            "cache": "",
            # Each image is shown in this many fixed views in turn, one per epoch; 0: in a new view
            # every time.
            "cache_views": 0,
        }
    )
    return ConfigDict({"student": student, "teacher": teacher})


def _run_defaults() -> ConfigDict:
    return ConfigDict(
        {
            "log_every": 50,  # steps from one line of metrics.jsonl to the next
            "eval_every": 1,  # epochs from one evaluation to the next
            "checkpoint_every": 1000,  # steps; the last one is always saved
            # Steps in one program, for data that are on the devices; 0: 1 on a CPU, and on a GPU or
            # TPU as many as keep it busy, 1 for all but the smallest networks.
            "steps_per_dispatch": 0,
            "keep_checkpoints": 2,  # how many of the newest are kept
            # "": the run's folder. Otherwise a folder for the checkpoints of several runs, shared
            # by all processes: a path or any URI that Orbax supports, such as "gs://bucket/runs".
            "checkpoint_dir": "",
            # Whether attention maps, features and others are drawn at the end of a run or
            # comparison, in a single process; see docs/analysis.md.
            "pictures": False,
        }
    )


def _data_defaults() -> ConfigDict:
    return ConfigDict(
        {
            # Such as "folder:photos", "images:photos", "tfds:cifar100" or "fashion_mnist_mini".
            "name": "",
            "dir": "",  # the folder of TensorFlow Datasets; "": its default
            "train": "train",  # split to train on
            "eval": "test",  # split of the learning curves
            "test": "test",  # split of the final evaluation
            "noisy": False,  # also evaluate on corrupted test images
            "labels": True,  # False: ignore them, as "images:FOLDER" does, which has none
            "on_error": "stop",  # at damaged images, or "skip" them
            # "resident": stored on the device as uint8; "host": decoded and cropped batch by batch;
            # "auto": "resident" if the images all have the same size and fit.
            "feed": "auto",
            "repeats": 1,  # times each example appears per epoch: repeated augmentation
            "workers": 0,  # worker processes that decode for "host"; 0: threads
        }
    )


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
    for name in ("optimizer", "adversary_optimizer"):
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
    if not config.data.name:
        raise UserError("data.name is empty; name a data set such as 'tfds:cifar100'.")
    strengths: tuple[Any, ...] = tuple(config.probe.l2)
    if not strengths or not all(isinstance(s, int | float) and s > 0 for s in strengths):
        raise UserError(f"probe.l2 is {strengths}, but must be one or more numbers above 0.")
    _check_methods(config)


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


def for_method(config: Config, method: str) -> Config:
    """The config of one run of a comparison."""
    config = copy.deepcopy(config)
    config.compare = ()
    config.method.name = method
    return config


def augmentation(config: Config) -> Augment:
    """The augmentations of `config.augment` other than crop and flip.

    Raises:
      UserError: a value is out of range.
    """
    options = config.augment.to_dict()
    return Augment(**{k: v for k, v in options.items() if k not in ("crop_padding", "flip")})


def used(config: Config) -> dict[str, Any]:
    """The config as a plain dict, without the options of unused methods."""
    plain = config.to_dict()
    parts = {part for name in config.compare or (config.method.name,) for part in name.split("+")}
    plain["method"] = {k: v for k, v in plain["method"].items() if k == "name" or k in parts}
    return plain


def has_field(config: Config, name: str) -> bool:
    """Whether there is a field "a.b.c"; any name is accepted below a network's `args`."""
    first, _, rest = name.partition(".")
    if first not in config:
        return False
    return not rest or first == "args" or has_field(config[first], rest)


def missing_field(config: Config, flag: str) -> UserError:
    """The error for an override, "a.b.c", of a field that `config` doesn't have."""
    known = [name for name, _ in fields(config)]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else "."
    return UserError(f"the config has no field {flag}{hint}")


def fields(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field as (name, value), "a.b.c" for nested ones."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
