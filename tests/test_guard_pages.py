"""No kernel reads or writes beside its arrays or its own memory: a page there would end the process."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastconv.algorithms import TABLE

ROOT = Path(__file__).parent.parent
SMALL = 64 << 10  # bytes
LIES = ["x", "w", "bias", "residual", "out", "workspace"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with Linux's mprotect")


def run_guarded(*arguments):
    """Run the guarded program; memory from malloc holds garbage, never the zeros of a fresh page."""
    environment = {**os.environ, "MALLOC_PERTURB_": "90", "FASTCONV_THREADS": "1"}
    command = [sys.executable, "-m", "tests.guard_pages", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def failure(done):
    """What ran last and why it ended."""
    return f"exit status {done.returncode} at: {done.stdout[-300:]}\n{done.stderr[:2000]}"


@pytest.mark.parametrize("algorithm", TABLE)
def test_arrays(algorithm):
    done = run_guarded(algorithm)
    assert done.returncode == 0, failure(done)
    assert "\n0 allocations, 0 not given back\n" in done.stdout


@pytest.mark.parametrize("algorithm", TABLE)
def test_arrays_of_the_gradient_of_the_weight(algorithm):
    done = run_guarded(algorithm, "--gradients")
    assert done.returncode == 0, failure(done)
    assert f"{algorithm} " in done.stdout


@pytest.mark.parametrize("algorithm", TABLE)
def test_workspace(algorithm):
    """It is freed, and is what the plan states, but for some lines and tiles of each thread."""
    done = run_guarded(algorithm, "--workspace")
    assert done.returncode == 0, failure(done)
    last = done.stdout[-300:]
    count, kept = re.search(r"\n(\d+) allocations, (\d+) not given back\n", last).groups()
    excess, where = re.search(r"\n(\d+) bytes more than the plan states \((.*)\)\n", last).groups()
    assert int(count) > 100, "the kernels allocate elsewhere"
    assert int(kept) == 0
    assert int(excess) <= SMALL, f"{excess} bytes more than stated: {where}"


@pytest.mark.parametrize("name", LIES)
def test_an_access_beside_an_array_is_noticed(name):
    """The same program, with an array one element beside where it says it is, or too small a memory."""
    done = run_guarded("direct", "--lie", name)
    assert done.returncode == -signal.SIGSEGV, failure(done)
