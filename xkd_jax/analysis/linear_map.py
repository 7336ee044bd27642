"""How well one feature space maps to another: ridge regression, cosine similarity, linear CKA.

In NumPy and float64: the spaces have at most a few thousand dimensions.
"""

from collections.abc import Iterator

import numpy as np

from xkd_jax.probing.linear import Linear

# Of standardised features, in units of the variance of one of them.
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_ROWS = 8192  # rows that are multiplied at once in float64


def fit_ridge(
    x: np.ndarray, y: np.ndarray, strengths: tuple[float, ...] = STRENGTHS
) -> Iterator[Linear]:
    """Linear maps with a bias, one for each strength, that minimise the ridge regression's loss.

    The loss is the mean squared error plus the strength times the squared norm of the kernel, for
    standardised `x`; the standardisation is folded into what is returned.

    Args:
      x: float [n, C].
      y: float [n, D].
      strengths: one or more.
    """
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    std = np.where(std > 1e-12, std, 1.0)  # a constant feature is ignored
    middle = y.mean(0, dtype=np.float64)
    gram = np.zeros((x.shape[1], x.shape[1]))
    cross = np.zeros((x.shape[1], y.shape[1]))
    for rows in _slices(len(x)):
        standard = (x[rows] - mean) / std
        gram += standard.T @ standard / len(x)
        cross += standard.T @ (y[rows] - middle) / len(x)
    values, vectors = np.linalg.eigh(gram)
    values, rotated = np.maximum(values, 0)[:, None], vectors.T @ cross
    for strength in strengths:
        kernel = vectors @ (rotated / (values + strength)) / std[:, None]
        yield Linear(kernel.astype(np.float32), (middle - mean @ kernel).astype(np.float32))


def fit_linear_map(
    x: np.ndarray,
    y: np.ndarray,
    held_out: np.ndarray,
    strengths: tuple[float, ...] = STRENGTHS,
) -> tuple[Linear, float]:
    """The ridge regression from `x` to `y` whose strength is best on held-out rows.

    The best strength has the highest mean cosine similarity; the map is then fitted to all rows.

    Args:
      x: float [n, C].
      y: float [n, D].
      held_out: bool [n].
      strengths: to choose from.

    Returns:
      The map and its strength.
    """
    fits = fit_ridge(x[~held_out], y[~held_out], strengths)
    scores = [cosines(fit(x[held_out]), y[held_out]).mean() for fit in fits]
    strength = strengths[int(np.argmax(scores))]
    (chosen,) = fit_ridge(x, y, (strength,))
    return chosen, strength


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine similarity of each row of `a` [n, D] with that of `b` [n, D]: [n]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.sum(a * b, axis=1) / np.maximum(norms, 1e-12)


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Debiased linear CKA of two sets of features of the same examples; 1 at most.

    The ratio of unbiased estimates of HSIC (Song et al., 2012) with linear kernels, as in
    arXiv:2010.15327: independent features have 0 on average, however few the examples.

    Args:
      x: float [n, C], n at least 4.
      y: float [n, D].
    """
    both, own_x, own_y = (_unbiased_hsic(a, b) for a, b in ((x, y), (x, x), (y, y)))
    product = own_x * own_y
    return float(both / np.sqrt(product)) if product > 0 else float("nan")


def _unbiased_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC_1 of linear kernels, without an [n, n] matrix.

    K = X X^T with a zero diagonal, and L of Y; tr(K L), 1^T K 1 and 1^T K L 1 from [C, D] products.
    """
    n = len(x)
    x, y = (a - a.mean(0, dtype=np.float64) for a in (x, y))  # HSIC ignores the mean
    cross = sum(x[rows].T @ y[rows] for rows in _slices(n))
    square_x, square_y = (x**2).sum(1), (y**2).sum(1)
    trace = np.sum(np.square(cross)) - square_x @ square_y
    # The rows of a centred Gram matrix sum to zero; its diagonal has been removed.
    sums_x, sums_y = -square_x, -square_y
    total = sums_x.sum() * sums_y.sum() / ((n - 1) * (n - 2))
    return float((trace + total - 2 / (n - 2) * (sums_x @ sums_y)) / (n * (n - 3)))


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, count, _ROWS))
