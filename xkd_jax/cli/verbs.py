"""The command `xkd-jax`: lists its verbs, or hands over to one of them."""

import importlib
import sys
from collections.abc import Sequence

from xkd_jax import __version__
from xkd_jax.cli.command import guard
from xkd_jax.errors import unknown

# A verb is a module in this folder with a guarded `main(argv)`: what it does, and an example.
VERBS = {
    "train": ("train what a recipe describes, or resume it", "xkd-jax train --config quickstart"),
    "sweep": (
        "train a table: cells times seeds, choices included",
        "xkd-jax sweep --config tables/table1 --workdir runs/table1",
    ),
    "predict": (
        "classify images with a trained student",
        "xkd-jax predict runs/quickstart/cakd photos/",
    ),
    "evaluate": (
        "measure a classifier: per class, confusion, calibration",
        "xkd-jax evaluate runs/quickstart/cakd --data fashion_mnist_mini",
    ),
    "export": (
        "write a student for timm, ONNX or StableHLO",
        "xkd-jax export runs/quickstart/cakd --to onnx --out exported",
    ),
    "convert": (
        "convert weights from timm or PyTorch, and back",
        "xkd-jax convert --timm resnet18 --out resnet18.safetensors",
    ),
    "prepare": (
        "download and prepare a data set for tfds:NAME",
        "xkd-jax prepare cifar100 --data_dir ~/tensorflow_datasets",
    ),
    "models": ("list the networks: size, FLOPs, outputs", "xkd-jax models 'resnet*'"),
    "report": (
        "report finished runs or a table: Markdown and an HTML page",
        "xkd-jax report runs/quickstart",
    ),
    "bench": (
        "time a training step: against its limit, and part by part",
        "xkd-jax bench --config quickstart",
    ),
    "analysis": (
        "measure finished runs (transferability, robustness) and draw pictures",
        "xkd-jax analysis transferability runs/quickstart",
    ),
}


def usage() -> str:
    """The verbs, each with what it does and an example."""
    lines = ["usage: xkd-jax VERB ...", "", "Knowledge distillation from Transformers into CNNs."]
    lines += ["", "verbs:"]
    for verb, (summary, example) in VERBS.items():
        lines += [f"  {verb:<9} {summary}", f"            {example}"]
    lines += ["", "xkd-jax VERB --help lists a verb's options; python -m xkd_jax.VERB is the same."]
    return "\n".join(lines)


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    verb, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb == "--version":
        print(f"xkd_jax {__version__}")
        return 0
    if not verb:
        print(usage(), file=sys.stderr)
        return 2
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    return importlib.import_module(f"xkd_jax.cli.{verb}").main(rest)
