"""Pictures of what a student has learned: how they are drawn, and their files in a run's folder."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xkd_jax.reporting import figures
from xkd_jax.reporting.files import read_json, write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "pictures"  # in a run's folder
NAMES = ("attention", "features", "gained_lost", "confusion", "views")  # in a report's order
CAPTIONS = "captions.json"  # of the pictures in the same folder, by file name
_NAMED = 40  # classes in the picture of a confusion matrix that are named
_PLAIN = 20  # classes whose confusion matrix needs no list of the most confused pairs
_PAIRS = 15  # pairs in that list
_LONGEST_NAME = 18  # characters of a class name
_GAP = 0.03  # on each side of an image in a row, in widths of an image
_HEAT = 0.6  # opacity of an attention map over its image


class Drawing(NamedTuple):
    """A picture and what it shows, in a sentence or two."""

    figure: Figure
    caption: str


class Change(NamedTuple):
    """An image that only one of two students classifies rightly.

    Attributes:
      image: uint8 [H, W, 3].
      label: the class's name.
      student: the predicted class and its probability.
      baseline: the same of the other student.
    """

    image: np.ndarray
    label: str
    student: tuple[str, float]
    baseline: tuple[str, float]


def write(drawings: Mapping[str, Drawing], folder: Path) -> dict[str, np.ndarray]:
    """Writes NAME.png for each drawing, and their captions; removes earlier pictures.

    Args:
      drawings: by name, of `NAMES`.
      folder: created if it is missing.

    Returns:
      The pictures by name, uint8 [H, W, 3].
    """
    from PIL import Image

    for name in NAMES:
        if name not in drawings:
            (folder / f"{name}.png").unlink(missing_ok=True)
    pixels = {}
    for name, drawing in drawings.items():
        png = figures.to_png(drawing.figure)
        write_file(folder / f"{name}.png", png)
        pixels[name] = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    captions = {f"{name}.png": drawing.caption for name, drawing in drawings.items()}
    write_file(folder / CAPTIONS, (json.dumps(captions, indent=2) + "\n").encode())
    return pixels


def read_captions(run: Path) -> dict[Path, str]:
    """The captions of the pictures in a run's folder, by path; empty if none have been drawn.

    Raises:
      UserError: the file of captions is damaged.
    """
    folder = run / FOLDER
    captions = read_json(folder / CAPTIONS) if (folder / CAPTIONS).exists() else {}
    paths = {folder / f"{name}.png": captions.get(f"{name}.png") for name in NAMES}
    return {path: text for path, text in paths.items() if text and path.exists()}


def plot_maps(images: np.ndarray, maps: Mapping[str, np.ndarray]) -> Figure:
    """Maps over the images: a column for each image, a row for the images and for each kind.

    Args:
      images: float [N, H, W, 3] in [0, 1].
      maps: by name, [N, h, w]. The colours of an image's maps have the same scale, from 0 to the
        highest value of all of them.
    """
    figure = _plot_rows({"image": images} | dict.fromkeys(maps, images))
    highest = np.max([of_kind.max((1, 2)) for of_kind in maps.values()], axis=0)
    for axes, of_kind in zip(figure.axes[1:], maps.values(), strict=True):
        for below, heat, top in zip(axes.images[:], of_kind, highest, strict=True):
            axes.imshow(
                heat, extent=below.get_extent(), alpha=_HEAT, cmap="inferno",
                interpolation="bilinear", vmin=0, vmax=top,
            )  # fmt: skip
    return figure


def plot_images(images: np.ndarray, others: Mapping[str, np.ndarray]) -> Figure:
    """Images above other images of the same N: a column for each one.

    Args:
      images: float [N, H, W, 3] in [0, 1].
      others: rows by name, each [N, h, w, 3], of any height and width.
    """
    return _plot_rows({"image": images, **others})


def _plot_rows(rows: Mapping[str, np.ndarray]) -> Figure:
    """Rows of images, all of them drawn in the shape of the first row's, one axes for each row."""
    from matplotlib.figure import Figure

    count, high, wide, _ = next(iter(rows.values())).shape
    figure = Figure((0.4 + 1.2 * count, 1.25 * len(rows) * high / wide), layout="constrained")
    for axes, (name, images) in zip(
        figure.subplots(len(rows), 1, squeeze=False).flat, rows.items(), strict=True
    ):
        axes.set(xticks=[], yticks=[], xlim=(0, count), ylim=(0, high / wide))
        axes.set_ylabel(name, fontsize=9)
        axes.spines[:].set_visible(False)
        for column, image in enumerate(images):
            side = (column + _GAP, column + 1 - _GAP, _GAP, high / wide - _GAP)
            axes.imshow(image, extent=side, interpolation="nearest")
    return figure


def plot_changes(gained: Sequence[Change], lost: Sequence[Change], columns: int) -> Figure:
    """Gained images in the upper row, lost ones in the lower row, with labels and predictions.

    Args:
      gained: at most `columns` images.
      lost: the same.
      columns: panels in a row.
    """
    from matplotlib.figure import Figure

    figure = Figure((1.55 * columns, 4.4), layout="constrained")
    panels = figure.subplots(2, columns, squeeze=False)
    for row, name, changes in zip(panels, ("gained", "lost"), (gained, lost), strict=True):
        row[0].set_ylabel(name)
        for i, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if i < len(changes):
                axes.imshow(changes[i].image)
                axes.set_title(_shorten(changes[i].label), fontsize=9)
                axes.set_xlabel(_predictions(changes[i]), fontsize=7)
    return figure


def _predictions(change: Change) -> str:
    rows = ("baseline", change.baseline), ("student", change.student)
    return "\n".join(f"{who}: {_shorten(name)} {100 * p:.0f}%" for who, (name, p) in rows)


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def plot_confusion(confusion: np.ndarray, class_names: tuple[str, ...]) -> Figure:
    """The share of each label's images that every class is predicted for.

    Beside the matrix of many classes are the most confused pairs.

    Args:
      confusion: int [K, K], the number of images by label (row) and predicted class (column).
      class_names: by label.
    """
    from matplotlib.figure import Figure

    count = len(class_names)
    side = 3 + 0.25 * min(count, _NAMED)
    listed = count > _PLAIN
    figure = Figure((side + 1 + 5 * listed, side), layout="constrained")
    axes, *beside = figure.subplots(
        1, 1 + listed, squeeze=False, width_ratios=(side + 1, 5)[: 1 + listed]
    )[0]
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(picture, ax=axes, label="share of the label's images")
    axes.set(xlabel="predicted class", ylabel="label")
    if count <= _NAMED:
        axes.set_xticks(range(count), class_names, rotation=90)
        axes.set_yticks(range(count), class_names)
    if beside:
        _list_pairs(beside[0], shares, class_names)
    return figure


def _list_pairs(axes: Axes, shares: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Bars of the most confused pairs of label and prediction."""
    wrong = shares * (1 - np.eye(len(shares)))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS].tolist()
    pairs = [divmod(place, len(wrong)) for place in order if wrong.flat[place] > 0]
    names = [f"{_shorten(class_names[i])} → {_shorten(class_names[j])}" for i, j in pairs]
    axes.barh(range(len(pairs)), [100 * wrong[pair] for pair in pairs])
    axes.set_yticks(range(len(pairs)), names, fontsize=8)
    axes.invert_yaxis()  # the most confused pair on top
    axes.set(xlabel="% of the label's images", title="label → predicted class")
