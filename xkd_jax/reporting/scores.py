"""The scores that runs are compared by."""

from collections.abc import Iterable

# By the name in summary.json, what it is called in text: the first one that a run has is what its
# students are compared by. A detector with masks has two average precisions.
MAIN = {"top1": "top-1", "mask_AP": "mask AP", "AP": "AP", "probe_top1": "probe top-1"}
EVALUATED = tuple(f"eval_{name}" for name in MAIN)  # the same in metrics.jsonl


def main_score(found: Iterable[str]) -> str:
    """The name of the score to compare by among `found`, as in `MAIN`; "" if there is none."""
    found = set(found)
    return next((name for name in MAIN if name in found), "")
