"""A problem and a device enter, what was measured fastest there leaves; records enter, a JSON file leaves.

One file per device and version of fastconv. The user's file wins over the one that ships with the package. A
file that cannot be read or written costs a warning and then counts as absent: it never stops a convolution.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypedDict

import fastconv
from fastconv import environment
from fastconv.algorithms import TABLE
from fastconv.problem import ConvProblem

LARGEST_FILE = 16 << 20
"""Bytes; some 100,000 measurements. A larger file is not one of ours."""


class Record(TypedDict):
    """The fastest of what was measured for one problem; seconds per call."""

    algorithm: str
    tile: str
    seconds: float


class _Stamp(NamedTuple):
    """What changes when a file is written; the content is read once per stamp."""

    inode: int
    size: int
    modified: int


def lookup(problem: ConvProblem, device: str) -> Record | None:
    """Return what was measured fastest for the problem on the device, or None; never raises.

    `device` is the name under which it was stored. Nothing is returned that cannot run the problem.
    """
    for path in _files(device):
        record = _read(path, device).get(problem.key)
        if record is not None:
            reason = TABLE[record["algorithm"]].refuses(problem)
            if reason is None:
                return record.copy()
            _ignore(path, f"{record['algorithm']!r} cannot run {problem.key}: {reason}")
    return None


def store(problem: ConvProblem, device: str, record: Record) -> Path | None:
    """Remember the record in the user's file and return its path; where that is impossible warn, return None.

    The file is read again, then replaced as a whole: who reads it sees the old or the new one, never half. Of
    two processes that store at the same moment one may lose its newest record, not the file.
    """
    try:
        path = user_directory() / _file_name(device)
        entries = {**_read(path, device), problem.key: record}
        content = {"device": device, "version": fastconv.__version__, "measurements": entries}
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
    except (OSError, RuntimeError) as error:
        _warn(f"the measurement of {problem.key} is not kept: {error}")
        return None
    return path


def user_directory() -> Path:
    """Return the directory of the user's files: $FASTCONV_CACHE, else fastconv in the user's cache directory.

    Raises RuntimeError where neither an environment variable nor the system names a home.
    """
    if chosen := environment.read("CACHE"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fastconv"


def shipped_directory() -> Path:
    """Return the directory of the files that come with the package."""
    return Path(__file__).parent / "data"


def _files(device: str) -> Iterator[Path]:
    name = _file_name(device)
    try:
        yield user_directory() / name
    except RuntimeError as error:
        _warn(f"there is no place for measurements: {error}")
    yield shipped_directory() / name


def _file_name(device: str) -> str:
    """Device and version, readable; the digest keeps apart what the readable part does not."""
    readable = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")[:60]
    digest = hashlib.sha256(device.encode()).hexdigest()[:8]
    return f"{readable}-{digest}-{fastconv.__version__}.json"


def _read(path: Path, device: str) -> dict[str, Record]:
    """The valid entries of a file, by problem key; none if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return {}
    except OSError as error:
        _ignore(path, str(error))
        return {}
    if not stat.S_ISREG(status.st_mode):
        _ignore(path, "it is not a file")
        return {}
    return _parse(path, device, _Stamp(status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=16)
def _parse(path: Path, device: str, stamp: _Stamp) -> dict[str, Record]:
    if stamp.size > LARGEST_FILE:
        _ignore(path, f"it has {stamp.size} bytes, more than {LARGEST_FILE}")
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number too long
        _ignore(path, str(error))
        return {}
    reason = _why_foreign(content, device)
    if reason is not None:
        _ignore(path, reason)
        return {}
    entries: dict[str, Any] = content["measurements"]
    invalid = {key: reason for key, entry in entries.items() if (reason := _why_invalid(entry)) is not None}
    if invalid:
        key, reason = next(iter(invalid.items()))
        _ignore(path, f"{len(invalid)} of {len(entries)} entries, the first {reprlib.repr(key)}: {reason}")
    return {key: entry for key, entry in entries.items() if key not in invalid}


def _why_foreign(content: Any, device: str) -> str | None:
    if not isinstance(content, dict) or not isinstance(content.get("measurements"), dict):
        return "it holds no measurements"
    for name, expected in (("device", device), ("version", fastconv.__version__)):
        if content.get(name) != expected:
            return f"its {name} must be {expected!r}, got {reprlib.repr(content.get(name))}"
    return None


def _why_invalid(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"an entry must be an object, got {type(entry).__name__}"
    algorithm, tile, seconds = (entry.get(name) for name in Record.__annotations__)
    if not isinstance(algorithm, str) or algorithm not in TABLE:
        return f"algorithm must be one of {', '.join(TABLE)}, got {reprlib.repr(algorithm)}"
    if not isinstance(tile, str):
        return f"tile must be a string, got {reprlib.repr(tile)}"
    if not _is_duration(seconds):
        return f"seconds must be a positive finite number, got {reprlib.repr(seconds)}"
    return None


def _is_duration(seconds: Any) -> bool:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        return False
    try:
        return math.isfinite(seconds) and seconds > 0
    except OverflowError:  # an int beyond every float
        return False


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _ignore(path: Path, reason: str) -> None:
    _warn(f"measurements in {path} are ignored: {reason}")


def _warn(text: str) -> None:
    """Warn of the caller's line, the first one outside of this package: it may lie many calls above."""
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("fastconv."):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"fastconv: {text}", stacklevel=level)
