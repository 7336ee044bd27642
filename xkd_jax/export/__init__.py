"""Students in formats of other runtimes: timm, ONNX, LiteRT, StableHLO."""

from xkd_jax.export.student import TARGETS, Options, export

__all__ = ["TARGETS", "Options", "export"]
