"""Translates the inference pass of a CNN to ONNX nodes, one JAX primitive at a time.

JAX's arrays are [N, H, W, C] and ONNX's [N, C, H, W]: every array of rank 4 is stored in ONNX's
order from the beginning, so that the graph has no transpositions. Two kinds of arrays that have
fewer axes in JAX are stored with rank 4 too: [H * W, C], a matrix whose rows are positions, and
[N, H, W], a sum over channels. What depends on the weights alone is computed here. The batch size
stays free.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core
from onnx import (  # pyright: ignore[reportMissingImports]
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

from xkd_jax.errors import UserError

OPSET = 13  # the converters of TensorRT and NCNN read it
_TO_NCHW = (0, 3, 1, 2)


@dataclasses.dataclass(frozen=True)
class Node:
    """An array that the graph computes.

    Attributes:
      name: its name in the graph.
      shape: [N, H, W, C] or [N, C], where N is 1. In JAX the first may be [H * W, C], and after a
        sum over C, which has length 1 here, the last axis may be missing.
      factor: what the graph's array has yet to be multiplied by: sums are means times a number.
    """

    name: str
    shape: tuple[int, ...]
    factor: float = 1.0


# An array of the graph, or one that the weights determine, in which broadcast axes have length 1.
Value = Node | np.ndarray


class Graph:
    """An ONNX graph under construction.

    Args:
      fold: whether factors and summands per channel that follow a convolution, such as those of
        BatchNorm, become part of its weights.
    """

    def __init__(self, fold: bool):
        self.nodes: list[NodeProto] = []
        self._initializers: dict[str, np.ndarray] = {}
        self._fold = fold
        self._uses: collections.Counter[Any] = collections.Counter()
        self._producers: dict[str, NodeProto] = {}
        self._shared: set[str] = set()  # the nodes that several equations use

    def trace(self, jaxpr: core.ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Adds a computation and returns its outputs.

        Args:
          jaxpr: of arrays whose first axis is the batch, of length 1.
          inputs: of `jaxpr`.

        Raises:
          UserError: a primitive has no translation here.
        """
        env: dict[Any, Value] = dict(
            zip(jaxpr.jaxpr.constvars, map(np.asarray, jaxpr.consts), strict=True)
        )

        def write(variables: Sequence[Any], values: Sequence[Value]) -> None:
            env.update(zip(variables, values, strict=True))
            for var, value in zip(variables, values, strict=True):
                if isinstance(value, Node) and self._uses[var] > 1:
                    self._shared.add(value.name)

        def read(var: Any) -> Value:
            return np.asarray(var.val) if isinstance(var, core.Literal) else env[var]

        used = [v for equation in jaxpr.jaxpr.eqns for v in equation.invars]
        used += jaxpr.jaxpr.outvars
        # Not a sum: JAX shares the jaxpr of a function that is called several times.
        self._uses |= collections.Counter(v for v in used if not isinstance(v, core.Literal))
        write(jaxpr.jaxpr.invars, inputs)
        for equation in jaxpr.jaxpr.eqns:
            values = [read(var) for var in equation.invars]
            write(equation.outvars, self._apply(equation, values))
        return [read(var) for var in jaxpr.jaxpr.outvars]

    def _apply(self, equation: Any, values: list[Value]) -> Sequence[Value]:
        name, params = equation.primitive.name, equation.params
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if inner is not None:  # a function of its own: jit, custom_jvp_call
            return self.trace(inner, values)
        shape = equation.outvars[0].aval.shape
        if name == "broadcast_in_dim":
            return [self._broadcast(values[0], params["broadcast_dimensions"], shape)]
        constants = [value for value in values if isinstance(value, np.ndarray)]
        if len(constants) == len(values):
            return [np.asarray(equation.primitive.bind(*constants, **params))]
        for var, value in zip(equation.invars, values, strict=True):
            if isinstance(value, Node) and var.aval.ndim != len(value.shape):
                if name not in _BY_POSITION:
                    raise _refusal(f"{name} of {_text(var.aval.shape)}")
                if name != "reshape":
                    shape = (*value.shape[:-1], shape[-1] if var.aval.ndim == 2 else 1)
        if name == "dot_general" and equation.invars[0].aval.ndim != 2:
            raise _refusal(f"dot_general of {_text(equation.invars[0].aval.shape)}")
        if name in _BINARY:
            return [self._binary(_BINARY[name], shape, *values)]
        if name not in _RULES:
            raise _refusal(name)
        return [_RULES[name](self, shape, params, *values)]

    def _broadcast(self, value: Value, where: tuple[int, ...], shape: tuple[int, ...]) -> Value:
        """Inserts axes of length 1 only: ONNX's operators broadcast them."""
        if isinstance(value, np.ndarray):
            wide = [1] * len(shape)
            for axis, target in enumerate(where):
                wide[target] = value.shape[axis]
            return value.reshape(wide)
        if shape == value.shape or len(shape) == len(value.shape) == len(where):
            return dataclasses.replace(value, shape=shape)
        if where != (0, 3) or len(value.shape) != 2:
            raise _refusal(f"broadcast_in_dim to {_text(shape)}")
        return self.unsqueeze(value, shape)

    def unsqueeze(self, value: Node, shape: tuple[int, ...]) -> Node:
        """[N, C] as [N, 1, 1, C], which the operators broadcast to `shape`."""
        axes = self.constant(np.array([2, 3]))
        wide = self.add("Unsqueeze", [value.name, axes], shape)
        return dataclasses.replace(wide, factor=value.factor)

    def _binary(self, kind: str, shape: tuple[int, ...], left: Value, right: Value) -> Value:
        if isinstance(left, np.ndarray) and kind in ("Add", "Mul", "Max", "Min"):
            left, right = right, left
        if isinstance(left, Node) and isinstance(right, np.ndarray):
            if right.size == 1 and kind in ("Mul", "Div"):
                by = float(right.reshape(()))
                factor = left.factor * by if kind == "Mul" else left.factor / by
                return dataclasses.replace(left, factor=factor)
            if kind == "Max" and not right.any():
                return self.add("Relu", [self.name(left)], shape)
            single = left.name not in self._shared and left.factor == 1
            if kind == "Min" and right.size == 1 and single:
                relu = self._producers.get(left.name)
                if relu is not None and relu.op_type == "Relu":  # with Min it is ReLU6
                    relu.op_type = "Clip"
                    limits = np.zeros((), np.float32), right.reshape(())
                    relu.input.extend(map(self.constant, limits))
                    return left
            if self._fold and single and self._absorb(kind, left, right):
                return left
        left, right = (_aligned(value, shape) for value in (left, right))
        return self.add(kind, [self.name(left), self.name(right)], shape)

    def _absorb(self, kind: str, node: Node, by: np.ndarray) -> bool:
        """Makes `node kind by` part of the convolution or matrix product that computes `node`."""
        producer = self._producers.get(node.name)
        if producer is None or producer.op_type not in ("Conv", "Gemm"):
            return False
        if kind not in _FOLDED or by.shape[-1:] != (by.size,):
            return False
        weights, bias = (self._initializers[name] for name in producer.input[1:3])
        by = np.broadcast_to(by.reshape(-1), bias.shape)
        if kind == "Mul":
            # The output channels are the first axis of a convolution's weights, the last otherwise.
            first = producer.op_type == "Conv"
            weights = weights * (by.reshape(-1, 1, 1, 1) if first else by)
        self._initializers[producer.input[1]] = weights
        self._initializers[producer.input[2]] = _FOLDED[kind](bias, by)
        return True

    def add(self, kind: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> Node:
        """Adds an operator with one output, whose shape is `shape` in JAX's order."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        node = helper.make_node(kind, inputs, [name], name=name, **attributes)
        self.nodes.append(node)
        self._producers[name] = node
        return Node(name, tuple(shape))

    def constant(self, array: np.ndarray) -> str:
        """Adds an array in ONNX's order and returns its name."""
        name = f"constant_{len(self._initializers)}"
        self._initializers[name] = np.ascontiguousarray(array)
        return name

    def name(self, value: Value) -> str:
        """The name in the graph of an array in JAX's order."""
        if isinstance(value, np.ndarray):
            return self.constant(value.transpose(_TO_NCHW) if value.ndim == 4 else value)
        if value.factor == 1:
            return value.name
        factor = self.constant(np.asarray(value.factor, np.float32))
        return self.add("Mul", [value.name, factor], value.shape).name

    def initializers(self) -> list[TensorProto]:
        """The constants that the nodes use."""
        used = {name for node in self.nodes for name in node.input}
        arrays = {name: array for name, array in self._initializers.items() if name in used}
        return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


def _refusal(what: str) -> UserError:
    return UserError(
        f"the ONNX export has no translation of {what}, because it covers CNNs without attention "
        "only; export such a network, or take --to litert or --to stablehlo."
    )


def _text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _aligned(value: Value, shape: tuple[int, ...]) -> Value:
    """`value` as an operand of a result that has `shape` in the graph."""
    if isinstance(value, Node):
        if len(value.shape) != len(shape):
            raise _refusal(f"operations on [N, C] and {_text(shape)}")
        return value
    if len(shape) == 4 and value.ndim == 2:
        return value.reshape(*(shape[:3] if len(value) > 1 else (1, 1, 1)), -1)
    return value[..., None] if 0 < value.ndim < len(shape) else value


_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"}
_FOLDED = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


def _convolution(graph: Graph, shape: Any, params: Any, x: Node, kernel: np.ndarray) -> Node:
    numbers = params["dimension_numbers"]
    if (*numbers.lhs_spec, *numbers.rhs_spec) != (0, 3, 1, 2, 3, 2, 0, 1):
        raise _refusal("convolutions of other arrays than [N, H, W, C]")
    weights = np.asarray(kernel).transpose(3, 2, 0, 1)
    bias = np.zeros(shape[-1], weights.dtype)
    return graph.add(
        "Conv",
        [graph.name(x), graph.constant(weights), graph.constant(bias)],
        shape,
        kernel_shape=weights.shape[2:],
        strides=params["window_strides"],
        pads=_pads(params["padding"]),
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """((top, bottom), (left, right)) as ONNX has it: top, left, bottom, right."""
    return [low for low, _ in padding] + [high for _, high in padding]


def _window(params: Any) -> dict[str, Any]:
    return {
        "kernel_shape": params["window_dimensions"][1:3],
        "strides": params["window_strides"][1:3],
        "pads": _pads(params["padding"][1:3]),
    }


def _max_pool(graph: Graph, shape: Any, params: Any, x: Node) -> Node:
    return graph.add("MaxPool", [graph.name(x)], shape, **_window(params))


def _sum_pool(graph: Graph, shape: Any, params: Any, x: Node) -> Node:
    window = _window(params)
    mean = graph.add("AveragePool", [graph.name(x)], shape, count_include_pad=1, **window)
    return dataclasses.replace(mean, factor=float(np.prod(window["kernel_shape"])))


def _sum(graph: Graph, shape: Any, params: Any, x: Node) -> Node:
    axes, rank = tuple(params["axes"]), len(x.shape)
    if axes == (1, 2) and rank == 4:  # over positions
        mean = graph.add("ReduceMean", [graph.name(x)], shape, axes=[2, 3], keepdims=0)
        return dataclasses.replace(mean, factor=float(np.prod(x.shape[1:3])))
    if axes == (rank - 1,):  # over channels
        mean = graph.add("ReduceMean", [graph.name(x)], (*shape, 1), axes=[1], keepdims=1)
        return dataclasses.replace(mean, factor=float(x.shape[-1]))
    raise _refusal(f"reduce_sum over the axes {_text(axes)}")


def _product(graph: Graph, shape: Any, params: Any, x: Node, kernel: Value) -> Node:
    (left, right), batch = params["dimension_numbers"]
    if isinstance(kernel, Node) or (tuple(left), tuple(right)) != ((1,), (0,)) or any(batch):
        raise _refusal("dot_general of two arrays that depend on the images")
    bias = graph.constant(np.zeros(shape[-1], kernel.dtype))
    if len(x.shape) == 4:  # the rows are positions
        names = [graph.name(x), graph.constant(kernel.T[:, :, None, None]), bias]
        return graph.add("Conv", names, shape, kernel_shape=(1, 1))
    return graph.add("Gemm", [graph.name(x), graph.constant(kernel), bias], shape)


def _reshape(graph: Graph, shape: Any, params: Any, x: Node) -> Node:
    """Between [N, H, W, C] and [N * H * W, C] only, which are the same in the graph."""
    del params
    rows, channels = int(np.prod(x.shape[:-1])), x.shape[-1]
    if rows == 1 and shape == (1, channels):
        return x if len(x.shape) == 2 else _flatten(graph, shape, {"dimensions": (1, 2)}, x)
    if rows == 1 and shape == (1, 1, 1, channels) and len(x.shape) == 2:
        return graph.unsqueeze(x, shape)
    if len(x.shape) != 4 or shape not in (x.shape, (rows, channels)):
        raise _refusal(f"reshape of {_text(x.shape)} to {_text(shape)}")
    return x


def _flatten(graph: Graph, shape: Any, params: Any, x: Node) -> Node:
    """[N, 1, 1, C] to [N, C]."""
    if tuple(params["dimensions"]) != (1, 2):
        raise _refusal(f"squeeze of {_text(x.shape)} to {_text(shape)}")
    flat = graph.add("Flatten", [x.name], shape, axis=1)
    return dataclasses.replace(flat, factor=x.factor)


def _greater(graph: Graph, shape: Any, params: Any, x: Value, y: Value) -> Node:
    del params
    return graph.add("Greater", [graph.name(x), graph.name(y)], shape)


def _select(graph: Graph, shape: Any, params: Any, which: Value, no: Value, yes: Value) -> Node:
    del params
    return graph.add("Where", [graph.name(value) for value in (which, yes, no)], shape)


def _square(graph: Graph, shape: Any, params: Any, x: Node) -> Node:
    del params
    name = graph.name(x)
    return graph.add("Mul", [name, name], shape)


def _rsqrt(graph: Graph, shape: Any, params: Any, x: Node) -> Node:
    del params
    root = graph.add("Sqrt", [graph.name(x)], shape)
    return graph.add("Reciprocal", [root.name], shape)


def _concatenation(graph: Graph, shape: Any, params: Any, *parts: Value) -> Node:
    axis = {3: 1, 1: 2, 2: 3}[params["dimension"]] if len(shape) == 4 else params["dimension"]
    return graph.add("Concat", [graph.name(part) for part in parts], shape, axis=axis)


def _cast(graph: Graph, shape: Any, params: Any, x: Node) -> Node:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(params["new_dtype"]))
    return graph.add("Cast", [graph.name(x)], shape, to=kind)


def _unary(kind: str) -> Callable[..., Node]:
    def rule(graph: Graph, shape: Any, params: Any, x: Node) -> Node:
        del params
        return graph.add(kind, [graph.name(x)], shape)

    return rule


_RULES: dict[str, Callable[..., Node]] = {
    "conv_general_dilated": _convolution,
    "reduce_window_max": _max_pool,
    "reduce_window_sum": _sum_pool,
    "reduce_sum": _sum,
    "dot_general": _product,
    "concatenate": _concatenation,
    "convert_element_type": _cast,
    "logistic": _unary("Sigmoid"),
    "erf": _unary("Erf"),
    "sqrt": _unary("Sqrt"),
    "rsqrt": _rsqrt,
    "square": _square,
    "reshape": _reshape,
    "squeeze": _flatten,
    "gt": _greater,
    "select_n": _select,
}
# What can be applied to the two kinds of arrays that have fewer axes in JAX than in the graph.
_BY_POSITION = {
    *_BINARY,
    *("convert_element_type", "logistic", "erf", "sqrt", "rsqrt", "square"),
    *("reshape", "dot_general"),
}
