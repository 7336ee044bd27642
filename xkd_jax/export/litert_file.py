"""Writes a student as a .tflite file, which LiteRT (formerly TensorFlow Lite) runs on phones.

LiteRT's own converter translates the StableHLO that JAX traces.
"""

# Its packages are compiled, without types, and only an extra installs them.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from pathlib import Path

import jax
import jax.numpy as jnp
from ai_edge_litert.interpreter import Interpreter
from litert_converter import converter_api_ext as converter
from litert_converter.mlir import ir, passmanager

from xkd_jax import backend
from xkd_jax.errors import UserError
from xkd_jax.export.student import normalized
from xkd_jax.model import Model
from xkd_jax.weights import write_file


def write_litert(model: Model, path: Path, uint8: bool = False) -> bool:
    """Writes `model` for LiteRT: `images` [1, H, W, 3] to `logits` [1, K].

    BatchNorm becomes part of the convolutions.

    Args:
      model: a network with its weights.
      path: of the file.
      uint8: as for `write_onnx`.

    Returns:
      Whether the interpreter can resize the batch to any N.

    Raises:
      UserError: LiteRT has no equivalent of the network.
    """
    size, variables = model.image_size, model.variables

    def forward(images: jax.Array) -> jax.Array:
        return model.forward(variables, normalized(model, images))[0]

    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8 if uint8 else jnp.float32)
    with backend.assume("gpu"):  # where convolutions are not rewritten as on a CPU
        program = jax.export.export(jax.jit(forward), platforms=("cpu",))(images)
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        # As text: the converter's version of the portable binary format is another than JAX's.
        module = ir.Module.parse(program.mlir_module())
        converter.set_signature(module.operation, "serving_default", ["images"], ["logits"])
        try:
            converter.run_convert_to_tfl_passes(
                module, passmanager.PassManager(), converter.ConvertToTFLConfig()
            )
            content = converter.export_flatbuffer_to_bytes(module.operation)
        except (RuntimeError, ValueError):
            raise UserError(
                f"LiteRT's converter has no translation of {model.name}; take --to stablehlo."
            ) from None
    write_file(path, content)
    return _is_resizable(content)


def _is_resizable(content: bytes) -> bool:
    """Whether two images go through at once: networks that reshape tokens fix the batch at one."""
    interpreter = Interpreter(model_content=content)
    images = interpreter.get_input_details()[0]
    interpreter.resize_tensor_input(images["index"], [2, *images["shape"][1:]])
    try:
        interpreter.allocate_tensors()
        interpreter.invoke()
    except RuntimeError:
        return False
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).shape[0] == 2
