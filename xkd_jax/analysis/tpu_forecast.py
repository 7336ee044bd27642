"""Compiles a recipe for TPUs that aren't attached, and predicts memory and speed.

The real TPU compiler runs on any machine: it comes with the optional extra `pods`. Neither the data
nor the teacher's weights are needed, and nothing is executed: all numbers are the compiler's sizes
and estimates.
"""

import copy
import dataclasses
import importlib.util
import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xkd_jax import backend, data, train
from xkd_jax.analysis import hlo, memory
from xkd_jax.analysis.flops import count_flops
from xkd_jax.analysis.memory import GIB
from xkd_jax.config import Config, for_method
from xkd_jax.convert.conversion import TIMM
from xkd_jax.data.encoded import EncodedImages, choose_feed, sizes_of_images
from xkd_jax.data.loader import resident_shapes
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError
from xkd_jax.evaluate import IMAGES_PER_DEVICE, create_eval_step
from xkd_jax.experiment import (
    Experiment,
    assemble,
    check_batch,
    create_student,
    describe_teacher,
    load_teacher_file,
)
from xkd_jax.methods import create_method
from xkd_jax.models import MODELS
from xkd_jax.state import student_variables
from xkd_jax.validation import validate

EXAMPLES = "v5e:4x4, v5e:16x16, v4:2x2x1, v5p:2x2x2 or v6e:2x4"


@dataclasses.dataclass(frozen=True)
class Chip:
    """The specification of one chip, from Google's Cloud TPU documentation.

    Attributes:
      memory: bytes of HBM.
      peak: peak bfloat16 FLOP/s; a multiply-add counts as two.
      clock: Hz at which its matrix units reach the peak.
      network: bytes/s to its neighbours over all links.
    """

    memory: int
    peak: float
    clock: float
    network: float


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.05e9, 300e9),
    "v5e": Chip(16 * GIB, 197e12, 1.5e9, 200e9),
    "v5p": Chip(95 * GIB, 459e12, 1.75e9, 600e9),
    "v6e": Chip(32 * GIB, 918e12, 1.75e9, 448e9),
}

# libtpu can't query a TPU for these settings here; and several processes may compile at once.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# Classes, image side (0 if sizes vary) and split sizes of TFDS data sets that aren't prepared.
_KNOWN = {
    "cifar10": (10, 32, {"train": 50_000, "test": 10_000}),
    "cifar100": (100, 32, {"train": 50_000, "test": 10_000}),
    "imagenet2012": (1000, 0, {"train": 1_281_167, "validation": 50_000}),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted memory and time of a compiled step, per chip.

    Attributes:
      arguments: bytes of its inputs: weights, states, data, the batch.
      temporaries: bytes that the step needs temporarily.
      flops: FLOPs of all chips: two for every multiply-add of convolutions and matrix products.
      compute: seconds of computation, from the compiler's estimate of cycles.
      communication: seconds of communication, if it doesn't overlap with computation.
      collectives: the step's collectives.
    """

    arguments: int
    temporaries: int
    flops: int
    compute: float
    communication: float
    collectives: list[hlo.Collective]

    @property
    def memory(self) -> int:
        """Total bytes."""
        return self.arguments + self.temporaries

    @property
    def seconds(self) -> float:
        """Predicted time of a step."""
        return self.compute + self.communication

    def mfu(self, chips: int, chip: Chip) -> float:
        """Model FLOPs utilisation: the fraction of the chips' peak (arXiv:2204.02311)."""
        return self.flops / (self.seconds * chips * chip.peak)


def topology(name: str) -> tuple[Mesh, Chip]:
    """A mesh of the devices of topology `name`, and the specification of its chips.

    Raises:
      UserError: the TPU compiler isn't installed, or there is no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--compile_for needs the TPU compiler; install it with: pip install 'xkd_jax[pods]'."
        )
    kind = name.partition(":")[0]
    if kind not in CHIPS:
        raise UserError(f"there is no topology {name!r}; take one such as {EXAMPLES}.")
    from jax.experimental import topologies

    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # As on real hardware, both cores of a v4 chip are one device.
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        devices = topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"there is no topology {name!r} ({reason}); take one such as {EXAMPLES}."
        ) from error
    return sharding.create_mesh(devices), CHIPS[kind]


def experiment_of_shapes(config: Config, mesh: Mesh) -> Experiment:
    """Like `create_experiment`, but reads neither images nor weights.

    Raises:
      UserError: as `create_experiment`, or the data set's classes and sizes are unknown.
    """
    config = copy.deepcopy(config)
    config.student.weights = ""  # shapes don't depend on them
    check_batch(config, mesh)
    method = create_method(config.method.name, config.method)
    splits = _split_of_shapes(config, config.data.train), _split_of_shapes(config, config.data.eval)
    teacher = None
    if method.needs_teacher:
        teacher = describe_teacher(config, splits[0], _teacher_metadata(config))
        if teacher.num_classes != splits[0].num_classes:  # as `classes.fit_teacher` does
            module = teacher.module.clone(num_classes=0)
            teacher = dataclasses.replace(teacher, module=module)
    student = create_student(config, splits[0], splits[0])
    return assemble(config, method, mesh, splits, student, teacher)


def _split_of_shapes(config: Config, split: str) -> data.Split:
    options, size = config.data, config.image_size
    examples: Any
    try:
        source = data.open_source(options.name, options.dir)
        examples = source.examples(*data.parse_split(split, source.sizes))
        classes, sides = len(source.class_names), sizes_of_images(examples)
    except UserError:
        known = _KNOWN.get(options.name.removeprefix("tfds:"))
        if known is None or not options.name.startswith("tfds:"):
            raise
        classes, side, sizes = known
        _, start, stop = data.parse_split(split, sizes)
        examples, sides = range(start, stop), {(side, side)} if side else set()
    images: Any
    if choose_feed(options.feed, len(examples), sides) == "host":
        if not size:
            raise UserError(
                f"the images of {options.name} have different sizes; set image_size, such as 224."
            )
        images = EncodedImages(examples, size, config.crop_pct)
    else:
        width, height = (size, size) if len(sides) > 1 else next(iter(sides))
        shape = (len(examples), height, width, 3)
        images = np.broadcast_to(np.zeros((), np.uint8), shape)
    names = tuple(str(number) for number in range(classes))
    return data.Split(images, np.zeros(len(examples), np.int32), names, crop_pct=config.crop_pct)


def _teacher_metadata(config: Config) -> dict[str, Any]:
    """The teacher's metadata from the config or its timm name if possible, else from its file."""
    wanted = config.teacher
    if wanted.model:
        return {"model": wanted.model, "args": wanted.args.to_dict()}
    name = wanted.weights.removeprefix(TIMM).partition(".")[0]
    if wanted.weights.startswith(TIMM) and name in MODELS:
        return {"model": name, "args": {}}
    return load_teacher_file(config)[1]


def predict_train_step(experiment: Experiment, chip: Chip) -> Prediction:
    """Compiles the training step for the experiment's mesh.

    Raises:
      UserError: it doesn't fit into memory.
    """
    distiller, mesh = experiment.distiller, experiment.mesh
    args = (
        distiller.state_shapes,
        experiment.teacher_shapes(),
        resident_shapes(experiment.train, mesh),
    )
    compiled = train.compile_step(experiment, *args)
    step = partial(train.experiment_step, experiment)
    products = count_flops(step, *args, experiment.batch_shapes())
    return _predict(compiled, products, mesh, chip)


def predict_eval_step(experiment: Experiment, chip: Chip) -> Prediction:
    """Compiles the evaluation step for the experiment's mesh."""
    everywhere, over_batch = (
        sharding.replicated(experiment.mesh),
        sharding.over_batch(experiment.mesh),
    )
    count = eval_batch(experiment)
    batch = {
        "images": jax.ShapeDtypeStruct((count, *experiment.evaluation.images.shape[1:]), np.uint8),
        "labels": jax.ShapeDtypeStruct((count,), np.int32),
        "valid": jax.ShapeDtypeStruct((count,), bool),
    }
    args = (
        sharding.shaped(student_variables(experiment.distiller.state_shapes), everywhere),
        *sharding.shaped(batch, over_batch).values(),
        sharding.shaped(jax.eval_shape(lambda: jax.random.key(0)), everywhere),
    )
    step = create_eval_step(experiment.distiller.student, experiment.evaluation.crop_pct)
    return _predict(step.lower(*args).compile(), count_flops(step, *args), experiment.mesh, chip)


def eval_batch(experiment: Experiment) -> int:
    """Number of images in an evaluation step."""
    return IMAGES_PER_DEVICE * experiment.mesh.shape["data"]


def _predict(compiled: jax.stages.Compiled, products: int, mesh: Mesh, chip: Chip) -> Prediction:
    text: Any = compiled.as_text()
    sizes: Any = compiled.memory_analysis()
    found, share = hlo.collectives(text), (mesh.size - 1) / mesh.size
    # In a ring, an all-reduce sends everything twice, the other collectives once.
    sent = sum(c.bytes * c.times * (2 if c.kind == "all-reduce" else 1) for c in found)
    return Prediction(
        arguments=sizes.argument_size_in_bytes,
        temporaries=memory.temporaries(compiled),
        flops=2 * products,
        compute=hlo.cycles(text) / chip.clock,
        communication=sent * share / chip.network,
        collectives=found,
    )


def run(config: Config, name: str) -> int:
    """Compiles both steps for a topology, with each method, and prints the predictions.

    Args:
      config: a locked config.
      name: name of the topology, such as "v5e:16x16".

    Returns:
      The process's exit code.

    Raises:
      UserError: wrong input, no TPU compiler, or a step that doesn't fit into memory.
    """
    validate(config)
    jax.config.update("jax_platforms", "cpu")
    mesh, chip = topology(name)
    with backend.assume("tpu"):
        for method in config.compare or (config.method.name,):
            experiment = experiment_of_shapes(for_method(config, method), mesh)
            steps = {
                "training": (predict_train_step(experiment, chip), config.batch_size),
                "evaluation": (predict_eval_step(experiment, chip), eval_batch(experiment)),
            }
            print(f"{method} on {name}, {mesh.size} chips; compiled, not run\n")
            print(table(steps, mesh.size, chip))
            largest = max(prediction.memory for prediction, _ in steps.values())
            if largest > chip.memory:
                raise memory.too_large(
                    f"a step needs {largest / GIB:.1f} GiB, but a chip has "
                    f"{chip.memory / GIB:.0f} GiB"
                )
            print(f"\nIt fits: {largest / GIB:.1f} GiB of a chip's {chip.memory / GIB:.0f} GiB.\n")
    return 0


def table(steps: dict[str, tuple[Prediction, int]], chips: int, chip: Chip) -> str:
    """A Markdown table of predictions.

    Args:
      steps: predictions and numbers of images per step, by name.
      chips: number of chips.
      chip: the chips' specification.
    """
    predictions = [prediction for prediction, _ in steps.values()]

    def row(title: str, texts: Iterable[str]) -> str:
        return f"| {title} | {' | '.join(texts)} |"

    lines = [
        row("", steps),
        row("---", ["---:"] * len(steps)),
        row("images", (str(images) for _, images in steps.values())),
        row("arguments, GiB per chip", (f"{p.arguments / GIB:.3f}" for p in predictions)),
        row("temporaries, GiB per chip", (f"{p.temporaries / GIB:.3f}" for p in predictions)),
        row("TFLOPs on all chips", (f"{p.flops / 1e12:.2f}" for p in predictions)),
        row("compute, ms", (f"{p.compute * 1e3:.2f}" for p in predictions)),
        row("communication, ms", (f"{p.communication * 1e3:.2f}" for p in predictions)),
        row("images/s", (f"{images / p.seconds:,.0f}" for p, images in steps.values())),
        row("MFU, %", (f"{100 * p.mfu(chips, chip):.1f}" for p in predictions)),
    ]
    for kind in hlo.KINDS:
        found = [[c for c in p.collectives if c.kind == kind] for p in predictions]
        if any(found):
            texts = [
                f"{sum(c.times for c in of_step)}, {hlo.total_bytes(of_step) / 2**20:.2f} MiB"
                for of_step in found
            ]
            lines.append(row(kind, texts))
    return "\n".join(lines)
