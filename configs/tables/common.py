"""What the tables share: their forms, the networks of each, and how cells are made."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xkd_jax.config import Config
from xkd_jax.configs import cifar100_published, common, quickstart
from xkd_jax.table import Cell, Fields, Table, grid, scaled

FORMS = ("smoke", "gpu", "paper")  # besides the default, on the packaged data set
Results = Mapping[str, Mapping[str, float | None]]  # published top-1 by method, by pair


# Between Transformers, with a ViT as the teacher.
TRANSFORMERS = ("none", "logits", "irg", "deit", "minilm", "cakd")


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a form.

    Attributes:
      teachers: the fields of each teacher.
      students: the fields of each student, its optimizer's included.
      distilled: for each Transformer student, the fields of the same network with the distillation
        token that `deit` trains.
      methods: fields that a method needs with these networks.
    """

    teachers: Mapping[str, Fields]
    students: Mapping[str, Fields]
    distilled: Mapping[str, Fields]
    methods: Mapping[str, Fields]


def _resnet(width: float, **args: Any) -> Fields:
    args = {"layers": (1, 1, 1, 1), "stem": "cifar", "width": width} | args
    return {"student.model": "resnet18", "student.args": args}


# Four blocks, pooled over the patch tokens, as the packaged teacher.
_VIT_28: dict[str, Any] = common.VIT_28 | {"embed_dim": 32}
_ADAMW = {
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 2e-3,
    "optimizer.weight_decay": 0.05,
}
PACKAGED = Networks(
    {"vit": {"teacher.weights": "packaged:quickstart_teacher"}},
    {
        "resnet": _resnet(0.125),
        "resnetx2": _resnet(0.25),
        "bottleneck": {
            "student.model": "resnet50",
            "student.args": {"layers": (1, 1, 1, 1), "stem": "cifar", "width": 0.125},
        },
        "mobilenetv2": {
            "student.model": "mobilenetv2_100_32",
            "student.args": {"width": 0.25, "depth": 0.5},
        },
        "efficientnet": {
            "student.model": "efficientnet_b0_32",
            "student.args": {"width": 0.25, "depth": 0.5},
        },
        "transformer": {
            "student.model": "vit_tiny_patch16_224",
            "student.args": _VIT_28,
            **_ADAMW,
        },
    },
    {
        "transformer": {
            "student.model": "deit_tiny_distilled_patch16_224",
            "student.args": {
                "img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2,
            },
        }
    },
    {},
)  # fmt: skip
# Teachers are the students of other recipes, in those recipes' default run folders.
GPU = Networks(
    {
        "resnet56": {
            "teacher.model": "resnet56",
            "teacher.weights": "runs/cifar100_published_resnet56/student.safetensors",
        },
        "resnet32x4": {
            "teacher.model": "resnet32x4",
            "teacher.weights": "runs/cifar100_published_resnet32x4/student.safetensors",
        },
        "vit": {
            "teacher.model": "vit_small_patch4_32",
            "teacher.weights": "runs/teacher_cifar100_32/student.safetensors",
        },
        "swin": {
            "teacher.model": "swin_tiny_patch2_window4_32",
            "teacher.weights": "runs/teacher_cifar100_32_swin/student.safetensors",
        },
    },
    {
        "resnet20": {"student.model": "resnet20"},
        "resnet8x4": {
            "student.model": "resnet8x4",
            "method.review.weight": 5.0,
            "method.dkd.non_target_weight": 8.0,
        },
        "resnet18": {"student.model": "resnet18_32"},
        "resnet50": {"student.model": "resnet50_32"},
        # The published protocol's rate for MobileNets.
        "mobilenetv2": {"student.model": "mobilenetv2_100_32", "optimizer.learning_rate": 0.01},
        "efficientnet": {"student.model": "efficientnet_b0_32", "optimizer.learning_rate": 0.01},
        # The optimizer of teacher_cifar100_32.py.
        "vit_tiny": {
            "student.model": "vit_tiny_patch4_32",
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 1e-3,
            "optimizer.weight_decay": 0.05,
            "optimizer.weight_decay_skip_1d": True,
            "optimizer.clip_norm": 1.0,
            "schedule.name": "cosine",
            "schedule.warmup_epochs": 10.0,
        },
    },
    {
        "vit_tiny": {
            "student.model": "deit_tiny_distilled_patch16_224",
            "student.args": {"img_size": 32, "patch_size": 4},
        }
    },
    # Without the clipping cakd can diverge; see the pitfalls in docs/method.md.
    {"cakd": {"optimizer.clip_norm": 2.0}, "minilm": {"method.minilm.variant": "v2"}},
)


# Last-epoch top-1 with the protocol of `gpu_config`, from the README of RepDistiller and, for `ofd`
# and `review`, from that of KD++.
PUBLISHED = {
    "resnet56-resnet20": {
        "none": 69.06, "logits": 70.66, "fitnet": 69.21, "at": 70.55, "rkd": 69.61, "ab": 69.47,
        "ft": 69.84, "crd": 71.16, "ofd": 70.98, "review": 71.89,
    },
    "resnet32x4-resnet8x4": {
        "none": 72.50, "logits": 73.33, "fitnet": 73.50, "at": 73.44, "rkd": 71.90, "ab": 73.17,
        "ft": 72.86, "crd": 75.51, "ofd": 74.95, "review": 75.63,
    },
}  # fmt: skip


def paper_networks(weights: Callable[[str], str]) -> Networks:
    """The paper's networks; `weights` gives a teacher's `teacher.weights` for its name."""
    return Networks(
        {
            name: {"teacher.model": model, "teacher.weights": weights(model)}
            for name, (model, _) in common.TEACHERS.items()
        },
        {
            name: {"student.model": model, "image_size": size}
            for name, (model, size) in common.STUDENTS.items()
        },
        {
            "vit_b16": {"student.model": "deit_base_distilled_patch16_384"},
            "vit_b32": {
                "student.model": "deit_base_distilled_patch16_384",
                "student.args": {"patch_size": 32},
            },
        },
        {
            "cakd": {"optimizer.clip_norm": 2.0},  # as for GPU
            # The widths of ViT-L and ViT-B, 1024 and 768, are multiples of 64, not of 48.
            "minilm": {"method.minilm.variant": "v2", "method.minilm.relation_heads": 64},
        },
    )


def packaged_config() -> Config:
    """A minute a run on one CPU core: the quickstart's recipe for half as many epochs."""
    config = quickstart.get_config("methods")
    config.epochs = 28
    config.method.ab.first_epochs = config.method.ft.first_epochs = 4
    config.method.review.warmup_epochs = config.method.dkd.warmup_epochs = 2
    config.compare = ()
    config.method.logits.update(label_weight=1.0, weight=1.0)
    return config


def gpu_config() -> Config:
    """CIFAR-100 at 32 x 32 with the schedule of cifar100_published.py."""
    config = cifar100_published.protocol()
    config.method.review.weight = 0.6
    config.method.dkd.non_target_weight = 2.0
    config.eval_every = 10
    return config


def paper_config(recipe: Callable[[], Config]) -> Config:
    """The recipe of one of the paper's data sets, without its networks and method."""
    config = recipe()
    config.method.name = "none"
    config.teacher.update(model="", weights="")
    config.optimizer.clip_norm = 0.0
    return config


def get_config(form: str, recipe: Callable[[], Config]) -> Config:
    """The config of all cells of a table, in a form.

    Args:
      form: "" or one of `FORMS`.
      recipe: the paper's recipe.

    Raises:
      UserError: there is no such form.
    """
    common.check_variant(form, FORMS)
    if form == "gpu":
        return gpu_config()
    if form == "paper":
        return paper_config(recipe)
    config = packaged_config()
    if form == "smoke":
        common.smoke(config, epochs=2, log_every=1, train="train[:128]", test="validation[:100]")
        config.checkpoint_every = 2
        config.data.noisy = False
        config.batch_size = 32
    return config


def create_cells(networks: Networks, results: Results, tuned: bool = False) -> dict[str, Cell]:
    """A cell STUDENT-none for each student and TEACHER-STUDENT-METHOD for each other result.

    Args:
      networks: with all teachers and students of `results`.
      results: the published top-1 in percent, or None, by method, by "TEACHER-STUDENT".
      tuned: whether the loss weights and the learning rate are chosen on the evaluation split.
    """
    cells: dict[str, Cell] = {}
    for pair, methods in results.items():
        teacher, student = pair.split("-")
        for method, paper in methods.items():
            name = f"{pair}-{method}"
            fields: dict[str, Any] = {"method.name": method, **networks.teachers[teacher]}
            if method == "none":
                name = f"{student}-none"
                fields = {"method.name": method}
            fields |= {**networks.methods.get(method, {}), **networks.students[student]}
            if method == "deit":
                fields |= networks.distilled[student]
            cells[name] = Cell(fields, (), paper, f"{student}-none")
            if tuned:
                cells[name] = _tuned(cells[name], method)
    return cells


def _tuned(cell: Cell, method: str) -> Cell:
    """The cell with choices among three scales of its loss weights, then three learning rates."""
    # 0.1, the quickstart's, is below what is best for the labels alone: docs/results/cakd_audit.md.
    rate = cell.fields.get("optimizer.learning_rate", 0.2)
    stages = (grid(optimizer__learning_rate=(rate / 2, rate, rate * 2)),)
    if method != "none":
        stages = (scaled((1 / 3, 1.0, 3.0), **_weights(method)), *stages)
    fields = {**cell.fields, "optimizer.learning_rate": rate}
    return dataclasses.replace(cell, fields=fields, stages=stages)


def _weights(method: str) -> dict[str, float]:
    """The weights of a method's own terms in the packaged form, for `table.scaled`."""
    options = packaged_config().method[method]
    return {
        f"method__{method}__{name}": value
        for name, value in options.items()
        if name.endswith("weight") and name != "label_weight" and value
    }


def create_table(
    form: str, networks: Networks, packaged: Results, gpu: Results, paper: Results
) -> Table:
    """The table in one of its forms; the smoke form has the first three cells, for two seeds.

    Args:
      form: "" or one of `FORMS`.
      networks: the paper's.
      packaged: the cells of the packaged form.
      gpu: the cells of the GPU's form.
      paper: the paper's results.

    Raises:
      UserError: there is no such form.
    """
    common.check_variant(form, FORMS)
    if form == "gpu":
        cells = create_cells(GPU, gpu)
    elif form == "paper":
        cells = create_cells(networks, paper)
    else:
        cells = create_cells(PACKAGED, packaged, tuned=form != "smoke")
    if form == "smoke":
        return smoke(cells)
    return Table(cells, next(iter(cells)))


def smoke(cells: Mapping[str, Cell]) -> Table:
    """A table of a baseline and a method that chooses its weight, for two seeds."""
    (baseline, cell), (name, other) = list(cells.items())[:2]
    stage = scaled((0.3, 1.0), **_weights(other.fields["method.name"]))
    other = dataclasses.replace(other, stages=(stage,))
    return Table({baseline: cell, name: other}, baseline, seeds=(0, 1))


def gpu_results(
    methods: Iterable[str], students: Iterable[str], cross: Iterable[str]
) -> dict[str, dict[str, float | None]]:
    """The cells of the GPU's form: CNNs, Transformers that teach CNNs, and Transformers.

    Args:
      methods: between CNNs.
      students: the CNNs that Transformers teach.
      cross: the methods for them.
    """
    pairs = ("resnet56-resnet20", "resnet32x4-resnet8x4")
    return {
        **{pair: published(pair, methods) for pair in pairs},
        **{f"{t}-{s}": unpublished(cross) for t in ("vit", "swin") for s in students},
        "vit-vit_tiny": unpublished(TRANSFORMERS),
        "swin-vit_tiny": unpublished(("logits", "irg", "deit", "cakd")),
    }


def published(pair: str, methods: Iterable[str]) -> dict[str, float | None]:
    """The results in `PUBLISHED` for a pair, None for methods without one."""
    return {method: PUBLISHED[pair].get(method) for method in methods}


def unpublished(methods: Iterable[str]) -> dict[str, float | None]:
    """Results without published numbers."""
    return dict.fromkeys(methods)
