"""Runs an algorithm on arrays that lie between pages which nobody may touch: a read or write outside ends it.

    python -m tests.guard_pages direct               every tile and order; arrays end or begin at a page
    python -m tests.guard_pages direct --workspace   the same for the memory that kernels allocate themselves
    python -m tests.guard_pages direct --gradients   the same for the arrays of the gradient of the weight
    python -m tests.guard_pages direct --lie x       x is said to lie one element further: must end in a crash

Prints the names of what it runs, so that the last line tells where a crash was, and finally what the kernels
allocated between guard pages. Linux only.
"""

import argparse
import atexit
import ctypes
import faulthandler
import mmap
import tempfile
from dataclasses import replace
from itertools import product

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from fastconv.algorithms import TABLE
from fastconv.plan import possible_plans
from tests.cases import CASES, TALL, WIDE, around_tile
from tests.compare import integers, normals, poisoned
from tests.gradients import make_gradient, problems
from tests.kernels import DTYPES, ORDERS, Layer, Way, make_layer, tile_plans, with_caches

PAGE = mmap.PAGESIZE
NO_ACCESS = 0  # PROT_NONE
SMALL_CACHES = (1 << 10, 1 << 12)
AROUND_TILE = ("row", "signal", "pixels", "channels", "tiles", "tiles_cut", "tiles_of_batch")


class Region:
    """Memory of whole pages, and a page before and behind it that must not be touched."""

    def __init__(self, nbytes: int):
        self.size = -(-max(nbytes, 1) // PAGE) * PAGE
        self.memory = mmap.mmap(-1, self.size + 2 * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for page in (self.address, self.address + PAGE + self.size):
            if protect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), NO_ACCESS) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")


def place(array: np.ndarray, at_end: bool, shift: int = 0) -> np.ndarray:
    """A copy in the same memory order that ends, or begins, at a page that must not be touched.

    shift  elements by which the view that comes back lies elsewhere than its content: a lie
    """
    axes = np.argsort([-stride for stride in array.strides], kind="stable")
    inner = np.ascontiguousarray(array.transpose(axes))
    region = Region(inner.nbytes)
    start = PAGE + (region.size - inner.nbytes if at_end else 0)
    np.ndarray(inner.shape, inner.dtype, region.memory, start)[...] = inner
    view = np.ndarray(inner.shape, inner.dtype, region.memory, start + shift * inner.itemsize)
    return view.transpose(np.argsort(axes))


def run_guarded(layer: Layer, plan, at_end: bool, lie: str | None = None) -> None:
    """Run a plan with all its arrays guarded, the weight as given and prepared, and judge the result."""
    arrays = {"x": layer.x, "w": layer.w, "bias": layer.bias, "residual": layer.residual}
    shift = 1 if at_end else -1
    guarded = {name: place(array, at_end, shift * (name == lie)) for name, array in arrays.items()}
    placed = layer.with_array(**guarded)
    problem = layer.problem
    for weight in (None, place(placed.prepare(plan), at_end)):
        out = poisoned(problem.output_shape, problem.dtype, problem.order)
        layer.judge(plan, placed.run(plan, weight, place(out, at_end, shift * (lie == "out"))))


def run_gradients(algorithm: str) -> None:
    """Run the gradient of the weight, a tile of each kind, between guarded arrays; large and small caches."""
    rng = np.random.default_rng(0)
    for order, at_end in product(ORDERS, (True, False)):
        for problem in problems(algorithm, "grad_weight", CASES + WIDE + TALL, order=order):
            gradient = make_gradient(rng, problem, normals)
            placed = replace(
                gradient, first=place(gradient.first, at_end), second=place(gradient.second, at_end)
            )
            out = poisoned(gradient.shape, problem.dtype)
            kinds = {type(plan.tile): plan for plan in possible_plans(problem, algorithm)}
            for plan in kinds.values():
                print(plan, "end" if at_end else "begin", flush=True)
                for cut in (plan, with_caches(plan, *SMALL_CACHES)):
                    assert np.isfinite(placed.run(cut, place(out, at_end))).all()


def layers(algorithm: str, dtype: str, order: str, every_tile: bool):
    """Layers with a plan: all cases, with large and small caches, and sizes around the tile."""
    rng = np.random.default_rng(0)
    for tile_plan in tile_plans(algorithm, dtype=dtype)[: None if every_tile else 1]:
        way, tile = Way(algorithm, str(tile_plan.tile)), tile_plan.tile
        width = tile.vectors * tile_plan.device.lanes(dtype)
        sizes = ((tile.rows + 1, width + 1), (tile.rows - 1, width - 1), (width + 1, tile.rows + 1), (1, 1))
        around = [case for k, n in sizes for case in around_tile(max(k, 1), n, getattr(tile, "m", 1))]
        around = [case for case in around if case.name in AROUND_TILE]
        for problem in way.problems(CASES + WIDE + TALL + around, dtype=dtype, order=order):
            if problem.N > 0:
                plan = way.plan(problem)
                yield make_layer(rng, problem, integers), plan
                yield make_layer(rng, problem, integers), with_caches(plan, *SMALL_CACHES)


class Workspace:
    """What the kernels have allocated: {address: (memory, bytes)}, how often, and the most at one time."""

    def __init__(self):
        self.held: dict[int, tuple[Region, int]] = {}
        self.count = self.peak = 0

    def take(self, nbytes: int, given: int) -> int:
        """The address of memory filled with NaN, of which `given` bytes end at a page."""
        region = Region(nbytes)
        region.memory[PAGE:-PAGE] = b"\xff" * region.size
        address = region.address + PAGE + region.size - given
        self.held[address] = region, nbytes
        self.count += 1
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.held.values()))
        return address

    def give_back(self, address: int) -> None:
        del self.held[address]


workspace = Workspace()


def guard_workspace(lie: bool) -> None:
    """Let the kernels allocate between guard pages; to be called before they are imported.

    Memory then ends at a page, and so is not aligned to a cache line as that of simd.allocate is.
    lie  they get half of what they ask for
    """
    # A disk cache of its own: the machine code holds addresses of this process.
    folder = tempfile.TemporaryDirectory(prefix="fastconv-guard-pages-")
    atexit.register(folder.cleanup)
    numba.config.CACHE_DIR = folder.name
    from fastconv.cpu import simd

    @ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
    def take(nbytes):
        return workspace.take(nbytes, nbytes // 16 * 8 if lie else nbytes)

    @ctypes.CFUNCTYPE(None, ctypes.c_int64)
    def give_back(address):
        workspace.give_back(address)

    def function(builder, callback, result):
        address = ir.Constant(simd.INT, ctypes.cast(callback, ctypes.c_void_p).value)
        return builder.inttoptr(address, ir.FunctionType(result, [simd.INT]).as_pointer())

    @intrinsic
    def allocate(typingctx, block, elements):
        def codegen(context, builder, sig, args):
            nbytes = builder.mul(args[1], simd.INT(block.float.bitwidth // 8))
            address = builder.call(function(builder, take, simd.INT), [nbytes])
            return builder.inttoptr(address, context.get_value_type(sig.return_type))

        return types.CPointer(block.float)(block, types.int64), codegen

    @intrinsic
    def release(typingctx, p):
        def codegen(context, builder, sig, args):
            builder.call(function(builder, give_back, ir.VoidType()), [builder.ptrtoint(args[0], simd.INT)])
            return context.get_dummy_value()

        return types.void(p), codegen

    simd.allocate, simd.release = allocate, release


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("algorithm", choices=list(TABLE))
    parser.add_argument("--workspace", action="store_true")
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--lie", choices=["x", "w", "bias", "residual", "out", "workspace"])
    arguments = parser.parse_args()
    faulthandler.enable()
    if arguments.gradients:
        run_gradients(arguments.algorithm)
        return
    is_workspace = arguments.workspace or arguments.lie == "workspace"
    if is_workspace:
        guard_workspace(arguments.lie == "workspace")
    few = is_workspace or arguments.lie is not None  # one tile: it is compiled each time, or crashes
    excess, where = 0, "nowhere"
    for dtype, order in product(DTYPES[: 1 if few else None], ORDERS):
        every_tile = dtype == "float32" and not few
        for layer, plan in layers(arguments.algorithm, dtype, order, every_tile):
            for at_end in (True, False):
                print(plan, "end" if at_end else "begin", flush=True)
                run_guarded(layer, plan, at_end, arguments.lie)
            more = workspace.peak - plan.workspace()
            if more > excess:
                excess, where = more, str(plan)
            workspace.peak = 0
    print(f"{workspace.count} allocations, {len(workspace.held)} not given back")
    print(f"{excess} bytes more than the plan states ({where})")


if __name__ == "__main__":
    main()
