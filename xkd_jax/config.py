"""The config of a run: every field with its default; validation.py checks the values.

A recipe in `configs/` calls `default_config()` and changes fields. The config is locked, so that a
misspelt field fails where it is set.
"""

import copy
import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from xkd_jax.augment.multiview import MultiView
from xkd_jax.augment.policies import Augment
from xkd_jax.errors import UserError
from xkd_jax.methods import METHODS
from xkd_jax.optim import OptimizerOptions
from xkd_jax.probing.linear import STRENGTHS
from xkd_jax.schedules import ScheduleOptions

Config = Any  # a ConfigDict, whose fields are only known at run time


def default_config() -> Config:
    """All fields; by default plain supervised training with the paper's optimizer.

    docs/config.md shows each field with the comment on its line or directly above it.
    """
    config = ConfigDict()
    config.seed = 0  # of the initial weights, the order of the examples and every random view
    # Several runs in one program, with these seeds instead of `seed`; see docs/performance.md.
    config.seeds = ()
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
    # Of the method's parameters, such as projectors, by the same schedule. name "": as `optimizer`.
    # With SGD a small weight of the loss is a small rate of the projectors; Adam undoes that.
    of_method = OptimizerOptions(name="", learning_rate=1e-3, weight_decay=0.0)
    config.method_optimizer = ConfigDict(dataclasses.asdict(of_method))
    # The paper doesn't specify it. The learning rate is constant.
    adversary = OptimizerOptions(name="adam", learning_rate=1e-3, weight_decay=0.0)
    config.adversary_optimizer = ConfigDict(dataclasses.asdict(adversary))
    config.accumulate = 1  # microbatches per batch (gradient accumulation): less memory
    config.remat = False  # recompute the student's blocks: less memory, a third more time
    # The embedding and this many first blocks of a ViT or DeiT keep the values of student.weights,
    # or the stem and this many first stages of a detector's ResNet; their gradients are not
    # computed. 0: none.
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
            # Such as "folder:photos", "images:photos", "tfds:cifar100" or "fashion_mnist_mini"; or,
            # for detectors, "coco:DIR".
            "name": "",
            "dir": "",  # the folder of TensorFlow Datasets; "": its default
            "train": "train",  # split to train on
            "eval": "test",  # split of the learning curves
            "test": "test",  # split of the final evaluation
            # Of the order of the images and their random views; -1: `seed`. With it all of `seeds`
            # see the same images, and the teacher sees them once.
            "seed": -1,
            "noisy": False,  # also evaluate on corrupted test images
            "labels": True,  # False: ignore them, as "images:FOLDER" does, which has none
            "on_error": "stop",  # at damaged images, or "skip" them
            # "resident": stored on the device as uint8; "host": decoded and cropped batch by batch;
            # "auto": "resident" if the images all have the same size and fit.
            "feed": "auto",
            "repeats": 1,  # times each example appears per epoch: repeated augmentation
            "workers": 0,  # worker processes that decode for "host"; 0: threads
            # Of "coco:DIR": pixels that the shorter side of an image is resized to, unless the
            # longer one would then exceed `max_size`; the image is padded to a square.
            "min_size": 800,
            "max_size": 1333,  # see `min_size`; the square's side is the next multiple of 32
            "max_objects": 100,  # of "coco:DIR": objects of an image to train on, the largest
        }
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
