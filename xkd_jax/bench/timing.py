"""Compiled programs, and their times when they run in turn."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

from xkd_jax.analysis import memory
from xkd_jax.analysis.flops import count_flops

Name = TypeVar("Name", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program with its arguments.

    Attributes:
      run: executes it once; the result may still be under way on the device.
      flops: of its convolutions and matrix products; a multiply-add counts as two.
      compile_seconds: what compiling took.
      temporaries: bytes that it needs temporarily, by the compiler's plan.
    """

    run: Callable[[], Any]
    flops: int = 0
    compile_seconds: float = 0.0
    temporaries: int = 0


def compile_program(function: Callable, *args: Any) -> Program:
    """`function` as a program that runs on `args`, which stay where they are."""
    begun = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - begun
    flops = 2 * count_flops(function, *args)
    return Program(lambda: compiled(*args), flops, seconds, memory.temporaries(compiled))


def alternate(programs: Mapping[Name, Program], rounds: int, warmup: int = 2) -> dict[Name, float]:
    """The median seconds of each program.

    They run in turn, once a round, so that whatever else the machine does affects all alike.

    Args:
      programs: by name.
      rounds: the rounds that count.
      warmup: rounds before them.
    """
    seconds = {name: [] for name in programs}
    for _ in range(warmup + rounds):
        for name, program in programs.items():
            begun = time.perf_counter()
            jax.block_until_ready(program.run())
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[warmup:]) for name, times in seconds.items()}
