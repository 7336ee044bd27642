"""Writes a student as an ONNX file, which TensorRT, ONNX Runtime, OpenVINO and others read."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from onnx import TensorProto, checker, helper  # pyright: ignore[reportMissingImports]

from xkd_jax import __version__, backend
from xkd_jax.export import onnx_detector
from xkd_jax.export.onnx_graph import OPSET, Graph, Node
from xkd_jax.export.student import normalized
from xkd_jax.model import Model
from xkd_jax.weights import write_file

# The shapes of a detector's outputs; D is the number of objects.
_OBJECTS: dict[str, list[int | str]] = {
    "boxes": ["D", 4], "scores": ["D"], "classes": ["D"], "masks": ["D", 28, 28],
}  # fmt: skip


def write_onnx(
    model: Model, path: Path, metadata: dict[str, Any], fold: bool = False, uint8: bool = False
) -> None:
    """Writes `model` as ONNX: `images` [N, 3, H, W] to `logits` [N, K], with any N.

    A detector's inputs are one image, [1, 3, S, S], and `sizes` float32 [1, 2], its height and
    width without padding in pixels. Its outputs are `boxes` [D, 4], `scores` [D], `classes` int64
    [D], and with a mask head `masks` [D, 28, 28], as in `Detections`.

    Args:
      model: a CNN without attention, or a detector with one, with its weights.
      path: of the file.
      metadata: recorded in the file, such as the preparation of images.
      fold: whether BatchNorm becomes part of the convolutions.
      uint8: whether the graph takes uint8 images and normalises them itself; otherwise it takes
        normalised float32 images.

    Raises:
      UserError: the network is not a CNN, or has attention.
    """
    graph, size = Graph(fold), model.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8 if uint8 else jnp.float32)
    kind = TensorProto.UINT8 if uint8 else TensorProto.FLOAT
    count = 1 if model.is_detector else "N"
    inputs = [helper.make_tensor_value_info("images", kind, [count, 3, size, size])]
    if model.is_detector:
        inputs.append(helper.make_tensor_value_info("sizes", TensorProto.FLOAT, [1, 2]))
        found = onnx_detector.detect(graph, model, images)
        shapes = {name: _OBJECTS[name] for name in found}
    else:
        logits = _classify(graph, model, images)
        found, shapes = {"logits": graph.name(logits)}, {"logits": ["N", logits.shape[1]]}
    outputs = []
    for name, inner in found.items():
        graph.nodes.append(helper.make_node("Identity", [inner], [name]))
        kind = TensorProto.INT64 if name == "classes" else TensorProto.FLOAT
        outputs.append(helper.make_tensor_value_info(name, kind, shapes[name]))
    proto = helper.make_model(
        helper.make_graph(graph.nodes, model.name, inputs, outputs, graph.initializers()),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,  # of the same age as the opset; older runtimes refuse newer ones
        producer_name="xkd_jax",
        producer_version=__version__,
    )
    helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    checker.check_model(proto, full_check=True)
    write_file(path, proto.SerializeToString())


def _classify(graph: Graph, model: Model, images: jax.ShapeDtypeStruct) -> Node:
    """Adds a classifier and returns its logits [1, K]."""
    variables = model.variables

    def forward(images: jax.Array) -> jax.Array:
        return model.forward(variables, normalized(model, images))[0]

    with backend.assume("gpu"):  # where convolutions are not rewritten as on a CPU
        jaxpr = jax.make_jaxpr(forward)(images)
    (logits,) = graph.trace(jaxpr, [Node("images", images.shape)])
    assert isinstance(logits, Node)
    return logits
