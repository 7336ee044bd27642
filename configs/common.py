"""What several recipes share: their smoke variants, and an untrained teacher."""

from collections.abc import Iterable
from typing import Any

from xkd_jax.config import Config
from xkd_jax.errors import unknown

# A small ViT for Fashion-MNIST. It pools over the patch tokens: with a class token, the patch
# tokens of the last block, which the student imitates, would get no gradient.
VIT_28 = {
    "img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2,
    "class_token": False, "global_pool": "avg", "fc_norm": False,
}  # fmt: skip
# For cakd's projectors: with small loss weights SGD's steps are too small for them.
ADAM_FOR_PROJECTORS = {
    "method_optimizer.name": "adam",
    "method_optimizer.learning_rate": 0.003,
    "method_optimizer.clip_norm": 2.0,
}

# The paper's networks at the sizes that its FLOPs stand for: our name, pixels. A teacher's size is
# that of its weights file.
TEACHERS = {
    "vit_b16": ("vit_base_patch16_384", 384),
    "vit_l16": ("vit_large_patch16_384", 384),
    "deit_b": ("deit_base_patch16_384", 384),
    "swin_b": ("swin_base_patch4_window7_224", 224),
    "swin_l": ("swin_large_patch4_window12_384", 384),
    "resnet152x2": ("resnet152x2", 480),
    "resnet101x3": ("resnet101x3", 384),
}
STUDENTS = {
    "resnet18": ("resnet18", 224),
    "resnet50": ("resnet50", 224),
    "resnet50x2": ("resnet50x2", 224),
    "resnet152": ("resnet152", 224),
    "xceptionx2": ("legacy_xception_x2", 384),
    "mobilenetv2": ("mobilenetv2_100", 224),
    "efficientnet_b0": ("efficientnet_b0", 448),
    "vit_b16": ("vit_base_patch16_384", 384),
    "vit_b32": ("vit_base_patch32_384", 384),
    "inception_v3": ("inception_v3", 299),
    "resnext26": ("resnext26_32x4d", 224),
}
_LARGE = ("resnet152", "vit_b16", "vit_b32", "xceptionx2")
TABLE_1 = (
    "resnet152x2-resnet50", "resnet101x3-resnet50x2",
    *(f"{t}-{s}" for t in ("vit_b16", "vit_l16", "swin_l") for s in ("resnet50", "resnet50x2")),
    *(f"{t}-{s}" for t in ("vit_l16", "swin_l") for s in _LARGE),
)  # fmt: skip
TABLE_2 = ("resnet152x2-resnet50x2", *TABLE_1[1:])
TABLE_3 = tuple(
    f"{t}-{s}"
    for t in ("vit_b16", "vit_l16", "deit_b", "swin_b", "swin_l")
    for s in ("resnet50", "resnet18", "mobilenetv2", "efficientnet_b0")
)
TABLE_4 = tuple(f"vit_l16-{s}" for s in ("resnet18", "inception_v3", "resnext26"))


def paper_pair(config: Config, variant: str) -> None:
    """Sets the networks of a row of the paper's tables, and the student's image size.

    A CNN teacher, which `cakd` does not take, gets `logits`, one of the paper's baselines.

    Args:
      config: changed in place; the teacher's weights are left to the recipe.
      variant: "TEACHER-STUDENT", of `TEACHERS` and `STUDENTS`.
    """
    teacher, student = variant.split("-")
    config.teacher.model, _ = TEACHERS[teacher]
    config.student.model, config.image_size = STUDENTS[student]
    if teacher.startswith("resnet"):
        config.method.name = "logits"


def check_variant(variant: str, known: Iterable[str]) -> None:
    """Accepts "" and any of `known`.

    Raises:
      UserError: the recipe has no such variant.
    """
    if variant and variant not in known:
        raise unknown("variant", variant, known)


def smoke(
    config: Config, *, epochs: int, log_every: int, train: str = "", test: str = "", **fields: Any
) -> None:
    """Shrinks a run to about a minute on two CPU cores, to check that everything runs.

    Args:
      config: changed in place.
      epochs: number of epochs.
      log_every: steps between two log lines.
      train: the split to train on; "" keeps the recipe's.
      test: the split for evaluation and for the final test; "" keeps the recipe's.
      **fields: other top-level fields.
    """
    config.update(epochs=epochs, log_every=log_every, **fields)
    if train:
        config.data.train = train
    if test:
        config.data.eval = config.data.test = test


def untrained_teacher(config: Config, model: str, **args: Any) -> None:
    """Replaces the teacher with a randomly initialised one, which needs no file.

    Args:
      config: changed in place.
      model: the network.
      **args: fields of the network's module.
    """
    config.teacher.update(model=model, weights="random")
    config.teacher.args = args
