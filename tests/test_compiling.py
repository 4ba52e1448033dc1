"""How Numba compiles kernels: what it keeps on disk, and that parts take no time of their own."""

import pickle
import sys

import numba
import numpy as np
import pytest
from numba.core import types
from numba.core.codegen import JITCodeLibrary

from fastconv.cpu.compiling import compile_cached, compile_for, part, small_part
from fastconv.cpu.simd import Block, Kernel, table


@pytest.mark.parametrize("gone", [b"math\nclass_that_is_gone\n.", b"module_that_is_gone\nname\n."])
def test_code_that_an_older_version_has_kept(gone, tmp_path, monkeypatch):
    """Numba's index on disk names the types of arguments; one of a class that is gone cannot be read."""
    (tmp_path / "kept.py").write_text("def add(a, b):\n    return a + b\n")
    monkeypatch.delitem(sys.modules, "kept", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    import kept

    signature = (types.int64, types.int64)
    for _ in range(2):
        compiled = compile_for(compile_cached(kept.add), signature)
        assert compiled.entry_point(3, 4) == 7
        (index,) = tmp_path.rglob("*.nbi")
        index.write_bytes(pickle.dumps(numba.__version__) + b"c" + gone)


def test_code_of_other_types_than_its_index_says():
    """Where two processes have written to one file at once, what is loaded is not what was asked for."""

    def add(a, b):
        return a + b

    signature = (types.int64, types.int64)
    dispatcher = compile_cached(add, no_cfunc_wrapper=True)
    dispatcher.compile = lambda signature: None
    assert compile_for(dispatcher, signature).entry_point(3, 4) == 7


def test_machine_code_is_made_of_whole_kernels(monkeypatch):
    @small_part
    def add_one(value):
        return value + 1

    @part
    def add_two(value):
        return add_one(add_one(value))

    def kernel(block, first, last, y):
        for i in range(first, last):
            table(y)[i] = add_two(i)

    made, finalize = [], JITCodeLibrary._finalize_specific
    monkeypatch.setattr(
        JITCodeLibrary, "_finalize_specific", lambda library: made.append(library.name) or finalize(library)
    )
    y = np.empty(5, np.float32)
    Kernel(kernel)(Block("float32", 1, 1, 4), 5, 1, y)
    assert y.tolist() == [2, 3, 4, 5, 6]
    names = [name.rpartition(".")[2] for name in made]
    assert names.count("kernel") == 1
    assert not {"add_one", "add_two"} & set(names)
