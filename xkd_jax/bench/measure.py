"""Measures the training steps of a recipe, and writes what was found as tables."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xkd_jax import models
from xkd_jax.analysis.tpu_forecast import CHIPS
from xkd_jax.bench import parts
from xkd_jax.bench.timing import Program, alternate, compile_program
from xkd_jax.config import Config, for_method
from xkd_jax.errors import UserError
from xkd_jax.experiment import compute_dtype, create_experiment
from xkd_jax.reporting.document import format_markdown
from xkd_jax.validation import validate

# Peak FLOP/s of dense bfloat16 products, by a part of the device's name: from the data sheets of
# NVIDIA's SXM modules and Google's documentation.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v4": CHIPS["v4"].peak,
    "TPU v5 lite": CHIPS["v5e"].peak,
    "TPU v5": CHIPS["v5p"].peak,
    "TPU v6 lite": CHIPS["v6e"].peak,
}
TEACHER, PLAIN, LIMIT = "teacher forward", "plain student step", "limit"
_PRODUCT = 2048  # side of the matrices that the peak of other devices is measured with


def measure(config: Config, rounds: int) -> dict[str, Any]:
    """Times the steps of `config.compare`, or of its only method, against their limit.

    All programs are compiled anew, then run in turn.

    Args:
      config: a recipe's.
      rounds: how often each program runs.

    Returns:
      A tree that JSON can hold: `device`, `devices`, `jax`, `dtype`, `batch`, `rounds`, `peak`;
      `steps`, for each method and for `TEACHER`, `PLAIN` and `LIMIT`; and `parts`, the milliseconds
      of each part by method.

    Raises:
      UserError: any wrong input, or data without labels, on which there is no plain training.
    """
    validate(config)
    if config.student.model in models.DETECTORS:
        raise UserError(f"{config.student.model} is a detector; give the recipe of a classifier.")
    jax.config.update("jax_enable_compilation_cache", False)  # or nothing would be compiled
    names = [name for name in config.compare or [config.method.name] if name != "none"]
    experiments = {name: create_experiment(for_method(config, name)) for name in names}
    if any(not experiment.train.num_classes for experiment in experiments.values()):
        raise UserError("a step is measured against training on labels; set data.labels=True.")
    plain = create_experiment(for_method(config, "none"))
    programs: dict[Any, Program] = {PLAIN: parts.whole_step(plain)}
    programs |= {name: parts.whole_step(experiments[name]) for name in names}
    taught = next((e for e in experiments.values() if e.distiller.teacher is not None), None)
    if taught is not None:
        programs[TEACHER] = parts.teacher_forward(taught)
    taken_apart = experiments or {"none": plain}
    pieces = {
        (name, part): program
        for name, experiment in taken_apart.items()
        for part, program in parts.breakdown(experiment).items()
    }
    seconds = alternate(programs | pieces, rounds)
    found = _about(config, rounds)
    found["peak"] = _peak(found["dtype"])
    limit = [name for name in (TEACHER, PLAIN) if name in programs]
    seconds[LIMIT] = sum(seconds[name] for name in limit)
    programs[LIMIT] = Program(lambda: None, sum(programs[name].flops for name in limit))
    found["steps"] = {
        name: _row(name, programs, seconds[name], found)
        | {"of_limit": seconds[name] / seconds[LIMIT]}
        for name in programs
    }
    found["memory"] = _device_memory()
    found["parts"] = {name: {} for name in taken_apart}
    for name, part in pieces:
        found["parts"][name][part] = 1e3 * seconds[name, part]
    return found


def _about(config: Config, rounds: int) -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "dtype": compute_dtype(config.dtype).name,
        "batch": config.batch_size,
        "rounds": rounds,
    }


def _row(
    name: str, programs: Mapping[str, Program], seconds: float, about: Mapping[str, Any]
) -> dict[str, Any]:
    program, limit = programs[name], programs[LIMIT].flops
    # A method's projectors and losses don't count as useful work.
    useful = program.flops if name in (TEACHER, PLAIN) else limit
    row = {
        "ms": 1e3 * seconds,
        "images_per_second": about["batch"] / seconds,
        "flops": program.flops,
        "flops_of_limit": program.flops / limit,
        "mfu": useful / seconds / (about["peak"]["flops"] * about["devices"]),
    }
    if program.compile_seconds:
        row |= {"compile_seconds": program.compile_seconds, "temporaries": program.temporaries}
    return row


def _peak(dtype: str) -> dict[str, Any]:
    """The FLOP/s that MFU is relative to, and where they are from."""
    kind = jax.devices()[0].device_kind
    for name, flops in PEAKS.items():
        if name in kind:
            return {"flops": flops, "source": "the data sheet, bfloat16"}
    matrix = jnp.ones((_PRODUCT, _PRODUCT), dtype)
    product = compile_program(jnp.matmul, matrix, matrix)
    seconds = alternate({"": product}, rounds=5)[""]
    source = f"a product of {_PRODUCT} x {_PRODUCT} matrices in {dtype}, measured here"
    return {"flops": 2 * _PRODUCT**3 / seconds, "source": source}


def _device_memory() -> dict[str, int]:
    """Peak bytes in use on the first device since the process began, where the device counts."""
    counted = jax.local_devices()[0].memory_stats() or {}
    name = "peak_bytes_in_use"
    return {name: counted[name]} if name in counted else {}


def describe(found: Mapping[str, Any]) -> str:
    """The tables of `measure`'s result, as Markdown."""
    lines = [
        f"{found['devices']} x {found['device']}, jax {found['jax']}, {found['dtype']}, batch "
        f"{found['batch']}; medians over rounds in which all programs take turns: "
        f"{found['rounds']}.",
        "",
    ]
    head = (
        "", "ms", "images/s", "time, of the limit", "FLOPs, of the limit", "MFU", "compile s",
        "temporaries MiB",
    )  # fmt: skip
    first = [name for name in (TEACHER, PLAIN, LIMIT) if name in found["steps"]]
    names = first + [name for name in found["steps"] if name not in first]
    rows = [_cells(name, found["steps"][name]) for name in names]
    lines.append(format_markdown([head, *rows]))
    peak = found["peak"]
    lines += [
        "",
        "Limit: one teacher forward pass and one plain student step. MFU: the FLOPs of the limit, "
        f"which a method's own don't add to, per second, of {peak['flops'] / 1e12:.3g} TFLOP/s "
        f"({peak['source']}).",
    ]
    if found["memory"]:
        peak_gib = found["memory"]["peak_bytes_in_use"] / 2**30
        lines.append(f"Peak memory of the device, all programs together: {peak_gib:.2f} GiB.")
    methods = list(found["parts"])
    lines += ["", "Each part of a step as a program of its own, ms:", ""]
    order = dict.fromkeys(part for of in found["parts"].values() for part in of)
    rows = [(part, *(_ms(found["parts"][m].get(part)) for m in methods)) for part in order]
    rows.append(("sum", *(_ms(sum(found["parts"][m].values())) for m in methods)))
    whole = [found["steps"][PLAIN if m == "none" else m]["ms"] for m in methods]
    rows.append(("whole step", *map(_ms, whole)))
    return "\n".join([*lines, format_markdown([("", *methods), *rows])])


def _cells(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    built = "compile_seconds" in row
    return (
        name, f"{row['ms']:.1f}", f"{row['images_per_second']:,.0f}", f"{row['of_limit']:.2f}",
        f"{row['flops_of_limit']:.2f}", f"{row['mfu']:.1%}",
        f"{row['compile_seconds']:.1f}" if built else "",
        f"{row['temporaries'] / 2**20:,.1f}" if built else "",
    )  # fmt: skip


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
