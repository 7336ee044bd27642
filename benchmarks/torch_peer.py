"""The training steps of a recipe against the same steps in PyTorch, and against timm's own.

python benchmarks/torch_peer.py [--config configs/quickstart.py] [--config.FIELD=VALUE ...]
  [--steps 30] [--compile]

Needs the extra `parity`. It compares `none`, `logits` and `cakd`, or those of them that
`config.compare` lists. JAX and PyTorch steps alternate in this process, on the same images, with
the same number of threads, in the recipe's dtype. The PyTorch side starts from the JAX side's
weights: timm's networks, channels-last images, fused optimizers, views batched over the images;
on a GPU with autocast if the dtype is bfloat16. "timm" is the task that timm's trainer uses for
`--kd-distill-type logit` or `feature`, with the same views and optimizer; beside the latter is the
same loss in JAX, cakd's term on pooled features alone.
"""

import contextlib
import dataclasses
import importlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch_networks
import torch_views
from absl import flags
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from xkd_jax.augment.policies import Augment
from xkd_jax.bench.parts import whole_step
from xkd_jax.cli import train as command
from xkd_jax.cli.command import guard
from xkd_jax.config import Config, for_method
from xkd_jax.errors import UserError
from xkd_jax.experiment import Experiment, create_experiment
from xkd_jax.methods.align import choose_stage
from xkd_jax.methods.cakd import CAKD
from xkd_jax.methods.logits import Logits
from xkd_jax.reporting.document import format_markdown
from xkd_jax.state import student_variables
from xkd_jax.train import init_state

METHODS = ("none", "logits", "cakd")
POOLED = "cakd, pooled term alone"
WARMUP = 6  # untimed steps of each; every fifth step updates the adversary
PAUSE = 0.02  # seconds before each step, in which the other side's waiting threads go to sleep
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_STEPS = flags.DEFINE_integer("steps", 30, "Timed steps of each method and side.")
_COMPILE = flags.DEFINE_bool("compile", False, "Compile PyTorch's networks with torch.compile.")


def create(config: Config, method: str) -> Experiment:
    """The experiment of a method; images of another size than the networks' become noise."""
    config = for_method(config, method)
    experiment = create_experiment(config)
    distiller = experiment.distiller
    models = [model for model in (distiller.student, distiller.teacher) if model is not None]
    sides = {model.image_size for model in models}
    if len(sides) > 1:
        raise UserError(f"the peer's networks must have one image size, not {sorted(sides)}.")
    side = sides.pop()
    images = experiment.train.images
    if images.shape[1] != side:
        shape = (len(images), side, side, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        train = dataclasses.replace(experiment.train, images=images)
        experiment = dataclasses.replace(experiment, train=train)
    return experiment


class Peer:
    """The PyTorch side of an experiment.

    `experiment` has a ViT or single-window Swin teacher, a CNN student of timm's, one of `METHODS`,
    and no augmentation but crop, flip and the multi-view generator. `timm_task` is "", "logit" or
    "feature", for timm's own loss instead of the method's.
    """

    def __init__(self, experiment: Experiment, timm_task: str = "", compiled: bool = False):
        _check(experiment)
        self.experiment, self.method, self.steps = experiment, experiment.distiller.method, 0
        self.images = torch.from_numpy(np.array(experiment.train.images)).to(DEVICE)
        self.labels = torch.from_numpy(np.array(experiment.train.labels)).long().to(DEVICE)
        self.indices = torch.randperm(len(experiment.train))[: experiment.config.batch_size]
        state = init_state(experiment)
        student, teacher = experiment.distiller.student, experiment.distiller.teacher
        network = torch_networks.create_network(student, student_variables(state))
        self.student = network.to(DEVICE, memory_format=torch.channels_last).train()
        self.trained = [list(self.student.parameters())]  # each part is clipped by itself
        self.teacher: Any = None
        self.task: Any = None
        if teacher:
            network = torch_networks.create_network(teacher, teacher.variables)
            self.teacher = torch_networks.Teacher(network).to(DEVICE)
        if isinstance(self.method, CAKD) and not timm_task:
            self._create_projectors(self.method, state)
        if timm_task:
            self.task = _create_task(timm_task, self.student, network, self.method)
            self.trained = [[p for p in self.task.parameters() if p.requires_grad]]
        self.forward = self.student.forward_intermediates
        if compiled:
            self.forward = torch.compile(self.forward)
            if self.teacher is not None:
                self.teacher.network.forward_features = torch.compile(
                    self.teacher.network.forward_features
                )
        options = experiment.config.optimizer
        self.optimizer = OPTIMIZERS[options.name](itertools.chain(*self.trained), options)

    def _create_projectors(self, method: CAKD, state: Any) -> None:
        distiller = self.experiment.distiller
        assert distiller.teacher
        teacher, student = distiller.teacher.output_shapes, distiller.student.output_shapes
        stage = choose_stage(student, teacher["grid"], method.student_stage)
        if student[stage].shape[1:3] != tuple(teacher["grid"]):
            raise UserError("the peer doesn't resize maps; set another image size.")
        channels, width = student[stage].shape[-1], teacher["tokens"].shape[-1]
        self.tap = int(stage.removeprefix("stage"))
        self.pca = torch_networks.PCAProjector(channels, width, teacher["query"].shape[1])
        self.gl = torch_networks.GLProjector(channels, width, teacher["grid"], method.token_dropout)
        self.pooled = nn.Linear(student["pooled"].shape[-1], teacher["pooled"].shape[-1])
        self.discriminator = torch_networks.Discriminator(width)
        params = state.params["method"]
        for name, module in (("pca", self.pca), ("gl", self.gl), ("pooled", self.pooled)):
            module.to(DEVICE)
            if name in params:
                torch_networks.copy_weights(module, params[name])
                self.trained.append(list(module.parameters()))
        # The method's parameters are one part.
        self.trained[1:] = [list(itertools.chain(*self.trained[1:]))]
        if method.adversarial_weight:
            torch_networks.copy_weights(self.discriminator, state.params["adversary"])
        self.discriminator.to(DEVICE)
        rate = self.experiment.config.adversary_optimizer.learning_rate
        self.adam = torch.optim.Adam(self.discriminator.parameters(), rate, fused=True)

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This step's images as the teacher and the student see them, [N, 3, H, W]."""
        distiller = self.experiment.distiller
        augment, teacher, student = distiller.augment, distiller.teacher, distiller.student
        images = self.images[self.indices]
        images = torch_views.crop_flip(images, augment.crop_padding, augment.flip)
        images = images.permute(0, 3, 1, 2).float().div_(255)
        views = (images, images)
        if self.method.multi_view:
            views = torch_views.multi_view(images, augment.views)
        student_view = torch_views.normalize(views[1], student.mean, student.std)
        if teacher is None:
            return images, student_view
        return torch_views.normalize(views[0], teacher.mean, teacher.std), student_view

    def step(self) -> dict[str, Any]:
        """One training step; returns its metrics."""
        config = self.experiment.config
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.experiment.learning_rate_fn(self.steps))
        labels = self.labels[self.indices]
        teacher_view, student_view = self.views()
        half = config.dtype == "bfloat16"
        with torch.autocast(DEVICE.type, torch.bfloat16) if half else contextlib.nullcontext():
            loss, metrics, judged = self._loss(teacher_view, student_view, labels)
        self.optimizer.zero_grad()
        loss.backward()
        if config.optimizer.clip_norm:
            for part in self.trained:
                nn.utils.clip_grad_norm_(part, config.optimizer.clip_norm, foreach=True)
        self.optimizer.step()
        if judged and self.steps % self.method.adversary_period == 0:
            metrics |= self._update_discriminator(*judged)
        self.steps += 1
        return {name: value.detach() for name, value in metrics.items()}

    def _loss(self, teacher_view: Any, student_view: Any, labels: Any) -> tuple[Any, dict, Any]:
        """The loss, its terms, and what the adversary judges."""
        if self.task is not None:
            loss = self.task(student_view, labels)["loss"]
            return loss, {"loss": loss}, None
        teacher = self.teacher(teacher_view) if self.teacher else {}
        last, maps = self.forward(student_view)
        logits = self.student.forward_head(last)
        loss = label = F.cross_entropy(logits, labels)
        metrics, judged = {"label_loss": label, "accuracy": accuracy(logits, labels)}, None
        if isinstance(self.method, Logits):
            softened = F.log_softmax(logits / self.method.temperature, dim=1)
            wanted = self.teacher.head(teacher["features"])
            target = F.log_softmax(wanted / self.method.temperature, dim=1)
            kl = F.kl_div(softened, target, reduction="batchmean", log_target=True)
            metrics["logits_kl"] = self.method.temperature**2 * kl
            loss = self.method.label_weight * label + self.method.weight * metrics["logits_kl"]
        elif isinstance(self.method, CAKD):
            added, terms, judged = self._distil(self.method, maps[self.tap], last, teacher)
            loss, metrics = loss + added, metrics | terms
        return loss, metrics | {"loss": loss}, judged

    def _distil(self, method: CAKD, features: Any, last: Any, teacher: Any) -> Any:
        terms, judged = {}, None
        if method.attention_weight or method.value_weight:
            qkv = self.pca(features)
            wanted = teacher["qkv"]
            mixed: Any = torch.where(self.draw_mask(qkv), wanted, qkv)
            attended = (
                F.scaled_dot_product_attention(*mixed),
                F.scaled_dot_product_attention(*wanted, attn_mask=teacher["bias"]),
            )
            relations = [v @ v.mT / v.shape[-1] ** 0.5 for v in (qkv[2], wanted[2])]
            terms["attention"] = method.attention_weight, F.mse_loss(*attended)
            terms["value_relation"] = method.value_weight, F.mse_loss(*relations)
        if method.token_weight or method.adversarial_weight:
            tokens = self.gl(features)
            terms["tokens"] = method.token_weight, F.mse_loss(tokens, teacher["tokens"])
        if method.adversarial_weight:
            self.discriminator.requires_grad_(False)
            fooled = F.logsigmoid(-self.discriminator(tokens)).mean()
            terms["generator"] = method.adversarial_weight, fooled
            judged = teacher["tokens"], tokens.detach()
        if method.pooled_weight:
            target = self.teacher.head(teacher["features"], pre_logits=True)
            variance = target.sub(target.mean(0)).square().mean().clamp(min=1e-6)
            distance = F.mse_loss(self.pooled(last.mean((2, 3))), target)
            terms["pooled"] = method.pooled_weight, distance / variance
        terms = {name: (weight, term) for name, (weight, term) in terms.items() if weight}
        loss = sum(weight * term for weight, term in terms.values())
        return loss, {name: term for name, (_, term) in terms.items()}, judged

    def draw_mask(self, qkv: torch.Tensor) -> torch.Tensor:
        """Which elements of Q, K and V [3, N, H, T, d] are the teacher's (Eq. 3)."""
        return torch.rand_like(qkv) < 0.5

    def _update_discriminator(self, teacher: torch.Tensor, student: torch.Tensor) -> dict[str, Any]:
        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(teacher), self.discriminator(student)
        loss = -(F.logsigmoid(real) + F.logsigmoid(-fake)).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return {"discriminator": loss, "discriminator_accuracy": right}


def _check(experiment: Experiment) -> None:
    """Refuses what the peer doesn't have.

    Raises:
      UserError: it would compute something else than the JAX side.
    """
    method, config = experiment.distiller.method, experiment.config
    options = isinstance(method, CAKD) and (
        method.generator, method.adversary_clock, method.teacher_block,
    )  # fmt: skip
    views = experiment.distiller.augment.views.geometry
    only_crops = experiment.distiller.augment.policy == Augment() and not config.label_smoothing
    if config.method.name not in METHODS or options not in (False, ("saturating", "step", -1)):
        raise UserError(f"the peer has {', '.join(METHODS)}, the latter with its default options.")
    if not only_crops or (method.multi_view and views != "shared"):
        raise UserError("the peer has crop, flip and the multi-view generator only.")
    if config.optimizer.name not in OPTIMIZERS or config.optimizer.weight_decay_skip_1d:
        raise UserError(f"the peer has {', '.join(OPTIMIZERS)}, and decays all parameters.")


OPTIMIZERS = {
    "sgd": lambda trained, o: torch.optim.SGD(
        trained, o.learning_rate, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov,
        fused=True,
    ),
    "adamw": lambda trained, o: torch.optim.AdamW(
        trained, o.learning_rate, tuple(o.betas), weight_decay=o.weight_decay, fused=True
    ),
}  # fmt: skip


def _create_task(kind: str, student: Any, teacher: Any, method: Any) -> Any:
    """timm's distillation task, in training mode."""
    torch_networks.import_timm()
    tasks = importlib.import_module("timm.task")
    options: dict[str, Any] = {"criterion": nn.CrossEntropyLoss(), "verbose": False}
    if kind == "logit":
        options |= {"distill_loss_weight": method.weight, "temperature": method.temperature}
        task = tasks.LogitDistillationTask(student, teacher, **options)
    else:
        task = tasks.FeatureDistillationTask(student, teacher, distill_loss_weight=1.0, **options)
    task.teacher.requires_grad_(False)
    return task.to(DEVICE).train()


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of images whose class has the highest logit."""
    return (logits.argmax(1) == labels).float().mean()


def measure(functions: dict[Any, Callable[[], Any]], steps: int) -> dict[Any, float]:
    """The median milliseconds of each function; calls alternate, and the first don't count."""
    seconds = {name: [] for name in functions}
    for _ in range(WARMUP + steps):
        for name, function in functions.items():
            time.sleep(PAUSE)
            begun = time.perf_counter()
            jax.block_until_ready(function())
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    return {name: 1e3 * statistics.median(times[WARMUP:]) for name, times in seconds.items()}


def compare(config: Config, steps: int, compiled: bool) -> list[list[str]]:
    """The rows of the table, its head first: the milliseconds of each step, and the ratios."""
    methods = [name for name in METHODS if name in (config.compare or [config.method.name])]
    with config.unlocked():
        config.compare = ()
    functions: dict[tuple[str, str], Callable[[], Any]] = {}
    for method in methods:
        experiment = create(config, method)
        functions[method, "JAX"] = whole_step(experiment).run
        functions[method, "PyTorch"] = Peer(experiment, compiled=compiled).step
        if method == "logits":
            functions[method, "timm"] = Peer(experiment, "logit", compiled).step
    if "cakd" in methods:
        terms = ("attention", "value", "token", "adversarial")
        weights = {f"{term}_weight": 0.0 for term in terms}
        config.method.cakd.update(multi_view=False, pooled_weight=1.0, **weights)
        experiment = create(config, "cakd")
        functions[POOLED, "JAX"] = whole_step(experiment).run
        functions[POOLED, "PyTorch"] = Peer(experiment, compiled=compiled).step
        functions[POOLED, "timm"] = Peer(experiment, "feature", compiled).step
    found = measure(functions, steps)
    rows = [["method", "JAX ms", "PyTorch ms", "JAX / PyTorch", "timm ms", "JAX / timm"]]
    for method in dict.fromkeys(method for method, _ in functions):
        row, ours = [method, f"{found[method, 'JAX']:.1f}"], found[method, "JAX"]
        for side in ("PyTorch", "timm"):
            theirs = found.get((method, side))
            row += ["", ""] if theirs is None else [f"{theirs:.1f}", f"{ours / theirs:.2f}"]
        rows.append(row)
    return rows


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not any(argument.startswith("--config") for argument in arguments):
        arguments = ["--config=configs/quickstart.py", *arguments]
    config, _ = command.parse(arguments)
    threads = len(os.sched_getaffinity(0))  # as many as XLA uses
    torch.set_num_threads(threads)
    rows = compare(config, _STEPS.value, _COMPILE.value)
    timm = torch_networks.import_timm().__version__
    versions = f"jax {jax.__version__}, torch {torch.__version__}, timm {timm}"
    device = jax.devices()[0].device_kind
    print(f"{versions}, {device}, {threads} threads, {config.dtype}, batch {config.batch_size}")
    print(format_markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
