"""The kind of device that code is traced for."""

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
    """Inside, what is traced is for `platform`, wherever it is compiled.

    `jax.jit` remembers what it has traced: give it a function of its own for each platform.
    """
    token = _assumed.set(platform)
    try:
        yield
    finally:
        _assumed.reset(token)
