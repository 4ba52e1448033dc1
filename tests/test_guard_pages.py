"""No kernel reads or writes beside its arrays or its own memory: a page there would end the process."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def guarded():
    """A function that returns a finished run; the runs of all tests begin here, as many at once as cores."""
    pool = ThreadPoolExecutor(os.cpu_count())
    arguments = [(name, *mode) for mode in ((), ("--workspace",)) for name in TABLE]
    arguments += [("direct", "--lie", name) for name in LIES]
    runs = {key: pool.submit(run_guarded, *key) for key in arguments}
    yield lambda *key: runs[key].result()
    pool.shutdown(cancel_futures=True)


def failure(done):
    """What ran last and why it ended."""
    return f"exit status {done.returncode} at: {done.stdout[-300:]}\n{done.stderr[:2000]}"


@pytest.mark.parametrize("algorithm", TABLE)
def test_arrays(algorithm, guarded):
    done = guarded(algorithm)
    assert done.returncode == 0, failure(done)
    assert "\n0 allocations, 0 not given back\n" in done.stdout


@pytest.mark.parametrize("algorithm", TABLE)
def test_workspace(algorithm, guarded):
    """It is freed, and is what the plan states, but for some lines and tiles of each thread."""
    done = guarded(algorithm, "--workspace")
    assert done.returncode == 0, failure(done)
    count, kept = map(
        int, re.search(r"^(\d+) allocations, (\d+) not given back$", done.stdout, re.M).groups()
    )
    assert count > 100, "the kernels allocate elsewhere"
    assert kept == 0
    excess, where = re.search(r"^(\d+) bytes more than the plan states \((.*)\)$", done.stdout, re.M).groups()
    assert int(excess) <= SMALL, f"{excess} bytes more than stated: {where}"


@pytest.mark.parametrize("name", LIES)
def test_an_access_beside_an_array_is_noticed(name, guarded):
    """The same program, with an array one element beside where it says it is, or memory that is too small."""
    done = guarded("direct", "--lie", name)
    assert done.returncode == -signal.SIGSEGV, failure(done)
