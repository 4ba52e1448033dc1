"""The addresses of a block's threads in shared memory enter; how often the slowest access is repeated leaves.

Shared memory serves 128 bytes at a time from 32 banks of 4 bytes: a warp at once where a thread takes 4
bytes, a half of it where a thread takes 8, a quarter where it takes 16. Words that lie in one bank are served
one after another, but one word goes to any number of threads at once.
"""

from __future__ import annotations

import numpy as np

from bench.kernels.occupancy import WARP

BANKS = 32
WORD = 4


def conflicts(addresses: np.ndarray, size: int) -> int:
    """Return how often the slowest group of threads is served; 1 without conflicts.

    addresses  bytes, one of each thread of a block, in its order
    size       bytes that every thread takes
    """
    together = min(WARP, BANKS * WORD // size)
    groups = [addresses[at : at + together] for at in range(0, len(addresses), together)]
    return max(_serve(group, size) for group in groups)


def _serve(addresses: np.ndarray, size: int) -> int:
    """Return how many words the busiest bank has to give."""
    taken = addresses[:, None] + np.arange(0, size, min(size, WORD))
    return int(np.bincount(np.unique(taken // WORD) % BANKS).max())
