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
