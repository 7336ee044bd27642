"""CRD: a contrastive loss matches the student's and the teacher's features of the same image.

Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699.
M training examples, K negatives for each of the N examples in a batch, D-dimensional features.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.nn import logsumexp
from typing_extensions import override

from xkd_jax.errors import UserError
from xkd_jax.methods.base import Method, apply, weighted_sum
from xkd_jax.methods.layers import unit
from xkd_jax.models.layers import torch_default

ROWS = 1024  # the number of rows in a bank is a multiple, which common meshes divide


def group_by_class(labels: np.ndarray, num_classes: int) -> dict[str, jax.Array]:
    """Groups a training set's labels [M] by class, for `draw_negatives`.

    Returns:
      `by_class`, int32 [M], the examples sorted by class, and `starts`, int32 [num_classes + 1],
      where each class starts in it.
    """
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(num_classes + 1))
    return {"by_class": jnp.asarray(order, jnp.int32), "starts": jnp.asarray(starts, jnp.int32)}


def draw_negatives(
    key: jax.Array, by_class: jax.Array, starts: jax.Array, labels: jax.Array, number: int
) -> jax.Array:
    """Draws examples of classes other than `labels` [N], with replacement: int32 [N, number].

    `by_class` and `starts` are from `group_by_class`.
    """
    start = starts[labels][:, None]
    size = starts[labels + 1][:, None] - start
    shape = (len(labels), number)
    place = jax.random.randint(key, shape, 0, len(by_class) - size)
    return by_class[jnp.where(place < start, place, place + size)]  # skips the label's class


def contrast(
    anchors: jax.Array,
    bank: jax.Array,
    index: jax.Array,
    drawn: jax.Array,
    log_normalizer: jax.Array,
    examples: int,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """Noise-contrastive estimation of one direction (Eq. 18), with the critic h of Eq. 19.

    Args:
      anchors: one network's features, unit vectors [N, D].
      bank: the other network's features of all examples [rows, D], without gradient.
      index: the bank's row for each anchor [N], its positive.
      drawn: how often each example is a negative of each anchor, float32 [N, rows]; rows sum to K.
      log_normalizer: log Z of exp(score / temperature), which is not in Eq. 19 but in the authors'
        code; -inf to estimate it from these scores as M times their mean.
      examples: M.
      temperature: tau.

    Returns:
      The batch mean of the loss, and log Z; both float32 scalars.
    """
    bank = jax.lax.stop_gradient(bank)
    negatives = jnp.sum(drawn[0])
    positive = jnp.sum(anchors * bank[index], -1) / temperature
    # One product with the whole bank: gathering K rows of D numbers for every anchor would move far
    # more memory. All scores are weighted instead of gathering some: the gradient of a gather is a
    # scatter-add, which is not deterministic on a GPU.
    scores = anchors @ bank.T / temperature
    total = jnp.logaddexp(logsumexp(positive), logsumexp(scores, b=drawn))
    estimate = total - jnp.log(len(anchors) * (negatives + 1) / examples)
    log_normalizer = jnp.where(jnp.isneginf(log_normalizer), estimate, log_normalizer)
    log_normalizer = jax.lax.stop_gradient(log_normalizer)
    shift = log_normalizer + jnp.log(negatives / examples)
    log_h = jax.nn.log_sigmoid(positive - shift)
    log_not_h = jnp.sum(drawn * jax.nn.log_sigmoid(shift - scores), -1)
    return -jnp.mean(log_h + log_not_h), log_normalizer


def remember(bank: jax.Array, index: jax.Array, features: jax.Array, momentum: float) -> jax.Array:
    """Updates rows `index` [N] of the bank [rows, D] with `features` [N, D]; all are unit vectors.

    As in Wu et al. (arXiv:1805.01978); `momentum` is the weight of the old rows.
    """
    mixed = momentum * bank[index] + (1 - momentum) * jax.lax.stop_gradient(features)
    return bank.at[index].set(unit(mixed))


@dataclasses.dataclass(frozen=True)
class CRD(Method):
    """Contrastive distillation of the pooled features, with RepDistiller's settings.

    The state has two memory banks, together 2 * 4 * 128 bytes per training example: 51 MB for
    CIFAR, 1.3 GB for ImageNet, sharded over the devices. A step holds a few float32 arrays [N, M]:
    1.3 GB each for a batch of 256 on ImageNet. The paper's temperature for CIFAR-100 is 0.1; the
    authors' code has 0.07.

    The authors draw the negatives of an example without replacement, in the data loader. Here they
    are drawn with replacement, in the step: a permutation of the training set for each example of
    the batch would cost more than the loss. The loss has the same expectation, because every
    negative has the same probability; its variance over the draws is larger, on CIFAR-100 by half
    (a factor of 1 / (1 - 16384 / 49500)), and small against that of the batch.

    "crd+logits" is published (as "CRD+KD") with `label_weight` 1 and `weight` 1 of `logits`, beside
    the weight 0.8 of this term: variants of `configs/cifar100_published.py` have these.

    Attributes:
      weight: weight of this term.
      temperature: tau.
      negatives: K, drawn for every example from all other classes, with replacement.
      momentum: weight of the old row when a bank is updated.
      width: D, the dimension of the space that both networks' features are mapped to.
    """

    weight: float = 0.8
    temperature: float = 0.07
    negatives: int = 16384
    momentum: float = 0.5
    width: int = 128

    needs_teacher = True
    hard_labels = True

    @override
    def check(self, teacher_out, student_out):
        for name, fits, right in (
            ("temperature", self.temperature > 0, "above 0"),
            ("negatives", self.negatives >= 1, "at least 1"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("width", self.width >= 1, "at least 1"),
        ):
            if not fits:
                raise UserError(f"method.crd.{name}={getattr(self, name)} must be {right}.")

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        """A linear embedding and a memory bank for each of the two networks.

        Raises:
          UserError: the training set has fewer than two classes.
        """
        labels = np.asarray(labels)
        if len(np.unique(labels)) < 2:
            raise UserError(
                "crd contrasts examples of different classes, but this training set has fewer than "
                "two; use another method."
            )
        outs = {"student": student_out, "teacher": teacher_out}
        rows = -(-len(labels) // ROWS) * ROWS
        bound = (self.width / 3) ** -0.5
        keys = dict(zip(outs, jax.random.split(key, (2, 2)), strict=True))
        linear = nn.Dense(self.width, kernel_init=torch_default)
        params = {name: linear.init(keys[name][0], out["pooled"]) for name, out in outs.items()}
        bank = {
            name: jax.random.uniform(keys[name][1], (rows, self.width), minval=-bound, maxval=bound)
            for name in outs
        }
        unset = {name: jnp.full((), -jnp.inf, jnp.float32) for name in outs}
        state = {"bank": bank, "log_normalizer": unset}
        return params, state | group_by_class(labels, student_out["logits"].shape[-1])

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        """The new state's banks hold this batch's features."""
        pooled = {
            "student": student_out["pooled"],
            "teacher": jax.lax.stop_gradient(teacher_out["pooled"]),
        }
        features = {
            name: unit(apply(nn.Dense(self.width), params[name], x.astype(jnp.float32)))
            for name, x in pooled.items()
        }
        bank, index, by_class = state["bank"], batch["index"], state["by_class"]
        negatives = draw_negatives(key, by_class, state["starts"], batch["label"], self.negatives)
        drawn = jnp.zeros((len(index), len(bank["student"])))
        drawn = drawn.at[jnp.arange(len(index))[:, None], negatives].add(1)
        terms, log_normalizer = {}, {}
        for name, other in (("student", "teacher"), ("teacher", "student")):
            term, log_normalizer[name] = contrast(
                features[name],
                bank[other],
                index,
                drawn,
                state["log_normalizer"][name],
                len(by_class),
                self.temperature,
            )
            terms[f"crd_{name}"] = (self.weight, term)
        new_bank = {
            name: remember(rows, index, features[name], self.momentum)
            for name, rows in bank.items()
        }
        return weighted_sum(terms, state | {"bank": new_bank, "log_normalizer": log_normalizer})
