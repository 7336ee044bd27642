"""The line about memory, and the error if a step doesn't fit."""

import re

import pytest

from xkd_jax.analysis import memory
from xkd_jax.errors import UserError

SIZES = {"teacher": 2**30, "student": 2**29, "temporaries": 3 * 2**30}


def test_one_line_has_all_sizes():
    line = memory.describe(SIZES, None)
    assert "(GiB): teacher 1.000, student 0.500, temporaries 3.000; total 4.50." in line
    assert "total 4.50 / 16.0." in memory.describe(SIZES, 16 * 2**30)


def test_what_does_not_fit_is_refused_with_what_to_change():
    with pytest.raises(UserError, match=r"needs 4\.5 GiB, but a device has 4\.0 GiB") as error:
        memory.describe(SIZES, 4 * 2**30)
    for field in ("batch_size", "accumulate", "remat", "mesh.student", "mesh.teacher"):
        assert re.search(rf"\b{re.escape(field)}\b", str(error.value))


def test_a_cpu_has_no_limit():
    assert memory.device_limit() is None
