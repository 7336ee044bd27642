"""What parity tests compare: a network, its weights, its image sizes, and its outputs."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from tests.parity.blockwise import blockwise
from tests.parity.filling import fill, images
from xkd_jax.convert.files import to_state
from xkd_jax.convert.networks import get_places
from xkd_jax.convert.rules import from_torch
from xkd_jax.models import MODELS, create_model
from xkd_jax.models.convnext import ConvNeXt

TOLERANCE = 1e-4
CLASSES = 10

_OURS = re.compile(r"bias$|^prefix_")  # taps that `reference.theirs` does not return


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A network and its images.

    Attributes:
      name: a key of `MODELS`.
      size: the side of the evaluation images, pixels.
      batch: the number of evaluation images.
      train_size: the side of the training images; 0 for networks without running statistics.
      train_batch: the number of training images.
      args: fields of the network, which override the variant's.
    """

    name: str
    size: int
    batch: int = 2
    train_size: int = 0
    train_batch: int = 0
    args: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def network_args(self) -> dict[str, Any]:
        """`args` and, for a network that must know it, the image size."""
        fields = {field.name for field in dataclasses.fields(MODELS[self.name].network)}
        return {**({"img_size": self.size} if "img_size" in fields else {}), **self.args}


# Exceptions from the rule of `small`.
_SIZES = {
    # Swin: shifted windows, windows as large as the map, padding to windows and to even sides.
    "swin_tiny_patch4_window7_224": 224,
    "swin_small_patch4_window7_224": 64,
    "swin_base_patch4_window7_224": 56,
    "swin_large_patch4_window7_224": 56,
    "swin_base_patch4_window12_384": 56,
    "swin_large_patch4_window12_384": 64,
    "swinv2_tiny_window8_256": 64,
    "swinv2_base_window8_256": 56,
    "swinv2_base_window16_256": 96,
    "swinv2_base_window12_192": 64,
    "swinv2_base_window12to16_192to256": 80,
    "swinv2_base_window12to24_192to384": 104,
    # Whole images where they are cheap.
    "vit_tiny_patch16_224": 224,
    "deit_tiny_distilled_patch16_224": 224,
    "mobilenetv2_035": 224,
    # Unpadded stems.
    "legacy_xception": 107,
    "legacy_xception_x2": 75,
    "inception_v3": 107,
    # Wide ones: odd sizes keep more than a pixel to the end.
    "resnet50x2": 33,
    "resnet152x2": 33,
    "resnet101x3": 33,
}


def small(name: str) -> Specimen:
    """The network at the size that its golden is made at: cheap, and with all its features."""
    variant = MODELS[name]
    if name in _SIZES:
        size = _SIZES[name]
    elif variant.image_size == 32:
        size = 32
    elif "patch_size" in variant.args:
        # Two sizes of the grid, as for the published ones.
        size = variant.args["patch_size"] * (4 if variant.image_size == 224 else 6)
    else:
        size = 64
    if variant.network.kind == "transformer":
        return Specimen(name, size, 1 if size > 128 else 2)
    if name == "inception_v3":
        return Specimen(name, size, 2, 299, 2)
    return Specimen(name, size, 4, size if _has_statistics(name) else 0, 4)


def _has_statistics(name: str) -> bool:
    """Whether the network has running statistics."""
    network = MODELS[name].network
    return network.kind == "cnn" and network is not ConvNeXt


def native(name: str) -> Specimen:
    """The network at its own size."""
    variant = MODELS[name]
    size = variant.image_size
    trains = _has_statistics(name)
    # A lone image leaves Inception's auxiliary classifier one value to normalise.
    return Specimen(name, size, 1, size if trains else 0, 2 if trains else 0)


def filled(specimen: Specimen) -> dict[str, Any]:
    """Our variables, filled by timm's names of them."""
    flat = {}
    for name, place in get_places(specimen.name, specimen.network_args).items():
        shape = tuple(CLASSES if side == -1 else side for side in place.torch_shape)
        flat[place.path] = from_torch(place.path, fill(name, shape))
    return traverse_util.unflatten_dict(flat, sep="/")


def ours(specimen: Specimen, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Our network's outputs, as `reference.theirs` returns PyTorch's."""
    model = create_model(specimen.name, num_classes=CLASSES, **specimen.network_args)
    variables = jax.device_put(variables)

    def run(batch: int, size: int, **args: Any) -> Any:
        # Accelerators round float32 products by default.
        with blockwise(), jax.default_matmul_precision("highest"):
            return model.apply(variables, images(batch, size), **args)

    _, out = run(specimen.batch, specimen.size)
    records = {key: np.asarray(value) for key, value in out.items() if not _OURS.search(key)}
    if not specimen.train_size:
        return records
    (_, out), changed = run(
        specimen.train_batch, specimen.train_size, train=True, mutable=["batch_stats"]
    )
    if "aux_logits" in out:
        records["train/aux_logits"] = np.asarray(out["aux_logits"])
    for name, array in to_state(changed, specimen.name).items():
        records[f"train/{name}"] = np.asarray(array)
    return records


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, relative to the largest magnitude of `want`."""
    assert got.shape == want.shape, f"{got.shape} is not {want.shape}"
    return float(np.abs(got - want).max() / np.abs(want).max())


def differences(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    """`difference` by key; both must have the same keys."""
    assert set(got) == set(want), f"only one of them has {sorted(set(got) ^ set(want))}"
    return {key: difference(got[key], want[key]) for key in want}
