"""The ablation of the paper's Fig. 3(a): what each part of cakd adds, on clean and noisy images.

Cells: `labels`, the student on the labels alone; `pca` and `gl`, with one of the projectors;
`pca_gl`, with both; `all`, with the multi-view generator and the adversary as well.

Claim: none yet; the paper has a bar chart without numbers. Cost: docs/tables.md.
Commands:
  python -m xkd_jax.sweep --config configs/tables/ablation.py --workdir runs/ablation
  python -m xkd_jax.sweep --config configs/tables/ablation.py:gpu --config.data.dir=DIR \
    --workdir runs/ablation_gpu

The forms are those of table1.py, each with one pair: the packaged ViT and a small ResNet, with the
quickstart's loss weights and the learning rate that Table 1 begins with, 0.2; ViT-S and ResNet-18
on CIFAR-100; ViT-L/16 and ResNet-50 on ImageNet. Nothing is chosen. `:smoke` takes about a minute
on two CPU cores.
"""

from typing import Any

from xkd_jax.config import Config
from xkd_jax.configs import imagenet
from xkd_jax.configs.tables import common
from xkd_jax.table import Cell, Table

_OFF = {"method.cakd.adversarial_weight": 0.0, "method.cakd.multi_view": False}
_NO_PCA = {"method.cakd.attention_weight": 0.0, "method.cakd.value_weight": 0.0}
_NO_GL = {"method.cakd.token_weight": 0.0}
PARTS: dict[str, dict[str, Any]] = {
    "pca": _OFF | _NO_GL,
    "gl": _OFF | _NO_PCA,
    "pca_gl": _OFF,
    "all": {"method.cakd.multi_view": True},
}
PAIRS = {"gpu": "vit-resnet18", "paper": "vit_l16-resnet50"}


def get_config(variant: str = "") -> Config:
    config = common.get_config(variant, imagenet.get_config)
    config.data.noisy = variant != "smoke"
    return config


def get_table(variant: str = "") -> Table:
    pair = {PAIRS.get(variant, "vit-resnet"): common.unpublished(("none", "cakd"))}
    networks = common.paper_networks(imagenet.teacher_weights)
    table = common.create_table(variant, networks, pair, pair, pair)
    labels, cakd = (dict(cell.fields) for cell in table.cells.values())
    # The clipping is part of the recipe: equal for all cells.
    clip = {name: value for name, value in cakd.items() if name == "optimizer.clip_norm"}
    cells = {"labels": Cell(labels | clip)}
    cells |= {name: Cell(cakd | fields) for name, fields in PARTS.items()}
    if variant == "smoke":
        cells = {name: cells[name] for name in ("labels", "all")}
    return Table(cells, "labels", seeds=table.seeds)
