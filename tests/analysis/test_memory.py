import re

import pytest

from xkd_jax.analysis import memory
from xkd_jax.errors import UserError

SIZES = {"teacher": 2**30, "student": 2**29, "temporaries": 3 * 2**30}


def test_one_line_tells_all():
    line = memory.describe(SIZES, None)
    assert "teacher 1.000, student 0.500, temporaries 3.000; together 4.50." in line
    assert "together 4.50 of 16.0." in memory.describe(SIZES, 16 * 2**30)


def test_what_does_not_fit_is_refused_with_what_to_change():
    with pytest.raises(UserError, match=r"takes 4\.5 GiB of a device's 4\.0 GiB") as error:
        memory.describe(SIZES, 4 * 2**30)
    for field in ("batch_size", "accumulate", "remat", "mesh.student", "mesh.teacher"):
        assert re.search(rf"\b{re.escape(field)}\b", str(error.value))


def test_a_cpu_has_no_limit():
    assert memory.device_limit() is None
