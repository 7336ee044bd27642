"""Detection: boxes, classes and perhaps masks; the detector's own losses and average precision."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from typing_extensions import override

from xkd_jax.analysis.detection import evaluate_detector
from xkd_jax.augment import ops
from xkd_jax.errors import UserError
from xkd_jax.methods import METHODS, check_pair
from xkd_jax.methods.base import apply
from xkd_jax.methods.reads import needs_logits
from xkd_jax.model import Model
from xkd_jax.tasks.base import Task

_TARGETS = ("boxes", "classes", "masks")
# Stem and stages of a ResNet, by the path of a parameter in the backbone.
_STEM, _STAGE = re.compile(r"(conv1|bn1)(_\d)?/"), re.compile(r"layer(\d)_")


@dataclasses.dataclass(frozen=True)
class Detection(Task):
    """Teacher and student see the images as the host has resized, flipped and padded them.

    A student with `frozen_norm` keeps its backbone's batch normalisation as it is.

    Attributes:
      frozen_stages: this many stages of the backbone, a ResNet's, and its stem keep their values;
        0: none.
      masks: whether masks are evaluated, of models that have some.
    """

    frozen_stages: int = 0
    masks: bool = False

    @override
    def check(self, method, teacher, student):
        if not method.detection:
            *most, last = (name for name, known in METHODS.items() if known.detection)
            raise UserError(
                "this method compares whole images by one prediction or feature, and isn't made "
                f"for detectors; take {', '.join(most)} or {last}."
            )
        if not (teacher.is_detector or getattr(teacher.module, "kind", "") == "transformer"):
            raise UserError(
                f"a detector learns from a Transformer or from another detector, but "
                f"{teacher.name} is neither."
            )
        outs = teacher.output_shapes, student.output_shapes
        check_pair(method, *outs)
        if not teacher.is_detector and needs_logits(method, *outs):
            raise UserError(
                "this method compares the class scores of the same proposals, which takes a "
                f"detector as the teacher, but {teacher.name} isn't one; take a method that reads "
                "features, such as cakd."
            )

    @override
    def initial(self, student, key):
        """Random variables, except for the student's, which may be its backbone's alone."""
        flat = traverse_util.flatten_dict(student.init(key))
        flat |= traverse_util.flatten_dict(student.variables or {})
        return traverse_util.unflatten_dict(flat)

    @override
    def create_views(self, distiller, key, batch):
        del key
        images, student = ops.to_float(batch["image"]), distiller.student
        teacher = distiller.teacher or student
        return teacher.preprocess(images), student.preprocess(images), batch

    @override
    def forward(self, distiller, variables, view, batch, key):
        """The losses, and class logits [N * R, K + 1] of the proposals that they are of.

        `valid` [N * R] is False for padding among the proposals.
        """
        student = distiller.student
        sample_key, dropout_key = jax.random.split(key)
        still = self.frozen(student, variables["params"])
        if still is not None:  # no backward pass either
            params = jax.tree.map(
                lambda frozen, leaf: jax.lax.stop_gradient(leaf) if frozen else leaf,
                still, variables["params"],
            )  # fmt: skip
            variables = variables | {"params": params}
        targets = {name: batch[name] for name in _TARGETS if name in batch}
        (losses, found), updates = apply(
            student.module, variables, view, batch["size"], targets, sample_key, train=True,
            method="losses", mutable=["batch_stats"], rngs={"dropout": dropout_key},
        )  # fmt: skip
        out = found["taps"] | {"side": view.shape[1], "losses": losses}
        out |= {"proposals": found["proposals"], "valid": found["valid"].reshape(-1)}
        out["logits"] = _rows(found["logits"])
        return out, updates.get("batch_stats", {})

    @override
    def teach(self, teacher_out, student_out):
        """A detector's class logits of the student's proposals."""
        if "classify" not in teacher_out:
            return teacher_out
        classify, proposals = teacher_out["classify"], student_out["proposals"]
        return teacher_out | {"logits": _rows(classify(jax.lax.stop_gradient(proposals)))}

    @override
    def label_terms(self, method, student_out, batch):
        """The sum of the detector's losses, as torchvision adds them, and each of them."""
        losses = student_out["losses"]
        return {"label_loss": sum(losses.values(), jnp.zeros(()))} | losses

    @override
    def frozen(self, student, params):
        norms: set[Any] = set()
        if student.module.backbone.frozen_norm:
            statistics = traverse_util.flatten_dict(student.shapes.get("batch_stats", {}))
            norms = {path[:-1] for path in statistics}
        if not norms and not self.frozen_stages:
            return None
        flat = traverse_util.flatten_dict(params)
        return traverse_util.unflatten_dict(
            {path: path[:-1] in norms or self._is_early(path) for path in flat}
        )

    def _is_early(self, path: tuple[str, ...]) -> bool:
        if not self.frozen_stages or path[:2] != ("backbone", "body"):
            return False
        inside = "/".join(path[2:])
        stage = _STAGE.match(inside)
        return int(stage[1]) <= self.frozen_stages if stage else bool(_STEM.match(inside))

    @override
    def describe_split(self, split):
        return dataclasses.asdict(split.frame)

    @override
    def evaluate(self, model, variables, split, mesh, noisy=False):
        """Average precision (COCO's) of boxes and, as `mask_AP` ..., of masks, in [0, 1]."""
        del noisy  # refused by `validation`
        step, masks = create_detect_step(model), self.masks and model.module.mask
        return flat_scores(evaluate_detector(step, variables, split, mesh, masks))


def flat_scores(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What `evaluate_detector` returns in one dict: `AP` ... of boxes, `mask_AP` ... of masks."""
    masks = {f"mask_{name}": score for name, score in found.get("segm", {}).items()}
    return {**found["bbox"], **masks}


@functools.lru_cache(maxsize=4)
def create_detect_step(model: Model) -> Callable[..., Any]:
    """A jitted function, step(variables, images uint8 [N, S, S, 3], sizes [N, 2]) -> detections.

    `sizes` are the heights and widths, in pixels, of what isn't padding.
    """

    @jax.jit
    def step(variables: Any, images: jax.Array, sizes: jax.Array) -> Any:
        pixels = model.preprocess(ops.to_float(images))
        return model.forward(variables, pixels, sizes=sizes)[0]

    return step


def _rows(logits: jax.Array) -> jax.Array:
    """[N, R, K + 1] -> [N * R, K + 1]."""
    return logits.reshape(-1, logits.shape[-1])
