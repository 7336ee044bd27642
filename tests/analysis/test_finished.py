"""Finished runs are loaded as they were, and what is missing is named."""

import dataclasses
import json

import numpy as np
import pytest

from tests.analysis.finished_run import write_run
from tests.experiments import leaves
from xkd_jax.analysis.finished import by_class, cakd_part, load_runs, read_config, spread
from xkd_jax.config import used
from xkd_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
def test_a_run_and_its_projectors_are_loaded(tmp_path):
    experiment, state = write_run(tmp_path / "all" / "cakd+logits", "cakd+logits")
    (run,) = load_runs([tmp_path / "all"])
    assert run.name == "all/cakd+logits"
    assert json.dumps(used(run.experiment.config)) == json.dumps(used(experiment.config))
    assert len(run.test) == 50
    assert run.teacher.fingerprint == experiment.distiller.teacher.fingerprint
    method, params = cakd_part(run)
    assert method.token_weight == experiment.config.method.cakd.token_weight
    expected = leaves(state.params["method"]["cakd"])
    for name, leaf in leaves(params).items():
        np.testing.assert_array_equal(leaf, expected[name])
    student = leaves(run.student.variables["params"])
    for name, leaf in leaves(state.params["student"]).items():
        np.testing.assert_array_equal(student[name], leaf)


@pytest.mark.slow
def test_a_baseline_has_its_configs_teacher_and_no_projectors(tmp_path):
    write_run(tmp_path / "none", "none", checkpoint=False)
    write_run(tmp_path / "cakd", checkpoint=False)
    none, cakd = load_runs([tmp_path / "none", tmp_path / "cakd"])
    assert (none.name, cakd.name) == ("none", "cakd")
    assert none.teacher.name == "vit_tiny_patch16_224"
    assert cakd_part(none) is None
    assert cakd_part(cakd) is None
    assert not (tmp_path / "cakd" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nonsense": 1}, "is from another version of xkd_jax .nonsense."),
        ({"batch_size": "many"}, "has a value of the wrong type"),
        (None, "is damaged"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text("{" if change is None else json.dumps(change))
    with pytest.raises(UserError, match=message):
        read_config(path)


def test_every_class_has_its_share_of_a_few_images(tmp_path):
    write_run(tmp_path / "none", "none", checkpoint=False)
    (run,) = load_runs([tmp_path / "none"])
    images, labels = np.arange(600).reshape(600, 1, 1, 1), np.arange(600) % 10
    # Classes take turns: every 20th image would be of the same class.
    split = dataclasses.replace(run.test, images=images, labels=labels)
    few = spread(split, 30)
    assert np.bincount(few.labels).tolist() == [3] * 10
    np.testing.assert_array_equal(few.images.ravel() % 10, few.labels)
    assert (np.diff(few.images.ravel()) > 0).all()  # in the split's order
    in_order = by_class(split, 30)
    assert in_order.labels.tolist() == sorted(few.labels.tolist())
    assert spread(split, 0) is spread(split, 999) is split
