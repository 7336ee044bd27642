"""The model card of a finished run: what its network was made from, and what was measured.

Markdown with the YAML header of Hugging Face, so that a folder with the card as README.md can be
uploaded there. It only states what the files of the run record.
"""

import json
import string
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xkd_jax.errors import UserError
from xkd_jax.reporting import cost, files
from xkd_jax.reporting.document import format_markdown

README = "README.md"  # what Hugging Face shows
UNKNOWN = "not recorded"
_HEADER = "---\npipeline_tag: "
# The network's accuracy, as summary.json calls it.
_SCORES = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "noisy_top1": "top-1 % on corrupted images",
    "eer": "equal error rate %",
    "AP": "average precision of boxes %",
    "AP50": "average precision of boxes at an overlap of 0.5 %",
    "mask_AP": "average precision of masks %",
    "mask_AP50": "average precision of masks at an overlap of 0.5 %",
    "probe_top1": "linear probe on its features, top-1 %",
    "knn_top1": "k-NN on its features, top-1 %",
}
# Fields of config.json, besides the method's options.
_RECIPE = (
    "epochs", "batch_size", "image_size", "crop_pct", "crop_scale", "label_smoothing", "optimizer",
    "schedule", "layer_decay", "freeze", "ema", "augment", "dtype",
)  # fmt: skip
_TEMPLATE = f"""\
{_HEADER}$task
tags:
- $task
- knowledge-distillation
- xkd_jax
---

# $title

$about

## Accuracy

$scores

$measured

## Data

$data

## Teacher

$teacher

## Method

$method

## Recipe

$recipe

## Seeds

$seeds

## Limits

$limits

## Reproduce

$command

Finished on $date, on $devices, with $versions.

## Licences of the source weights

$licences
"""


def write(folder: Path) -> None:
    """Writes model_card.md into the folder of a finished run.

    Raises:
      UserError: config.json, data.json or summary.json is damaged.
    """
    files.write_file(folder / files.CARD, describe(folder).encode())


def describe(folder: Path) -> str:
    """The model card of the finished run in `folder`; what its files don't have is "not recorded".

    Raises:
      UserError: config.json, data.json or summary.json is damaged.
    """
    summary = files.read_summary(folder)
    config, data = (_read_object(folder / name) for name in (files.CONFIG, files.DATA))
    finished = (folder / files.SUMMARY).stat().st_mtime
    student, train = summary["student"], _section(data, "train")
    classes = train.get("class_names", [])
    size = student.get("image_size", UNKNOWN)
    name, method = student.get("model", UNKNOWN), summary.get("method", UNKNOWN)
    task, kind = _name_task(student, classes)
    versions = _section(summary, "versions")
    command = summary.get("command")
    return string.Template(_TEMPLATE).substitute(
        task=task,
        title=_title(name, method, summary.get("teacher")),
        about=f"{kind}, {size} x {size} pixels{_describe_cost(student)}.",
        scores=_list_scores(summary),
        measured=f"Measured on {_name_test(summary)}, once, after the last training step.",
        data=_describe_data(summary, train, classes),
        teacher=_describe_teacher(summary),
        method=_describe_method(config, method, kind),
        recipe=_describe_recipe(config, summary),
        seeds=f"Seed {summary.get('seed', UNKNOWN)}: one run. Other seeds give other numbers; "
        "their spread is not part of this card.",
        limits=_describe_limits(summary, _section(config, "data"), kind, size),
        command=f"```\n{command}\n```" if command else f"The command is {UNKNOWN}.",
        date=time.strftime("%Y-%m-%d", time.localtime(finished)),
        devices=summary.get("devices", "devices that were not recorded"),
        versions=", ".join(f"{k} {v}" for k, v in versions.items()) or "unrecorded versions",
        licences=_list_licences(summary.get("sources")),
    )


def find(student: str, out: Path) -> bytes | None:
    """The card of a run's student, for the README.md of the folder to which it is exported.

    Args:
      student: a run's folder, or its student.safetensors.
      out: the folder.

    Returns:
      None if there is no card, as for weights that aren't a run's.

    Raises:
      UserError: the folder has another README.md, which would be lost.
    """
    path = Path(student)
    folder = path.parent if path.name == files.STUDENT else path
    if not (folder / files.CARD).is_file():
        return None
    readme = out / README
    if readme.exists() and not readme.read_text(errors="replace").startswith(_HEADER):
        raise UserError(
            f"{readme} isn't a model card and would be overwritten; choose another --out."
        )
    return (folder / files.CARD).read_bytes()


def _read_object(path: Path) -> dict[str, Any]:
    contents = files.read_json(path) if path.exists() else {}
    if not isinstance(contents, dict):
        raise UserError(f"{path} is damaged: it has no fields; restore it.")
    return contents


def _section(contents: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = contents.get(name)
    return found if isinstance(found, dict) else {}


def _name_task(student: Mapping[str, Any], classes: list[str]) -> tuple[str, str]:
    """Hugging Face's name of the network's task, and what kind of network it is."""
    if not classes:
        return "image-feature-extraction", "Feature extractor"
    count = f"for {len(classes)} classes"
    if "mask_AP" in student:
        return "image-segmentation", f"Detector with masks {count}"
    if "AP" in student:
        return "object-detection", f"Detector {count}"
    return "image-classification", f"Classifier {count}"


def _title(name: str, method: str, teacher: Any) -> str:
    if method == "probe":
        return f"{name} with a linear classifier"
    if not teacher:
        return f"{name}, trained without a teacher"
    return f"{name}, distilled from {teacher.get('model', 'a teacher')} with {method}"


def _describe_cost(student: Mapping[str, Any]) -> str:
    text = ""
    if "parameters" in student:
        text += f", {student['parameters']:,} parameters"
    if "flops" in student:
        text += f", {cost.format_mflops(student['flops'])} MFLOPs (multiply-adds) per image"
    return text


def _list_scores(summary: Mapping[str, Any]) -> str:
    student, teacher = summary["student"], _section(summary, "teacher")
    known = [name for name in _SCORES if name in student]
    if not known:
        return "No accuracy was measured."
    lines = [["", "this network", *(["teacher"] if teacher else [])]]
    for name in known:
        cells = [f"{100 * row[name]:.2f}" if name in row else "" for row in (student, teacher)]
        lines.append([_SCORES[name], *cells[: len(lines[0]) - 1]])
    return format_markdown(lines)


def _name_test(summary: Mapping[str, Any]) -> str:
    count = summary.get("test_images")
    return summary.get("test", UNKNOWN) + (f" ({count:,} images)" if count else "")


def _describe_data(summary: Mapping[str, Any], train: Mapping[str, Any], classes: list[str]) -> str:
    count = f", {train['examples']:,} images" if "examples" in train else ""
    lines = [f"- Trained on {summary.get('train', UNKNOWN)}{count}."]
    if "digest" in train:
        lines.append(f"- Digest of the training images' names and labels: {train['digest']}.")
    if classes:
        lines.append(f"- Classes, in the order of the logits: {', '.join(classes)}.")
    return "\n".join(lines)


def _describe_teacher(summary: Mapping[str, Any]) -> str:
    teacher, probe = _section(summary, "teacher"), _section(summary, "probe")
    if probe:
        return f"None: this is {probe.get('weights')}, frozen, with a classifier fitted to it."
    if not teacher:
        return "None."
    return f"{teacher.get('model', UNKNOWN)}, {teacher.get('weights', UNKNOWN)}" + (
        f"{_describe_cost(teacher)}."
    )


def _describe_method(config: Mapping[str, Any], method: str, kind: str) -> str:
    if method == "probe":
        return f"Logistic regression on frozen features: {_values(_section(config, 'probe'))}."
    if method == "none":
        loss = "The detector's losses" if kind.startswith("Detector") else "Cross-entropy"
        return f"{loss} with the labels alone."
    options = _section(config, "method")
    lines = [f"- `{part}`: {_values(_section(options, part))}" for part in method.split("+")]
    return "\n".join(lines)


def _describe_recipe(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    rest = "All fields are in the run's `config.json`."
    if "probe" in summary:
        return rest
    start = _section(config, "student").get("weights", UNKNOWN)
    lines = [f"- steps: {summary.get('steps', UNKNOWN)}", f"- initial weights: {start or 'random'}"]
    for name in _RECIPE:
        value = config.get(name, UNKNOWN)
        lines.append(f"- {name}: {_values(value) if isinstance(value, dict) else value}")
    return "\n".join([*lines, "", rest])


def _values(options: Mapping[str, Any]) -> str:
    texts = (f"{name} {json.dumps(value)}" for name, value in options.items())
    return ", ".join(texts) or UNKNOWN


def _describe_limits(
    summary: Mapping[str, Any], data: Mapping[str, Any], kind: str, size: Any
) -> str:
    share = summary.get("crop_pct", 1)
    crop = f" from a centre crop of {share:g} of the shorter side" if share < 1 else ""
    lines = [
        f"- The scores are those of {_name_test(summary)}, at {size} x {size} pixels{crop}. This "
        "run has measured nothing else: no other images, no other sizes."
    ]
    if "classes" in kind and "probe" not in summary and data.get("eval") == data.get("test"):
        lines.append(
            "- The learning curves are those of the same images: whatever was chosen by them, such "
            "as the recipe, fits these images better than others."
        )
    if "noisy_top1" in summary["student"]:
        lines.append("- The corruptions are synthetic, and applied to the same test images.")
    if kind.startswith("Classifier"):
        count = kind.removeprefix("Classifier for ")
        lines.append(
            f"- It assigns one of its {count} to every image, also to an image of something else."
        )
    return "\n".join(lines)


def _list_licences(sources: Any) -> str:
    if sources is None:
        return f"The source weights and their licences are {UNKNOWN}."
    if not sources:
        return "None: all networks were trained from random weights."
    rows = [[source["weights"], source["license"] or UNKNOWN] for source in sources]
    return format_markdown([["weights", "licence"], *rows])
