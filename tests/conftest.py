"""Fixtures of several test files."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiling is most of these tests' time; XLA's optimizations change none of the claims."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
