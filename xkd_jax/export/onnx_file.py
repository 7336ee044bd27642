"""Writes a student as an ONNX file, which TensorRT, ONNX Runtime, OpenVINO and others read."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from onnx import TensorProto, checker, helper  # pyright: ignore[reportMissingImports]

from xkd_jax import __version__, backend
from xkd_jax.export.onnx_graph import OPSET, Graph, Node
from xkd_jax.export.student import normalized
from xkd_jax.model import Model
from xkd_jax.weights import write_file


def write_onnx(
    model: Model, path: Path, metadata: dict[str, Any], fold: bool = False, uint8: bool = False
) -> None:
    """Writes `model` as ONNX: `images` [N, 3, H, W] to `logits` [N, K], with any N.

    Args:
      model: a CNN without attention, with its weights.
      path: of the file.
      metadata: recorded in the file, such as the preparation of images.
      fold: whether BatchNorm becomes part of the convolutions.
      uint8: whether the graph takes uint8 images and normalises them itself; otherwise it takes
        normalised float32 images.

    Raises:
      UserError: the network is not a CNN, or has attention.
    """
    size, variables = model.image_size, model.variables

    def forward(images: jax.Array) -> jax.Array:
        return model.forward(variables, normalized(model, images))[0]

    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8 if uint8 else jnp.float32)
    with backend.assume("gpu"):  # where convolutions are not rewritten as on a CPU
        jaxpr = jax.make_jaxpr(forward)(images)
    graph = Graph(fold)
    (logits,) = graph.trace(jaxpr, [Node("images", images.shape)])
    graph.nodes.append(helper.make_node("Identity", [graph.name(logits)], ["logits"]))
    kind = TensorProto.UINT8 if uint8 else TensorProto.FLOAT
    proto = helper.make_model(
        helper.make_graph(
            graph.nodes,
            model.name,
            [helper.make_tensor_value_info("images", kind, ["N", 3, size, size])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", logits.shape[1]])],
            graph.initializers(),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,  # of the same age as the opset; older runtimes refuse newer ones
        producer_name="xkd_jax",
        producer_version=__version__,
    )
    helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    checker.check_model(proto, full_check=True)
    write_file(path, proto.SerializeToString())
