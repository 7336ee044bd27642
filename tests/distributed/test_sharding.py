"""Sharding rules for eight devices; needs no devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from xkd_jax.distributed import sharding

MESH = AbstractMesh((8,), ("data",))
WHOLE = PartitionSpec()


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 512, 1024), PartitionSpec(None, None, None, "data")),
        ((1024, 512), PartitionSpec("data")),
        ((1023, 512), PartitionSpec(None, "data")),  # the longest doesn't divide
        ((513, 513), WHOLE),  # none does
        ((512, 511), WHOLE),  # too small
        ((512, 512), PartitionSpec("data")),  # just large enough
        ((2**17,), WHOLE),
        ((), WHOLE),
    ],
)
def test_large_leaves_are_split_along_their_longest_axis(shape, spec):
    assert sharding.split_large(MESH, array(*shape)).spec == spec


@pytest.mark.parametrize(
    ("rule", "rows", "spec"),
    [
        ("auto", 2**15, WHOLE),  # 2 GiB
        ("auto", 2**15 + 8, PartitionSpec("data")),
        ("fsdp", 2**10, PartitionSpec(None, "data")),
        ("replicated", 2**20, WHOLE),
    ],
)
def test_a_teacher_is_split_when_it_is_large(rule, rows, spec):
    assert sharding.of_teacher(MESH, {"kernel": array(rows, 2**14)}, rule)["kernel"].spec == spec


def test_memory_banks_are_split_whatever_their_size():
    params = {"student": array(1024, 1024), "method": array(1024, 1024)}
    state = {"method_state": {"bank": {"row": array(16, 4)}}, "params": params, "ema": params}
    placed = sharding.of_state(MESH, state, "replicated")
    assert placed["method_state"]["bank"]["row"].spec == PartitionSpec("data")
    assert {s.spec for s in jax.tree.leaves(placed["params"])} == {WHOLE}
    placed = sharding.of_state(MESH, state | {"opt_state": params}, "fsdp")
    for part in ("params", "opt_state"):
        assert placed[part]["student"].spec == PartitionSpec("data")
        assert placed[part]["method"].spec == WHOLE
    assert placed["ema"]["student"].spec == PartitionSpec("data")
