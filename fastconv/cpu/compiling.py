"""How Numba compiles kernels and their parts: machine code is made once, of a kernel with all its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

UNCALLED = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Options of what Python does not call."""


def compile_cached(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function with Numba; its machine code is kept on disk."""
    try:
        return numba.njit(**options, cache=True)(function)
    except RuntimeError:  # Numba found no folder that it may write to
        return numba.njit(**options)(function)


def compile_for(dispatcher: Any, signature: tuple[Any, ...]) -> Any:
    """Return what Numba compiles of a function for arguments of these types."""
    try:
        dispatcher.compile(signature)
    except (AttributeError, ImportError):  # an older version has kept code for a class that is gone
        dispatcher._cache.flush()
        dispatcher.compile(signature)
    if signature not in dispatcher.overloads:  # two processes have written to one file of the cache at once
        dispatcher = numba.jit(**dispatcher.targetoptions)(dispatcher.py_func)
        dispatcher.compile(signature)
    return dispatcher.overloads[signature]


class _PartLibrary(JITCodeLibrary):
    """The code of a part in LLVM's language, with that of the parts it calls, not optimized.

    Numba would optimize each part and make machine code of it, then do so again for all that call it, one
    level after the other: 2 of the 6 seconds that a first convolution takes.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Return 0: there is no machine code."""
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> _PartLibrary:
        """Return what is told where global names are found, which without machine code nothing reads."""
        return self

    def set_env(self, name: str, environment: Any) -> None:
        pass


class _PartCompiler(Compiler):
    """Numba's compiler, which leaves a part as it is linked into a kernel."""

    def define_pipelines(self) -> Any:
        state = self.state
        state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        return super().define_pipelines()


def part(function: Callable[..., Any]) -> Any:
    """Compile a part of kernels, which Python does not call: without wrappers and a cache of its own."""
    return numba.njit(**UNCALLED, pipeline_class=_PartCompiler)(function)


def small_part(function: Callable[..., Any]) -> Any:
    """Compile a small part, always inlined: calls were seen to cost 60 ns per task, 2 ns per copied row."""
    return numba.njit(**UNCALLED, pipeline_class=_PartCompiler, forceinline=True)(function)
