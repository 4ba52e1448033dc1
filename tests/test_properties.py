"""What holds for every convolution, for problems that Hypothesis draws, with every algorithm by name.

Numbers are small integers, on which an algorithm that "highest" admits is exact: identities hold bit for bit.
"""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastconv
from fastconv.algorithms import TABLE
from fastconv.plan import possible_plans
from fastconv.problem import make_problem
from tests.cases import operands, options_of
from tests.compare import assert_exact, integers, normals
from tests.kernels import DTYPES, ORDERS, in_order, make_layer, with_caches
from tests.strategies import problems

any_problem = st.tuples(st.sampled_from(DTYPES), st.sampled_from(ORDERS)).flatmap(
    lambda kind: problems(dtype=kind[0], order=kind[1])
)
exact_problem = problems(precision="highest")
seeds = st.integers(0, 2**32 - 1)


class TestReference:
    @settings(max_examples=200)
    @given(any_problem, seeds, st.data())
    def test_any_plan(self, problem, seed, data):
        """Any problem with every algorithm, any tile and cache sizes, all or some of the operands."""
        rng = np.random.default_rng(seed)
        fill = data.draw(st.sampled_from((integers, normals)), label="fill")
        absent = data.draw(st.sets(st.sampled_from(("bias", "residual", "activation"))), label="absent")
        layer = make_layer(rng, problem, fill).with_array(**dict.fromkeys(absent))
        l1, l2 = (data.draw(st.sampled_from((1 << 9, 1 << 13, 1 << 19)), label=name) for name in ("l1", "l2"))
        for name in TABLE if problem.N > 0 else ():
            plans = possible_plans(problem, name)
            if plans:
                plan = with_caches(plans[rng.integers(len(plans))], l1, l2)
                layer.check(plan, prepared=data.draw(st.booleans(), label="prepared"))


class Convolution:
    """The operation of a problem under an algorithm's name."""

    def __init__(self, algorithm, problem):
        self.algorithm, self.problem = algorithm, problem

    def __call__(self, x, w, bias=None, op=None, **changes):
        options = {**options_of(self.problem), "precision": "highest", "algo": self.algorithm, **changes}
        return getattr(fastconv, op or self.problem.op)(x, w, bias, **options)


def convolutions(problem, **changes):
    """One under the name of every algorithm that takes the problem, and takes it with the changes too."""
    shapes = problem.op, problem.input_shape, problem.weight_shape
    options = {**options_of(problem), "precision": "highest"}
    calls = make_problem(*shapes, **options), make_problem(*shapes, **{**options, **changes})
    for name, row in TABLE.items():
        if not any(map(row.refuses, calls)):
            yield Convolution(name, problem)


def draw_operands(problem, seed):
    """Integers for the input, the weight and the bias, and the generator for more of them."""
    rng = np.random.default_rng(seed)
    return *operands(rng, problem, integers)[:3], rng


class TestIdentities:
    @given(exact_problem, seeds, st.data())
    def test_shift(self, problem, seed, data):
        """A shifted input has a shifted output: away from the borders, by multiples of the stride."""
        options = options_of(problem)
        _, w, bias, rng = draw_operands(problem, seed)
        shift = [data.draw(st.integers(0, 2), label="shift") for _ in range(problem.ndim)]
        offsets = [n * s for n, s in zip(shift, options["stride"])]
        sizes = [
            size + sum(pair) + offset
            for size, pair, offset in zip(problem.input_shape[2:], options["padding"], offsets)
        ]
        x = integers(rng, (*problem.input_shape[:2], *sizes))
        part = np.ascontiguousarray(x[(..., *(slice(offset, None) for offset in offsets))])
        for conv in convolutions(make_problem(problem.op, x.shape, w.shape, **{**options, "padding": 0})):
            whole = conv(x, w, bias)
            assert_exact(conv(part, w, bias), whole[(..., *(slice(n, None) for n in shift))])

    @given(problems("pointwise"), seeds)
    def test_kernel_of_one_is_a_linear_layer_per_pixel(self, problem, seed):
        x, w, bias, _ = draw_operands(problem, seed)
        layer = np.moveaxis(x, 1, -1) @ w.reshape(problem.K, problem.C).T + bias
        for conv in convolutions(problem, padding=0, stride=1):
            assert_exact(np.moveaxis(conv(x, w, bias, padding=0, stride=1), 1, -1), layer)

    @given(exact_problem, seeds)
    def test_stride_takes_a_sample_of_stride_1(self, problem, seed):
        x, w, bias, _ = draw_operands(problem, seed)
        sample = (..., *(slice(None, None, stride) for stride in options_of(problem)["stride"]))
        for conv in convolutions(problem):
            assert_exact(conv(x, w, bias), conv(x, w, bias, stride=1, algo="direct")[sample])
        for conv in convolutions(problem, stride=1):
            assert_exact(conv(x, w, bias, algo="direct"), conv(x, w, bias, stride=1)[sample])

    @given(exact_problem, seeds)
    def test_flipped_twice_is_not_flipped(self, problem, seed):
        x, w, bias, _ = draw_operands(problem, seed)
        flipped = np.flip(w, axis=tuple(range(2, w.ndim)))
        for conv in convolutions(problem):
            assert_exact(conv(x, flipped, bias, flip=True), conv(x, w, bias))

    @given(exact_problem, seeds)
    def test_input_and_kernel_flipped_flip_the_output(self, problem, seed):
        x, w, bias, _ = draw_operands(problem, seed)
        axes = tuple(range(2, w.ndim))
        mirrored = [(after, before) for before, after in options_of(problem)["padding"]]
        for conv in convolutions(problem, stride=1):
            y = conv(np.flip(x, axes), np.flip(w, axes), bias, padding=mirrored, stride=1)
            assert_exact(np.flip(y, axes), conv(x, w, bias, stride=1))

    @given(exact_problem, seeds)
    def test_groups_are_convolutions_side_by_side(self, problem, seed):
        x, w, bias, _ = draw_operands(problem, seed)
        n = problem.groups
        for conv in convolutions(problem):
            alone = zip(np.split(x, n, 1), np.split(w, n), np.split(bias, n))
            parts = [conv(*arrays, groups=1, algo="auto") for arrays in alone]
            assert_exact(conv(x, w, bias), np.concatenate(parts, axis=1))

    @given(exact_problem, seeds)
    def test_one_dimension_less(self, problem, seed):
        """conv1d is conv2d of images of one row, conv2d is conv3d of volumes of one plane."""
        assume(problem.ndim < 3)
        x, w, bias, _ = draw_operands(problem, seed)
        given = options_of(problem)
        options = {name: (1, *given[name]) for name in ("stride", "dilation")}
        options |= {"padding": ((0, 0), *given["padding"]), "op": f"conv{problem.ndim + 1}d"}
        for conv in convolutions(problem):
            y = conv(x[:, :, None], w[:, :, None], bias, **options)
            assert_exact(y[:, :, 0], conv(x, w, bias))

    @given(exact_problem, seeds, st.integers(-3, 3), st.integers(-3, 3))
    def test_linear_in_both(self, problem, seed, a, b):
        x, w, _, rng = draw_operands(problem, seed)
        x2, w2, _, _ = operands(rng, problem, integers)
        for conv in convolutions(problem):
            assert_exact(conv(a * x + b * x2, w), a * conv(x, w) + b * conv(x2, w))
            assert_exact(conv(x, a * w + b * w2), a * conv(x, w) + b * conv(x, w2))

    @given(exact_problem, seeds)
    def test_padding_is_zeros_around(self, problem, seed):
        x, w, bias, _ = draw_operands(problem, seed)
        padded = np.pad(x, [(0, 0), (0, 0), *options_of(problem)["padding"]])
        for conv in convolutions(problem):
            assert_exact(conv(x, w, bias), conv(padded, w, bias, padding=0))

    @given(exact_problem, seeds)
    def test_dilation_is_zeros_between_taps(self, problem, seed):
        x, w, bias, _ = draw_operands(problem, seed)
        dilation = options_of(problem)["dilation"]
        extents = [d * (k - 1) + 1 for k, d in zip(w.shape[2:], dilation)]
        spread = np.zeros((*w.shape[:2], *extents), w.dtype)
        spread[(..., *(slice(None, None, d) for d in dilation))] = w
        for conv in convolutions(problem):
            assert_exact(conv(x, w, bias), conv(x, spread, bias, dilation=1, algo="auto"))

    @given(exact_problem, seeds)
    def test_memory_order_changes_no_value(self, problem, seed):
        x, w, bias, _ = draw_operands(problem, seed)
        for conv in convolutions(problem):
            assert_exact(conv(in_order(x, "NHWC"), w, bias), conv(x, w, bias))

    @given(exact_problem, seeds)
    def test_channels_may_be_renamed(self, problem, seed):
        """Groups in another order, and in each its outputs: the result's channels in that order."""
        x, w, bias, rng = draw_operands(problem, seed)
        groups = rng.permutation(problem.groups)
        inputs, outputs = (
            np.arange(count).reshape(problem.groups, -1)[groups] for count in (problem.C, problem.K)
        )
        inner = rng.permutation(inputs.shape[1])
        inputs, outputs = inputs[:, inner].ravel(), rng.permuted(outputs, axis=1).ravel()
        for conv in convolutions(problem):
            renamed = conv(x[:, inputs], w[outputs][:, inner], bias[outputs])
            assert_exact(renamed, conv(x, w, bias)[:, outputs])
