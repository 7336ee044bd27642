"""What a frozen network's features know of the classes: k-NN accuracy and linear probes."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# From strong to weak, each a starting point for the next; of standardised features.
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
NEIGHBOURS = 20  # and the temperature: DINO's (arXiv:2104.14294), as its code evaluates
TEMPERATURE = 0.07
VALIDATION = 0.2  # the share of each class that a strength is chosen on
_CHUNK = 256  # test features compared at once


class Linear(NamedTuple):
    """A linear classifier of raw features: `features @ kernel + bias`."""

    kernel: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Logits [N, K] of features [N, D]."""
        return features @ self.kernel + self.bias


def knn_accuracy(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> float:
    """Top-1 accuracy of a weighted k-nearest-neighbour classifier, in [0, 1].

    A neighbour's vote is exp(cosine similarity / temperature), as in arXiv:1805.01978.

    Args:
      train: features [n, D] and labels [n].
      test: features [m, D] and labels [m].
      num_classes: the number of classes.
      neighbours: k.
      temperature: of the votes.
    """
    bank, labels = jnp.asarray(_unit(train[0])), jnp.asarray(train[1])
    count = min(neighbours, len(labels))

    @jax.jit
    def predict(bank: jax.Array, labels: jax.Array, features: jax.Array) -> jax.Array:
        similarity = jnp.matmul(features, bank.T, precision="highest")
        nearest, index = jax.lax.top_k(similarity, count)
        votes = jnp.exp((nearest - nearest[:, :1]) / temperature)
        return jnp.argmax(
            jnp.einsum("nk,nkc->nc", votes, jax.nn.one_hot(labels[index], num_classes)), axis=-1
        )

    queries, hits = _unit(test[0]), 0
    for start in range(0, len(queries), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        padded = np.zeros((_CHUNK, queries.shape[1]), queries.dtype)  # one shape, one program
        padded[: len(queries[chunk])] = queries[chunk]
        best = np.asarray(predict(bank, labels, padded))[: len(queries[chunk])]
        hits += int(np.sum(best == test[1][chunk]))
    return hits / len(queries)


def fit_linear(
    features: np.ndarray, labels: np.ndarray, num_classes: int, strengths: Iterable[float]
) -> Iterator[Linear]:
    """Multinomial logistic regressions by L-BFGS, one for each L2 strength.

    Minimises the mean cross-entropy plus strength / 2 times the squared norm of the kernel for
    standardised features; the standardisation is folded into what is returned. Each fit starts
    from the one before.

    Args:
      features: float [n, D].
      labels: int [n].
      num_classes: the number of classes.
      strengths: from strong to weak.
    """
    mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    std = np.where(std > 0, std, 1.0)  # a constant feature gets a constant zero
    x = jnp.asarray(((features - mean) / std).astype(np.float32))
    y = jnp.asarray(labels)
    params: Any = {"kernel": jnp.zeros((x.shape[1], num_classes)), "bias": jnp.zeros(num_classes)}
    for strength in strengths:
        params = _minimise(params, x, y, jnp.float32(strength))
        kernel = np.asarray(params["kernel"], np.float64) / std[:, None]
        bias = np.asarray(params["bias"], np.float64) - mean @ kernel
        yield Linear(kernel.astype(np.float32), bias.astype(np.float32))


@jax.jit
def _minimise(params: Any, x: jax.Array, y: jax.Array, strength: jax.Array) -> Any:
    def loss_fn(params: Any) -> jax.Array:
        logits = jnp.matmul(x, params["kernel"], precision="highest") + params["bias"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(loss) + strength / 2 * jnp.sum(params["kernel"] ** 2)

    optimizer, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss_fn)

    def unfinished(carry: tuple) -> jax.Array:
        return (carry[2] < 300) & (carry[3] > 1e-4)

    def step(carry: tuple) -> tuple:
        params, state, number, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss_fn
        )
        return optax.apply_updates(params, updates), state, number + 1, optax.tree.norm(grad)

    carry = params, optimizer.init(params), jnp.int32(0), jnp.float32(jnp.inf)
    return jax.lax.while_loop(unfinished, step, carry)[0]


def choose_strength(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    strengths: tuple[float, ...] = STRENGTHS,
    seed: int = 0,
) -> tuple[float, dict[float, float]]:
    """The L2 strength with the best top-1 accuracy on held-out examples; ties: the strongest.

    Args:
      features: float [n, D].
      labels: int [n]; two examples of each class, or more.
      num_classes: the number of classes.
      strengths: to choose from.
      seed: which examples are held out.

    Returns:
      The strength, and the accuracy in [0, 1] of each.
    """
    held = hold_out(labels, VALIDATION, seed)
    strengths = tuple(sorted(strengths, reverse=True))
    fits = fit_linear(features[~held], labels[~held], num_classes, strengths)
    scores = {
        strength: accuracy(fit(features[held]), labels[held])["top1"]
        for strength, fit in zip(strengths, fits, strict=True)
    }
    return max(strengths, key=lambda strength: scores[strength]), scores


def hold_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Whether each example is held out: bool [n]; `share` of each class, at least one of two."""
    rng, held = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        held[of_class[: max(1, round(share * len(of_class)))]] = len(of_class) > 1
    return held


def accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`top1` and `top5` in [0, 1], of logits [N, K] and labels [N]."""
    best = np.asarray(jax.lax.top_k(logits, min(5, logits.shape[-1]))[1])
    hits = best == np.asarray(labels)[:, None]
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(1).mean())}


def _unit(features: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(features.astype(np.float32), axis=1, keepdims=True)
    return features.astype(np.float32) / np.maximum(norm, 1e-12)
