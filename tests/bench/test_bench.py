"""`xkd-jax bench`: that its programs compute what a step computes, and what its tables say."""

import json

import jax
import numpy as np
import pytest

from tests import tiny
from tests.runs import TINY, finish, start
from xkd_jax.bench import measure, parts, timing
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def broken_down():
    experiment = create_experiment(tiny.get_config("cakd"))
    return experiment, parts.breakdown(experiment)


@pytest.mark.slow
def test_every_part_of_the_step_is_there(broken_down):
    _, programs = broken_down
    names = ["data", "views", "teacher", "student", "method", "adversary", "optimizer"]
    assert list(programs) == names


@pytest.mark.slow
def test_the_teachers_part_is_what_the_method_reads(broken_down):
    experiment, programs = broken_down
    view = programs["views"].run()[0]
    teacher = experiment.distiller.teacher
    _, out = teacher.forward(teacher.variables, view)
    found = programs["teacher"].run()
    assert found.keys() == {"query", "key", "value", "tokens"}
    for name, array in found.items():
        np.testing.assert_allclose(array, out[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_methods_part_has_gradients_of_projectors_and_outputs(broken_down):
    _, programs = broken_down
    (loss, (_, metrics, _)), (of_params, of_outputs) = programs["method"].run()
    weighted = [float(v) for name, v in metrics.items() if name.endswith("_weighted")]
    np.testing.assert_allclose(float(loss), sum(weighted), rtol=1e-5)
    assert len(of_outputs) == 1  # the tapped map of the student
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves((of_params, of_outputs)))


@pytest.mark.slow
def test_student_adversary_and_optimizer_have_all_gradients(broken_down):
    experiment, programs = broken_down
    state = experiment.distiller.state_shapes
    (loss, _), grads = programs["student"].run()
    assert float(loss) == pytest.approx(np.log(10), rel=0.5)  # an untrained classifier's
    assert jax.tree.structure(grads) == jax.tree.structure(state.params["student"])
    of_adversary, judged = programs["adversary"].run()
    assert jax.tree.structure(of_adversary) == jax.tree.structure(state.params["adversary"])
    assert np.isfinite(judged["discriminator"])
    updated, _ = programs["optimizer"].run()
    assert jax.tree.structure(updated) == jax.tree.structure(state.params)


@pytest.mark.slow
def test_without_a_teacher_there_are_fewer_parts():
    programs = parts.breakdown(create_experiment(tiny.get_config("none")))
    assert list(programs) == ["data", "views", "student", "optimizer"]


def test_programs_take_turns_and_medians_are_given(monkeypatch):
    clock, calls = iter(range(1000)), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    costs = {"a": iter([9, 9, 1, 5, 2]), "b": iter([0] * 5)}

    def program(name):
        def run():
            calls.append(name)
            for _ in range(next(costs[name])):
                next(clock)

        return timing.Program(run)

    found = timing.alternate({name: program(name) for name in costs}, rounds=3)
    assert calls == ["a", "b"] * 5
    assert found == {"a": 3, "b": 1}  # the median of 1, 5 and 2, and a tick of the clock


@pytest.mark.slow
def test_steps_are_measured_against_their_limit():
    config = tiny.get_config("none")
    config.compare = ("none", "fitnet")
    found = measure.measure(config, rounds=1)
    steps = found["steps"]
    assert steps.keys() == {measure.TEACHER, measure.PLAIN, measure.LIMIT, "fitnet"}
    limit = steps[measure.TEACHER]["ms"] + steps[measure.PLAIN]["ms"]
    assert steps[measure.LIMIT]["ms"] == pytest.approx(limit)
    assert steps["fitnet"]["of_limit"] == pytest.approx(steps["fitnet"]["ms"] / limit)
    teacher, plain, both = (steps[n] for n in (measure.TEACHER, measure.PLAIN, measure.LIMIT))
    assert both["flops"] == teacher["flops"] + plain["flops"]
    # The method's own layers come in addition, and don't count as useful work.
    assert 1 < steps["fitnet"]["flops_of_limit"] < 1.5
    useful = [row["mfu"] * row["ms"] for row in (steps["fitnet"], both)]
    assert useful[0] == pytest.approx(useful[1])
    assert json.loads(json.dumps(found)) == found
    text = measure.describe(found)
    assert "| fitnet |" in text
    assert "batch 16; medians over rounds in which all programs take turns: 1." in text
    assert text.splitlines()[-1].startswith("| whole step |")


def test_data_without_labels_are_refused():
    config = tiny.get_config("rkd")
    config.data.labels = False
    with pytest.raises(UserError, match=r"against training on labels; set data\.labels=True\."):
        measure.measure(config, rounds=1)


@pytest.mark.slow
def test_the_command_line(tmp_path):
    file = tmp_path / "step.json"
    program = ("-m", "xkd_jax.bench")
    recipe = f"--config={TINY}:none"
    code, out, err = finish(start(recipe, "--rounds=1", f"--json={file}", program=program))
    assert code == 0, err
    assert f"| {measure.PLAIN} |" in out
    assert json.loads(file.read_text())["rounds"] == 1
    code, _, err = finish(start(recipe, "--rounds=0", program=program))
    assert (code, err) == (2, "xkd_jax: --rounds=0 must be at least 1.\n")
