"""The interface of a task: the parts of a training step and of an evaluation that depend on it."""

from typing import TYPE_CHECKING, Any, Protocol

import jax
from jax.sharding import Mesh

from xkd_jax.methods.base import Method, Outputs, Tree
from xkd_jax.model import Model

if TYPE_CHECKING:
    from xkd_jax.distiller import Distiller

Batch = dict[str, jax.Array]


class Task(Protocol):
    """What a student is trained for; constant during training."""

    def check(self, method: Method, teacher: Model, student: Model) -> None:
        """Checks that the method can teach the student this task.

        Raises:
          UserError: it doesn't support this pair, or reads logits that the teacher lacks.
        """
        ...

    def initial(self, student: Model, key: jax.Array) -> Tree:
        """The student's variables before the first step; random ones where it has no weights."""
        return student.variables or student.init(key)

    def create_views(
        self, distiller: "Distiller", key: jax.Array, batch: Batch
    ) -> tuple[jax.Array, jax.Array, Batch]:
        """The networks' inputs for a batch.

        Args:
          distiller: everything that is constant.
          key: a typed key.
          batch: as for `distiller.train_step`.

        Returns:
          The teacher's and the student's input, each normalised as its network expects, and the
          batch with what methods and the label term read besides.
        """
        ...

    def forward(
        self, distiller: "Distiller", variables: Tree, view: jax.Array, batch: Batch, key: jax.Array
    ) -> tuple[Outputs, Tree]:
        """The student's outputs in training, and its new running statistics.

        Args:
          distiller: everything that is constant.
          variables: the student's.
          view: the student's input.
          batch: from `create_views`.
          key: for dropout and other random choices.
        """
        ...

    def teach(self, teacher_out: Outputs, student_out: Outputs) -> Outputs:
        """The teacher's outputs with those that depend on the student's."""
        del student_out
        return teacher_out

    def label_terms(self, method: Method, student_out: Outputs, batch: Batch) -> Batch:
        """The label term, as `label_loss`, and other scalars by name; empty without labels."""
        ...

    def frozen(self, student: Model, params: Tree) -> Tree | None:
        """Which of the student's parameters never move, a tree of booleans; None: none."""
        del student, params
        return None

    def describe_split(self, split: Any) -> dict[str, Any]:
        """How the images of a split are cut for the networks, as a student's file records it."""
        ...

    def evaluate(
        self, model: Model, variables: Tree, split: Any, mesh: Mesh, noisy: bool = False
    ) -> dict[str, float]:
        """Scores on every example of a split.

        Args:
          model: the student, or a teacher of the same task.
          variables: its variables.
          split: the task's kind of split.
          mesh: the devices.
          noisy: whether images are corrupted, see `evaluate.create_eval_step`.
        """
        ...
