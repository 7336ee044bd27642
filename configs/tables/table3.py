"""The paper's Table 3, ImageNet: cakd for many pairs of teachers and students.

Cells are named TEACHER-STUDENT-cakd, and STUDENT-none is the student on the labels alone.

Claim: none yet. `paper` is the paper's number of each cell. Cost: docs/tables.md.
Commands:
  python -m xkd_jax.sweep --config configs/tables/table3.py --workdir runs/table3
  python -m xkd_jax.sweep --config configs/tables/table3.py:gpu --config.data.dir=DIR \
    --workdir runs/table3_gpu

The forms are those of table1.py; in the default and in `:gpu`, a residual, a bottleneck, a
MobileNetV2 and an EfficientNet are the students. `:paper` is imagenet.py's form, and `:smoke` takes
about a minute on two CPU cores.
"""

from xkd_jax.config import Config
from xkd_jax.configs import imagenet
from xkd_jax.configs.tables import common
from xkd_jax.table import Table

_TEACHERS = ("vit_b16", "vit_l16", "deit_b", "swin_b", "swin_l")
_PAPER = {  # of the student alone, and of cakd with each teacher
    "resnet50": (76.28, 78.34, 78.85, 78.53, 78.87, 78.96),
    "resnet18": (69.76, 71.73, 72.02, 71.85, 72.01, 72.09),
    "mobilenetv2": (71.88, 73.34, 73.52, 73.40, 73.56, 73.66),
    "efficientnet_b0": (77.69, 79.23, 79.34, 79.30, 79.38, 79.52),
}
PAPER = {
    f"{teacher}-{student}": {"none": alone, "cakd": top1}
    for student, (alone, *distilled) in _PAPER.items()
    for teacher, top1 in zip(_TEACHERS, distilled, strict=True)
}
_BOTH = common.unpublished(("none", "cakd"))
_STUDENTS = ("resnet50", "resnet18", "mobilenetv2", "efficientnet")
GPU = {f"{teacher}-{student}": _BOTH for student in _STUDENTS for teacher in ("vit", "swin")}
PACKAGED = {
    f"vit-{student}": _BOTH for student in ("resnet", "bottleneck", "mobilenetv2", "efficientnet")
}


def get_config(variant: str = "") -> Config:
    return common.get_config(variant, imagenet.get_config)


def get_table(variant: str = "") -> Table:
    networks = common.paper_networks(imagenet.teacher_weights)
    return common.create_table(variant, networks, PACKAGED, GPU, PAPER)
