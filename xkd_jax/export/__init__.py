"""Students in formats of other runtimes: timm, ONNX, LiteRT, StableHLO."""
