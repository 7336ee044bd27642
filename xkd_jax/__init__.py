"""Knowledge distillation from Transformers into CNNs, in JAX."""

__version__ = "0.1.0"
