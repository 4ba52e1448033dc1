"""The matrices of F(m, k) are right for all inputs: proved in whole fractions, on a basis."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from fastconv.winograd_math import matrices

# Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", section 4.1: B^T, G, A^T of F(2, 3).
PUBLISHED = (
    """1 0 -1 0;  0 1 1 0;  0 -1 1 0;  0 1 0 -1""",
    """1 0 0;  1/2 1/2 1/2;  1/2 -1/2 1/2;  0 0 1""",
    """1 1 1 0;  0 1 -1 -1""",
)

every_m = pytest.mark.parametrize("m", [2, 4])
every_pair = pytest.mark.parametrize(("m", "taps"), list(product((2, 4), (2, 3, 4, 5))))


def parse(text):
    return np.array([[Fraction(entry) for entry in row.split()] for row in text.split(";")], dtype=object)


def arrays(m, taps=3):
    """A^T, G and B^T as arrays of fractions, on which @ and * are exact."""
    return (np.array(matrix, dtype=object) for matrix in matrices(m, taps))


def basis(*shape):
    for index in product(*map(range, shape)):
        e = np.full(shape, Fraction(0), dtype=object)
        e[index] = Fraction(1)
        yield e


def fir(d, g):
    """The correlation of a signal or an image with a filter, by its definition."""
    windows = np.lib.stride_tricks.sliding_window_view(d, g.shape)
    return (windows * g).sum(axis=tuple(range(d.ndim, 2 * d.ndim)))


@every_pair
class TestIdentity:
    """Both sides are linear in d and in g, so equality on a basis of each is equality everywhere."""

    def test_one_dimension(self, m, taps):
        AT, G, BT = arrays(m, taps)
        for g, d in product(basis(taps), basis(m + taps - 1)):
            assert np.array_equal(AT @ ((G @ g) * (BT @ d)), fir(d, g))

    def test_two_dimensions(self, m, taps):
        AT, G, BT = arrays(m, taps)
        images = [(d, BT @ d @ BT.T) for d in basis(m + taps - 1, m + taps - 1)]
        for g in basis(taps, taps):
            U = G @ g @ G.T
            for d, V in images:
                assert np.array_equal(AT @ (U * V) @ AT.T, fir(d, g))

    @pytest.mark.parametrize("name", ["AT", "G", "BT"])
    def test_no_entry_may_be_changed(self, m, taps, name, monkeypatch):
        """The proof fails for any other matrix: each entry in turn changes its sign, or stops being 0."""
        right = getattr(matrices(m, taps), name)
        for i, j in product(range(len(right)), range(len(right[0]))):
            wrong = [list(row) for row in right]
            wrong[i][j] = -right[i][j] or Fraction(1)
            changed = matrices(m, taps)._replace(**{name: tuple(map(tuple, wrong))})
            monkeypatch.setitem(globals(), "matrices", lambda m, taps, changed=changed: changed)
            with pytest.raises(AssertionError):
                self.test_one_dimension(m, taps)


def test_published():
    """Product e is A^T's column times G's row times B^T's row: a sign may stand in any two of them."""
    AT, G, BT = arrays(2)
    paper_BT, paper_G, paper_AT = map(parse, PUBLISHED)
    assert (paper_BT.shape, paper_G.shape, paper_AT.shape) == (BT.shape, G.shape, AT.shape)
    for e in range(4):
        signs = [
            sign(BT[e], paper_BT[e]), sign(G[e], paper_G[e]), sign(AT[:, e], paper_AT[:, e])
        ]  # fmt: skip
        assert signs[0] * signs[1] * signs[2] == 1


@every_m
class TestMatrices:
    def test_first_in_a_row_of_BT_is_positive(self, m):
        """Then no transform of an input begins with a negation."""
        for row in matrices(m).BT:
            assert next(entry for entry in row if entry) > 0

    def test_fractions(self, m):
        for matrix in matrices(m):
            assert all(type(entry) is Fraction for row in matrix for entry in row)

    def test_input_and_output_transforms_are_exact(self, m):
        """Whole numbers in F(2), 512ths in F(4), which floats hold; only the filter's are rounded in F(4)."""
        AT, G, BT = matrices(m)
        denominators = {entry.denominator for matrix in (AT, BT) for row in matrix for entry in row}
        assert max(denominators) == {2: 1, 4: 512}[m]
        assert denominators <= {2**i for i in range(10)}
        assert max(entry.denominator for row in G for entry in row) == {2: 2, 4: 2975}[m]

    def test_multiplications(self, m):
        """What it is all for: m + 2 products instead of 3 m, squared in two dimensions."""
        AT, G, BT = matrices(m)
        assert (len(AT), len(AT[0])) == (m, m + 2)
        assert (len(G), len(G[0])) == (m + 2, 3)
        assert (len(BT), len(BT[0])) == (m + 2, m + 2)


@pytest.mark.parametrize(("m", "taps"), [(2, 2), (4, 2), (2, 4), (4, 4)])
def test_a_missing_tap_leaves_a_place_out(m, taps):
    """A phase with one tap less is multiplied in one place less: infinity holds the last tap alone."""
    *others, infinity = matrices(m, taps).G
    assert tuple(map(abs, infinity)) == (*[0] * (taps - 1), 1)
    assert all(row[0] for row in others)
    exact = {entry.denominator for matrix in matrices(m, taps)[::2] for row in matrix for entry in row}
    assert exact <= {2**i for i in range(12)}, "floats hold B^T and A^T"


def test_one_tap_is_not_transformed():
    assert matrices(1, 1) == (((1,),),) * 3


def test_no_points():
    with pytest.raises(ValueError, match=r"^F\(4, 6\) must have one of 1, 3, 4, 5, 6, 7, 8 inputs, got 9$"):
        matrices(4, 6)


def sign(ours, published):
    """1 or -1, by which the published row must be multiplied."""
    factor = next(s for s in (1, -1, None) if s is None or np.array_equal(ours, s * published))
    assert factor is not None, f"{ours} is not {published} up to its sign"
    return factor


def test_whole_numbers_stay_exact_in_float32():
    """F(2): with integers in [-4, 4] all intermediates of 3200 channels are quarters below 2**22."""
    AT, G, BT = (np.abs(matrix) for matrix in arrays(2))
    largest_U, largest_V = 4 * G.sum(axis=1).max() ** 2, 4 * BT.sum(axis=1).max() ** 2
    assert (largest_U, largest_V) == (9, 16)
    assert {Fraction(a * b).denominator for a, b in product(G.ravel(), repeat=2)} == {1, 2, 4}
    assert 3200 * largest_U * largest_V * AT.sum(axis=1).max() ** 2 < 2**22
