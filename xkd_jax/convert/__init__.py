"""Converts weights from timm and PyTorch, and back; also as `python -m xkd_jax.convert`.

In Python, `conversion.convert(hub.download("resnet18"))` is timm's ResNet-18 as variables and
metadata, for `xkd_jax.weights.save_weights`; `files.read_checkpoint` reads files instead, and
`files.write_state` writes what PyTorch loads.
"""
