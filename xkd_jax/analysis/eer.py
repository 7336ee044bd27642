"""The Equal Error Rate of a detector: the error rate where both kinds of error are equal."""

import numpy as np

from xkd_jax.errors import UserError


def equal_error_rate(scores: np.ndarray, labels: np.ndarray) -> float:
    """The rate at which false-positive and false-negative rate are equal, in [0, 1]; 0.5 is chance.

    Both rates are computed with every distinct score as the threshold and interpolated linearly
    (the ROC curve; tied scores are one step). Exact: no binning, no grid of thresholds.

    Args:
      scores: [N], higher for class 1, on any monotonic scale, such as
        `logits[:, 1] - logits[:, 0]`.
      labels: [N], 0 or 1.

    Raises:
      UserError: a class is missing, there is a third one, or a score isn't finite.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise UserError(
            f"the Equal Error Rate needs one score and one label for each example, but has shapes "
            f"{scores.shape} and {labels.shape}."
        )
    classes = np.unique(labels)
    if not np.array_equal(classes, [0, 1]):
        raise UserError(
            "the Equal Error Rate needs examples of both classes 0 and 1 and no others, but the "
            f"labels hold {', '.join(map(str, classes[:5])) or 'nothing'}."
        )
    if not np.isfinite(scores).all():
        raise UserError("the Equal Error Rate needs finite scores, but some are NaN or infinite.")
    order = np.argsort(-scores)
    positive = labels[order] == 1
    last_of_equals = np.append(np.diff(scores[order]) != 0, True)
    false_positive = np.append(0, np.cumsum(~positive)[last_of_equals]) / np.sum(~positive)
    false_negative = 1 - np.append(0, np.cumsum(positive)[last_of_equals]) / np.sum(positive)
    # Rises from -1 to 1: the first point from 0 on ends the segment on which the rates are equal.
    difference = false_positive - false_negative
    end = np.argmax(difference >= 0)
    share = difference[end] / (difference[end] - difference[end - 1])
    return float(false_positive[end] + share * (false_positive[end - 1] - false_positive[end]))
