"""Transferability of features (Fig. 1(b) and 3(b) of the paper).

A linear map from the student's features to the teacher's is fitted on training images; the mean
cosine similarity of mapped and teacher features is measured on test images. For a cakd run the
same is measured after the trained projectors, without a fitted map.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xkd_jax.analysis.finished import Finished, cakd_part, spread
from xkd_jax.analysis.linear_map import cosines, fit_linear_map, linear_cka
from xkd_jax.augment import ops
from xkd_jax.data import Split
from xkd_jax.data.encoded import open_split
from xkd_jax.distributed import sharding
from xkd_jax.evaluate import IMAGES_PER_DEVICE
from xkd_jax.methods.align import choose_stage, is_transformer, level_map, levels, resize_map
from xkd_jax.methods.base import Outputs
from xkd_jax.methods.cakd import CAKD, attention
from xkd_jax.model import Model, load
from xkd_jax.probing.linear import VALIDATION, hold_out
from xkd_jax.reporting.files import BEST, STUDENT, TEACHER
from xkd_jax.reporting.logger import say

ROWS = 50_000  # tokens of a split, at most; of larger ones a few random tokens of each image
LINEAR = "linear map"
PROJECTORS = {"GL": "GL projector", "PCA": "PCA projector"}
_SEED = 2022  # of the tokens that are drawn and the images that are held out

# By space: the teacher's features and the student's, each [N, ...], with equal leading axes.
Features = dict[str, tuple[Any, Any]]


class Pair(NamedTuple):
    """Two networks and the images that they are compared on.

    Attributes:
      name: for tables.
      teacher: with weights.
      student: with weights.
      train: the images that maps are fitted on.
      test: the images that similarities are measured on.
      projectors: a cakd and its trained parameters, if there are any.
    """

    name: str
    teacher: Model
    student: Model
    train: Split
    test: Split
    projectors: tuple[CAKD, Any] | None = None


class Similarity(NamedTuple):
    """One row of the table.

    Attributes:
      name: the pair's.
      kind: "CNN→CNN", "T→T" or "T→CNN", teacher first.
      features: "pooled", "tokens (stage3)", ...
      mapping: `LINEAR`, or one of the `PROJECTORS`.
      cosine: mean cosine similarity of mapped student features and teacher features.
      centred: the same after the teacher's mean over the training images is subtracted from both.
      constant: the mean cosine similarity of that mean itself: what a map reaches without looking.
      cka: debiased linear CKA of the student's (projected) features and the teacher's.
      strength: of the ridge regression; None for a projector.
    """

    name: str
    kind: str
    features: str
    mapping: str
    cosine: float
    centred: float
    constant: float
    cka: float
    strength: float | None


def pairs_of_runs(runs: list[Finished]) -> list[Pair]:
    """The networks of each run; one without a teacher is compared with that of all others."""
    teachers = {run.teacher.fingerprint: run.teacher for run in runs if run.teacher is not None}
    shared = next(iter(teachers.values())) if len(teachers) == 1 else None
    return [pair for run in runs if (pair := pair_of(run, shared)) is not None]


def pair_of(run: Finished, shared: Model | None = None) -> Pair | None:
    """A run's networks, with the teacher `shared` if it has none; None, with a message, if neither.

    Args:
      run: finished.
      shared: the teacher of the runs that it is compared with.
    """
    teacher = run.teacher or shared
    if teacher is None:
        say(f"{run.name} is left out: its config names no teacher.")
        return None
    projectors = cakd_part(run)
    if projectors is None and "cakd" in run.experiment.config.method.name.split("+"):
        say(f"{run.name} has no checkpoint left: measured without its projectors.")
    train = run.experiment.train
    return Pair(run.name, teacher, run.student, train, run.test, projectors)


def pairs_of(
    teachers: list[str], students: list[str], data: str, data_dir: str, train: str, test: str,
    image_size: int = 0,
) -> list[Pair]:  # fmt: skip
    """All pairs of weights files, except those of a file with itself.

    Args:
      teachers: names as `xkd_jax.load` takes them.
      students: the same.
      data: the data set's name; for the others see `data.load`.
      data_dir: the data folder.
      train: the split that maps are fitted on.
      test: the split that similarities are measured on.
      image_size: of the images before each network resizes them, pixels; 0: the data's own.

    Raises:
      UserError: a file or the data are missing or damaged.
    """
    models = {name: load(name) for name in (*teachers, *students)}
    fitted, measured = (
        open_split(data, split, data_dir, image_size, "auto", "stop", 0.0, True)
        for split in (train, test)
    )
    return [
        Pair(f"{_short(teacher)} / {_short(student)}", models[teacher], models[student],
             fitted, measured)
        for teacher in teachers
        for student in students
        if teacher != student
    ]  # fmt: skip


def _short(name: str) -> str:
    """A name for tables: a run's, or else a file's."""
    path = Path(name.rpartition(":")[2])
    return path.parent.name if path.name in (STUDENT, BEST, TEACHER) else path.stem


def measure(pair: Pair, mesh: Mesh, images: int = 0) -> list[Similarity]:
    """All similarities of a pair.

    Args:
      pair: the networks and images.
      mesh: the devices.
      images: training images to fit on, and test images to measure on, at most; 0: all.
    """
    train, test = spread(pair.train, images), spread(pair.test, images)
    step = create_pair_step(pair)
    fitted, measured = (_features(step, pair, split, mesh) for split in (train, test))
    held_images = hold_out(np.asarray(train.labels), VALIDATION, _SEED)
    kind, found = kind_of(pair), []
    # `jit` has sorted the names; the projectors come last.
    for name in sorted(measured, key=lambda name: (" by " in name, name)):
        (teacher, student), (past_teacher, past_student) = measured[name], fitted[name]
        mean = past_teacher.mean(0)
        mapped, strength, mapping = student, None, PROJECTORS.get(name.split()[-1], LINEAR)
        if mapping == LINEAR:
            held = np.repeat(held_images, len(past_teacher) // len(held_images))
            linear, strength = fit_linear_map(past_student, past_teacher, held)
            mapped = linear(student)
        row = Similarity(
            pair.name, kind, name.split(" by ")[0], mapping,
            float(cosines(mapped, teacher).mean()),
            float(cosines(mapped - mean, teacher - mean).mean()),
            float(cosines(np.broadcast_to(mean, teacher.shape), teacher).mean()),
            linear_cka(student, teacher), strength,
        )  # fmt: skip
        found.append(row)
    return found


def kind_of(pair: Pair) -> str:
    """The pair's architectures as the paper names them, teacher first, such as "T→CNN"."""
    outs = pair.teacher.output_shapes, pair.student.output_shapes
    return "→".join("T" if is_transformer(out) else "CNN" for out in outs)


def create_pair_step(pair: Pair) -> Callable[..., Features]:
    """A jitted step(variables, images, key) -> `Features`.

    `variables` are the teacher's, the student's and the projectors'; `images` are uint8
    [N, H, W, 3]; tokens are [N, k, D], at the positions that `key` draws.
    """
    teacher, student = pair.teacher, pair.student
    stage = find_stage(teacher.output_shapes, student.output_shapes)

    def step(
        variables: tuple[Any, Any, Any], images: jax.Array, key: jax.Array,
        crop_pct: float, kept: int,
    ) -> Features:  # fmt: skip
        teacher_out = forward(teacher, variables[0], images, crop_pct)
        student_out = forward(student, variables[1], images, crop_pct)
        features: Features = {"pooled": (teacher_out["pooled"], student_out["pooled"])}
        tokens = {f"tokens ({stage})": paired_tokens(teacher_out, student_out, stage)}
        if pair.projectors:
            method = pair.projectors[0]
            done = method.project(variables[2], teacher_out, student_out)
            if method.token_weight:  # or the projector has not been trained
                tokens["tokens by GL"] = done.teacher_tokens, done.student_tokens
            if method.attention_weight or method.value_weight:
                maps = attention(*done.teacher_qkv, bias=done.bias), attention(*done.student_qkv)
                tokens["attention by PCA"] = _join_heads(maps[0]), _join_heads(maps[1])
        for name, (of_teacher, of_student) in tokens.items():
            order = jax.random.permutation(key, of_teacher.shape[1])[:kept]
            features[name] = of_teacher[:, order], of_student[:, order]
        return jax.tree.map(lambda array: array.astype(jnp.float32), features)

    return jax.jit(step, static_argnums=(3, 4))


def forward(model: Model, variables: Any, images: jax.Array, crop_pct: float) -> Outputs:
    """A network's outputs for uint8 images [N, H, W, 3], as methods get them.

    `crop_pct` is that of the images' split.
    """
    pixels = ops.evaluated_pixels(images, model.image_size, crop_pct)
    _, out = model.forward(variables, model.preprocess(pixels))
    return out | {"side": model.image_size}


def find_stage(teacher_out: Outputs, student_out: Outputs) -> str:
    """The student's map that is compared with the teacher's tokens, or with a CNN's last stage."""
    if not is_transformer(teacher_out):
        return levels(student_out)[-1]
    sides = teacher_out.get("side", 0), student_out.get("side", 0)
    return choose_stage(student_out, teacher_out["grid"], "auto", sides)


def paired_tokens(
    teacher_out: Outputs, student_out: Outputs, stage: str
) -> tuple[jax.Array, jax.Array]:
    """The teacher's tokens [N, T, D] and the student's map [N, T, C], resized if grids differ."""
    last = "tokens" if is_transformer(teacher_out) else levels(teacher_out)[-1]
    teacher = level_map(teacher_out, last, standardize=False)
    student = level_map(student_out, stage, standardize=False)
    student = resize_map(student, teacher.shape[1:3])
    flat = (each.reshape(len(each), -1, each.shape[-1]) for each in (teacher, student))
    return tuple(flat)  # type: ignore[return-value]


def _join_heads(values: jax.Array) -> jax.Array:
    """[N, H, T, d] -> [N, T, H * d]."""
    n, heads, tokens, width = values.shape
    return values.swapaxes(1, 2).reshape(n, tokens, heads * width)


def _features(
    step: Callable[..., Features], pair: Pair, split: Split, mesh: Mesh
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The features of every image, [rows, width] each; the tokens of an image are adjacent."""
    parts = list(_batches(step, pair, split, mesh, max(1, ROWS // len(split))))
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    return jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), joined)


def _batches(
    step: Callable[..., Features], pair: Pair, split: Split, mesh: Mesh, kept: int
) -> Iterator[Features]:
    """The features of each batch; the last one is padded, and cut again."""
    over_batch, key = sharding.over_batch(mesh), jax.random.key(_SEED)
    params = pair.projectors[1] if pair.projectors else {}
    variables = pair.teacher.variables, pair.student.variables, params
    variables = jax.device_put(variables, sharding.replicated(mesh))
    batch_size, count = IMAGES_PER_DEVICE * mesh.shape["data"], len(split)
    for first in range(0, count, batch_size):
        indices = np.minimum(np.arange(first, first + batch_size), count - 1)
        images = sharding.put_rows(split.images, indices, over_batch)
        batch = step(variables, images, jax.random.fold_in(key, first), split.crop_pct, kept)
        batch = sharding.to_host(batch, mesh)
        yield jax.tree.map(lambda array: array[: count - first], batch)  # noqa: B023
