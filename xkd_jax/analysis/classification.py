"""Scores of a classifier, from its logits: accuracy per class, confusion and calibration."""

import dataclasses

import numpy as np

BINS = 15  # of the calibration error, as in arXiv:1706.04599


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores on labelled images; all shares are in [0, 1].

    Attributes:
      top1: share of images whose most probable class is the label.
      top5: share of images whose label is among the five most probable classes.
      calibration_error: expected calibration error of the most probable class, see
        `calibration_error`.
      confusion: int [K, K], the number of images by label (row) and predicted class (column).
    """

    top1: float
    top5: float
    calibration_error: float
    confusion: np.ndarray

    @property
    def per_class(self) -> np.ndarray:
        """The accuracy [K] on the images of each class; NaN for a class without images."""
        counts = self.confusion.sum(1)
        return np.where(counts > 0, np.diag(self.confusion) / np.maximum(counts, 1), np.nan)


def score(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Scores a classifier.

    Args:
      logits: float [n, K].
      labels: int [n].
    """
    logits, classes = np.asarray(logits, np.float64), logits.shape[1]
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, best[:, 0]), 1)
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    confidence = 1 / shifted.sum(1)  # of the most probable class
    hits = best == np.asarray(labels)[:, None]
    return Scores(
        float(hits[:, 0].mean()),
        float(hits.any(1).mean()),
        calibration_error(confidence, hits[:, 0]),
        confusion,
    )


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error (arXiv:1706.04599, Eq. 3), in [0, 1].

    The mean difference between accuracy and confidence over bins of equal width, weighted by the
    number of images in each.

    Args:
      confidence: [n], the probability of the predicted class, in (0, 1].
      correct: bool [n], whether it is the label.
      bins: their number; a bin includes its upper edge.
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
