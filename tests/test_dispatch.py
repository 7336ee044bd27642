import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.experiments import leaves, tiny_config
from xkd_jax import backend, dispatch, train
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.train import Stepper, init_state

SIZE = 3
END = 7

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def experiment():
    config = tiny_config("cakd")
    config.batch_size = 2  # a loop's convolutions are slow on a CPU
    config.data.train = "train[:8]"
    return create_experiment(config)


def trained(experiment, size, ends=(END,), start=0, state=None):
    """The state at the last of `ends`, and the steps and metrics of each dispatch."""
    state = init_state(experiment) if state is None else state
    step_fn, dispatches = Stepper(experiment, state, size=size), []
    following = step_fn.dispatches(state, start, lambda step: min(e for e in ends if e > step))
    for steps, state, metrics in following:  # noqa: B007
        dispatches.append((steps, jax.device_get(metrics)))
        if steps[-1] == ends[-1]:
            break
    return state, dispatches


def assert_identical(one, other):
    one, other = leaves(one), leaves(other)
    assert {path: leaf.tobytes() for path, leaf in one.items()} == {
        path: leaf.tobytes() for path, leaf in other.items()
    }


@pytest.fixture(scope="module")
def several(experiment):
    return trained(experiment, SIZE)


@pytest.mark.slow
def test_several_steps_in_one_program_equal_single_ones(experiment, several):
    # To rounding: on a CPU, XLA takes other kernels inside a loop.
    state, dispatches = several
    assert [list(steps) for steps, _ in dispatches] == [[1, 2, 3], [4, 5, 6], [7]]
    single, singles = trained(experiment, 1)
    assert [list(steps) for steps, _ in singles] == [[step] for step in range(1, END + 1)]
    rows = [
        {name: value[i] for name, value in metrics.items()}
        for steps, metrics in dispatches
        for i in range(len(steps))
    ]
    for row, (_, metrics) in zip(rows, singles, strict=True):
        assert row.keys() == metrics.keys()
        for name in metrics:
            np.testing.assert_allclose(row[name], metrics[name], rtol=1e-3, atol=1e-4, err_msg=name)
    got, want = leaves(state), leaves(single)
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_where_dispatches_end_changes_nothing(experiment, several):
    state, dispatches = trained(experiment, SIZE, ends=(2, 4, END))
    assert [list(steps) for steps, _ in dispatches] == [[1, 2], [3, 4], [5, 6, 7]]
    assert_identical(state, several[0])


@pytest.mark.slow
def test_a_resumed_run_ends_bit_identical(experiment, several):
    half, _ = trained(experiment, SIZE, ends=(4,))
    state, _ = trained(experiment, SIZE, start=4, state=jax.tree.map(jnp.copy, half))
    assert_identical(state, several[0])


@pytest.mark.slow
def test_a_run_saves_evaluates_and_logs_at_its_steps(tmp_path):
    config = tiny.get_config("none")
    # Without convolutions, which are slow in a loop on a CPU.
    config.student.model, config.student.args = "vit_tiny_patch4_32", {
        "img_size": 28, "embed_dim": 16, "depth": 1, "num_heads": 2,
    }  # fmt: skip
    config.steps_per_dispatch = 5
    config.epochs = 3  # of 4 steps
    experiment = create_experiment(config)
    train.run(experiment, tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"7", "12"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 13)]
    assert [line["step"] for line in lines if "eval_top1" in line] == [4, 8, 12]


@pytest.mark.parametrize(
    ("platform", "steps", "fed", "flops", "chosen"),
    [
        ("cpu", 0, False, 1e9, 1),
        ("cpu", 8, False, 1e9, 8),
        ("gpu", 0, False, 1e9, 64),
        ("gpu", 0, False, 5e10, 4),
        ("gpu", 0, False, 1e13, 1),
        ("gpu", 0, True, 1e9, 1),
        ("tpu", 1, False, 1e9, 1),
    ],
)
def test_the_number_of_steps(platform, steps, fed, flops, chosen):
    with backend.assume(platform):
        assert dispatch.choose(steps, fed, lambda: flops) == chosen


def test_the_number_of_steps_of_an_experiment(experiment):
    assert train.steps_per_dispatch(experiment) == 1
    with backend.assume("gpu"):
        assert train.steps_per_dispatch(experiment) == 64


@pytest.mark.parametrize(
    ("resident", "cached", "message"),
    [(False, False, "images on the devices"), (True, True, "teacher.cache")],
)
def test_what_comes_from_the_host_is_refused(resident, cached, message):
    dispatch.check(1, resident, cached)
    with pytest.raises(UserError, match=message):
        dispatch.check(2, resident, cached)


def test_a_run_with_a_cache_is_refused_before_it_starts(tmp_path):
    config = tiny_config("logits")
    config.steps_per_dispatch = 2
    config.teacher.update(cache=str(tmp_path / "cache"), cache_views=1)
    with pytest.raises(UserError, match="steps_per_dispatch=2"):
        create_experiment(config)
