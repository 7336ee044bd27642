"""The report of finished runs: scores, learning curves and cost."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

from xkd_jax.errors import UserError
from xkd_jax.reporting import cost, document, figures, files, model_card, pictures
from xkd_jax.reporting.document import Heading, Image, Items, Paragraph, Picture, Table
from xkd_jax.reporting.figures import first_key
from xkd_jax.reporting.recipe import Recipe, find_differences, read_recipe
from xkd_jax.reporting.scores import EVALUATED, main_score

CURVES = "curves.png"
# Columns, each shown if all rows have it; short, so that the table fits into 80 columns.
_SCORES = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "noisy_top1": "noisy top-1",
    "eer": "EER %",
    "AP": "AP %",
    "AP50": "AP50 %",
    "mask_AP": "mask AP %",
    "mask_AP50": "mask AP50 %",
    "probe_top1": "linear probe %",
    "knn_top1": "k-NN %",
}

Lines = list[dict[str, Any]]  # of metrics.jsonl


@dataclasses.dataclass
class Runs:
    """What is sound in finished runs, by the run's name.

    Attributes:
      paths: the runs' folders.
      summaries: the contents of summary.json.
      metrics: the lines of metrics.jsonl.
      recipes: the runs' configs, except for the options of methods.
      notes: sentences about what is left out.
    """

    paths: dict[str, Path] = dataclasses.field(default_factory=dict)
    summaries: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Lines] = dataclasses.field(default_factory=dict)
    recipes: dict[str, Recipe] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def find_runs(folder: Path) -> dict[str, Path]:
    """The finished runs by name: `folder` itself, or its subfolders, the first started first.

    Raises:
      UserError: there is no finished run.
    """
    if (folder / files.SUMMARY).exists():
        return {folder.name: folder}
    finished = [path.parent for path in folder.glob(f"*/{files.SUMMARY}")]
    if not finished:
        raise UserError(
            f"{folder} holds no finished run; give the folder of a run, a comparison or a table."
        )

    def started(run: Path) -> int:  # a run's config is only written when it first starts
        config = run / files.CONFIG
        return (config if config.exists() else run).stat().st_mtime_ns

    return {run.name: run for run in sorted(finished, key=started)}


def read_runs(folder: Path) -> Runs:
    """Reads everything that is sound in the finished runs of `folder`.

    Raises:
      UserError: there is no finished run, or nothing in the runs is sound.
    """
    runs, damage = Runs(), []
    for name, path in find_runs(folder).items():
        try:
            runs.summaries[name] = files.read_summary(path)
        except UserError as error:
            damage.append(error)
            continue
        runs.paths[name] = path
        runs.metrics[name], damaged = files.read_sound_metrics(path)
        if damaged:
            runs.notes.append(f"{name}: damaged lines of {files.METRICS} left out: {damaged}.")
        try:
            recipe = read_recipe(path, {})
        except UserError as error:
            runs.notes.append(str(error))
            recipe = Recipe({}, {})
        # The runs of a comparison differ in their methods.
        found = {k: v for k, v in recipe.found.items() if not k.startswith(("method.", "compare"))}
        runs.recipes[name] = Recipe(found, {})
    if not runs.summaries:
        raise damage[0]
    if not any(runs.metrics.values()):
        for path in runs.paths.values():
            files.read_metrics(path)  # names the damaged line, if there is one
    runs.notes += [*map(str, damage), *_list_differences(runs), *_list_unfinished(folder)]
    return runs


def _list_differences(runs: Runs) -> list[str]:
    differences = find_differences(list(runs.recipes.values()))
    found = zip(runs.recipes, differences, strict=True)
    return [f"{name} was trained with another recipe: {text}." for name, text in found if text]


def _list_unfinished(folder: Path) -> list[str]:
    begun = sorted(path.parent for path in folder.glob(f"*/{files.CONFIG}"))
    unfinished = [run.name for run in begun if not (run / files.SUMMARY).exists()]
    return [f"{name} isn't finished, and is left out." for name in unfinished]


def write(folder: Path) -> str:
    """Writes report.md, report.html and curves.png of the finished runs in `folder` into it.

    The pictures that `analysis.pictures` has drawn of the runs are part of the report.
    Each run's own folder gets its model card.

    Returns:
      The table and the files' paths, as text.

    Raises:
      UserError: there is no finished run, or nothing in the runs is sound.
    """
    runs = read_runs(folder)
    table = Table(list_scores(runs.summaries))
    is_trained = any(runs.metrics.values())  # a probe isn't trained step by step
    blocks: list[document.Block] = [Paragraph(describe(runs.summaries, runs.paths)), table]
    if is_trained:
        # In the files, relative paths: they stay right in a copy of the folder.
        best = [_best(runs, name, path.relative_to(folder)) for name, path in runs.paths.items()]
        blocks += [Items(best), Picture(_plot(runs), CURVES, "learning curves")]
        blocks += [*_describe_costs(runs), *_show_pictures(runs, folder)]
    if runs.notes:
        blocks += [Heading("Notes"), Items(runs.notes)]
    document.write_document(folder, folder.absolute().name, blocks)
    for path in runs.paths.values():
        with contextlib.suppress(UserError):  # a note names the damaged file
            model_card.write(path)
    text = "".join(f"\n{note}" for note in runs.notes)
    text = f"\n{table.markdown()}\n{text}" + ("\n" if text else "")
    reports = f"report: {folder / document.MARKDOWN}\npage: {folder / document.PAGE}"
    if not is_trained:
        teachers = "".join(f"\n  {path / files.TEACHER}" for path in runs.paths.values())
        return f"{text}\n{reports}\nteacher: {teachers}"
    best = "\n".join(_best(runs, name, path) for name, path in runs.paths.items())
    students = "".join(f"\n  {path / files.STUDENT}" for path in runs.paths.values())
    return f"{text}\n{best}\ncurves: {folder / CURVES}\n{reports}\nstudents: {students}"


def _show_pictures(runs: Runs, folder: Path) -> list[document.Block]:
    """The pictures of all runs that have some; otherwise the command that draws them."""
    blocks: list[document.Block] = []
    for name, path in runs.paths.items():
        try:
            captions = pictures.read_captions(path)
        except UserError as error:
            runs.notes.append(str(error))
            continue
        if captions:
            blocks.append(Heading(f"Pictures of {name}"))
        for file, caption in captions.items():
            blocks.append(Image(file, file.relative_to(folder).as_posix(), caption))
    return blocks or [
        Paragraph(
            "Attention maps, features, views, a confusion matrix, and the images gained and lost: "
            f"xkd-jax analysis pictures {folder} adds them to this report."
        )
    ]


def _plot(runs: Runs) -> Any:
    metrics = {_label(name): lines for name, lines in runs.metrics.items()}
    names = [main_score(summary["student"]) for summary in runs.summaries.values()]
    found = zip(runs.summaries.values(), names, strict=True)
    of_teacher = [_get(summary, "teacher", name) for summary, name in found]
    return figures.plot_runs(metrics, next((s for s in of_teacher if s is not None), None))


def _describe_costs(runs: Runs) -> list[document.Block]:
    costs = {}
    for name, summary in runs.summaries.items():
        batch_size = runs.recipes[name].found.get("batch_size")
        costs[_label(name)] = [cost.read_cost(summary, runs.metrics[name], batch_size)]
    # The table of scores has the rest.
    lines = cost.list_costs(costs, ("speed", "hours", "extra", "devices"))
    if len(lines[0]) == 1:
        return []
    return [Heading("Cost"), Table(lines), Items(cost.explain(lines), small=True)]


def describe(summaries: dict[str, dict[str, Any]], runs: dict[str, Path]) -> str:
    """What was trained and measured: data, seeds, teacher and date, in a paragraph.

    Args:
      summaries: the contents of each run's summary.json, by the run's name; fields may be missing.
      runs: the folders of the same runs.
    """

    def values(*keys: str) -> str:
        found = dict.fromkeys(str(_get(summary, *keys)) for summary in summaries.values())
        return ", ".join(name for name in found if name != "None")

    finished = max((path / files.SUMMARY).stat().st_mtime for path in runs.values())
    network = "Network" if values("method") == "probe" else "Student"
    sentences = {
        f"Trained on {values('train')}, measured on {values('test')}.": values("train"),
        f"{network}: {values('student', 'model')}.": values("student", "model"),
        f"Teacher: {values('teacher', 'model')}, {values('teacher', 'weights')}.": values(
            "teacher", "model"
        ),
        f"Seed {values('seed')}.": values("seed"),
        f"Finished on {time.strftime('%Y-%m-%d', time.localtime(finished))}.": "always",
    }
    return " ".join(sentence for sentence, is_known in sentences.items() if is_known)


def _get(summary: dict[str, Any], *keys: str) -> Any:
    value: Any = summary
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _best(runs: Runs, name: str, folder: Path) -> str:
    """The best evaluation of a run, whose best student is in `folder`."""
    lines = runs.metrics[name]
    score = first_key(lines, *EVALUATED)
    best = max(
        (line for line in lines if score in line),
        key=lambda line: (line[score], -line["step"]),
        default=None,
    )
    if best is None:
        return f"{name}: no evaluation"
    value, path = f"{100 * best[score]:.2f}", folder / files.BEST
    return f"{name}: best evaluation {value}% at step {best['step']}, in {path}"


def format_table(summaries: dict[str, dict[str, Any]]) -> str:
    """`list_scores` as a Markdown table."""
    return document.format_markdown(list_scores(summaries))


def list_scores(summaries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A table of scores: the header, a row for the teacher, then one for each run.

    Args:
      summaries: the contents of each run's summary.json, by the run's name.
    """
    rows = []
    teachers = [summary["teacher"] for summary in summaries.values() if "teacher" in summary]
    if teachers:
        rows.append(("teacher", teachers[0]))
    if not teachers and len(summaries) == 1:  # a teacher or a baseline of its own
        (alone,) = summaries.values()
        rows.append((_get(alone, "student", "model") or "student", alone["student"]))
    else:
        rows += [(_label(s.get("method", name)), s["student"]) for name, s in summaries.items()]
    # A teacher without a classifier, or of other classes, has no scores.
    scored = [row for _, row in rows if _SCORES.keys() & row.keys()]
    scores = {k: v for k, v in _SCORES.items() if scored and all(k in row for row in scored)}
    if "eer" in scores:
        scores.pop("top5", None)  # always 100% for two classes
    lines = [["", *scores.values(), "parameters", "MFLOPs"]]
    for name, row in rows:
        cells = [f"{100 * row[score]:.2f}" if score in row else "" for score in scores]
        cells.append(f"{row['parameters']:,}" if "parameters" in row else "")
        cells.append(cost.format_mflops(row["flops"]) if "flops" in row else "")
        lines.append([name, *cells])
    return lines


def _label(method: str) -> str:
    return "cross-entropy alone" if method == "none" else method
