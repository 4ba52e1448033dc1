"""The child process of a comparison: it holds one library, is told a problem, and measures in its turn."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bench.operations import OPERATIONS, Forward
from bench.timing import measure, settle
from fastconv.problem import ConvProblem

Calls = dict[str, Callable[[], Any]]

SETTLE_SECONDS = 0.02  # untimed calls before each turn: the other side's threads fall asleep, the caches fill
TURN_SECONDS = 0.05


class Failure(str):
    """The traceback of a request that raised."""


def serve(connection: Connection, library: str, cpus: list[int]) -> None:
    """Answer requests (method, *arguments) until the parent closes the connection."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    side = Side(LIBRARIES[library], len(cpus))
    with suppress(EOFError):
        while True:
            connection.send(side.answer(*connection.recv()))


class Side:
    """The calls of one library for the problem loaded last, one per memory order that is tried."""

    def __init__(self, make_calls: Callable[..., Calls], threads: int):
        self.make_calls = make_calls
        self.threads = threads
        self.calls: Calls = {}

    def answer(self, method: str, *arguments: Any) -> Any:
        """What the method returns, or the Failure that the parent raises."""
        try:
            return getattr(self, method)(*arguments)
        except Exception:
            return Failure(traceback.format_exc())

    def load(self, problem: ConvProblem, operation: str, algo: str, prepared: bool) -> dict[str, np.ndarray]:
        """Make the arrays, call once in each memory order, and return the outputs for the parent to check."""
        self.calls = self.make_calls(OPERATIONS[operation](problem), algo, prepared, self.threads)
        return {order: np.asarray(call()) for order, call in self.calls.items()}

    def take_turn(self) -> dict[str, tuple[float, ...]]:
        """Samples in seconds per call, for each memory order."""
        samples = {}
        for order, call in self.calls.items():
            settle(call, SETTLE_SECONDS)
            samples[order] = measure(call, TURN_SECONDS, min_samples=1).samples
        return samples


def fastconv_calls(operation: Forward, algo: str, prepared: bool, threads: int) -> Calls:
    """fastconv's public call; its thread count is in the environment."""
    return {operation.problem.order: operation.ours(algo, prepared)}


def torch_calls(operation: Forward, algo: str, prepared: bool, threads: int) -> Calls:
    """torch's eager call in both memory orders, all operands converted beforehand."""
    import torch

    torch.set_num_threads(threads)
    orders, ndim = {"NCHW": torch.contiguous_format}, operation.problem.ndim
    if ndim > 1:
        orders["NHWC"] = torch.channels_last if ndim == 2 else torch.channels_last_3d
    without_graph = torch.inference_mode()
    return {name: without_graph(operation.theirs(torch, order)) for name, order in orders.items()}


LIBRARIES = {"fastconv": fastconv_calls, "torch": torch_calls}
