"""Fixtures of several test files, and how the tests share compiled programs."""

import os
import shutil
import tempfile

import jax
import pytest

from tests import runs

CACHE = pytest.StashKey[str]()


def pytest_configure(config):
    """All processes share one compilation cache: XKD_JAX_TEST_CACHE, or else a new folder.

    Cached programs are bit for bit those that would be compiled, options are part of their key.
    """
    if not hasattr(config, "workerinput"):  # xdist's workers inherit the variables
        cache = os.environ.get("XKD_JAX_TEST_CACHE")
        if cache is None:
            cache = config.stash[CACHE] = tempfile.mkdtemp(prefix="xkd_jax_tests_")
        os.environ["XDG_CACHE_HOME"] = cache
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(cache, "xkd_jax")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    # JAX has been imported already.
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_unconfigure(config):
    if CACHE in config.stash:
        shutil.rmtree(config.stash[CACHE], ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    """Leaves out what is exhaustive, slow or not, unless -m names it."""
    if "exhaustive" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="module")
def quick_compilation():
    """These tests mostly wait for compilation, and don't depend on XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def start():
    """Starts `python -m xkd_jax.main`."""
    return runs.start
