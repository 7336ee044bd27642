"""The config of a run: every field with its default, and the checks that need no data.

A recipe in `configs/` calls `default_config()` and sets what differs. The result is locked, so that
a misspelt field fails where it is written.
"""

import dataclasses
import difflib
from typing import Any

from ml_collections import ConfigDict

from xkd_jax import optimizer
from xkd_jax.errors import UserError, unknown
from xkd_jax.methods import METHODS, create_method
from xkd_jax.views import MultiView

Config = Any  # a ConfigDict; what its fields are is known at run time only

DTYPES = ("auto", "float32", "bfloat16")


def default_config() -> Config:
    """Plain supervised training with the paper's optimizer; every field there is."""
    config = ConfigDict({"seed": 0, "epochs": 200, "batch_size": 64})
    config.dtype = "auto"  # what networks compute in; auto: bfloat16 on a GPU or TPU

    # Methods to train one after the other with everything else equal; empty: `method.name` alone.
    config.compare = ()
    config.label_weight = 1.0  # of the cross-entropy
    config.label_smoothing = 0.0
    config.method = ConfigDict({"name": "none"})
    for name, method in METHODS.items():
        config.method[name] = ConfigDict(dataclasses.asdict(method))

    # args: fields of the network's module. weights: a .safetensors, .pth or .bin, ours or timm's,
    # or "timm:NAME" to download it; "" starts at random.
    config.student = ConfigDict({"model": "resnet18", "args": {}, "weights": ""})
    # weights: a .safetensors of ours, which says what it is: model may be ""; or "timm:NAME"; or
    # "random", a control.
    config.teacher = ConfigDict({"model": "", "args": {}, "weights": ""})

    # train: what is learnt from; eval: what the curves show; test: measured once, at the end.
    config.data = ConfigDict(
        {"name": "", "dir": "", "train": "train", "eval": "test", "test": "test", "noisy": False}
    )
    config.image_size = 0  # the side that networks see, pixels; 0: the data's own
    config.augment = ConfigDict({"crop_padding": 4, "flip": True})
    config.views = ConfigDict(dataclasses.asdict(MultiView()))

    config.optimizer = ConfigDict(
        {
            "name": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 1e-4,
            "clip_norm": 0.0,  # of each part's gradient (student, method); 0: off
        }
    )
    # step: times `factor` at every one of `boundaries` (epochs).
    config.schedule = ConfigDict(
        {"name": "step", "boundaries": (100, 150), "factor": 0.1, "warmup_epochs": 0.0}
    )
    # The paper states none. Its rate stays constant.
    config.adversary_optimizer = ConfigDict(
        {
            "name": "adam",
            "learning_rate": 1e-3,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 0.0,
            "clip_norm": 0.0,
        }
    )

    config.mesh = ConfigDict({"data": -1, "model": 1})  # devices along each axis; -1: the rest
    config.log_every = 50  # steps
    config.eval_every = 1  # epochs
    config.checkpoint_every = 1000  # steps; the last step is always saved
    config.keep_checkpoints = 2
    return config.lock()


def validate(config: Config) -> None:
    """Names the first value that can't be right.

    Raises:
      UserError: in one sentence, with what would be right.
    """
    for name, _ in _fields(default_config()):
        if not has_field(config, name):
            raise UserError(f"the config lacks {name}; a recipe starts from default_config().")
    for field, value, known in (
        ("optimizer.name", config.optimizer.name, optimizer.OPTIMIZERS),
        ("adversary_optimizer.name", config.adversary_optimizer.name, optimizer.OPTIMIZERS),
        ("schedule.name", config.schedule.name, optimizer.SCHEDULES),
        ("dtype", config.dtype, DTYPES),
    ):
        if value not in known:
            raise unknown(field, value, known)
    positive = ("epochs", "batch_size", "log_every", "eval_every", "checkpoint_every")
    for field in (*positive, "keep_checkpoints"):
        if config[field] < 1:
            raise UserError(f"{field} is {config[field]}, but must be at least 1.")
    if not 0 <= config.label_smoothing < 1:
        raise UserError(f"label_smoothing is {config.label_smoothing}, but must be in [0, 1).")
    MultiView(**config.views)
    if not config.data.name:
        raise UserError("data.name is empty; name a data set such as 'tfds:cifar100'.")
    if config.compare and config.method.name != "none":
        raise UserError(
            f"method.name={config.method.name} has no effect beside compare={config.compare}; "
            "add it there, or set compare=() for one run."
        )
    for name in config.compare or (config.method.name,):
        if not isinstance(name, str):
            raise UserError(f"compare must be a tuple of method names, but holds {name!r}.")
        method = create_method(name, config.method)
        if method.needs_teacher and not (config.teacher.model or config.teacher.weights):
            raise UserError(f"method {name} needs a teacher; set teacher.weights to its file.")


def used(config: Config) -> dict[str, Any]:
    """The config as plain data, without the options of methods that this run doesn't use."""
    plain = config.to_dict()
    parts = {part for name in config.compare or (config.method.name,) for part in name.split("+")}
    plain["method"] = {k: v for k, v in plain["method"].items() if k == "name" or k in parts}
    return plain


def has_field(config: Config, name: str) -> bool:
    """Whether there is a field "a.b.c"; networks' `args` are open, so any may be there."""
    first, _, rest = name.partition(".")
    if first not in config:
        return False
    return not rest or first == "args" or has_field(config[first], rest)


def missing_field(config: Config, flag: str) -> UserError:
    """The error for an override, "a.b.c", of a field that `config` doesn't have."""
    known = [name for name, _ in _fields(config)]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else "."
    return UserError(f"the config has no field {flag}{hint}")


def _fields(config: Config, prefix: str = ""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
