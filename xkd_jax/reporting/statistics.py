"""Statistics over seeds: paired differences, their intervals, and Holm's correction."""

import dataclasses
import math
import statistics
from collections.abc import Mapping

CONFIDENCE = 0.95
_EQUAL = 1e-9  # a deviation of scores, in percent, that is only rounding

Scores = Mapping[int, float]  # by seed


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean paired difference.

    Attributes:
      mean: of the differences over the shared seeds.
      low: lower end of the 95% interval (Student's t); NaN, as the next two, if there is one seed
        or all differences are equal, which leaves nothing to estimate a deviation from.
      high: its upper end.
      p: two-sided p-value of the paired t-test.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def subtract(scores: Scores, others: Scores) -> Difference | None:
    """`scores` minus `others`, paired by seed; None if they share no seed."""
    pairs = [scores[seed] - others[seed] for seed in scores if seed in others]
    if not pairs:
        return None
    mean = statistics.mean(pairs)
    if len(pairs) < 2 or statistics.stdev(pairs) < _EQUAL:
        return Difference(mean)
    from scipy.stats import t  # takes half a second to import

    error, degrees = statistics.stdev(pairs) / math.sqrt(len(pairs)), len(pairs) - 1
    half = float(t.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    return Difference(mean, mean - half, mean + half, 2 * float(t.sf(abs(mean) / error, degrees)))


def adjust(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction (1979) of several tests' p-values; NaNs are left out."""
    ordered = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    adjusted, highest = {}, 0.0
    for rank, (p, name) in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * p))
        adjusted[name] = highest
    return adjusted


@dataclasses.dataclass(frozen=True)
class Rival:
    """How a cell compares with the best other one.

    Attributes:
      name: the best other cell.
      difference: this cell minus that one.
      p: the p-value of the difference after Holm's correction over all cells' tests; may be NaN.
    """

    name: str
    difference: Difference
    p: float

    @property
    def is_significant(self) -> bool:
        """Whether the difference is significant at the 5% level."""
        return self.p < 1 - CONFIDENCE


def compare_with_best(cells: Mapping[str, Scores], groups: Mapping[str, str]) -> dict[str, Rival]:
    """Compares each cell with the best other one of its group, by the mean of all its scores.

    Args:
      cells: the scores of each cell by seed.
      groups: of each cell, such as its student.

    Returns:
      By cell; without cells that share fewer than two seeds with every other one.
    """
    found = {}
    for name, scores in cells.items():
        means = {
            other: statistics.mean(theirs.values())
            for other, theirs in cells.items()
            if other != name
            and groups[other] == groups[name]
            and len(scores.keys() & theirs.keys()) > 1
        }
        best = max(means, key=lambda other: means[other], default=None)
        difference = subtract(scores, cells[best]) if best is not None else None
        if best is not None and difference is not None:
            found[name] = (best, difference)
    # The two best cells share one test.
    tests = {name: " ".join(sorted((name, best))) for name, (best, _) in found.items()}
    adjusted = adjust({tests[name]: difference.p for name, (_, difference) in found.items()})
    return {
        name: Rival(best, difference, adjusted.get(tests[name], math.nan))
        for name, (best, difference) in found.items()
    }
