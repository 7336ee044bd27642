"""A classifier measured on labelled images: scores, accuracy per class and confusion matrix."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xkd_jax.analysis.classification import Scores, score
from xkd_jax.analysis.eer import equal_error_rate
from xkd_jax.augment import ops
from xkd_jax.data.encoded import open_split
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError
from xkd_jax.evaluate import create_eval_step, evaluate
from xkd_jax.export.runtime import Exported
from xkd_jax.model import Model
from xkd_jax.prediction import load_classifier
from xkd_jax.probing.features import compute, create_feature_step
from xkd_jax.reporting.document import Table
from xkd_jax.reporting.figures import to_png
from xkd_jax.reporting.logger import say
from xkd_jax.reporting.pictures import plot_confusion
from xkd_jax.teacher.classes import Names, match_classes
from xkd_jax.weights import write_file


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A classifier's scores on a split.

    Attributes:
      scores: of the clean images.
      class_names: by label.
      about: what was measured: the student, the data, the number of images and crop_pct.
      more: further scores: `eer` for two classes, `noisy_top1` if measured.
    """

    scores: Scores
    class_names: tuple[str, ...]
    about: dict[str, Any]
    more: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """Everything except for the matrix, as it is written to evaluation.json."""
        names = ("top1", "top5", "calibration_error")
        return self.about | {name: getattr(self.scores, name) for name in names} | self.more


def measure(student: str, data: tuple[str, str, str], crop_pct: float, noisy: bool) -> Evaluation:
    """Measures a classifier, whose classes are matched to the data's by name.

    Args:
      student: as for `prediction.load_classifier`.
      data: name, split and data folder, as for `data.load`.
      crop_pct: the share of the shorter side that is cropped; 0: what the student's file says.
      noisy: whether to measure on corrupted images too, as `data.noisy`.

    Raises:
      UserError: the student or the data can't be read, their classes differ, or an exported student
        is to be measured on corrupted images.
    """
    model, recorded = load_classifier(student)
    if noisy and isinstance(model, Exported):
        raise UserError(
            f"--noisy needs the network itself, but {student} is exported; give its run's folder."
        )
    crop_pct = crop_pct or recorded
    name, part, folder = data
    split = open_split(name, part, folder, model.image_size, "auto", "stop", crop_pct)
    if not split.num_classes:
        raise UserError(f"{name} has no labels; give labelled images.")
    reason, order = match_classes(model, split, Names("", student, name), say)
    if reason:
        raise UserError(f"{reason}; evaluate it on images of its own classes.")
    model = dataclasses.replace(model, class_order=order)
    mesh, labels = sharding.create_mesh(), np.asarray(split.labels)
    if isinstance(model, Exported):
        logits = compute(_create_exported_step(model, split.crop_pct), None, split, mesh)
    else:
        step = create_feature_step(model, split.crop_pct, "logits")
        logits = compute(step, model.variables, split, mesh)
    more = {}
    if split.num_classes == 2 and np.ptp(labels):
        more["eer"] = equal_error_rate(logits[:, 1] - logits[:, 0], labels)
    if noisy and isinstance(model, Model):
        step = create_eval_step(model, split.crop_pct, noisy=True)
        more["noisy_top1"] = evaluate(step, model.variables, split, mesh)["top1"]
    about = {"student": student, "data": f"{name} {part}", "images": len(split)}
    return Evaluation(score(logits, labels), split.class_names, about, more)


def _create_exported_step(model: Exported, crop_pct: float) -> Callable[..., jax.Array]:
    """As `create_feature_step`."""

    crop = jax.jit(lambda images: ops.evaluated_pixels(images, model.image_size, crop_pct))
    return lambda variables, images: model(crop(images))


def write(result: Evaluation, folder: Path) -> None:
    """Writes evaluation.json, classes.csv, confusion.csv and confusion.png into `folder`."""
    text = json.dumps(result.summary(), indent=2) + "\n"
    write_file(folder / "evaluation.json", text.encode())
    names, confusion = result.class_names, result.scores.confusion
    counts, shares = confusion.sum(1), result.scores.per_class
    rows = [
        [name, count, f"{share:.4f}" if count else ""]
        for name, count, share in zip(names, counts.tolist(), shares, strict=True)
    ]
    _write_csv(folder / "classes.csv", [["class", "images", "accuracy"], *rows])
    rows = [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)]
    _write_csv(folder / "confusion.csv", [["label / prediction", *names], *rows])
    write_file(folder / "confusion.png", to_png(plot_confusion(confusion, names)))


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_file(path, text.getvalue().encode())


def format_scores(result: Evaluation) -> str:
    """The scores as a Markdown table, and the classes with the lowest accuracy."""
    labels = {
        "top1": "top-1 %",
        "top5": "top-5 %",
        "calibration_error": "calibration error %",
        "noisy_top1": "noisy top-1 %",
        "eer": "EER %",
    }
    summary = result.summary()
    shown = {name: label for name, label in labels.items() if name in summary}
    if len(result.class_names) == 2:
        shown.pop("top5")  # always 100%
    cells = [f"{100 * summary[name]:.2f}" for name in shown]
    lines = [
        ["", "images", *shown.values()],
        [summary["data"], f"{summary['images']:,}", *cells],
    ]
    table = Table(lines).markdown()
    shares = result.scores.per_class
    worst = [i for i in np.argsort(shares, kind="stable") if shares[i] < 1][:5]
    if not worst:
        return table
    weakest = ", ".join(f"{result.class_names[i]} {100 * shares[i]:.1f}%" for i in worst)
    return f"{table}\nlowest accuracy: {weakest}"
