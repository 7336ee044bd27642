"""Checkpoints of a small state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xkd_jax import partition
from xkd_jax.checkpoint import Checkpoints
from xkd_jax.errors import UserError


@pytest.fixture
def state():
    sharding = partition.replicated(partition.create_mesh(-1, 1))
    tree = {"key": jax.random.key(3), "half": jnp.arange(4, dtype=jnp.bfloat16) / 3}
    return jax.device_put(tree, sharding)


def saved(folder, state, teacher="abc"):
    checkpoints = Checkpoints(folder, 2, teacher)
    for step in (1, 2, 3):
        checkpoints.save(step, state)
    checkpoints.close()


def test_restores_the_newest_bit_for_bit(tmp_path, state):
    saved(tmp_path / "c", state)
    checkpoints = Checkpoints(tmp_path / "c", 2, "abc")
    restored = checkpoints.restore(jax.tree.map(jnp.copy, state))
    checkpoints.close()
    assert restored["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(restored["half"], state["half"])
    np.testing.assert_array_equal(*map(jax.random.key_data, (restored["key"], state["key"])))
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["2", "3"]


def test_nothing_to_restore(tmp_path, state):
    checkpoints = Checkpoints(tmp_path / "c", 2, "abc")
    assert checkpoints.restore(state) is None
    checkpoints.close()


def test_another_teacher_is_refused(tmp_path, state):
    saved(tmp_path / "c", state)
    checkpoints = Checkpoints(tmp_path / "c", 2, "xyz")
    with pytest.raises(UserError, match=r"teacher abc, and teacher.weights now holds x"):
        checkpoints.restore(state)
    checkpoints.close()


def test_a_state_of_another_shape_is_refused(tmp_path, state):
    saved(tmp_path / "c", state)
    checkpoints = Checkpoints(tmp_path / "c", 2, "abc")
    with pytest.raises(UserError, match=r"the checkpoint of step 3 doesn't fit this run"):
        checkpoints.restore(state | {"more": state["half"]})
    checkpoints.close()
