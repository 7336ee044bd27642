"""Knowledge distillation from Transformers into CNNs, in JAX.

The public names are imported on first use, so that `import xkd_jax` is quick:

- `load(file)`: a model with its weights, from a .safetensors file;
- `create_model(name, num_classes=...)`: a model without weights, by its timm name;
- `Model`: what both return, callable on images;
- `Distiller(teacher, student, method, optimizer)`: the training step;
- `methods`: the distillation methods; `data`: data sets; `export`: other runtimes' formats.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xkd_jax import data, export, methods
    from xkd_jax.distiller import Distiller
    from xkd_jax.model import Model, create_model, load

__version__ = "0.1.0"
__all__ = ["Distiller", "Model", "create_model", "data", "export", "load", "methods"]

_MODULES = {"Distiller": "distiller", "Model": "model", "create_model": "model", "load": "model"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
    return getattr(module, name) if name in _MODULES else module
