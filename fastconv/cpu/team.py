"""Shares the tasks of a kernel among threads, safely under many callers and after a fork.

    caller   takes a job's memory, fills it, opens it, works on it, waits for the workers' chunks
    worker   watches all jobs; claims a chunk of an open one, runs it, claims another ...

Both stay in compiled code without the GIL: to wake a sleeping thread takes 30 us and more, and as long again
where two threads want the GIL at once, and many layers take less. So a worker that has nothing to do
watches for a while before it sleeps, and runs a kernel by its address. The caller never waits for a worker
that has not begun.

Numba's own layers do not serve: `workqueue` ends the process when two Python threads call at once, and
GNU OpenMP ends it when a forked child calls after its parent did.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastconv.cpu.compiling import compile_cached, part

CHUNKS_PER_THREAD = 4  # so that a thread that is held up does not hold up the others
WATCHES = 20_000  # of all jobs, before a worker sleeps: about a millisecond
WAITS = 1_000  # of a caller for the last chunks, before it lets others have its core

# Memory of a team: a row for each of so many callers at once (another finds no row, and works alone), then
# one for each worker that there may be. A row is two cache lines, which are fetched together.
JOBS, MOST_WORKERS, ROW = 8, 255, 128

# A job's numbers, and where they lie in its row: whether a caller has TAKEN it, how many chunks are OPEN,
# claimed by nobody (plus EACH for each worker that may claim some), and UNFINISHED, claimed or not. While
# there are any: the FUNCTION(ARGUMENTS, first, last) to call, how many TASKS and CHUNKS there are in all, and
# whether one FAILED.
TAKEN, OPEN, FUNCTION, ARGUMENTS, TASKS, CHUNKS, UNFINISHED, FAILED = range(0, 64, 8)
EACH = 1 << 32
# A worker's: whether it is ASLEEP, or about to be, and the LOCK that it waits for then.
ASLEEP, LOCK = range(0, 16, 8)

_INT = ir.IntType(64)
_IS_X86 = platform.machine() in ("x86_64", "AMD64")


def _entry(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, without the GIL."""
    return compile_cached(function, error_model="numpy", nogil=True, no_cfunc_wrapper=True)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _INT.as_pointer())


@intrinsic
def load(typingctx: Any, address: types.Integer) -> Any:
    """Return the number at an address; all threads see what these functions do in one order."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store(typingctx: Any, address: types.Integer, number: types.Integer) -> Any:
    """Store a number at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _replace(typingctx: Any, address: types.Integer, old: types.Integer, new: types.Integer) -> Any:
    """Replace the number at an address if it is `old`, in one step, and say whether it was."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        p = _pointer(builder, args[0])
        return builder.extract_value(builder.cmpxchg(p, args[1], args[2], "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _decrease(typingctx: Any, address: types.Integer) -> Any:
    """Subtract 1 from the number at an address, in one step."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.atomic_rmw("sub", _pointer(builder, args[0]), _INT(1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _call(
    typingctx: Any,
    function: types.Integer,
    arguments: types.Integer,
    first: types.Integer,
    last: types.Integer,
) -> Any:
    """Call the function at an address, and return what it does."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(_INT, [_INT] * 3)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(*[types.int64] * 4), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Let the core rest for some cycles, as a loop that waits should."""
    return types.void(), _emit_foreign_call("llvm.x86.sse2.pause" if _IS_X86 else "")


@intrinsic
def _step_aside(typingctx: Any) -> Any:
    """Let another thread have this core, where the system has a word for that."""
    return types.void(), _emit_foreign_call("sched_yield" if binding.address_of_symbol("sched_yield") else "")


@intrinsic
def _acquire(typingctx: Any, lock: types.Integer) -> Any:
    """Wait for one of Python's locks, which needs no GIL."""
    return types.void(types.int64), _emit_foreign_call("PyThread_acquire_lock", 1)


@intrinsic
def _release(typingctx: Any, lock: types.Integer) -> Any:
    """Release one of Python's locks."""
    return types.void(types.int64), _emit_foreign_call("PyThread_release_lock")


def _emit_foreign_call(name: str, *more: int) -> Any:
    """Return what emits a call of a C function with numbers, if it has a name, and leaves its result."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if name:
            values = [*args, *map(_INT, more)]
            kind = ir.FunctionType(ir.VoidType(), [_INT] * len(values))
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)
        return context.get_dummy_value()

    return codegen


@intrinsic
def _bind(typingctx: Any, kernel: types.Integer, arguments: types.BaseTuple) -> Any:
    """Return the address of a function f(a, first, last) that calls kernel(block, first, last, *arguments).

    And a, the address of what f needs, which lasts as long as the caller of `_bind` runs. f returns 1 if the
    kernel raised an exception, else 0. A block is nothing at run time, so any number will do for it.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        slot = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, args))
        kind = ir.FunctionType(_INT, [_INT] * 3)
        function = ir.Function(builder.module, kind, builder.module.get_unique_name("chunk"))
        function.linkage = "internal"
        _emit_call(
            context, ir.IRBuilder(function.append_basic_block()), sig.args[1], slot.type, *function.args
        )
        both = [builder.ptrtoint(function, _INT), builder.ptrtoint(slot, _INT)]
        return context.make_tuple(builder, sig.return_type, both)

    return types.UniTuple(types.int64, 2)(types.int64, arguments), codegen


def _emit_call(
    context: Any, builder: Any, arguments: types.BaseTuple, slot: Any, address: Any, first: Any, last: Any
) -> None:
    """Emit a call of the kernel, by its address, with the arguments that were kept at another."""
    kernel, kept = cgutils.unpack_tuple(builder, builder.load(builder.inttoptr(address, slot)), 2)
    kinds = [types.voidptr, types.int64, types.int64, *arguments.types]
    signature = context.call_conv.get_function_type(types.none, kinds)
    values = [context.get_dummy_value(), first, last, *cgutils.unpack_tuple(builder, kept)]
    target = builder.inttoptr(kernel, signature.as_pointer())
    status, _ = context.call_conv.call_function(builder, target, types.none, kinds, values)
    builder.ret(builder.zext(status.is_error, _INT))


@_entry
def launch(jobs, helpers, tasks, kernel, arguments):
    """Call a kernel until every task in 0 ... tasks-1 has been covered once; return whether a call failed."""
    function, bound = _bind(kernel, arguments)
    job = _take_job(jobs) if helpers > 0 else 0
    if job == 0:
        return _call(function, bound, 0, tasks)
    chunks = min(tasks, (helpers + 1) * CHUNKS_PER_THREAD)
    store(job + FUNCTION, function)
    store(job + ARGUMENTS, bound)
    store(job + TASKS, tasks)
    store(job + CHUNKS, chunks)
    store(job + FAILED, 0)
    store(job + UNFINISHED, chunks)
    store(job + OPEN, helpers * EACH + chunks)
    _wake(jobs, helpers)
    _work_on(job, -1)
    waits = 0
    while load(job + UNFINISHED) > 0:
        _pause()
        waits += 1
        if waits > WAITS:
            _step_aside()
    failed = load(job + FAILED)
    store(job + TAKEN, 0)
    return failed


@part
def _take_job(jobs):
    """Return the address of a job that nobody has taken, or 0."""
    for job in range(jobs, jobs + JOBS * ROW, ROW):
        if _replace(job + TAKEN, 0, 1):
            return job
    return 0


@part
def _wake(jobs, helpers):
    """Wake those of the first `helpers` workers that sleep; others will see the job, which is open by now."""
    for me in range(helpers):
        worker = jobs + (JOBS + me) * ROW
        if load(worker + ASLEEP) == 1 and _replace(worker + ASLEEP, 1, 0):
            _release(load(worker + LOCK))


@part
def _work_on(job, me):
    """Claim and run chunks of a job until none is left for worker `me` (-1: the caller); say if any was."""
    worked = False
    while True:
        opened = load(job + OPEN)
        helpers, left = opened // EACH, opened % EACH
        if left == 0 or helpers <= me:
            return worked
        if _replace(job + OPEN, opened, opened - 1):  # the caller waits for this chunk from here on: whatever
            tasks, chunks = load(job + TASKS), load(job + CHUNKS)  # job it is of, these are its numbers
            chunk = chunks - left
            first, last = tasks * chunk // chunks, tasks * (chunk + 1) // chunks
            if _call(load(job + FUNCTION), load(job + ARGUMENTS), first, last) != 0:
                store(job + FAILED, 1)
            _decrease(job + UNFINISHED)
            worked = True


@_entry
def _serve(jobs, me):
    """Work on the jobs that are open to worker `me`, for ever."""
    worker = jobs + (JOBS + me) * ROW
    while True:
        idle = 0
        while idle < WATCHES:
            idle = 0 if _work_on_all(jobs, me) else idle + 1
            _pause()
        store(worker + ASLEEP, 1)
        if _work_on_all(jobs, me) and _replace(worker + ASLEEP, 1, 0):
            continue
        _acquire(load(worker + LOCK))  # whoever sets ASLEEP to 0 releases it


@part
def _work_on_all(jobs, me):
    """Work on all jobs that are open to a worker; say whether there was one."""
    worked = False
    for job in range(jobs, jobs + JOBS * ROW, ROW):
        worked |= _work_on(job, me)
    return worked


class _Team:
    """Worker threads, started when first needed, and the memory that they share with the callers."""

    def __init__(self) -> None:
        # never freed: at exit the workers still look at it
        self.memory = _python.PyMem_RawCalloc(JOBS + MOST_WORKERS + 1, ROW)
        self.jobs = -(-self.memory // ROW) * ROW
        self.workers = 0
        self.starting = threading.Lock()

    def start(self, helpers: int) -> None:
        """Start workers until there are so many."""
        with self.starting:
            while self.workers < helpers:
                me, self.workers = self.workers, self.workers + 1
                lock = _python.PyThread_allocate_lock()
                _python.PyThread_acquire_lock(lock, 1)
                ctypes.c_int64.from_address(self.jobs + (JOBS + me) * ROW + LOCK).value = lock
                try:
                    threading.Thread(
                        target=_serve, args=(self.jobs, me), name="fastconv", daemon=True
                    ).start()
                except RuntimeError:  # the system has no more: the caller does what this one would have
                    break


_python = ctypes.pythonapi
_python.PyMem_RawCalloc.restype = ctypes.c_void_p
_python.PyMem_RawCalloc.argtypes = [ctypes.c_size_t] * 2
_python.PyThread_allocate_lock.restype = ctypes.c_void_p
_python.PyThread_acquire_lock.argtypes = [ctypes.c_void_p, ctypes.c_int]

_team = _Team()


def gather(helpers: int) -> tuple[int, int]:
    """Return the address of the jobs, and how many workers are to help, started if need be."""
    if helpers <= 0:
        return 0, 0
    helpers = min(helpers, MOST_WORKERS)
    if _team.workers < helpers:
        _team.start(helpers)
    return _team.jobs, helpers


def _forget_team() -> None:
    global _team
    _team = _Team()  # a forked child has none of its parent's threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_team)
