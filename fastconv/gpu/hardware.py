"""A driver's figures enter, a Device leaves: what the kernels' cost models need to know of a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Device:
    """One GPU as the kernels see it.

    name              model, as the driver names it
    capability        of compute, such as (9, 0)
    processors        streaming multiprocessors (SM)
    shared_per_block  bytes of shared memory a block may declare
    shared_per_sm     bytes of shared memory of one SM
    l2                bytes of level-2 cache
    clock             Hz
    bandwidth         bytes/s of device memory
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared_per_block: int
    shared_per_sm: int
    l2: int
    clock: float
    bandwidth: float

    def label(self) -> str:
        """Return the name that measurements are kept under."""
        return self.name

    def fits(self, tile: Any, dtype: str) -> bool:
        """Say whether a tile can run; every kernel keeps to what the smallest supported GPU has."""
        return bool(tile.takes(dtype))

    def peak(self, dtype: str) -> float:
        """Return the FLOP/s of all multiply-adds without tensor cores."""
        single, double = _LANES.get(self.capability, _LANES.get((self.capability[0], 0), (128, 2)))
        return 2.0 * self.processors * self.clock * (double if dtype == "float64" else single)


# Multiply-adds per SM and cycle in float32 and float64 (CUDA C++ Programming Guide, Arithmetic Instructions).
_LANES = {
    (7, 0): (64, 32), (7, 5): (64, 2), (8, 0): (64, 32), (8, 6): (128, 2), (8, 9): (128, 2),
    (9, 0): (128, 64), (10, 0): (128, 64), (12, 0): (128, 2),
}  # fmt: skip

# Of the GPUs that do not tell (in a virtual machine a driver may hide its clocks): kHz, kHz and bits.
_TYPICAL = {"ClockRate": 1_500_000, "MemoryClockRate": 1_000_000, "GlobalMemoryBusWidth": 4096}


def describe(name: str, capability: tuple[int, int], attributes: Mapping[str, int]) -> Device:
    """Return the device that has these attributes, which bear CUDA's names without cudaDevAttr."""
    clock, memory_clock, bits = (attributes.get(key) or value for key, value in _TYPICAL.items())
    return Device(
        name,
        capability,
        processors=attributes["MultiProcessorCount"],
        shared_per_block=attributes["MaxSharedMemoryPerBlock"],
        shared_per_sm=attributes["MaxSharedMemoryPerMultiprocessor"],
        l2=attributes["L2CacheSize"],
        clock=clock * 1e3,
        bandwidth=2.0 * memory_clock * 1e3 * bits / 8,  # two transfers per cycle
    )
