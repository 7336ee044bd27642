"""Classification: one class per image, cross-entropy, random views and top-1 accuracy."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from typing_extensions import override

from xkd_jax.augment import fixed
from xkd_jax.data.encoded import crop_share
from xkd_jax.evaluate import create_eval_step, evaluate
from xkd_jax.methods import check_pair
from xkd_jax.methods.base import apply
from xkd_jax.methods.label import label_term
from xkd_jax.methods.reads import check_logits
from xkd_jax.optim import layer_ids
from xkd_jax.tasks.base import Task

if TYPE_CHECKING:
    from xkd_jax.distiller import Distiller


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """Without labels, only the method trains the student, and its batch has no `label`."""

    labelled: bool = True

    @override
    def check(self, method, teacher, student):
        for check in (check_pair, check_logits):
            check(method, teacher.output_shapes, student.output_shapes)

    @override
    def create_views(self, distiller, key, batch):
        """Random views of the images, or fixed ones; adds `target` [N, K] to the batch."""
        keys = fixed.view_keys(batch["view"], batch["index"]) if "view" in batch else None
        teacher, student, targets = create_views(
            distiller, key, batch["image"], batch["label"], keys
        )
        batch = batch | {"target": targets}
        if not self.labelled:
            del batch["label"]  # 0 for all images
        return teacher, student, batch

    @override
    def forward(self, distiller, variables, view, batch, key):
        del batch
        (_, out), updates = apply(
            distiller.student.module, variables, view, train=True,
            mutable=["batch_stats"], rngs={"dropout": key},
        )  # fmt: skip
        return out | {"side": view.shape[1]}, updates.get("batch_stats", {})

    @override
    def label_terms(self, method, student_out, batch):
        if "logits" not in student_out or "label" not in batch:
            return {}
        label = label_term(method, student_out, batch["target"])
        return {"label_loss": label, "accuracy": accuracy(student_out["logits"], batch["label"])}

    @override
    def frozen(self, student, params):
        """The embedding and the first blocks, see `model.freeze`."""
        blocks = getattr(student.module, "frozen", 0)
        if not blocks:
            return None
        return jax.tree.map(lambda layer: layer <= blocks, layer_ids(params))

    @override
    def describe_split(self, split):
        return {"crop_pct": crop_share(split)}

    @override
    def evaluate(self, model, variables, split, mesh, noisy=False):
        eval_step = create_eval_step(model, split.crop_pct, noisy)
        return evaluate(eval_step, variables, split, mesh)


def create_views(
    distiller: "Distiller", key: jax.Array, images: jax.Array, labels: jax.Array, keys: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The networks' inputs for images [N, H, W, 3] with labels [N].

    If views are fixed, `keys` are from `fixed.view_keys`.

    Returns:
      The teacher's and the student's input, each normalised as its network expects, and the targets
      [N, K]. Without labels the targets mean nothing; without a classifier K is 1.
    """
    targets = jax.nn.one_hot(labels, max(distiller.student.num_classes, 1))
    multiple = distiller.method.multi_view
    if keys is None:
        *views, targets = distiller.augment(key, images, targets, multiple)
    else:
        inputs = distiller.augment, key, keys, images, targets
        *views, targets = fixed.fixed_views(*inputs, multiple)
    teacher, student = distiller.teacher or distiller.student, distiller.student
    return teacher.preprocess(views[0]), student.preprocess(views[1]), targets


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of logits [N, K] whose maximum is at the label, of labels [N]."""
    return jnp.mean(jnp.argmax(logits, -1) == labels)
