"""Who may import whom, read from the source of every module; and what `import fastconv` brings with it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastconv

ROOT = Path(fastconv.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}

# The design's picture: what a module may import of the package. One that is not named has no place in it.
ALLOWED = {
    "environment": set(),
    "lines": set(),
    "problem": set(),
    "winograd_math": set(),
    "pool_problem": {"problem"},
    "resizing": {"problem"},
    "arrays": {"gpu", "lines", "problem"},  # gpu: for arrays on a GPU, when one comes in
    "reference": {"problem"},
    "cpu": {"cpu", "environment", "lines", "pool_problem", "problem", "winograd_math"},
    "gpu": {"gpu", "pool_problem", "problem", "winograd_math"},
    "borrowing": {"arrays", "cpu", "gpu"},
    "losses": {"borrowing", "problem"},
    "algorithms": {"problem"},
    "measured": {"__init__", "algorithms", "environment", "problem"},  # __init__: for the version
    "grad_input": {"problem"},
    "plan": {"algorithms", "cpu", "environment", "gpu", "grad_input", "measured", "problem"},
    "lazy": set(),
    "ops": {"algorithms", "arrays", "lazy", "plan", "problem"},
    "transposed": {"ops", "problem"},
    "conv_grad": {"arrays", "borrowing", "ops", "plan", "problem"},
    "tune": {"algorithms", "arrays", "gpu", "measured", "ops", "plan", "problem"},
    "pool": {"arrays", "borrowing", "lazy", "pool_problem", "problem"},
    "pool_grad": {"arrays", "borrowing", "pool", "pool_problem", "problem"},
    "folding": {"arrays", "borrowing", "pool_problem", "problem"},
    "functional": {"arrays", "borrowing", "losses", "problem", "resizing"},
    "functional_grad": {"borrowing", "functional", "losses", "problem", "resizing"},
    "grad": {"conv_grad", "folding", "functional_grad", "pool_grad"},
    "torch": {"__init__", "arrays", "conv_grad", "pool_grad", "problem", "torch"},
    "__init__": {"folding", "functional", "grad", "ops", "pool", "problem", "reference", "torch"}
    | {"transposed", "tune"},
}
FOREIGN = {
    "numpy": set(ALLOWED),
    "numba": {"cpu"},
    "llvmlite": {"cpu"},
    "ml_dtypes": {"arrays", "gpu"},
    "cupy": {"gpu"},
    "torch": {"torch"},
    "dask": {"lazy"},
}
HEAVY = {"numba", "llvmlite", "cupy", "torch", "matplotlib", "ml_dtypes", "rich", "dask"}


def unit(module):
    """problem -> problem, cpu.direct -> cpu: the box of the picture in which a module lies."""
    return module.split(".")[0]


def imports_of(module):
    """The full name of every module that is imported anywhere in the source, in functions too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (own_name(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; the package writes them in full"
            for alias in node.names:
                inner = own_name(f"{node.module}.{alias.name}")
                yield inner if inner.removeprefix("fastconv.") in MODULES else own_name(node.module)


def own_name(name):
    return "fastconv.__init__" if name == "fastconv" else name


def split_imports(module):
    found = set(imports_of(module))
    own = {name.removeprefix("fastconv.") for name in found if name.startswith("fastconv.")}
    return own, {name.split(".")[0] for name in found if not name.startswith("fastconv.")}


def run(code):
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("module", sorted(MODULES))
class TestDirections:
    def test_package(self, module):
        own, _ = split_imports(module)
        strangers = {name for name in own if unit(name) not in ALLOWED[unit(module)]}
        assert not strangers, f"{module} may import {sorted(ALLOWED[unit(module)])} only"

    def test_other_packages(self, module):
        _, foreign = split_imports(module)
        others = foreign - set(sys.stdlib_module_names)
        assert all(unit(module) in FOREIGN.get(name, ()) for name in others), (
            f"{module} imports {sorted(others)}"
        )

    def test_no_circle(self, module):
        """Not even through a third module; the package itself, which every module may name, is no step."""
        reached, todo = set(), {module}
        while todo:
            own, _ = split_imports(todo.pop())
            own = {name for name in own if name != "__init__" and name in MODULES}
            assert module not in own, f"{module} reaches itself"
            todo |= own - reached
            reached |= own


def test_the_picture_names_what_exists():
    assert set(ALLOWED) == {unit(module) for module in MODULES}


def test_one_module_imports_cupy():
    assert [module for module in MODULES if "cupy" in split_imports(module)[1]] == ["gpu.cupy_driver"]


def test_a_forbidden_import_is_found(tmp_path, monkeypatch):
    """These tests can fail: an import inside a function, of a submodule, in either spelling."""
    for line in ("from fastconv.ops import conv2d", "import fastconv.plan", "from fastconv import plan"):
        path = tmp_path / "problem.py"
        path.write_text(f"def f():\n    {line}\n")
        monkeypatch.setitem(MODULES, "problem", path)
        with pytest.raises(AssertionError, match="problem may import"):
            TestDirections().test_package("problem")


class TestImport:
    def test_brings_nothing_heavy(self):
        loaded = set(run("import fastconv, sys; print(*sys.modules)"))
        assert not loaded & (HEAVY | {"numpy"})

    def test_operations_bring_numpy_only(self):
        loaded = set(run("from fastconv import *; import sys; print(*sys.modules)"))
        assert "numpy" in loaded
        assert not loaded & HEAVY

    def test_a_call_brings_no_framework(self):
        call = "x = np.ones((1, 1, 3)); fastconv.conv1d(x, x)"
        loaded = set(run(f"import sys, numpy as np, fastconv; {call}; print(*sys.modules)"))
        assert not loaded & {"torch", "cupy", "matplotlib", "ml_dtypes", "rich", "dask"}

    def test_public_names(self):
        names = {"__version__", "Conv1d", "Conv2d", "Conv3d", "ConvError", "algorithms"}
        names |= {"conv1d", "conv2d", "conv3d", "explain", "grad", "reference", "tune"}
        names |= {f"{pool}_pool{axes}d" for pool in ("avg", "max", "adaptive_avg") for axes in (1, 2, 3)}
        names |= {"adaptive_max_pool1d", "adaptive_max_pool2d", "max_unpool2d", "interpolate"}
        names |= {"fold", "unfold"}
        names |= {"relu", "relu6", "leaky_relu", "silu", "gelu", "sigmoid", "tanh", "softmax", "log_softmax"}
        names |= {"linear", "cross_entropy", "batch_norm", "local_response_norm", "dropout", "flatten"}
        names |= {f"conv_transpose{axes}d" for axes in (1, 2, 3)}
        assert set(fastconv.__all__) == names
        assert names <= set(dir(fastconv))
        assert all(getattr(fastconv, name) is not None for name in names)
        assert issubclass(fastconv.ConvError, ValueError)

    def test_help_of_the_gradients(self):
        """Lists them all: they are defined elsewhere, and help goes by __all__."""
        names = {name for name in dir(fastconv.grad) if not name.startswith("_")}
        assert set(fastconv.grad.__all__) == names
        assert all(getattr(fastconv.grad, name).__doc__ for name in names)
        assert {"conv2d_input", "conv3d_bias", "batch_norm", "unfold_input"} <= names

    def test_unknown_name(self):
        with pytest.raises(AttributeError, match="module 'fastconv' has no attribute 'conv4d'"):
            _ = fastconv.conv4d

    @pytest.mark.parametrize("name", ["tune", "algorithms"])
    @pytest.mark.parametrize(
        "first",
        [
            "import fastconv.{0}",
            "import fastconv; fastconv.{0}; import fastconv.{0}",
            "import fastconv.{0}, importlib, sys; importlib.reload(sys.modules['fastconv.{0}'])",
            "from fastconv.{0} import annotations",
            "import fastconv.ops, fastconv.plan",
        ],
    )
    def test_functions_that_share_a_name_with_a_module(self, name, first):
        """fastconv.tune is the function, in whatever order function and module are asked for."""
        check = f"print(type({name}).__name__, type(fastconv.{name}).__name__)"
        code = f"{first.format(name)}\nimport fastconv\nfrom fastconv import {name}\n{check}"
        assert run(code) == ["function", "function"]
