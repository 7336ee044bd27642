"""Pictures of a finished run: attention maps, features, views, and right and wrong predictions."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from xkd_jax.analysis.classification import score
from xkd_jax.analysis.feature_maps import (
    FITTED,
    create_maps_step,
    fit_tokens,
    principal_colours,
)
from xkd_jax.analysis.finished import Finished, by_class, find_cakd, load_runs, spread
from xkd_jax.analysis.transferability import Pair, pair_of
from xkd_jax.augment import ops
from xkd_jax.augment.multiview import MultiView, multi_view
from xkd_jax.data import Split
from xkd_jax.errors import UserError
from xkd_jax.methods.align import is_transformer, level_grid, levels
from xkd_jax.probing.features import compute, create_feature_step
from xkd_jax.reporting import pictures
from xkd_jax.reporting.files import SUMMARY
from xkd_jax.reporting.logger import log_images, say
from xkd_jax.reporting.pictures import Change, Drawing

SHOWN = 8  # images in a picture
VIEWS = 3  # views of each image
BASELINE = "none"  # the run of a comparison that the others are compared with
_SEED = 2022  # of the views


def draw(
    runs: list[Finished], baseline: Finished | None = None, images: int = 0, out: Path | None = None
) -> list[Path]:
    """Draws the pictures of all runs, into their folders and TensorBoard, or into `out`.

    Args:
      runs: the finished runs.
      baseline: what their students are compared with; by default each run of a comparison is
        compared with `BASELINE`.
      images: test images to classify, at most; 0: all.
      out: a folder for the pictures of a single run; those of several get subfolders.

    Returns:
      The folders with pictures.

    Raises:
      UserError: `baseline` was measured on other images than a run.
    """
    rivals = {run: _find_rival(run, runs, baseline) for run in runs}
    logits = functools.cache(functools.partial(_logits, images=images))
    folders = []
    for run in runs:
        drawings = dict(_draw_run(run, rivals[run], logits, images))
        inside = out / run.name if out and len(runs) > 1 else out
        folders.append(inside or run.folder / pictures.FOLDER)
        pixels = pictures.write(drawings, folders[-1])
        if out is None:
            log_images(run.folder, run.experiment.total_steps, pixels)
    return folders


def load_baseline(folder: Path, data_dir: str = "") -> Finished:
    """The run that others are compared with.

    Raises:
      UserError: the folder doesn't hold exactly one finished run.
    """
    found = load_runs([folder], data_dir)
    if len(found) > 1:
        names = ", ".join(run.folder.name for run in found)
        raise UserError(f"--baseline {folder} holds several runs; give one of them: {names}.")
    return found[0]


def _find_rival(run: Finished, runs: list[Finished], baseline: Finished | None) -> Finished | None:
    """The run whose student's predictions are compared with this one's, if there is one."""
    if not run.experiment.train.num_classes:
        say(f"{run.name} was trained without labels: no images gained or lost, and no confusion.")
        return None
    if baseline is not None and baseline.folder.absolute() == run.folder.absolute():
        return None
    if baseline is not None:
        difference = _difference(baseline.test, run.test)
        if difference:
            raise UserError(
                f"the baseline {baseline.name} can't be compared with {run.name}: {difference}; "
                "give a run on the same data."
            )
        return baseline
    folder = run.folder.absolute().parent / BASELINE
    if folder == run.folder.absolute():
        return None
    if not (folder / SUMMARY).exists():
        say(
            f"{run.name} has no run {BASELINE!r} beside it: no images gained or lost; name a run "
            "with --baseline."
        )
        return None
    loaded = [other for other in runs if other.folder.absolute() == folder]
    (rival,) = loaded or load_runs([folder], run.experiment.config.data.dir)
    difference = _difference(rival.test, run.test)
    if difference:
        say(f"{run.name} isn't compared with {folder}: {difference}.")
    return None if difference else rival


def _difference(a: Split, b: Split) -> str:
    """Why predictions for two splits can't be compared; "" if they can."""
    if a.class_names != b.class_names:
        return "their classes differ"
    # The digest of decoded data sets is one of the labels alone.
    first, second = a.images[:SHOWN], b.images[:SHOWN]
    resized = first.shape != second.shape
    same = a.identity == b.identity and (resized or np.array_equal(first, second))
    return "" if same else "their test images differ"


def _draw_run(
    run: Finished, rival: Finished | None, logits: Callable[[Finished], np.ndarray], images: int
) -> Iterator[tuple[str, Drawing]]:
    if run.teacher is None:
        say(f"{run.name} has no attention maps and no features: its config names no teacher.")
    elif pair := pair_of(run):
        yield from _draw_features(pair)
    test = spread(run.test, images)
    if rival is not None:
        yield "gained_lost", _draw_changes(logits(run), logits(rival), test, run.name, rival.name)
    if run.experiment.train.num_classes:
        confusion = score(logits(run), np.asarray(test.labels)).confusion
        caption = f"Confusion matrix of the student on {len(test):,} test images."
        yield "confusion", Drawing(pictures.plot_confusion(confusion, test.class_names), caption)
    method = run.experiment.distiller.method
    if method.multi_view or find_cakd(method):
        yield "views", _draw_views(run)


def _draw_features(pair: Pair) -> Iterator[tuple[str, Drawing]]:
    step, shown = create_maps_step(pair), by_class(pair.test, SHOWN)
    found = step(shown.images, shown.crop_pct)
    outs = pair.teacher.output_shapes
    last = "tokens" if is_transformer(outs) else levels(outs)[-1]
    grid = level_grid(outs, last)
    attention = {
        name: found[name].mean(1).reshape(-1, *grid)  # over queries
        for name in ("Attn_T", "Attn_S")
        if name in found
    }
    if attention:
        block = pair.projectors[0].teacher_block if pair.projectors else -1
        student = " and Attn_S, that of the student after the PCA projector,"
        caption = (
            f"Attn_T, the attention of the teacher's {'last' if block == -1 else 'tapped'} block,"
            f"{student if 'Attn_S' in attention else ''} over test images: how much each patch "
            "token receives, averaged over heads and queries. Maps of the same image have the same "
            "colour scale, from black (0) to yellow."
        )
        yield "attention", Drawing(pictures.plot_maps(found["pixels"], attention), caption)
    teacher, student, mapping = found["teacher"], found["student"], "after the GL projector"
    if not pair.projectors:
        student = fit_tokens(step, pair)(student)
        count = min(FITTED, len(pair.train))
        mapping = f"after a ridge regression that was fitted on {count} training images"
    rows = {
        name: colours.reshape(len(colours), *grid, 3)
        for name, colours in zip(
            ("teacher", "student"), principal_colours(teacher, student), strict=True
        )
    }
    caption = (
        f"The teacher's {last}, and the student's features {mapping}, on a grid of "
        f"{grid[0]}x{grid[1]}: the first three principal components of the teacher's {last} for "
        "these test images as red, green and blue, with the same projection for both."
    )
    yield "features", Drawing(pictures.plot_images(found["pixels"], rows), caption)


def _logits(run: Finished, images: int) -> np.ndarray:
    test = spread(run.test, images)
    step = create_feature_step(run.student, test.crop_pct, "logits")
    return compute(step, run.student.variables, test, run.experiment.mesh)


def find_changes(
    student: np.ndarray, baseline: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The images that one classifier gets right and another one gets wrong.

    Args:
      student: probabilities [n, K].
      baseline: the other one's.
      labels: int [n].

    Returns:
      The indices of images that the student has gained and of those that it has lost, each with
      the largest change in the label's probability first.
    """
    rows = np.arange(len(labels))
    change = np.abs(student[rows, labels] - baseline[rows, labels])
    right = student.argmax(1) == labels, baseline.argmax(1) == labels
    order = np.argsort(-change, kind="stable")
    gained, lost = right[0] & ~right[1], right[1] & ~right[0]
    return order[gained[order]], order[lost[order]]


def _draw_changes(
    student: np.ndarray, baseline: np.ndarray, test: Split, name: str, rival: str
) -> Drawing:
    student, baseline = (np.asarray(jax.nn.softmax(logits)) for logits in (student, baseline))
    labels = np.asarray(test.labels)
    gained, lost = find_changes(student, baseline, labels)

    def predict(probabilities: np.ndarray) -> tuple[str, float]:
        return test.class_names[probabilities.argmax()], float(probabilities.max())

    def describe(index: int) -> Change:
        label, image = test.class_names[labels[index]], test.images[np.array([index])][0]
        return Change(image, label, predict(student[index]), predict(baseline[index]))

    caption = (
        f"Of {len(labels):,} test images, the student of {name} has gained {len(gained):,}, which "
        f"it classifies rightly and the baseline, {rival}, wrongly, and lost {len(lost):,}. Shown "
        "are those whose label's probability differs most: above each image its label, below it "
        "the predicted classes and their probabilities."
    )
    shown = ([describe(index) for index in indices[:SHOWN]] for indices in (gained, lost))
    return Drawing(pictures.plot_changes(*shown, columns=SHOWN), caption)


def _draw_views(run: Finished) -> Drawing:
    """What the multi-view generator makes of a batch of training images."""
    experiment = run.experiment
    shown, options = by_class(experiment.train, SHOWN), MultiView(**experiment.config.views)
    images = ops.to_float(jnp.asarray(shown.images))
    student_size = experiment.distiller.augment.student_size
    # On a CPU, XLA's optimisations take longer than these few calls.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    generate = jax.jit(multi_view, static_argnums=(2, 3), compiler_options=quick)
    rows = {}
    for number, key in enumerate(jax.random.split(jax.random.key(_SEED), VIEWS), 1):
        teacher, student = generate(key, images, options, student_size)
        rows[f"teacher {number}"] = np.asarray(teacher)
        rows[f"student {number}"] = np.asarray(student)
    used = "" if experiment.distiller.method.multi_view else " This run did not train on them."
    caption = (
        f"{VIEWS} views of training images by the multi-view generator (Eq. 7), for the teacher "
        f"and for the student. On average, half of the images stay as they are.{used}"
    )
    return Drawing(pictures.plot_images(np.asarray(images), rows), caption)
