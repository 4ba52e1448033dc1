"""No kernel reads or writes beside its arrays or its own memory: a page there would end the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastconv.algorithms import TABLE

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with Linux's mprotect")


def run_guarded(*arguments):
    """Run the guarded program; memory from malloc holds garbage, never the zeros of a fresh page."""
    environment = {**os.environ, "MALLOC_PERTURB_": "90", "FASTCONV_THREADS": "1"}
    command = [sys.executable, "-m", "tests.guard_pages", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def failure(done):
    """What ran last and why it ended."""
    return f"exit status {done.returncode} at: {done.stdout[-300:]}\n{done.stderr[:2000]}"


@pytest.mark.parametrize("algorithm", TABLE)
def test_arrays(algorithm):
    done = run_guarded(algorithm)
    assert done.returncode == 0, failure(done)
    assert "finished; 0 allocations" in done.stdout


@pytest.mark.parametrize("algorithm", TABLE)
def test_workspace(algorithm):
    done = run_guarded(algorithm, "--workspace")
    assert done.returncode == 0, failure(done)
    assert "finished; 0 allocations" not in done.stdout, "the kernels did not allocate here"
    assert "finished; " in done.stdout
    assert done.stdout.endswith(" 0 not given back\n")


@pytest.mark.parametrize("name", ["x", "w", "bias", "residual", "out", "workspace"])
def test_an_access_beside_an_array_is_noticed(name):
    """The same program, with an array that lies one element beside where it says, or memory that is too small."""
    done = run_guarded("direct", "--lie", name)
    assert done.returncode == -signal.SIGSEGV, failure(done)
