"""The platform that code is traced for."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_assumed: ContextVar[str] = ContextVar("assumed", default="")


def current() -> str:
    """ "cpu", "gpu" or "tpu": JAX's default backend, or what `assume` says."""
    return _assumed.get() or jax.default_backend()


@contextlib.contextmanager
def assume(platform: str) -> Iterator[None]:
    """A context in which code is traced for `platform`, wherever it is compiled.

    `jax.jit` caches traces by function: jit a new function for each platform.
    """
    token = _assumed.set(platform)
    try:
        yield
    finally:
        _assumed.reset(token)
