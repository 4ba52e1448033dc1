"""Settings and fixtures of all tests: a reproducible random generator, and a store that is not the user's."""

import os
import sys
import tempfile
import zlib

import numpy as np
import pytest

_store = tempfile.TemporaryDirectory(prefix="fastconv-tests-")


def pytest_configure(config):
    """Keep the user's measurements out of the tests, and the tests' out of the user's store."""
    os.environ["FASTCONV_CACHE"] = _store.name


def pytest_unconfigure(config):
    _store.cleanup()


def pytest_collection_modifyitems(items):
    """The emulator needs Linux: it names the parts of an ELF file."""
    if not sys.platform.startswith("linux"):
        skip = pytest.mark.skip(reason="the emulator of a GPU needs Linux")
        for item in items:
            if item.get_closest_marker("emulator"):
                item.add_marker(skip)


@pytest.fixture
def way(request):
    """The way of a parametrized test, whose backend runs meanwhile."""
    with request.param.backend.running():
        yield request.param


@pytest.fixture
def place(request, monkeypatch):
    """Where a parametrized test computes, which lasts as long as the test; see tests/places.py."""
    from tests.places import entering

    with entering(request.param, monkeypatch) as place:
        yield place


@pytest.fixture
def rng(request):
    """A generator seeded by the name of the test: the same numbers in every run, others in every case."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
