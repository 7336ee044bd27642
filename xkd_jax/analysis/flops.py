"""FLOPs and parameters of a network, as in the papers' tables: one multiply-add is one FLOP."""

import math
from collections.abc import Callable
from typing import Any

import jax

from xkd_jax import backend


def count_flops(function: Callable, *args: Any) -> int:
    """Multiply-adds of the convolutions and matrix products in one call of `function`.

    A ResNet-50 at 224 x 224 has 4.1 GFLOPs by this measure. Normalisation, activations and pooling
    don't count, as in fvcore and the papers' tables.

    Args:
      function: any function that JAX can trace; it is not executed.
      *args: arrays, or `jax.ShapeDtypeStruct`s.
    """
    # On a CPU some convolutions are rewritten as sums of products: count the TPU's version.
    with backend.assume("tpu"):
        return _count(jax.make_jaxpr(function)(*args).jaxpr)


def count_parameters(params: Any) -> int:
    """The number of elements in a tree of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            # Each output element takes the kernel's elements of one output feature.
            features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            products = math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
            # Gradients of strided convolutions are dilated with zeros, which don't count.
            total += products // math.prod(equation.params["lhs_dilation"])
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(
                left[axis] for axis in contracted
            )
        else:
            repeats = equation.params["length"] if name == "scan" else 1
            total += repeats * sum(_count(inner) for inner in _inner_jaxprs(equation.params))
    return total


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs inside an equation, such as jit, remat, custom derivatives or loops."""
    values = []
    for value in params.values():
        values += value if isinstance(value, tuple) else [value]
    jaxprs = [getattr(value, "jaxpr", value) for value in values]
    return [jaxpr for jaxpr in jaxprs if hasattr(jaxpr, "eqns")]
