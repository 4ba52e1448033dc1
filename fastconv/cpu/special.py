"""Functions of one number that NumPy lacks."""

from __future__ import annotations

import math
from typing import Any

import numba


def _erf(x: Any) -> Any:
    return math.erf(x)


try:
    erf = numba.vectorize(cache=True)(_erf)
except RuntimeError:  # Numba found no folder that it may write to
    erf = numba.vectorize()(_erf)
