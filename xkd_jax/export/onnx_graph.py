"""Translates the inference pass of a CNN to ONNX nodes, one JAX primitive at a time.

JAX's arrays are [N, H, W, C] and ONNX's [N, C, H, W]: every array of rank 4 is stored in ONNX's
order from the beginning, so that the graph has no transpositions. What depends on the weights
alone is computed here. The batch size stays free.
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
      shape: as in JAX, [N, H, W, C] or [N, C], where N is 1.
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
        self._variables: dict[str, Any] = {}  # JAX's variable that each node was computed for

    def trace(self, jaxpr: core.ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Adds a computation and returns its outputs.

        Args:
          jaxpr: of arrays whose first axis is the batch, of length 1.
          inputs: of `jaxpr`.

        Raises:
          UserError: a primitive has no translation here.
        """
        env: dict[Any, Value] = dict(zip(jaxpr.jaxpr.invars, inputs, strict=True))
        env.update(zip(jaxpr.jaxpr.constvars, map(np.asarray, jaxpr.consts), strict=True))

        def read(var: Any) -> Value:
            return np.asarray(var.val) if isinstance(var, core.Literal) else env[var]

        used = [v for equation in jaxpr.jaxpr.eqns for v in equation.invars]
        used += jaxpr.jaxpr.outvars
        # Not a sum: JAX shares the jaxpr of a function that is called several times.
        self._uses |= collections.Counter(v for v in used if not isinstance(v, core.Literal))
        for equation in jaxpr.jaxpr.eqns:
            results = self._apply(equation, [read(var) for var in equation.invars])
            for var, value in zip(equation.outvars, results, strict=True):
                env[var] = value
                if isinstance(value, Node):
                    self._variables.setdefault(value.name, var)
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
        if name in _BINARY:
            return [self._binary(_BINARY[name], equation, *values)]
        if name not in _RULES:
            raise UserError(
                f"the ONNX export has no translation of {name}, because it is made for CNNs; "
                "export a CNN, or take --to litert or --to stablehlo."
            )
        return [_RULES[name](self, shape, params, *values)]

    def _broadcast(self, value: Value, where: tuple[int, ...], shape: tuple[int, ...]) -> Value:
        """Inserts axes of length 1 only: ONNX's operators broadcast them."""
        if isinstance(value, np.ndarray):
            wide = [1] * len(shape)
            for axis, target in enumerate(where):
                wide[target] = value.shape[axis]
            return value.reshape(wide)
        if len(shape) == len(value.shape):
            return dataclasses.replace(value, shape=shape)
        if where != (0, 3):
            raise UserError("the ONNX export can broadcast [N, C] over positions only.")
        axes = self.constant(np.array([2, 3]))
        wide = self.add("Unsqueeze", [value.name, axes], shape)
        return dataclasses.replace(wide, factor=value.factor)

    def _binary(self, kind: str, equation: Any, left: Value, right: Value) -> Value:
        shape = equation.outvars[0].aval.shape
        if isinstance(left, np.ndarray) and kind in ("Add", "Mul", "Max", "Min"):
            left, right = right, left
        if isinstance(left, Node) and isinstance(right, np.ndarray):
            if right.size == 1 and kind in ("Mul", "Div"):
                by = float(right.reshape(()))
                factor = left.factor * by if kind == "Mul" else left.factor / by
                return dataclasses.replace(left, factor=factor)
            if kind == "Max" and not right.any():
                return self.add("Relu", [self.name(left)], shape)
            if kind == "Min" and right.size == 1 and self._is_single(equation, left):
                relu = self._producers.get(left.name)
                if relu is not None and relu.op_type == "Relu":  # with Min it is ReLU6
                    relu.op_type = "Clip"
                    limits = np.zeros((), np.float32), right.reshape(())
                    relu.input.extend(map(self.constant, limits))
                    return left
            if self._fold and self._is_single(equation, left) and self._absorb(kind, left, right):
                return left
        return self.add(kind, [self.name(left), self.name(right)], shape)

    def _is_single(self, equation: Any, node: Node) -> bool:
        """Whether `equation` is the only one that uses `node`, here and where it was computed."""
        here = next(var for var in equation.invars if not isinstance(var, core.Literal))
        return self._uses[here] == self._uses[self._variables.get(node.name, here)] == 1

    def _absorb(self, kind: str, node: Node, by: np.ndarray) -> bool:
        """Makes `node kind by` part of the convolution or matrix product that computes `node`."""
        producer = self._producers.get(node.name)
        if producer is None or producer.op_type not in ("Conv", "Gemm") or node.factor != 1:
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


_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"}
_FOLDED = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


def _convolution(graph: Graph, shape: Any, params: Any, x: Node, kernel: np.ndarray) -> Node:
    numbers = params["dimension_numbers"]
    if (*numbers.lhs_spec, *numbers.rhs_spec) != (0, 3, 1, 2, 3, 2, 0, 1):
        raise UserError("the ONNX export reads convolutions of [N, H, W, C] only.")
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
    if tuple(params["axes"]) != (1, 2):
        raise UserError("the ONNX export sums over positions only.")
    mean = graph.add("ReduceMean", [graph.name(x)], shape, axes=[2, 3], keepdims=0)
    return dataclasses.replace(mean, factor=float(np.prod(x.shape[1:3])))


def _product(graph: Graph, shape: Any, params: Any, x: Node, kernel: np.ndarray) -> Node:
    (left, right), batch = params["dimension_numbers"]
    if (tuple(left), tuple(right), len(x.shape)) != ((1,), (0,), 2) or any(batch):
        raise UserError("the ONNX export multiplies [N, C] by a matrix only.")
    bias = np.zeros(shape[-1], kernel.dtype)
    names = [graph.name(x), graph.constant(np.asarray(kernel)), graph.constant(bias)]
    return graph.add("Gemm", names, shape)


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
}
