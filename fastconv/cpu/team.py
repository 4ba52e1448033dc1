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

import os
import platform
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

CHUNKS_PER_THREAD = 4  # so that a thread that is held up does not hold up the others
WATCHES = 20_000  # of all jobs, before a worker sleeps: about a millisecond
WAITS = 1_000  # of a caller for the last chunks, before it lets others have its core

JOBS = 8  # that may be open at once; a caller that finds no other works alone
JOB_BYTES = 128
# What a job's memory holds, and where: TAKEN by a caller; OPEN chunks that nobody has claimed, UNFINISHED
# ones, claimed or not; and, while there are any, the FUNCTION(ARGUMENTS, first, last) to call, how many
# TASKS and CHUNKS there are, and HELPERS, the workers that may claim some.
TAKEN, OPEN, FUNCTION, ARGUMENTS, TASKS, CHUNKS, HELPERS, UNFINISHED = range(0, 64, 8)

_INT = ir.IntType(64)
_HAS_PAUSE = platform.machine() in ("x86_64", "AMD64")


def compile_cached(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function with Numba; its machine code is kept on disk."""
    try:
        return numba.njit(**options, cache=True)(function)
    except RuntimeError:  # Numba found no folder that it may write to
        return numba.njit(**options)(function)


_part = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
_entry = partial(compile_cached, error_model="numpy", nogil=True, no_cfunc_wrapper=True)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _INT.as_pointer())


@intrinsic
def _load(typingctx: Any, address: types.Integer) -> Any:
    """Return the number at an address; what was stored before it is seen after it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store(typingctx: Any, address: types.Integer, number: types.Integer) -> Any:
    """Store a number, after all that was stored before it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _replace(typingctx: Any, address: types.Integer, old: types.Integer, new: types.Integer) -> Any:
    """Replace the number at an address if it is `old`, in one step, and say whether it was."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        p = _pointer(builder, args[0])
        return builder.extract_value(builder.cmpxchg(p, args[1], args[2], "acq_rel", "acquire"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _decrease(typingctx: Any, address: types.Integer) -> Any:
    """Subtract 1 from the number at an address, in one step."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.atomic_rmw("sub", _pointer(builder, args[0]), _INT(1), "acq_rel")
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
    """Call the function at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_INT] * 3)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Let the core rest for some cycles, as loops that wait should."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _HAS_PAUSE:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _bind(typingctx: Any, kernel: types.Integer, arguments: types.BaseTuple) -> Any:
    """Return the address of a function f(a, first, last) that calls kernel(block, first, last, *arguments).

    And a, the address of what f needs, which lasts as long as the caller of `_bind` runs. A block is nothing
    at run time, so any number will do for it.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        slot = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, args))
        kind = ir.FunctionType(ir.VoidType(), [_INT] * 3)
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
    context.call_conv.call_function(builder, target, types.none, kinds, values)  # kernels raise nothing
    builder.ret_void()


@_part
def _yield(jobs):
    """Let another thread have this core, where the system has a word for that."""
    function = _load(jobs + JOBS * JOB_BYTES)
    if function != 0:
        _call(function, 0, 0, 0)


@_part
def _work_on(job):
    """Claim chunks of a job and run them, until none is left."""
    left = _load(job + OPEN)
    while left > 0:
        if _replace(job + OPEN, left, left - 1):  # the caller waits for this chunk from here on: whatever
            tasks, chunks = _load(job + TASKS), _load(job + CHUNKS)  # job it is of, these are its numbers
            chunk = chunks - left
            first, last = tasks * chunk // chunks, tasks * (chunk + 1) // chunks
            _call(_load(job + FUNCTION), _load(job + ARGUMENTS), first, last)
            _decrease(job + UNFINISHED)
        left = _load(job + OPEN)


@_entry
def launch(jobs, helpers, tasks, kernel, arguments):
    """Call a kernel until every task in 0 ... tasks-1 has been covered once."""
    function, bound = _bind(kernel, arguments)
    job = jobs
    while helpers > 0 and not _replace(job + TAKEN, 0, 1):
        job += JOB_BYTES
        if job == jobs + JOBS * JOB_BYTES:
            helpers = 0  # as many callers are at work: there is no thread to spare
    if helpers <= 0:
        _call(function, bound, 0, tasks)
        return
    chunks = min(tasks, (helpers + 1) * CHUNKS_PER_THREAD)
    _store(job + FUNCTION, function)
    _store(job + ARGUMENTS, bound)
    _store(job + TASKS, tasks)
    _store(job + CHUNKS, chunks)
    _store(job + HELPERS, helpers)
    _store(job + UNFINISHED, chunks)
    _store(job + OPEN, chunks)
    _work_on(job)
    waits = 0
    while _load(job + UNFINISHED) > 0:
        _pause()
        waits += 1
        if waits > WAITS:
            _yield(jobs)
    _store(job + TAKEN, 0)


@_entry
def _watch(jobs, me, watches):
    """Work on the jobs that are open to worker `me`; return when there was none for a while."""
    idle = 0
    while idle < watches:
        idle += 1
        for job in range(jobs, jobs + JOBS * JOB_BYTES, JOB_BYTES):
            if _load(job + OPEN) > 0 and _load(job + HELPERS) > me:
                _work_on(job)
                idle = 0
        _pause()


class _Team:
    """Worker threads, started when first needed, and the memory of the jobs."""

    def __init__(self) -> None:
        self.memory = np.zeros(JOBS * JOB_BYTES // 8 + 1 + 8, np.int64)
        self.jobs = -(-self.memory.ctypes.data // 64) * 64
        self.memory[(self.jobs - self.memory.ctypes.data) // 8 + JOBS * JOB_BYTES // 8] = (
            binding.address_of_symbol("sched_yield") or 0
        )
        self.workers = 0
        self.asleep = 0
        self.wanted = threading.Condition()

    def wake(self, helpers: int) -> int:
        """See to it that so many workers watch the jobs, or soon will; return where the jobs are."""
        if self.workers < helpers:
            self._start(helpers)
        if self.asleep:
            with self.wanted:
                self.wanted.notify_all()
        return self.jobs

    def _start(self, helpers: int) -> None:
        with self.wanted:
            while self.workers < helpers:
                worker = threading.Thread(
                    target=self._serve, args=(self.workers,), name="fastconv", daemon=True
                )
                try:
                    worker.start()
                except RuntimeError:  # the system gives no more threads; the caller does what they would have
                    break
                self.workers += 1

    def _serve(self, me: int) -> None:
        while True:
            _watch(self.jobs, me, WATCHES)
            with self.wanted:
                self.asleep += 1
                self.wanted.wait()
                self.asleep -= 1


_team = _Team()


def wake(helpers: int) -> tuple[int, int]:
    """See to it that so many workers watch the jobs, or soon will; return where these are, and `helpers`."""
    return _team.wake(helpers) if helpers > 0 else 0, helpers


def _forget_team() -> None:
    global _team
    _team = _Team()  # a forked child has none of its parent's threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_team)
