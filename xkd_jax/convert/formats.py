"""Formats of weights that are not read: each recognised by its content and named."""

import os
import zipfile
from pathlib import Path

from xkd_jax.errors import UserError
from xkd_jax.weights import PYTORCH_MAGIC

SAFETENSORS, PYTORCH = "safetensors", "PyTorch"
_ZIP, _PICKLE = PYTORCH_MAGIC
_ANYTHING = "give a .safetensors, .pth or .bin"
_TENSORFLOW = (
    f"TensorFlow's files are not read; timm has converted many: --timm NAME, or {_ANYTHING}"
)
_KERAS = f"Keras's files are not read; timm has the same networks: --timm NAME, or {_ANYTHING}"
_JAX = (
    "files of other JAX libraries are not read; if it is a published ViT, timm has converted it: "
    f"--timm NAME, or {_ANYTHING}"
)
_EXPORTED = "it holds a compiled graph, not a state dict; save state_dict() of the PyTorch model"

# What a file begins with, at which offset, what it is, and the way to go.
_MAGIC = (
    (0, b"\x89HDF", "an HDF5 file, as Keras writes", _KERAS),
    (4, b"TFL3", "a TensorFlow Lite model", _EXPORTED),
    (0, b"\x93NUMPY", "a single NumPy array", _ANYTHING),
    (0, b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (257, b"ustar", "a tar archive", "unpack it first"),
    (
        0,
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file itself",
        "run git lfs pull where it was cloned",
    ),
)
# By suffix, for formats that have no such beginning.
_SUFFIXES = {
    ".onnx": ("an ONNX model", _EXPORTED),
    ".pb": ("a TensorFlow graph", _TENSORFLOW),
    ".msgpack": ("a Flax checkpoint", _JAX),
    ".ckpt": ("a TensorFlow checkpoint, or another file that torch.save didn't write", _TENSORFLOW),
    ".index": ("part of a TensorFlow checkpoint", _TENSORFLOW),
    ".meta": ("part of a TensorFlow checkpoint", _TENSORFLOW),
    ".h5": ("a Keras file by its name, but not HDF5", _KERAS),
    ".keras": ("a Keras file by its name, but not a zip", _KERAS),
}


def find_format(path: Path) -> str:
    """Whether a file is `SAFETENSORS` or `PYTORCH`, by its content.

    Raises:
      UserError: it is neither, missing or empty; the message says what it is and what to do.
    """
    _check_existence(path)
    size = path.stat().st_size
    if not size:
        raise UserError(f"{path} is empty; copy or download it again.")
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(_ZIP):
        _check_zip(path)
        return PYTORCH
    if start.startswith(_PICKLE):
        return PYTORCH
    # A safetensors file begins with the length of its header, a JSON object.
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return SAFETENSORS
    for offset, magic, what, hint in _MAGIC:
        if start[offset:].startswith(magic):
            raise UserError(f"{path} is {what}; {hint}.")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(
            f"{path} was not written by torch.save: it is a web page; download the file itself."
        )
    if path.suffix.lower() in _SUFFIXES or ".data-" in path.name:
        default = ("part of a TensorFlow checkpoint", _TENSORFLOW)
        what, hint = _SUFFIXES.get(path.suffix.lower(), default)
        raise UserError(f"{path} is {what}; {hint}.")
    raise UserError(f"{path} was not written by torch.save; {_ANYTHING}.")


def _check_existence(path: Path) -> None:
    if path.is_dir():
        files = sorted(item.name for item in path.iterdir() if item.is_file())
        readable = [name for name in files if name.endswith((".safetensors", ".pth", ".bin"))]
        hint = f"it has {', '.join(readable[:3])}" if readable else _ANYTHING
        if (path / "saved_model.pb").exists():
            hint = _TENSORFLOW
        raise UserError(f"{path} is a folder, and one file is needed; {hint}.")
    if path.is_file():
        return
    if Path(f"{os.fspath(path)}.index").is_file():
        raise UserError(f"{path} is a TensorFlow checkpoint; {_TENSORFLOW}.")
    raise UserError(f"there is no file at {path}; {_ANYTHING}.")


def _check_zip(path: Path) -> None:
    """Checks that a zip is one of torch.save's.

    Raises:
      UserError: it is another kind of file, or incomplete.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut off: its end is missing; copy or download it again.")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    tails = {name.partition("/")[2] for name in names}
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(
            f"{path} is a NumPy .npz archive, which is not read; Google publishes ViT weights in "
            "this format, and timm has converted them: --timm NAME."
        )
    if "constants.pkl" in tails and any(tail.startswith("code/") for tail in tails):
        raise UserError(
            f"{path} is a TorchScript archive, which holds code and is not read; load it with "
            "torch.jit.load where you trust it, and save its state_dict() with torch.save."
        )
    if "model.weights.h5" in names:
        raise UserError(f"{path} is a Keras model; {_KERAS}.")
    if any("archive_format" in tail or tail.startswith("models/") for tail in tails):
        raise UserError(f"{path} is a PyTorch export (.pt2); {_EXPORTED}.")
    if "data.pkl" not in tails:
        some = ", ".join(names[:3])
        raise UserError(
            f"{path} is a zip archive that torch.save didn't write (it holds {some}); unpack it, "
            f"or {_ANYTHING}."
        )
