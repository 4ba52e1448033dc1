"""Settings and fixtures of all tests: a reproducible random generator, and a store that is not the user's."""

import os
import tempfile
import zlib

import hypothesis
import numpy as np
import pytest

# The first call of a kernel compiles it, which no deadline per example allows for.
hypothesis.settings.register_profile(
    "fastconv", deadline=None, derandomize=True, max_examples=60, print_blob=True
)
hypothesis.settings.load_profile("fastconv")

_store = tempfile.TemporaryDirectory(prefix="fastconv-tests-")


def pytest_configure(config):
    """Keep the user's measurements out of the tests, and the tests' out of the user's store."""
    os.environ["FASTCONV_CACHE"] = _store.name


def pytest_unconfigure(config):
    _store.cleanup()


@pytest.fixture
def rng(request):
    """A generator seeded by the name of the test: the same numbers in every run, others in every case."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
