"""The store keeps what it is given; whatever else lies in its place costs a warning and nothing more."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import fastconv
from fastconv import measured
from fastconv.algorithms import TABLE
from fastconv.problem import make_problem

DEVICE = "Test CPU @ 3.00GHz (four cores)"
PROBLEM = make_problem("conv2d", (1, 8, 14, 14), (16, 8, 3, 3), padding=1)
STRIDED = make_problem("conv2d", (1, 8, 14, 14), (16, 8, 3, 3), stride=2)
RECORD = {"algorithm": "direct", "tile": "6x4", "seconds": 0.25}


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """A store of the test's own."""
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def path(directory):
    """Where the records of DEVICE are, with the directory made."""
    directory.mkdir()
    return directory / measured.store(PROBLEM, DEVICE, RECORD).name


def content(**entries):
    return {"device": DEVICE, "version": fastconv.__version__, "measurements": entries}


def test_what_is_stored_is_found():
    assert measured.lookup(PROBLEM, DEVICE) is None
    path = measured.store(PROBLEM, DEVICE, RECORD)
    assert path.is_file()
    assert measured.lookup(PROBLEM, DEVICE) == RECORD
    assert measured.lookup(STRIDED, DEVICE) is None
    assert measured.lookup(PROBLEM, "another CPU") is None


def test_a_newer_record_replaces_the_older(path):
    newer = {"algorithm": "im2col", "tile": "8x3", "seconds": 0.125}
    measured.store(PROBLEM, DEVICE, newer)
    assert measured.lookup(PROBLEM, DEVICE) == newer


def test_the_caller_cannot_change_what_is_kept(path):
    measured.lookup(PROBLEM, DEVICE)["algorithm"] = "nonsense"
    assert measured.lookup(PROBLEM, DEVICE) == RECORD


def test_devices_have_files_of_their_own(path):
    similar = DEVICE.replace("@", "#")
    other = measured.store(PROBLEM, similar, {**RECORD, "seconds": 1.0})
    assert other != path
    assert measured.lookup(PROBLEM, DEVICE)["seconds"] == 0.25
    assert measured.lookup(PROBLEM, similar)["seconds"] == 1.0


def test_another_version_measures_anew(path, monkeypatch):
    monkeypatch.setattr(fastconv, "__version__", "999.0")
    assert measured.lookup(PROBLEM, DEVICE) is None
    assert measured.store(PROBLEM, DEVICE, RECORD) != path


def test_file_name_is_readable_and_safe():
    path = measured.store(PROBLEM, "../../a b/c\\d:e" + "x" * 300, RECORD)
    assert path.parent == measured.user_directory()
    assert path.name.startswith("a-b-c-d-exxx")
    assert len(path.name) < 120


def test_directory_is_chosen_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert measured.user_directory() == tmp_path / "store"
    monkeypatch.setenv("FASTCONV_CACHE", "")
    assert measured.user_directory() == tmp_path / "xdg" / "fastconv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert measured.user_directory() == tmp_path / "home" / ".cache" / "fastconv"


def test_no_home_is_a_warning(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FASTCONV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(UserWarning, match="no place for measurements: Could not determine home"):
        assert measured.lookup(PROBLEM, DEVICE) is None
    with pytest.warns(UserWarning, match="is not kept: Could not determine home"):
        assert measured.store(PROBLEM, DEVICE, RECORD) is None


def test_the_users_file_wins_over_the_shipped_one(path, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(measured, "shipped_directory", lambda: shipped)
    theirs = {**RECORD, "seconds": 8.0}
    (shipped / path.name).write_text(json.dumps(content(**{PROBLEM.key: theirs, STRIDED.key: theirs})))
    assert measured.lookup(PROBLEM, DEVICE) == RECORD
    assert measured.lookup(STRIDED, DEVICE) == theirs
    path.write_text("damaged")
    with pytest.warns(UserWarning, match="ignored"):
        assert measured.lookup(PROBLEM, DEVICE) == theirs


def test_unknown_fields_are_tolerated_and_kept(path):
    richer = {**RECORD, "threads": 2, "notes": ["quiet machine"]}
    path.write_text(json.dumps({**content(**{PROBLEM.key: richer}), "host": "somewhere"}))
    assert measured.lookup(PROBLEM, DEVICE) == richer
    measured.store(STRIDED, DEVICE, RECORD)
    assert measured.lookup(PROBLEM, DEVICE) == richer
    assert measured.lookup(STRIDED, DEVICE) == RECORD


def test_a_file_is_read_once_until_it_changes(path, monkeypatch):
    reads = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read_bytes(self))
    for _ in range(3):
        assert measured.lookup(PROBLEM, DEVICE) == RECORD
    assert len(reads) <= 1
    measured.store(STRIDED, DEVICE, RECORD)
    assert measured.lookup(STRIDED, DEVICE) == RECORD


DAMAGED = {
    "empty": b"",
    "half": b'{"device": "x", "measurem',
    "not text": bytes(range(256)),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "null": b"null",
    "a number": b"12",
    "a string": b'"measurements"',
    "a list": b"[1, 2]",
    "an object of something else": b'{"name": "a package", "scripts": {}}',
    "measurements null": b'{"measurements": null}',
    "measurements a list": json.dumps({**content(), "measurements": [RECORD]}).encode(),
    "no device": json.dumps(
        {"version": fastconv.__version__, "measurements": {PROBLEM.key: RECORD}}
    ).encode(),
    "another device": json.dumps({**content(**{PROBLEM.key: RECORD}), "device": "other"}).encode(),
    "another version": json.dumps({**content(**{PROBLEM.key: RECORD}), "version": "0.0"}).encode(),
    "version a number": json.dumps({**content(**{PROBLEM.key: RECORD}), "version": 1}).encode(),
    "nested without end": b"[" * 100_000,
    "nested objects": b'{"measurements":' * 50_000,
    "an endless number": b"1" * 100_000,
}


@pytest.mark.parametrize("raw", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_a_warning(path, raw):
    path.write_bytes(raw)
    with pytest.warns(UserWarning, match="measurements in .* are ignored") as caught:
        assert measured.lookup(PROBLEM, DEVICE) is None
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 600


@pytest.mark.parametrize("raw", DAMAGED.values(), ids=DAMAGED)
def test_storing_heals_a_damaged_file(path, raw):
    path.write_bytes(raw)
    with pytest.warns(UserWarning, match="are ignored"):
        assert measured.store(STRIDED, DEVICE, RECORD) == path
    assert measured.lookup(STRIDED, DEVICE) == RECORD
    assert measured.lookup(PROBLEM, DEVICE) is None


INVALID = {
    "an entry must be an object, got list": ["direct", "6x4", 0.25],
    "an entry must be an object, got NoneType": None,
    "an entry must be an object, got str": "direct",
    "algorithm must be one of .*direct.*, got 'fft'": {**RECORD, "algorithm": "fft"},
    "algorithm must be one of .*, got None": {"tile": "6x4", "seconds": 0.25},
    "algorithm must be one of .*, got 7": {**RECORD, "algorithm": 7},
    r"algorithm must be one of .*, got \['direct'\]": {**RECORD, "algorithm": ["direct"]},
    "tile must be a string, got None": {**RECORD, "tile": None},
    r"tile must be a string, got \[6, 4\]": {**RECORD, "tile": [6, 4]},
    "seconds must be a positive finite number, got 0": {**RECORD, "seconds": 0},
    "seconds must be a positive finite number, got -1": {**RECORD, "seconds": -1},
    "seconds must be a positive finite number, got nan": {**RECORD, "seconds": float("nan")},
    "seconds must be a positive finite number, got inf": {**RECORD, "seconds": float("inf")},
    "seconds must be a positive finite number, got True": {**RECORD, "seconds": True},
    "seconds must be a positive finite number, got '0.25'": {**RECORD, "seconds": "0.25"},
    "seconds must be a positive finite number, got None": {"algorithm": "direct", "tile": "6x4"},
    "seconds must be a positive finite number, got 1000": {**RECORD, "seconds": 10**400},
}


@pytest.mark.parametrize(("reason", "entry"), INVALID.items())
def test_an_invalid_entry_is_a_warning_and_spares_the_others(path, reason, entry):
    path.write_text(json.dumps(content(**{PROBLEM.key: entry, STRIDED.key: RECORD})))
    with pytest.warns(UserWarning, match=f"1 of 2 entries, the first '.*': {reason}"):
        assert measured.lookup(PROBLEM, DEVICE) is None
    assert measured.lookup(STRIDED, DEVICE) == RECORD


def test_many_invalid_entries_are_one_warning(path):
    path.write_text(json.dumps(content(**{f"key {i}" * 50: {"algorithm": "x" * 10_000} for i in range(500)})))
    with pytest.warns(UserWarning, match="500 of 500 entries") as caught:
        assert measured.lookup(PROBLEM, DEVICE) is None
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 600


def test_an_algorithm_that_cannot_run_the_problem_is_not_returned(path):
    name = next(name for name, algorithm in TABLE.items() if algorithm.refuses(STRIDED) is not None)
    measured.store(STRIDED, DEVICE, {**RECORD, "algorithm": name})
    with pytest.warns(UserWarning, match=f"'{name}' cannot run {STRIDED.key}: "):
        assert measured.lookup(STRIDED, DEVICE) is None


def test_a_huge_file_is_not_read(path):
    os.truncate(path, measured.LARGEST_FILE + 1)
    with pytest.warns(UserWarning, match="it has 16777217 bytes, more than 16777216"):
        assert measured.lookup(PROBLEM, DEVICE) is None


def test_a_directory_in_its_place_is_a_warning(path):
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="it is not a file"):
        assert measured.lookup(PROBLEM, DEVICE) is None
    with pytest.warns(UserWarning, match="it is not a file|is not kept") as caught:
        assert measured.store(PROBLEM, DEVICE, RECORD) is None
    assert "is not kept" in str(caught[-1].message)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_its_place_does_not_block(path):
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(UserWarning, match="it is not a file"):
        assert measured.lookup(PROBLEM, DEVICE) is None


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_directory_that_cannot_be_is_a_warning(tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / name))
    with pytest.warns(UserWarning, match="are ignored: .*Not a directory") as caught:
        assert measured.lookup(PROBLEM, DEVICE) is None
    assert [warning.filename for warning in caught] == [__file__]  # the caller's, not measured.py
    with pytest.warns(UserWarning, match="are ignored|is not kept") as caught:
        assert measured.store(PROBLEM, DEVICE, RECORD) is None
    assert "is not kept" in str(caught[-1].message)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match=f"{STRIDED.key} is not kept: .*No space left"):
        assert measured.store(STRIDED, DEVICE, RECORD) is None
    assert list(path.parent.iterdir()) == [path]
    assert measured.lookup(PROBLEM, DEVICE) == RECORD


WRITER = """
import sys
from fastconv import measured
from fastconv.problem import make_problem
device, first = sys.argv[1], int(sys.argv[2])
for size in range(first, first + 40):
    problem = make_problem("conv2d", (1, 8, size, size), (16, 8, 3, 3))
    measured.store(problem, device, {"algorithm": "direct", "tile": "6x4", "seconds": float(size)})
"""


def test_two_processes_that_write_do_not_lose_the_file():
    commands = [[sys.executable, "-W", "error", "-c", WRITER, DEVICE, first] for first in ("100", "200")]
    writers = [subprocess.Popen(command) for command in commands]
    last = [make_problem("conv2d", (1, 8, size, size), (16, 8, 3, 3)) for size in (139, 239)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a reader never sees half a file
        while any(writer.poll() is None for writer in writers):
            measured.lookup(last[0], DEVICE)
        assert [writer.returncode for writer in writers] == [0, 0]
        found = [measured.lookup(problem, DEVICE) for problem in last]
    assert any(found)
    assert len(list(measured.user_directory().iterdir())) == 1
