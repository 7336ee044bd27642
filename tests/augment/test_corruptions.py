"""The corruptions of noisy evaluation."""

import jax
import numpy as np

from tests.augment.images import images_of, key
from xkd_jax.augment import corruptions, ops

noisy = jax.jit(corruptions.noisy)
blur = jax.jit(ops.blur)


def test_corruptions_are_equally_likely_and_as_documented():
    n, size = 400, 16
    x = 0.2 + 0.6 * images_of(n, size, size)
    y = np.asarray(noisy(key(), x))
    bars = np.zeros(n, bool)
    for i in range(n):
        black = (y[i] == 0).all(-1)
        rows, columns = black.all(1), black.all(0)
        bars[i] = (rows.sum() == 4) or (columns.sum() == 4)
        if bars[i]:  # a bar of four pixels, everything else unchanged
            np.testing.assert_array_equal(y[i][~black], x[i][~black])
            assert black.sum() == 4 * size
    same = (y == x).all(-1).mean((1, 2))
    specks = ~bars & (same > 0.5)
    assert set(np.unique(y[specks][(y[specks] != x[specks])])) == {0.0, 1.0}
    np.testing.assert_allclose(1 - same[specks].mean(), 0.1, atol=0.01)
    blurred = np.asarray(blur(x))
    is_blurred = np.abs(y - blurred).max((1, 2, 3)) < 1e-5
    rest = ~bars & ~specks & ~is_blurred
    exponent = np.log(y[rest]) / np.log(x[rest])
    np.testing.assert_allclose(exponent.max((1, 2, 3)), exponent.min((1, 2, 3)), rtol=1e-3)
    gamma = exponent.mean((1, 2, 3))
    assert 0.4 <= gamma.min() < 0.5
    assert 2.2 < gamma.max() <= 2.51
    for kind in (bars, specks, is_blurred, rest):
        assert abs(kind.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / n)
    np.testing.assert_array_equal(y, noisy(key(), x))
