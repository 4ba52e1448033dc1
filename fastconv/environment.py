"""What the user sets in the environment: variables FASTCONV_<name>, which count from the next call on."""

from __future__ import annotations

import os
from typing import Any

_NAMES = ("ALGO", "WORKSPACE", "THREADS", "VECTOR_BITS", "CACHE")
# The dictionary behind os.environ, where there is one: os.environ.get takes 0.6 us for each name.
_data: Any = getattr(os.environ, "_data", os.environ)
_keys = {name: f"FASTCONV_{name}" for name in _NAMES}
if _data is not os.environ:
    _keys = {name: os.environ.encodekey(key) for name, key in _keys.items()}


def read(name: str) -> str:
    """Return the value of a variable, "" where it is not set."""
    value = _data.get(_keys[name])
    return "" if value is None else os.fsdecode(value)


def read_all() -> tuple[Any, ...]:
    """Return the values of all variables in one form, to compare and to hash."""
    return tuple(map(_data.get, _keys.values()))
