"""A run folder as a finished run leaves it, without training: random weights and a checkpoint."""

import json

import jax

from tests.experiments import tiny_config
from xkd_jax.checkpoint import Checkpoints
from xkd_jax.config import used
from xkd_jax.experiment import create_experiment
from xkd_jax.reporting.summary import STUDENT, save_student
from xkd_jax.state import student_variables
from xkd_jax.train import init_state


def write_run(folder, method="cakd", checkpoint=True, **fields):
    """Returns the experiment and the state that the folder holds."""
    config = tiny_config(method)
    config.data.test = "validation[:50]"
    config.update_from_flattened_dict(fields)
    experiment = create_experiment(config)
    state = init_state(experiment)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(used(config)))
    (folder / "summary.json").write_text("{}")
    save_student(experiment, jax.device_get(student_variables(state)), folder / STUDENT, {})
    if checkpoint:
        teacher = experiment.distiller.teacher
        checkpoints = Checkpoints(folder / "checkpoints", 1, teacher.fingerprint if teacher else "")
        checkpoints.save(1, state)
        checkpoints.close()
    return experiment, state
