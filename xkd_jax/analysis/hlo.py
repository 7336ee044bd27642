"""Collectives and estimated cycles of a compiled step, parsed from XLA's HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation|branch_computations)="
    r"\{?((?:%[\w.\-]+(?:, )?)+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")
# Operations whose computation runs as part of the program, rather than once per element.
_CALLERS = ("fusion", "call", "conditional", "async-start")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program.

    Attributes:
      kind: one of `KINDS`.
      bytes: size of a device's input; for an "all-gather", of its output.
      times: how often it runs in a step; more than once in loops.
      source: where it comes from, as JAX's `op_name`.
    """

    kind: str
    bytes: int
    times: int
    source: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    operation: str
    rest: str  # operands and attributes


def collectives(text: str) -> list[Collective]:
    """All collectives in `text`, which is `Compiled.as_text()`.

    An asynchronous collective counts once: TPUs show it in the fusions in which it starts,
    continues and ends, with one channel.
    """
    computations = _parse(text)
    found, seen = [], set()
    for name, times, fused in _runs(computations, text):
        shapes = {i.name: i.shape for i in computations[name]}
        for i in computations[name]:
            kind = i.operation.removesuffix("-start")
            channel = re.search(r"channel_id=\d+", i.rest)
            part_of = fused and channel and (kind, channel[0])
            if kind not in KINDS or part_of in seen:
                continue
            seen |= {part_of} if part_of else set()
            operands = sum(_bytes(shapes.get(n, "")) for n in _NAME.findall(_operands(i)))
            size = operands
            if kind == "all-gather":  # the result of its start also holds the operands
                size = _bytes(i.shape) - (operands if i.operation != kind else 0)
            source = re.search(r'op_name="([^"]*)"', i.rest)
            found.append(Collective(kind, size, times, source[1] if source else ""))
    return found


def total_bytes(found: list[Collective]) -> int:
    """The bytes that a step's collectives move per device."""
    return sum(c.bytes * c.times for c in found)


def cycles(text: str) -> int:
    """The TPU compiler's estimate of a step's cycles, with loops multiplied by their trip counts.

    Collectives and waiting times are not included.
    """
    computations, total = _parse(text), 0
    for name, times, fused in _runs(computations, text):
        for i in [] if fused else computations[name]:
            estimate = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
            total += times * int(estimate[1]) if estimate else 0
    return total


def _parse(text: str) -> dict[str, list[_Instruction]]:
    """Each computation's instructions."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[1], [])
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
    return computations


def _runs(
    computations: dict[str, list[_Instruction]], text: str
) -> Iterator[tuple[str, int, bool]]:
    """The computations that a step runs, how often, and whether as part of a fusion."""
    entry = re.search(r"^ENTRY %([\w.\-]+)", text, re.MULTILINE)
    assert entry, "not a compiled program"
    waiting = [(entry[1], 1, False)]
    while waiting:
        name, times, fused = waiting.pop()
        yield name, times, fused
        for i in computations[name]:
            if i.operation == "while":
                body = re.search(r"body=%([\w.\-]+)", i.rest)
                assert body
                waiting.append((body[1], times * _trips(computations, i), fused))
            elif i.operation in _CALLERS:
                inside = fused or i.operation == "fusion"
                for called in _CALLED.findall(i.rest):
                    waiting += [(inner, times, inside) for inner in _NAME.findall(called)]


def _trips(computations: dict[str, list[_Instruction]], loop: _Instruction) -> int:
    """A loop's trip count: JAX's scans compare a counter with a constant."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
    assert condition
    constants = [
        int(i.rest.split(")")[0])
        for i in computations[condition[1]]
        if i.operation == "constant" and i.shape.startswith("s32[]")
    ]
    return max(constants, default=1)


def _operands(instruction: _Instruction) -> str:
    return instruction.rest.split("), ")[0]


def _bytes(shape: str) -> int:
    """The bytes of an array, or of all arrays of a tuple."""
    total = 0
    for kind, bits, dimensions in _ARRAY.findall(shape):
        size = math.prod(int(n) for n in dimensions.split(",") if n)
        total += size * (1 if kind == "pred" else int(bits) // 8)
    return total
