"""What a user installs: the wheel and the source archive, built here from a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import fastconv
from fastconv.algorithms import TABLE

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "results", "*.egg-info")
# Stand in for kernels, so that shipping them is tested before there are any.
PROBES = ("probe.cu", "probe.cuh")


def _build(source: Path, hook: str, target: Path) -> Path:
    """The archive that setuptools' build hook makes of a source tree, without a network or pip."""
    call = f"from setuptools import build_meta; print(build_meta.{hook}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", call], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.splitlines()[-1]


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    for name in PROBES:
        (copy / "kernels" / name).write_text("// a kernel\n")
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(checkout, "build_sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("unpacked")
    subprocess.run([sys.executable, "-m", "tarfile", "-e", str(sdist), str(target)], check=True)
    return target / f"fastconv-{fastconv.__version__}"


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the source archive, so that a file missing there is missing here."""
    return zipfile.ZipFile(_build(unpacked, "build_wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(wheel.read(f"fastconv-{fastconv.__version__}.dist-info/METADATA").decode())


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "fastconv"
    wanted = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (package / "data").glob("*.json")}
    wanted |= {"fastconv/py.typed"} | {f"fastconv/kernels/{name}" for name in PROBES}
    wanted |= {f"fastconv/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.cu*")}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == wanted


def test_wheel_works_away_from_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import fastconv; print(fastconv.__file__); print(fastconv.__version__)"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "fastconv" / "__init__.py"), fastconv.__version__]


def test_source_archive_can_be_tested_and_linted(unpacked: Path, checkout: Path) -> None:
    for folder in ("fastconv", "bench", "tests"):
        assert _files(unpacked / folder) == _files(checkout / folder)
    for name in ("Makefile", "pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md"):
        assert (unpacked / name).is_file(), name


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "fastconv"
    assert metadata["Version"] == fastconv.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    extras = {"bench", "cuda12", "cuda13", "dask", "lint", "test", "torch"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_run_time_needs_are_three_packages(metadata: Message) -> None:
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    names = {re.split(r"[<>=]", need)[0].replace("-", "_") for need in needs}
    assert names == {"ml_dtypes", "numba", "numpy"}


def test_tools_are_pinned_in_one_place() -> None:
    pins = re.compile(r"\b(?:ruff|mypy)\s*==|\brev:")
    files = (ROOT / name for name in ("pyproject.toml", "Makefile", ".pre-commit-config.yaml", ".ci/run"))
    assert [path.name for path in files if path.exists() and pins.search(path.read_text())] == []
    assert len(pins.findall((ROOT / "setup.py").read_text())) == 2


def test_readme_names_every_algorithm() -> None:
    rows = re.findall(r"^\| `([a-z0-9]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(TABLE)


def test_readme_names_every_variable() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "fastconv").rglob("*.py"))
    named = re.findall(r"^\| `(FASTCONV_[A-Z_]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert set(named) == set(re.findall(r"FASTCONV_[A-Z_]+", source))


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    scope: dict[str, object] = {}
    exec(compile(example.group(1), "README.md", "exec"), scope)
    assert scope["y"].shape == (1, 128, 56, 56)  # type: ignore[attr-defined]
    assert "winograd" in capsys.readouterr().out
