"""Fixtures of several test files."""

import jax
import pytest

from tests.runs import starter


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiling is most of these tests' time; XLA's optimizations change none of the claims."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `python -m xkd_jax.main`; a file's processes share a new compilation cache."""
    return starter(tmp_path_factory.mktemp("cache"))
