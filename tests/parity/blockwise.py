"""Compiles a network block by block, identical blocks only once."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

# Holders of blocks: it is their parts that repeat.
_HOLDERS = ("Stage", "WideGroup")

# XLA's newer code generator for CPUs takes twice as long to generate code.
_QUICK = {"xla_cpu_use_fusion_emitters": False}

_lock = threading.Lock()


def blockwise() -> Any:
    """A context in which `apply` compiles each of a network's parts separately.

    This is several times faster than compiling a whole network or each of its operations, and
    networks that share a part share its compiled program.
    """
    return nn.intercept_methods(_compiled_part)


def _compiled_part(
    method: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any
) -> Any:
    module: nn.Module = context.module
    if (
        type(module).__name__ in _HOLDERS
        or not isinstance(module.parent, nn.Module)  # the network itself
        or context.method_name != "__call__"
        or _is_traced((args[0], module.variables))  # inside a part
    ):
        return method(*args, **kwargs)
    arrays = {i: arg for i, arg in enumerate(args) if isinstance(arg, jax.Array | np.ndarray)}
    rest = tuple(None if i in arrays else arg for i, arg in enumerate(args))
    trains = module.is_mutable_collection("batch_stats")
    with _lock:  # one function for all threads: JAX then compiles it once
        apply = _jit(module.clone(parent=None, name=None), rest, trains)
    out, changed = apply(module.variables, arrays)
    for name, value in changed.get("batch_stats", {}).items():
        module.put_variable("batch_stats", name, value)
    return out


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@functools.cache
def _jit(module: nn.Module, rest: tuple, trains: bool) -> Callable[..., Any]:
    mutable = ["batch_stats"] if trains else []
    return jax.jit(
        lambda variables, arrays: module.apply(
            variables, *(arrays.get(i, arg) for i, arg in enumerate(rest)), mutable=mutable
        ),
        compiler_options=_QUICK,
    )
