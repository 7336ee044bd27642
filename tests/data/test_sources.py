"""Split syntax, data set names and the order of batches."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xkd_jax import data
from xkd_jax.data.order import batch_indices
from xkd_jax.errors import UserError

# ---- splits

SIZES = {"train": 50, "test": 10}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("train", ("train", 0, 50)),
        ("test", ("test", 0, 10)),
        ("train[:20]", ("train", 0, 20)),
        ("train[45:]", ("train", 45, 50)),
        ("train[3:7]", ("train", 3, 7)),
        ("train[:]", ("train", 0, 50)),
        ("train[-5:]", ("train", 45, 50)),
        ("train[:-5]", ("train", 0, 45)),
        ("test[:10%]", ("test", 0, 1)),
        ("train[:90%]", ("train", 0, 45)),
        ("train[90%:]", ("train", 45, 50)),
        ("train[-10%:]", ("train", 45, 50)),
    ],
)
def test_split_syntax(spec, expected):
    assert data.parse_split(spec, SIZES) == expected


def test_percentages_partition_like_tfds():
    """Adjacent percentages share a bound, so that no example is lost or read twice."""
    sizes = {"train": 997}
    stops = [data.parse_split(f"train[:{p}%]", sizes)[2] for p in range(1, 101)]
    starts = [data.parse_split(f"train[{p}%:]", sizes)[1] for p in range(1, 100)]
    assert stops[:-1] == starts
    assert stops[-1] == 997


@pytest.mark.parametrize("spec", ["validation", "train[", "train[1:2", "", "train[a:b]", "t est"])
def test_unknown_split_names_the_right_ones(spec):
    with pytest.raises(UserError, match=r"unknown split .*train \(50\), test \(10\).*'train\[:10"):
        data.parse_split(spec, SIZES)


@pytest.mark.parametrize("spec", ["train[:51]", "train[7:7]", "train[9:3]", "train[-51:]"])
def test_impossible_range(spec):
    with pytest.raises(UserError, match="'train' has 50"):
        data.parse_split(spec, SIZES)


# ---- names, and what is imported


def test_unknown_data_set():
    with pytest.raises(UserError, match=r"unknown data set 'cifar100'; did you mean tfds:cifar100"):
        data.load("cifar100", "train")
    with pytest.raises(UserError, match=r"known: .*fashion_mnist_mini.*idx:FOLDER"):
        data.load("zzz", "train")
    with pytest.raises(UserError, match="lacks the part after the colon"):
        data.load("tfds:", "train")


def test_neither_jax_nor_tensorflow_is_imported():
    code = (
        "import sys; from xkd_jax import data; data.load('fashion_mnist_mini', 'train[:10]'); "
        "import xkd_jax.data.order; "
        "print([m for m in ('jax', 'tensorflow', 'tensorflow_datasets') if m in sys.modules])"
    )
    root = Path(data.__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"


# ---- order


def test_an_epoch_is_a_permutation_less_its_remainder():
    steps = 103 // 10
    seen = np.concatenate([batch_indices(103, 10, seed=3, step=step) for step in range(steps)])
    assert seen.dtype == np.int32
    assert len(np.unique(seen)) == 100
    assert seen.min() >= 0
    assert seen.max() < 103


def test_epochs_and_seeds_differ():
    first = batch_indices(100, 100, seed=0, step=0)
    assert (first != batch_indices(100, 100, seed=0, step=1)).any()
    assert (first != batch_indices(100, 100, seed=1, step=0)).any()
    np.testing.assert_array_equal(np.sort(first), np.arange(100))


def test_order_needs_only_the_step():
    walked = [batch_indices(64, 10, seed=7, step=step) for step in range(20)]
    for step in (19, 0, 6, 5, 12):  # in any order, over several epochs
        np.testing.assert_array_equal(batch_indices(64, 10, seed=7, step=step), walked[step])


def test_order_is_pinned():
    """Another NumPy or another platform must not reorder a resumed run."""
    np.testing.assert_array_equal(batch_indices(10, 5, seed=0, step=0), [0, 7, 8, 6, 9])


def test_a_changed_batch_changes_no_other():
    batch_indices(10, 5, seed=0, step=0)[:] = 9
    np.testing.assert_array_equal(batch_indices(10, 5, seed=0, step=0), [0, 7, 8, 6, 9])


@pytest.mark.parametrize("batch_size", [0, 11])
def test_impossible_batch(batch_size):
    with pytest.raises(ValueError, match=r"not within 1\.\.10"):
        batch_indices(10, batch_size, 0, 0)
