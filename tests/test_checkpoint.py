"""Saving and restoring checkpoints, with a small state."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xkd_jax.checkpoint import Checkpoints, place
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError


@pytest.fixture
def state():
    everywhere = sharding.replicated(sharding.create_mesh())
    tree = {"key": jax.random.key(3), "half": jnp.arange(4, dtype=jnp.bfloat16) / 3}
    return jax.device_put(tree, everywhere)


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
    with pytest.raises(UserError, match=r"teacher abc, but teacher.weights now holds x"):
        checkpoints.restore(state)
    checkpoints.close()


def test_a_state_of_another_shape_is_refused(tmp_path, state):
    saved(tmp_path / "c", state)
    checkpoints = Checkpoints(tmp_path / "c", 2, "abc")
    with pytest.raises(UserError, match=r"the checkpoint of step 3 doesn't fit this run"):
        checkpoints.restore(state | {"more": state["half"]})
    checkpoints.close()


def test_the_previous_one_is_used_whichever_file_is_truncated(tmp_path, state, capsys):
    older = state | {"half": state["half"] * 2}
    checkpoints = Checkpoints(tmp_path / "whole", 2, "abc")
    checkpoints.save(2, older)
    checkpoints.save(3, state)
    checkpoints.close()
    newest = tmp_path / "whole" / "3"
    for file in [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]:
        torn = tmp_path / "torn" / "3" / file.relative_to(newest)
        shutil.copytree(tmp_path / "whole", tmp_path / "torn")
        torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
        checkpoints = Checkpoints(tmp_path / "torn", 2, "abc")
        restored = checkpoints.restore(state)["half"]
        checkpoints.save(3, state)  # the damaged one has been deleted
        checkpoints.close()
        said = "the checkpoint of step 3 is damaged" in capsys.readouterr().err
        np.testing.assert_array_equal(restored, (older if said else state)["half"], str(file))
        if file.stat().st_size > 20_000 or file.name in ("metadata", "_METADATA"):
            assert said, file
        shutil.rmtree(tmp_path / "torn")


def test_a_folder_without_a_commit_marker_is_not_a_checkpoint(tmp_path, state):
    saved(tmp_path / "c", state)
    half = tmp_path / "c" / "3.orbax-checkpoint-tmp"  # the remains of an interrupted save
    (tmp_path / "c" / "3").rename(half)
    (half / "commit_success.txt").unlink()
    checkpoints = Checkpoints(tmp_path / "c", 2, "abc")
    assert checkpoints.restore(state) is not None
    checkpoints.save(3, state)  # waits for Orbax's thread that deletes interrupted saves
    checkpoints.close()
    assert {path.name for path in (tmp_path / "c").iterdir() if path.is_dir()} == {"2", "3"}


def test_a_non_finite_state_is_not_saved(tmp_path, state):
    saved(tmp_path / "c", state)
    checkpoints = Checkpoints(tmp_path / "c", 2, "abc")
    with pytest.raises(UserError, match="Non-finite values after step 4: half; the checkpoint"):
        checkpoints.save(4, state | {"half": state["half"] / 0})
    assert checkpoints.restore(state) is not None
    checkpoints.close()
    assert not (tmp_path / "c" / "4").exists()


def test_a_folder_that_cannot_be_written_is_reported_in_one_sentence(tmp_path):
    """At the start; test_faults.py covers failures while saving."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/c can't be written \(.*\); earlier checkpoints are"):
        Checkpoints(tmp_path / "file" / "c", 2, "abc")


def test_the_folder_of_checkpoints():
    assert str(place(Path("runs/a"), "")) == "runs/a/checkpoints"
    assert str(place(Path("runs/a"), "gs://bucket/all")) == "gs://bucket/all/a"
    assert str(place(Path("runs/a"), "/disk")) == "/disk/a"
