"""The training steps of the quickstart against the same steps in PyTorch.

python benchmarks/torch_peer.py [--steps 30]

Needs the extra `parity`. JAX and PyTorch steps alternate in this process on the CPU, in float32,
with the same number of threads. The PyTorch side is eager: timm's networks, channels-last images,
fused optimizers, views batched over the images. It starts from the JAX side's weights.
"""

import argparse
import importlib
import itertools
import os
import re
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from xkd_jax.augment.multiview import MultiView
from xkd_jax.bench.parts import whole_step
from xkd_jax.experiment import Experiment, create_experiment
from xkd_jax.methods.align import choose_stage
from xkd_jax.methods.cakd import CAKD, TILE
from xkd_jax.methods.logits import Logits
from xkd_jax.state import student_variables
from xkd_jax.train import init_state

CONFIG = "configs/quickstart.py"
METHODS = ("none", "logits", "cakd")
WARMUP = 6  # untimed steps of each; every fifth step updates the adversary
PAUSE = 0.02  # seconds before each step, in which the other side's waiting threads go to sleep
_libraries = []  # keeps the operator schemas alive


def import_timm() -> Any:
    """Imports timm, even if torchvision was built for a different torch than the installed one."""
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    # A torchvision that doesn't match torch lacks its operators; timm needs only their schemas.
    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]
    library: Any = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return importlib.import_module("timm")


def create_student(module: Any) -> Any:
    """timm's ResNet with basic blocks and a CIFAR stem, with the Flax module's options."""
    resnet = import_timm().models.resnet
    channels = [round(64 * 2**stage * module.width) for stage in range(4)]
    # With a deep stem, timm's layer1 can have other than 64 inputs; the stem is replaced below.
    options = {"channels": channels, "stem_type": "deep", "stem_width": channels[0] // 2}
    network = resnet.ResNet(resnet.BasicBlock, module.layers, module.num_classes, **options)
    network.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


class Teacher(nn.Module):
    """timm's VisionTransformer with the Flax module's options, frozen, and its last Q, K and V."""

    def __init__(self, module: Any):
        super().__init__()
        names = ["num_classes", "img_size", "patch_size", "embed_dim", "depth", "num_heads"]
        names += ["mlp_ratio", "qkv_bias", "class_token", "global_pool", "fc_norm"]
        options = {name: getattr(module, name) for name in names}
        self.vit: Any = import_timm().models.VisionTransformer(**options)
        self.vit.blocks[-1].attn.qkv.register_forward_hook(self._keep)
        self.heads: int = module.num_heads
        self.eval().requires_grad_(False)

    def _keep(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._qkv = output

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N, 3, H, W] -> logits [N, K], tokens [N, T, D] and qkv [3, N, H, T, d]."""
        tokens = self.vit.forward_features(images)
        qkv = self._qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return {"logits": self.vit.forward_head(tokens), "tokens": tokens, "qkv": qkv}


class PCAProjector(nn.Module):
    """Proj_1: three 3x3 convolutions map the student's features to Q_S, K_S and V_S."""

    def __init__(self, channels: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("query", "key", "value"):
            self.add_module(name, nn.Conv2d(channels, width, 3, padding=1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> Q, K and V stacked, [3, N, H, T, d]."""
        maps = torch.stack([convolution(features) for convolution in self.children()])
        return maps.flatten(3).unflatten(2, (self.heads, -1)).transpose(3, 4)


class GLProjector(nn.Module):
    """Proj_2: every 4x4 tile of the feature map has its own linear layer, in one einsum."""

    def __init__(self, channels: int, width: int, grid: tuple[int, int], dropout: float):
        super().__init__()
        tiles = -(-grid[0] // TILE) * -(-grid[1] // TILE)
        self.weight = nn.Parameter(torch.empty(tiles, channels, width))
        self.bias = nn.Parameter(torch.empty(tiles, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> [N, T, D]."""
        n, channels, h, w = features.shape
        rows, columns = -(-h // TILE), -(-w // TILE)
        tiles = F.pad(self.dropout(features), (0, columns * TILE - w, 0, rows * TILE - h))
        tiles = tiles.reshape(n, channels, rows, TILE, columns, TILE).permute(0, 2, 4, 3, 5, 1)
        tiles = tiles.reshape(n, rows * columns, TILE * TILE, channels)
        projected = torch.einsum("ngpc,gcd->ngpd", tiles, self.weight) + self.bias[:, None]
        grid = projected.reshape(n, rows, columns, TILE, TILE, -1).transpose(2, 3)
        grid = grid.reshape(n, rows * TILE, columns * TILE, -1)
        return grid[:, :h, :w].flatten(1, 2)


class Discriminator(nn.Module):
    """Three fully connected layers on each token, their logits averaged to one per image."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(width, out) for out in (width, width, 1)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> logits [N]."""
        for dense in self.dense[:-1]:
            tokens = F.leaky_relu(dense(tokens), 0.2)
        return self.dense[-1](tokens).mean((1, 2))


def crop_flip(images: torch.Tensor, padding: int, flip: bool) -> torch.Tensor:
    """Pads [N, H, W, C] with zeros, crops at random offsets, flips half of the images."""
    n, h, w, _ = images.shape
    rows = torch.arange(h) + torch.randint(2 * padding + 1, (n, 1))
    columns = torch.arange(w) + torch.randint(2 * padding + 1, (n, 1))
    if flip:
        columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def color_jitter(images: torch.Tensor, options: MultiView) -> torch.Tensor:
    """Brightness, contrast and saturation of [N, 3, H, W] images in [0, 1], a factor per image."""
    luma = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]
    factors = []
    for strength in (options.brightness, options.contrast, options.saturation):
        low = max(0.0, 1 - strength)
        factors.append(low + (1 + strength - low) * torch.rand(len(images), 1, 1, 1))
    brightness, contrast, saturation = factors
    images = (brightness * images).clamp(0, 1)
    grey = (images.mean((2, 3), keepdim=True) * luma).sum(1, keepdim=True)
    images = torch.lerp(grey, images, contrast).clamp(0, 1)
    grey = (images * luma).sum(1, keepdim=True)
    return torch.lerp(grey, images, saturation).clamp(0, 1)


def random_geometry(images: torch.Tensor, options: MultiView) -> torch.Tensor:
    """A random crop of square [N, C, S, S] images, rotated and enlarged: one bilinear warp."""
    n, size = len(images), images.shape[-1]
    draws = torch.rand(4, n)
    angle = options.rotation * torch.pi / 180 * (2 * draws[0] - 1)
    scale = options.min_scale + (1 - options.min_scale) * draws[1]
    shift_y, shift_x = (1 - scale) * (2 * draws[2:] - 1) * (size - 1) / size
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, sin, shift_x, -sin, cos, shift_y], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, 1, size, size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def multi_view(images: torch.Tensor, options: MultiView) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's and the student's view of images [N, 3, H, W]; only half are transformed."""
    chosen = (torch.rand(len(images)) < 0.5).nonzero()[:, 0]
    original = images[chosen]
    both = torch.cat([original, color_jitter(original, options)], dim=1)
    teacher, student = random_geometry(both, options).chunk(2, dim=1)
    student = (student + options.noise * torch.randn_like(student)).clamp(0, 1)
    (n, _, h, w), side = student.shape, options.mask_patch
    masked = torch.rand(n, 1, -(-h // side), -(-w // side)) < options.mask_ratio
    masked = masked.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :h, :w]
    student = torch.where(masked, student.mean((2, 3), keepdim=True), student)
    return images.index_copy(0, chosen, teacher), images.index_copy(0, chosen, student)


def copy_weights(module: nn.Module, variables: Any) -> int:
    """Copies the JAX side's variables into `module`; returns the number of parameters."""
    state = {}
    for path, value in jax.tree_util.tree_leaves_with_path(variables):
        name = ".".join(key.key for key in path[1:])
        name = re.sub(r"(query|key|value)_(kernel|bias)$", r"\1.\2", name.lower())
        name = re.sub(r"_(\d+)(?=\.|$)", r".\1", name)
        *parents, leaf = name.split(".")
        tensor = torch.from_numpy(np.array(value))
        if leaf == "kernel" and tensor.ndim != 3:  # the GL projector's kernel keeps its layout
            tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
        leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
        leaf = f"running_{leaf}" if path[0].key == "batch_stats" else leaf
        state[".".join([*parents, leaf])] = tensor
    expected = {name for name in module.state_dict() if not name.endswith("num_batches_tracked")}
    if set(state) != expected:
        raise ValueError(f"tensors without a counterpart: {sorted(set(state) ^ expected)}")
    module.load_state_dict(state, strict=False)
    return sum(parameter.numel() for parameter in module.parameters())


class Peer:
    """The PyTorch side of a quickstart experiment."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.method, self.steps = experiment, experiment.distiller.method, 0
        self.images = torch.from_numpy(experiment.train.images)
        self.labels = torch.from_numpy(experiment.train.labels).long()
        self.indices = torch.randperm(len(experiment.train))[: experiment.config.batch_size]
        state = init_state(experiment)
        self.student = create_student(experiment.distiller.student.module)
        self.sizes = {"student": copy_weights(self.student, student_variables(state))}
        self.trained = [list(self.student.parameters())]  # each part is clipped by itself
        self.teacher = None
        teacher = experiment.distiller.teacher
        if teacher:
            self.teacher = Teacher(teacher.module)
            self.sizes["teacher"] = copy_weights(self.teacher.vit, teacher.variables)
        if isinstance(self.method, CAKD):
            self._create_projectors(self.method, state)
        sgd, trained = experiment.config.optimizer, itertools.chain(*self.trained)
        options: Any = {"momentum": sgd.momentum, "weight_decay": sgd.weight_decay, "fused": True}
        self.optimizer = torch.optim.SGD(trained, sgd.learning_rate, **options)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, experiment.total_steps
        )

    def _create_projectors(self, method: CAKD, state: Any) -> None:
        variant = (method.generator, method.adversary_clock, method.teacher_block)
        distiller = self.experiment.distiller
        geometry = distiller.augment.views.geometry
        if variant != ("saturating", "step", -1) or geometry != "shared":
            raise ValueError("the peer has only the defaults of generator, clock, tap and geometry")
        assert distiller.teacher
        teacher, student = distiller.teacher.output_shapes, distiller.student.output_shapes
        stage = choose_stage(student, teacher["grid"], method.student_stage)
        channels, width = student[stage].shape[-1], teacher["tokens"].shape[-1]
        self.tap = int(stage.removeprefix("stage"))
        self.pca = PCAProjector(channels, width, teacher["query"].shape[1])
        self.gl = GLProjector(channels, width, teacher["grid"], method.token_dropout)
        self.discriminator = Discriminator(width)
        self.sizes |= {
            "PCA projector": copy_weights(self.pca, state.params["method"]["pca"]),
            "GL projector": copy_weights(self.gl, state.params["method"]["gl"]),
            "discriminator": copy_weights(self.discriminator, state.params["adversary"]),
        }
        self.trained.append([*self.pca.parameters(), *self.gl.parameters()])
        rate = self.experiment.config.adversary_optimizer.learning_rate
        self.adam = torch.optim.Adam(self.discriminator.parameters(), rate, fused=True)

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This step's images as the teacher and the student see them, [N, 3, H, W]."""
        distiller = self.experiment.distiller
        augment, teacher, student = distiller.augment, distiller.teacher, distiller.student
        images = crop_flip(self.images[self.indices], augment.crop_padding, augment.flip)
        images = images.permute(0, 3, 1, 2).float().div_(255)
        views = (images, images)
        if self.method.multi_view:
            views = multi_view(images, augment.views)
        student_view = normalize(views[1], student.mean, student.std)
        return normalize(views[0], teacher.mean, teacher.std) if teacher else images, student_view

    def step(self) -> dict[str, Any]:
        """One training step; returns its metrics."""
        labels = self.labels[self.indices]
        teacher_view, student_view = self.views()
        teacher = self.teacher(teacher_view) if self.teacher else {}
        last, maps = self.student.forward_intermediates(student_view)
        logits = self.student.forward_head(last)
        loss = label = F.cross_entropy(logits, labels)
        metrics, tokens = {}, logits
        if isinstance(self.method, Logits):
            softened = F.log_softmax(logits / self.method.temperature, dim=1)
            target = F.log_softmax(teacher["logits"] / self.method.temperature, dim=1)
            kl = F.kl_div(softened, target, reduction="batchmean", log_target=True)
            metrics["logits_kl"] = self.method.temperature**2 * kl
            loss = self.method.label_weight * label + self.method.weight * metrics["logits_kl"]
        elif isinstance(self.method, CAKD):
            added, metrics, tokens = self._distil(self.method, maps[self.tap], teacher)
            loss = loss + added
        self.optimizer.zero_grad()
        loss.backward()
        limit = self.experiment.config.optimizer.clip_norm
        norms = [nn.utils.clip_grad_norm_(part, limit, foreach=True) for part in self.trained]
        self.optimizer.step()
        self.schedule.step()
        if isinstance(self.method, CAKD) and self.steps % self.method.adversary_every == 0:
            metrics |= self._update_discriminator(teacher["tokens"], tokens.detach())
        self.steps += 1
        if teacher:
            metrics["teacher_accuracy"] = accuracy(teacher["logits"], labels)
        metrics |= {"loss": loss, "label_loss": label, "gradient_norm": norms[0]}
        metrics["accuracy"] = accuracy(logits, labels)
        return {name: value.detach() for name, value in metrics.items()}

    def _distil(self, method: CAKD, features: torch.Tensor, teacher: Any) -> Any:
        qkv, tokens, wanted = self.pca(features), self.gl(features), teacher["qkv"]
        mixed = torch.where(torch.rand_like(qkv) < 0.5, wanted, qkv)
        attended = [F.scaled_dot_product_attention(q, k, v) for q, k, v in (mixed, wanted)]
        relations = [v @ v.mT / v.shape[-1] ** 0.5 for v in (qkv[2], wanted[2])]
        self.discriminator.requires_grad_(False)
        metrics = {
            "attention": F.mse_loss(attended[0], attended[1]),
            "value_relation": F.mse_loss(relations[0], relations[1]),
            "tokens": F.mse_loss(tokens, teacher["tokens"]),
            "generator": F.logsigmoid(-self.discriminator(tokens)).mean(),
        }
        weights = [method.attention_weight, method.value_weight, method.token_weight]
        weights.append(method.adversarial_weight)
        terms = zip(weights, metrics.values(), strict=True)
        return sum(weight * term for weight, term in terms), metrics, tokens

    def _update_discriminator(self, teacher: torch.Tensor, student: torch.Tensor) -> dict[str, Any]:
        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(teacher), self.discriminator(student)
        loss = -(F.logsigmoid(real) + F.logsigmoid(-fake)).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return {"discriminator": loss, "discriminator_accuracy": right}


def normalize(images: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
    """Subtracts each channel's mean from [N, 3, H, W] and divides by its standard deviation."""
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


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
            jax.block_until_ready(function())  # PyTorch's CPU tensors are ready already
            seconds[name].append(time.perf_counter() - begun)
    return {name: 1e3 * statistics.median(times[WARMUP:]) for name, times in seconds.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The same training steps in JAX and PyTorch.")
    parser.add_argument("--steps", type=int, default=30, help="timed steps per method and side")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    threads = len(os.sched_getaffinity(0))  # as many as XLA uses
    torch.set_num_threads(threads)
    config = runpy.run_path(CONFIG)["get_config"]()
    config.compare = ()
    functions, sizes = {}, {}
    for method in METHODS:
        config.method.name = method
        experiment = create_experiment(config)
        functions[method, "JAX"] = whole_step(experiment).run
        peer = Peer(experiment)
        functions[method, "PyTorch"] = peer.step
        sizes |= peer.sizes
    milliseconds = measure(functions, arguments.steps)
    versions = f"jax {jax.__version__}, torch {torch.__version__}, timm {import_timm().__version__}"
    print(f"{versions}, {threads} threads each, float32, batch {config.batch_size}")
    counts = (f"{name} {count:,}" for name, count in sizes.items())
    print(f"Parameters, equal on both sides: {', '.join(counts)}\n")
    print("| method | JAX ms (median) | PyTorch ms (median) | JAX / PyTorch |\n|---|---|---|---|")
    for method in METHODS:
        ours, theirs = milliseconds[method, "JAX"], milliseconds[method, "PyTorch"]
        print(f"| {method} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
