import jax
import numpy as np
import pytest

from tests.experiments import leaves, tiny_config
from tests.runs import finish, start
from xkd_jax import backend, seeds
from xkd_jax.analysis.flops import count_flops
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.seeds import SideBySide
from xkd_jax.train import Alone
from xkd_jax.validation import validate

SEEDS = (3, 1)
STEPS = 2

pytestmark = pytest.mark.usefixtures("quick_compilation")


def configs(method, data_seed):
    for seed in SEEDS:
        config = tiny_config(method, seed)
        config.data.seed = data_seed
        config.steps_per_dispatch = 1
        config.dtype = "float32"  # also for an assumed GPU
        config.optimizer.clip_norm = 1.0  # rounding errors grow less
        yield config


def experiments(method="cakd", data_seed=-1):
    first, *others = configs(method, data_seed)
    experiment = create_experiment(first, sharding.create_mesh(jax.devices()[:1]))
    return [experiment, *map(experiment.with_seed, others)]


def trained(group):
    """The state after a few steps, and each step's metrics."""
    first, found = group.init(), []
    for steps, state, metrics in group.compile(first).dispatches(first, 0, lambda _: STEPS):
        found.append(jax.device_get(metrics))
        if steps[-1] == STEPS:
            return state, found
    raise AssertionError


def assert_as_alone(data_seed):
    members = experiments(data_seed=data_seed)
    state, metrics = trained(SideBySide(members))
    for number, member in enumerate(members):
        member.compiled_steps.update(members[0].compiled_steps)  # they share the step
        alone, of_alone = trained(Alone(member))
        got, want = leaves(seeds.take(state, number)), leaves(alone)
        assert got.keys() == want.keys()
        for path in want:
            # Adam takes whole steps along gradients that are nothing but rounding.
            atol = 5e-3 if "adversary" in path else 1e-4
            np.testing.assert_allclose(got[path], want[path], 1e-3, atol, err_msg=path)
        for one, other in zip(metrics, of_alone, strict=True):
            for name in other:
                np.testing.assert_allclose(one[name][number], other[name], 1e-3, 1e-5, err_msg=name)
    return state


REST = pytest.mark.exhaustive  # the same two ways, each the other way round


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "data_seed"),
    [
        ("cpu", -1),
        ("gpu", 7),
        pytest.param("cpu", 7, marks=REST),
        pytest.param("gpu", -1, marks=REST),
    ],
)
def test_each_seed_is_trained_as_if_it_was_alone(platform, data_seed):
    with backend.assume(platform):
        assert_as_alone(data_seed)


@pytest.mark.slow
@pytest.mark.parametrize("data_seed", [7, pytest.param(-1, marks=REST)])
def test_two_devices_take_a_seed_each(data_seed):
    program = f"""
import jax
from tests.test_seeds import assert_as_alone
jax.config.update("jax_disable_most_optimizations", True)
leaf = jax.tree.leaves(assert_as_alone({data_seed}).params)[0]
print([shard.data.shape[0] for shard in leaf.addressable_shards])
"""
    flags = "--xla_force_host_platform_device_count=2"
    done = finish(start("-c", program, program=(), XLA_FLAGS=flags, JAX_PLATFORMS="cpu"))
    assert done[:2] == (0, "[1, 1]\n"), done[2]


def test_seeds_see_the_same_images_with_a_seed_of_the_data():
    first, second = (member.order.indices(0) for member in experiments(data_seed=7))
    np.testing.assert_array_equal(first, second)
    first, second = (member.order.indices(0) for member in experiments())
    assert (first != second).any()


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", pytest.param("gpu", marks=REST)])
def test_the_teacher_sees_the_same_images_once(platform):
    with backend.assume(platform):
        shared, own = (flops(experiments("logits", data_seed)) for data_seed in (7, -1))
    first = experiments("logits")[0]
    teacher, image = first.distiller.teacher, jax.ShapeDtypeStruct((16, 28, 28, 3), np.float32)
    forward = 2 * count_flops(lambda v, x: teacher.forward(v, x)[0], teacher.variables, image)
    # The views, and what XLA counts besides products, such as softmax, come in addition.
    assert forward < own - shared < 2 * forward


def flops(members):
    """What XLA counts of the compiled step."""
    group = SideBySide(members)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        return group.compile(group.init()).compiled.cost_analysis()["flops"]
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def test_devices_share_the_seeds_out_evenly(monkeypatch):
    device = jax.devices()[0]
    found = []
    monkeypatch.setattr(jax, "devices", lambda: [device] * 8)
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *args, **options: found.append(shape))
    for count in (1, 5, 6, 16, 22):
        seeds.create_mesh(count)
    assert found == [(1,), (5,), (6,), (8,), (2,)]


def test_what_comes_from_the_host_is_refused(tmp_path):
    config = tiny_config("logits")
    config.teacher.update(cache=str(tmp_path / "cache"), cache_views=1)
    with pytest.raises(UserError, match="images and teacher on the devices"):
        seeds.check(create_experiment(config))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ((1, 1), "must be different integers"),
        (("a",), "must be different integers"),
        ((-1,), "must be different integers"),
        ((0, 1), "a random one depends on the seed"),
    ],
)
def test_wrong_seeds_are_refused(chosen, message):
    config = tiny_config("logits")
    config.seeds = chosen
    with pytest.raises(UserError, match=message):
        validate(config)
