"""Kernels enter, a verdict on each of them leaves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bench.kernels import banks, disassembly, nvrtc, occupancy, ptx
from bench.kernels.disassembly import Loop
from bench.kernels.nvrtc import CompileError, Resources
from fastconv.gpu.source import Kernel

DTYPES = ("float32", "float64", "float16", "bfloat16")
ORDERS = ("NCHW", "NHWC")
ARCHITECTURES = tuple(occupancy.LIMITS)


class Verdict(NamedTuple):
    """One kernel on one architecture: what it takes there, or why it cannot be compiled.

    loop       its main loop, None if it has none that multiplies
    conflicts  how often shared memory serves the loop's slowest access; 1 without bank conflicts
    """

    kernel: Kernel
    sm: int
    resources: Resources | None
    loop: Loop | None = None
    conflicts: int = 1
    refusal: str = ""

    def faults(self) -> list[str]:
        """Return what is wrong with it, in words."""
        if self.resources is None:
            return [self.refusal]
        return occupancy.faults(self.resources, self.kernel.threads, self.sm)


def judge(kernels: Iterable[Kernel], sm: int, look_inside: bool = False) -> Iterator[Verdict]:
    """Compile kernels for one architecture, several at a time; look_inside finds their main loops too."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda kernel: _judge_one(kernel, sm, look_inside), kernels)


def _judge_one(kernel: Kernel, sm: int, look_inside: bool) -> Verdict:
    try:
        compiled = nvrtc.compiler_for(sm).compile(kernel.name, kernel.source, sm)
    except CompileError as error:
        return Verdict(kernel, sm, None, refusal=str(error))
    if not look_inside:
        return Verdict(kernel, sm, compiled.resources)
    accesses = ptx.main_loop_accesses(compiled.ptx, kernel.threads)
    conflicts = max((banks.conflicts(access.addresses, access.size) for access in accesses), default=1)
    loop = disassembly.main_loop(disassembly.disassemble(compiled.cubin))
    return Verdict(kernel, sm, compiled.resources, loop, conflicts)
