"""The square that images are resized and padded to."""

import numpy as np
import pytest

from xkd_jax.data.frame import Frame
from xkd_jax.errors import UserError


def test_sizes():
    frame = Frame()
    assert frame.side == 1344
    assert frame.fit(480, 640) == (800, 1066)  # 1066.7
    assert frame.fit(640, 480) == (1066, 800)
    assert frame.fit(427, 1280) == (444, 1333)  # the longer side's limit
    assert Frame(64, 64).side == 64
    assert Frame(64, 64).fit(1, 1000) == (1, 64)  # not 0


def test_padding():
    pixels = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    padded = Frame(3, 5).pad(pixels, np.array([7, 8, 9], np.uint8))
    assert padded.shape == (32, 32, 3)
    np.testing.assert_array_equal(padded[:3, :5], pixels)
    padded[:3, :5] = 7, 8, 9
    assert (padded == [7, 8, 9]).all()


@pytest.mark.parametrize("sizes", [(0, 32), (64, 32), (-1, 5)])
def test_impossible_sizes(sizes):
    with pytest.raises(UserError, match=r"min_size=.* max_size=.* both must be positive"):
        Frame(*sizes)
