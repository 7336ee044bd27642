"""The paper's Table 4 on COCO: detectors whose backbones were distilled on ImageNet.

Cells are named DETECTOR-TEACHER-STUDENT-METHOD, and DETECTOR-STUDENT-none has a backbone that was
trained on the labels alone. `paper` is the paper's AP of each cell: of boxes for `frcnn`, of masks
for `mrcnn`. The table's third part, face anti-spoofing, is configs/spoof.py.

Claim: none yet; the full schedule has not been run with this code.
Cost: 24 cells of five runs each, of coco_frcnn_r50.py or coco_mrcnn_r50.py. `:smoke` has two small
cells, for two seeds, a few minutes on two CPU cores.
Commands, the first one for every backbone, TEACHER-STUDENT-METHOD or STUDENT-none:
  python -m xkd_jax.main --config configs/imagenet.py:vit_l16-resnet50 --config.data.dir=DIR \
    --workdir runs/backbones/vit_l16-resnet50-cakd
  python -m xkd_jax.sweep --config configs/tables/table4.py --config.data.name=coco:DIR \
    --workdir runs/table4
`:online` has a ViT-L/16 teach the detectors themselves by cakd, instead of their backbones.
"""

from typing import Any

from xkd_jax.config import Config
from xkd_jax.configs import coco_frcnn_r50, common
from xkd_jax.table import Cell, Table

# The backbone alone, distilled by logits from a ResNet-152x2 and from a ViT-L/16, and by cakd.
_CELLS = ("none", "resnet152x2-logits", "vit_l16-logits", "vit_l16-cakd")
PAPER = {
    "frcnn-resnet50": (34.5, 35.0, 34.9, 35.5),
    "frcnn-resnet101": (37.1, 37.7, 37.4, 38.1),
    "frcnn-resnext101": (39.2, 39.8, 39.6, 40.3),
    "mrcnn-resnet50": (32.6, 33.3, 33.1, 33.6),
    "mrcnn-resnet101": (33.9, 34.5, 34.2, 34.8),
    "mrcnn-resnext101": (35.1, 35.5, 35.3, 35.9),
}
_BACKBONES = {"resnet50": "resnet50", "resnet101": "resnet101", "resnext101": "resnext101_32x8d"}
_FAMILIES = {"frcnn": "fasterrcnn", "mrcnn": "maskrcnn"}
# Of a detector that a ViT-L/16 teaches: its 42 x 42 tokens are the grid of the last stage.
_TAUGHT = {
    "method.name": "cakd",
    "teacher.weights": f"timm:{common.TEACHERS['vit_l16'][0]}",
    "teacher.args": {"img_size": 672},
}


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("online", "smoke"))
    return coco_frcnn_r50.get_config("smoke" if variant == "smoke" else "")


def get_table(variant: str = "") -> Table:
    common.check_variant(variant, ("online", "smoke"))
    if variant == "smoke":
        return _smoke()
    cells: dict[str, Cell] = {}
    for pair, results in PAPER.items():
        detector, student = pair.split("-")
        baseline = f"{pair}-none"
        for name, paper in zip(_CELLS, results, strict=True):
            teacher, _, method = name.rpartition("-")
            cell = f"{detector}-{teacher}-{student}-{method}" if teacher else baseline
            fields = _student(detector, student)
            if variant != "online":
                backbone = cell.removeprefix(f"{detector}-")
                fields["student.weights"] = f"runs/backbones/{backbone}/student.safetensors"
                cells[cell] = Cell(fields, (), paper, baseline)
            elif method in ("none", "cakd"):
                fields["student.weights"] = f"timm:{_BACKBONES[student]}.tv_in1k"
                taught = _TAUGHT if method == "cakd" else {}
                cells[cell] = Cell({**fields, **taught}, baseline=baseline)
    return Table(cells, next(iter(cells)))


def _student(detector: str, student: str) -> dict[str, Any]:
    """The fields of a detector that is trained on the labels alone."""
    model = f"{_FAMILIES[detector]}_{_BACKBONES[student]}_fpn"
    return {"method.name": "none", "student.model": model}


def _smoke() -> Table:
    """A baseline with boxes, and one with masks that a small ViT teaches."""
    cells = {
        "frcnn-resnet50-none": Cell(_student("frcnn", "resnet50")),
        "mrcnn-vit-resnet50-cakd": Cell(
            _student("mrcnn", "resnet50") | {"method.name": "cakd"}, baseline="frcnn-resnet50-none"
        ),
    }
    return Table(cells, "frcnn-resnet50-none", seeds=(0, 1))
