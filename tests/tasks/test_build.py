"""What a detector's config builds."""

import json

import numpy as np
import pytest

from tests.tasks.detectors import vit
from tests.tasks.shapes import write_coco
from tests.tasks.test_bad_input import changed, save
from xkd_jax.analysis.finished import load_runs
from xkd_jax.config import used
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.tasks.detection import Detection


def test_a_teacher_of_another_size_and_other_classes(tmp_path):
    """Its position embeddings are resized, its classifier is left out."""
    data = write_coco(tmp_path / "coco", 8)
    path = save(tmp_path, vit(num_classes=7))
    teacher = {"model": "", "weights": path, "args": {"img_size": 96}}
    config = changed(
        data__name=data, method__name="cakd", data__max_size=96,
        **{f"teacher__{name}": value for name, value in teacher.items()},
    )  # fmt: skip
    experiment = create_experiment(config)
    teacher = experiment.distiller.teacher
    assert teacher is not None
    assert teacher.image_size == 96
    assert teacher.output_shapes["grid"] == (6, 6)
    assert teacher.num_classes == 0
    assert experiment.distiller.task == Detection()
    batch = next(iter(experiment.create_loader().batches(0)))
    shapes = experiment.batch_shapes()
    assert {name: leaf.shape for name, leaf in batch.items()} == {
        name: leaf.shape for name, leaf in shapes.items()
    }
    assert batch["image"].shape == (2, 96, 96, 3)
    assert np.all(np.asarray(batch["size"]) == (72, 96))


def test_the_analysis_of_classifiers_refuses_a_detector(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(used(changed())))
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="trained a detector; give runs that trained classifiers"):
        load_runs([tmp_path])
