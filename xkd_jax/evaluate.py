"""Accuracy over a whole split and, for two classes, the Equal Error Rate.

The last, smaller batch is padded and masked.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xkd_jax import data
from xkd_jax.analysis.eer import equal_error_rate
from xkd_jax.augment import corruptions, ops
from xkd_jax.distributed import sharding
from xkd_jax.model import Model

# Seed of the noisy evaluation: all compared models see the same corruptions.
NOISE_SEED = 2022
IMAGES_PER_DEVICE = 128


@functools.lru_cache(maxsize=4)  # shared by the curves, the final test and runs with other seeds
def create_eval_step(
    model: Model, crop_pct: float = 0.0, noisy: bool = False
) -> Callable[..., dict[str, jax.Array]]:
    """A jitted function that evaluates one batch.

    Args:
      model: the student or the teacher.
      crop_pct: `data.Split.crop_pct` of the split.
      noisy: whether images are corrupted (`corruptions.noisy`), as in the paper's Fig. 3(a).

    Returns:
      step(variables, images uint8 [N, H, W, 3], labels [N], valid [N], key) -> sums by name and,
      for two classes, `scores` [N]: logit 1 minus logit 0.
    """

    @jax.jit
    def eval_step(variables, images, labels, valid, key):
        pixels = ops.to_float(images)
        if noisy:
            pixels = corruptions.noisy(key, pixels)
        if crop_pct:
            pixels = ops.resize_crop(pixels, model.image_size, crop_pct)
        logits, _ = model.forward(variables, model.preprocess(pixels))
        best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
        hits = (best == labels[:, None]) & valid[:, None]
        log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        counts = {
            "top1": jnp.sum(hits[:, 0]),
            "top5": jnp.sum(hits),
            "loss": -jnp.sum(jnp.where(valid, log_likelihood[:, 0], 0)),
        }
        if logits.shape[-1] == 2:
            counts["scores"] = logits[:, 1] - logits[:, 0]
        return counts

    return eval_step


def evaluate(
    eval_step: Callable, variables: Any, split: data.Split, mesh: Mesh
) -> dict[str, float]:
    """Means over every image of `split`.

    Args:
      eval_step: from `create_eval_step`.
      variables: the network's variables.
      split: the split to evaluate on.
      mesh: the devices.

    Returns:
      top1 and top5 in [0, 1]; loss, the mean cross-entropy; and, if there are two classes and both
      occur, eer, the Equal Error Rate.
    """
    over_batch = sharding.over_batch(mesh)
    variables = jax.device_put(variables, sharding.replicated(mesh))
    count, sums = len(split), []
    batch_size = IMAGES_PER_DEVICE * mesh.shape["data"]
    key = jax.random.key(NOISE_SEED)
    for start in range(0, count, batch_size):
        indices = np.arange(start, start + batch_size)
        valid = indices < count
        indices = np.minimum(indices, count - 1)
        images = sharding.put_rows(split.images, indices, over_batch)
        labels, valid = sharding.put((split.labels[indices], valid), over_batch)
        sums.append(eval_step(variables, images, labels, valid, jax.random.fold_in(key, start)))
    scores = [batch.pop("scores") for batch in sums if "scores" in batch]
    scores = sharding.to_host(scores, mesh)
    totals = jax.device_get(sums)
    means = {name: float(sum(s[name] for s in totals)) / count for name in totals[0]}
    if scores and np.ptp(split.labels):
        means["eer"] = equal_error_rate(np.concatenate(scores)[:count], split.labels)
    return means


if __name__ == "__main__":
    # `python -m xkd_jax.evaluate`: see cli/evaluate.py.
    import sys

    from xkd_jax.cli.evaluate import main

    sys.exit(main())
