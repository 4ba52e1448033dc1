"""What the kernels need to know of this CPU: vector width, registers, caches, cores."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv import environment
from fastconv.cpu.threads import thread_count
from fastconv.lines import CACHE_LINE
from fastconv.problem import HashedOnce

if TYPE_CHECKING:
    from fastconv.problem import ConvProblem

CLOCK = 3.0e9  # Hz; nominal, so that estimates (and the choices made from them) do not depend on the hour
FMA_PER_CYCLE = 2  # vectors; true of every current x86 server core, and of most ARM ones
BANDWIDTH = 25.0e9  # bytes/s that one core moves to and from memory; a typical server core
EXPOSED = 0.1  # the part of the shorter of arithmetic and traffic that the longer does not hide
TILE_CYCLES = 60  # to start a tile and to store it
L2_CYCLES = 2  # to load a vector from L2
CROSSING = 1.22  # a tile takes longer whose vectors lie in two cache lines each; of vectors as wide as a line
SUM_CYCLES = 4  # from one FMA to the next on its result
ROW_CYCLES = 45  # to start a row that is copied alone
BOX_ROW_CYCLES = 15  # one of several that are copied together


@dataclass(frozen=True)
class Device(HashedOnce):
    """One CPU as the kernels see it.

    name         model, as the operating system names it
    vector_bits  width of one vector
    registers    vector registers the microkernel may count on
    l1, l2       bytes of data cache one core has for itself
    """

    name: str
    vector_bits: int
    registers: int
    l1: int
    l2: int

    __hash__ = HashedOnce.__hash__

    def label(self) -> str:
        """Return the name that measurements are kept under: vectors and threads decide what is fastest."""
        return f"{self.name}, {self.vector_bits} bits, {thread_count()} threads"

    def lanes(self, dtype: str) -> int:
        """Return the elements of one vector."""
        return self.vector_bits // (32 if dtype == "float32" else 64)

    def peak(self, dtype: str) -> float:
        """Return the nominal FLOP/s of one core."""
        return CLOCK * FMA_PER_CYCLE * 2 * self.lanes(dtype)

    def fits(self, tile: Any, dtype: str) -> bool:
        """Say whether a tile's sums, one tap of B and one broadcast fit the registers, in any dtype."""
        return tile.rows * tile.vectors + tile.vectors + 1 <= self.registers

    def tap_cycles(self, rows: int, vectors: int) -> float:
        """Return the cycles of one tap of a tile: its FMAs, its loads, its B from L2 or one sum's latency."""
        return max(rows * vectors / 2, (rows + vectors + 2) / 2, vectors * L2_CYCLES, SUM_CYCLES)

    def multiply_cycles(
        self, tile: Any, rows: int, columns: int, taps: float, dtype: str, aligned: bool
    ) -> float:
        """Return the cycles of a (rows x taps) by (taps x columns) product, tile by tile, waste included.

        aligned  whether no vector of the columns lies in two cache lines
        """
        vectors = math.ceil(columns / self.lanes(dtype))
        tiles = math.ceil(vectors / tile.vectors)
        narrow, wider = divmod(vectors, tiles)  # 7 vectors: a tile of 3 and two of 2
        tap = (tiles - wider) * self.tap_cycles(tile.rows, narrow)
        tap += wider * self.tap_cycles(tile.rows, narrow + 1)
        if not aligned and self.vector_bits == 8 * CACHE_LINE:
            tap *= CROSSING
        return math.ceil(rows / tile.rows) * (taps * tap + tiles * TILE_CYCLES)

    def copy_cycles(
        self, problem: ConvProblem, rows: float, length: float, step: int, start: int = ROW_CYCLES
    ) -> float:
        """Return the cycles to copy rows of an input, columns `step` apart, to where they lie together."""
        is_scattered = step > 2 or problem.order == "NHWC"
        element = 1 if is_scattered else 2 * step / self.lanes(problem.compute_dtype)
        return rows * (start + length * element)

    def fetch_cycles(self, bytes: int) -> float:
        """Return the cycles to read what lies beyond L2."""
        return bytes / BANDWIDTH * CLOCK

    def seconds(self, problem: ConvProblem, cycles: float) -> float:
        """Return the seconds of `cycles` of arithmetic and traffic; the longer hides most of the other."""
        longer, shorter = sorted((cycles / CLOCK, problem.bytes / BANDWIDTH), reverse=True)
        return longer + EXPOSED * shorter


def itemsize(problem: ConvProblem) -> int:
    """Return the bytes of one element in the arithmetic of a problem."""
    return 8 if problem.compute_dtype == "float64" else 4


# feature that LLVM reports -> (vector bits, vector registers), widest first
_WIDTHS = {"avx512f": (512, 32), "avx2": (256, 16), "neon": (128, 32), "sse2": (128, 16)}


def current() -> Device:
    """Return this machine's CPU; FASTCONV_VECTOR_BITS (128, 256 or 512) forces narrower vectors."""
    return _detect(environment.read("VECTOR_BITS"))


@lru_cache(maxsize=8)
def _detect(forced: str) -> Device:
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    bits, registers = next((w for name, w in _WIDTHS.items() if features.get(name)), (128, 16))
    if forced:
        bits, registers = _forced_width(forced, bits, registers)
    return Device(_model_name(), bits, registers, _cache_size("1", 32 << 10), _cache_size("2", 512 << 10))


def _forced_width(forced: str, bits: int, registers: int) -> tuple[int, int]:
    from fastconv.problem import ConvError

    if forced not in ("128", "256", "512") or int(forced) > bits:
        known = [str(w) for w in (128, 256, 512) if w <= bits]
        raise ConvError(f"FASTCONV_VECTOR_BITS must be one of {', '.join(known)} on this CPU, got {forced!r}")
    return int(forced), registers if int(forced) == bits else 16


def _model_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _cache_size(level: str, default: int) -> int:
    """Return the bytes of core 0's data cache of a level, where Linux tells, else `default`."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (index / "level").read_text().strip() != level:
                continue
            if (index / "type").read_text().strip() == "Instruction":
                continue
            return int((index / "size").read_text().strip().rstrip("K")) << 10
        except (OSError, ValueError):
            continue
    return default
