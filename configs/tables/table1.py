"""The paper's Table 1, CIFAR-100: 14 methods between CNNs and Transformers, and cakd.

Cells are named TEACHER-STUDENT-METHOD, and STUDENT-none is the student on the labels alone.

Claim: none yet. `paper` is the paper's number of each cell. What is left out: docs/tables.md.
Cost: docs/tables.md.
Commands:
  python -m xkd_jax.sweep --config configs/tables/table1.py --workdir runs/table1
  python -m xkd_jax.sweep --config configs/tables/table1.py:gpu --config.data.dir=DIR \
    --workdir runs/table1_gpu

The default is the quickstart's form: one packaged ViT teaches two small students on 1,000
labelled images of Fashion-MNIST by every method that supports the pair, each with loss weights and
a learning rate chosen on the validation split. `:gpu` is CIFAR-100 at 32 x 32 with the networks and
the schedule of published tables; train the teachers first, with cifar100_published.py:resnet56,
cifar100_published.py:resnet32x4, teacher_cifar100_32.py and teacher_cifar100_32.py:swin. `:paper`
is the paper's own form, cifar100.py's: its teachers are files NETWORK_cifar100.safetensors, which
have to be fine-tuned first. `:smoke` takes about a minute on two CPU cores.
"""

from xkd_jax.config import Config
from xkd_jax.configs import cifar100, quickstart
from xkd_jax.configs.tables import common
from xkd_jax.table import Table

PAPER = {
    "resnet152x2-resnet50": {
        "none": 85.02, "logits": 86.53, "fitnet": 85.37, "at": 86.41, "rkd": 86.22, "irg": 86.87,
        "ofd": 86.79, "crd": 86.91, "review": 87.03, "london": 87.16,
    },
    "resnet101x3-resnet50x2": {
        "none": 88.21, "logits": 89.07, "fitnet": 88.51, "at": 89.18, "rkd": 89.39, "irg": 89.89,
        "ofd": 89.62, "crd": 89.94, "review": 90.04, "london": 89.98,
    },
    "vit_b16-resnet50": {"logits": 86.42, "rkd": 86.13, "irg": 86.59, "cakd": 87.39},
    "vit_l16-resnet50": {"logits": 86.69, "rkd": 86.73, "irg": 86.91, "cakd": 88.09},
    "vit_b16-resnet50x2": {"logits": 88.86, "rkd": 89.11, "irg": 89.38, "cakd": 90.33},
    "vit_l16-resnet50x2": {"logits": 89.28, "rkd": 89.51, "irg": 89.68, "cakd": 90.97},
    "swin_l-resnet50": {"logits": 86.78, "rkd": 86.91, "irg": 87.06, "cakd": 88.46},
    "swin_l-resnet50x2": {"logits": 88.93, "rkd": 90.02, "irg": 89.97, "cakd": 91.21},
    # The paper's layout doesn't say which of 91.15 and 91.84 (Swin-L: 91.36 and 92.07) is
    # Xceptionx2's and which is ViT-B/16's.
    "vit_l16-vit_b16": {
        "none": 90.92, "logits": 91.45, "irg": 91.59, "deit": 91.57, "minilm": 91.44, "cakd": None,
    },
    "vit_l16-xceptionx2": {"none": 90.27, "cakd": None},
    "vit_l16-vit_b32": {"none": 89.46, "logits": 90.22, "irg": 90.39, "deit": 90.40, "cakd": 90.66},
    "vit_l16-resnet152": {"none": 89.57, "cakd": 90.66},
    "swin_l-vit_b16": {"logits": 91.74, "irg": 91.88, "deit": 91.91, "cakd": None},
    "swin_l-xceptionx2": {"cakd": None},
    "swin_l-vit_b32": {
        "logits": 90.59, "irg": 90.95, "deit": 90.99, "minilm": 90.62, "cakd": 91.20,
    },
    "swin_l-resnet152": {"cakd": 91.20},
}  # fmt: skip
_CNN = ("none", "logits", "fitnet", "at", "rkd", "irg", "ofd", "crd", "review", "london")
GPU = common.gpu_results(_CNN, ("resnet20", "resnet8x4"), ("logits", "rkd", "irg", "cakd"))
PACKAGED = {
    "vit-resnet": common.unpublished(quickstart.METHODS),
    "vit-transformer": common.unpublished(common.TRANSFORMERS),
}


def get_config(variant: str = "") -> Config:
    return common.get_config(variant, cifar100.get_config)


def get_table(variant: str = "") -> Table:
    networks = common.paper_networks(cifar100.teacher_weights)
    return common.create_table(variant, networks, PACKAGED, GPU, PAPER)
