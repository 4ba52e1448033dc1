"""The matrices of Winograd's minimal filtering F(m, k), exact, from which both backends take their constants.

A tile of m outputs of a filter g of k taps over m + k - 1 inputs d is  A^T [(G g) * (B^T d)]  with m + k - 1
multiplications instead of k m; in two dimensions  A^T [(G g G^T) * (B^T d B)] A. Construction by Toom-Cook
interpolation at a few points and infinity (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308).

The points decide how far rounding errors grow (Barabasz et al. 2018, arXiv:1803.10986). Among pairs +-p, +-q
of eighths, 5/8 and 3/2 have about the smallest error of F(4 x 4, 3 x 3): half that of 1 and 2. With eighths
A^T and B^T are exact in floats.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

Matrix = tuple[tuple[Fraction, ...], ...]

# inputs of a tile -> the points besides infinity; F(1, 1) stands for an axis that is not transformed
POINTS = {
    1: "",
    3: "0 1",
    4: "0 1 -1",
    5: "0 1/2 -1 2",
    6: "0 5/8 -5/8 3/2 -3/2",
    7: "0 5/8 -5/8 1 -1 2",
    8: "0 1 -1 2 -2 1/2 -1/2",
}


class Matrices(NamedTuple):
    """A^T (m, m+k-1), G (m+k-1, k) and B^T (m+k-1, m+k-1)."""

    AT: Matrix
    G: Matrix
    BT: Matrix


@lru_cache(maxsize=16)
def matrices(m: int, taps: int = 3) -> Matrices:
    """Return the matrices of F(m, taps); raise ValueError for a number of inputs without points.

    >>> matrices(2).BT[0] == (1, 0, -1, 0)
    True
    """
    a = m + taps - 1
    if a not in POINTS:
        raise ValueError(f"F({m}, {taps}) must have one of {', '.join(map(str, POINTS))} inputs, got {a}")
    points = [Fraction(p) for p in POINTS[a].split()]
    AT = tuple(tuple(p**i for p in points) + (Fraction(int(i == m - 1)),) for i in range(m))
    G = [tuple(p**i / _others(points, p) for i in range(taps)) for p in points]
    BT = [_polynomial([q for q in points if q != p], a) for p in points]
    infinity = (Fraction(0),) * (taps - 1) + (Fraction(1),)
    raw = Matrices(AT, (*G, infinity), (*BT, _polynomial(points, a)))
    return _positive_first(raw)


def _others(points: list[Fraction], p: Fraction) -> Fraction:
    """Return the product of p's distances to the other points."""
    product = Fraction(1)
    for q in points:
        if q != p:
            product *= p - q
    return product


def _polynomial(roots: list[Fraction], length: int) -> tuple[Fraction, ...]:
    """Return the coefficients of the monic polynomial with these roots, lowest power first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        scaled = [*(-root * c for c in coefficients), Fraction(0)]
        coefficients = [s + t for s, t in zip(shifted, scaled, strict=True)]
    return (*coefficients, *[Fraction(0)] * (length - len(coefficients)))


def _positive_first(raw: Matrices) -> Matrices:
    """Move the sign of each row of B^T to G, so that fewer transforms begin with a negation."""
    signs = [1 if next(c for c in row if c) > 0 else -1 for row in raw.BT]
    G = tuple(tuple(s * c for c in row) for s, row in zip(signs, raw.G, strict=True))
    BT = tuple(tuple(s * c for c in row) for s, row in zip(signs, raw.BT, strict=True))
    return Matrices(raw.AT, G, BT)
