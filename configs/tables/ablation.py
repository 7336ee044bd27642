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

`:tuned` compares, on packaged images, the parts that help with what might replace the others: with
the PCA projector on the student's last stage (`pca_last`), the term on pooled features alone
(`pooled`) and beside it (`pca_pooled`), and the teacher's logits beside it (`pca_logits`). As in
Table 1, each cell chooses the scale of its loss weights and its learning rate.

`:audit` changes one setting of `cakd` at a time: its adversary, the teacher's block, the weight of
the tokens or of the labels, and the projectors' optimizer. It is measured on the validation images,
because it looks for better defaults.
"""

import dataclasses
from typing import Any

from xkd_jax.config import Config
from xkd_jax.configs import imagenet
from xkd_jax.configs.common import ADAM_FOR_PROJECTORS, check_variant
from xkd_jax.configs.tables import common
from xkd_jax.table import Cell, Table, scaled

_OFF = {"method.cakd.adversarial_weight": 0.0, "method.cakd.multi_view": False}
_NO_PCA = {"method.cakd.attention_weight": 0.0, "method.cakd.value_weight": 0.0}
_NO_GL = {"method.cakd.token_weight": 0.0}
PARTS: dict[str, dict[str, Any]] = {
    "pca": _OFF | _NO_GL,
    "gl": _OFF | _NO_PCA,
    "pca_gl": _OFF,
    "all": {"method.cakd.multi_view": True},
}
_PCA = {"attention_weight": 10.0, "value_weight": 1.0}
# For each cell of `:tuned`, the terms' weights, which are scaled together.
TUNED: dict[str, dict[str, float]] = {
    "pca": _PCA,
    "pca_last": _PCA,
    "pooled": {"pooled_weight": 1.0},
    "pca_pooled": _PCA | {"pooled_weight": 1.0},
    "pca_logits": _PCA,
}
# For each cell of `:audit`, the change.
AUDIT: dict[str, dict[str, Any]] = {
    "cakd": {},
    "non_saturating": {"method.cakd.generator": "non_saturating"},
    "adversary_weak": {"method.cakd.adversarial_weight": 0.01},
    "adversary_strong": {"method.cakd.adversarial_weight": 1.0},
    "block_before": {"method.cakd.teacher_block": -2},
    "tokens_strong": {"method.cakd.token_weight": 5.0},
    "labels_weak": {"method.cakd.label_weight": 0.5},
    "labels_strong": {"method.cakd.label_weight": 2.0},
    "adam": ADAM_FOR_PROJECTORS,
}
PAIRS = {"gpu": "vit-resnet18", "paper": "vit_l16-resnet50"}


def get_config(variant: str = "") -> Config:
    check_variant(variant, (*common.FORMS, "tuned", "audit"))
    form = "" if variant in ("tuned", "audit") else variant
    config = common.get_config(form, imagenet.get_config)
    config.data.noisy = variant not in ("smoke", "audit")
    if variant == "audit":
        config.data.test = config.data.eval
    return config


def get_table(variant: str = "") -> Table:
    if variant == "tuned":
        return _tuned_table()
    if variant == "audit":
        cells = get_table().cells
        base = {**cells["all"].fields, "method.cakd.multi_view": False}
        changed = {name: Cell(base | fields) for name, fields in AUDIT.items()}
        return Table({"labels": cells["labels"]} | changed, "labels")
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


def _tuned_table() -> Table:
    """Each cell chooses among three scales of its weights, then three learning rates."""
    pair = {"vit-resnet": common.unpublished(("none", "logits", "cakd"))}
    labels, logits, cakd = common.create_cells(common.PACKAGED, pair, tuned=True).values()
    rates = labels.stages[-1]
    cells = {
        name: dataclasses.replace(cell, baseline=None)
        for name, cell in (("labels", labels), ("logits", logits))
    }
    for name, weights in TUNED.items():
        fields = {**cakd.fields, **_OFF, **_NO_PCA, **_NO_GL}
        scales = {f"method__cakd__{weight}": value for weight, value in weights.items()}
        if name == "pca_last":
            fields["method.cakd.student_stage"] = "stage4"
        elif name == "pca_logits":
            fields["method.name"] = "cakd+logits"
            scales["method__logits__weight"] = 1.0
        cells[name] = Cell(fields, (scaled((1 / 3, 1.0, 3.0), **scales), rates))
    return Table(cells, "labels")
