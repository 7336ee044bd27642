"""Fixtures that several test files use."""

import jax
import pytest

from tests.runs import starter


@pytest.fixture(scope="module")
def quick_compilation():
    """These tests mostly wait for compilation, and don't depend on XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `python -m xkd_jax.main`; all processes of a test file share a compilation cache."""
    return starter(tmp_path_factory.mktemp("cache"))
