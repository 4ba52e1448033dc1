"""A part's function enters, its rows leave: run in a process of its own, which is ended when its time is up.

A kernel that never returns, or that leaves the GPU unusable, then costs one part and not the whole run.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from bench.gpu.clock import Deadline
from bench.rows import Row

Part = Callable[[Deadline], Iterator[Row]]

GRACE = 5.0  # seconds for a part to end by itself: it looks at the clock between two kernels only
END: Row = {"kind": "end"}


def run(target: str, seconds: float, grace: float = GRACE) -> Iterator[Row]:
    """Yield the rows of the function that `target` ("module:function") names, as they come.

    A part that raises or dies adds a `failure` row, one that has to be ended a `left_out` row.
    """
    spawn = multiprocessing.get_context("spawn")  # a forked child could not use CUDA
    connection, far_end = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_serve, args=(far_end, target, seconds))
    process.start()
    far_end.close()
    limit = Deadline(seconds + grace)
    try:
        yield from _receive(connection, process, limit)
    finally:
        _end(process)
        connection.close()


def _receive(connection: Connection, process: BaseProcess, limit: Deadline) -> Iterator[Row]:
    while connection.poll(limit.left()):
        try:
            row = connection.recv()
        except EOFError:
            process.join()
            yield {"kind": "failure", "reason": f"the process died with exit code {process.exitcode}"}
            return
        if row == END:
            return
        yield row
    reason = f"did not end within {limit.seconds:g} s and was stopped: what follows was not done"
    yield {"kind": "left_out", "reason": reason}


def _serve(connection: Connection, target: str, seconds: float) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # so that _end reaches the processes which this one starts
    module, name = target.split(":")
    deadline = Deadline(seconds)
    try:
        for row in getattr(importlib.import_module(module), name)(deadline):
            connection.send(row)
    except Exception:
        connection.send({"kind": "failure", "reason": traceback.format_exc()})
    connection.send(END)
    connection.close()


def _end(process: BaseProcess) -> None:
    """Let a process that has said all end; stop any other with all that it started."""
    process.join(timeout=0.5)
    if process.is_alive() and process.pid is not None and hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # not yet the head of its group
            process.kill()
    elif process.is_alive():
        process.kill()
    process.join()
