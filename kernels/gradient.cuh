// gradient.cuh - where the sums of a weight's gradient go: to partial[part][k][term], and from there to the array.
//
//   terms count c, t, r, s if ORDER is NCHW, else t, r, s, c, the last fastest: neighbours read neighbours in memory
//
// Each element is a sum over all pixels, of many blocks: a block sums a part of the pixels, and the stage ADD adds
// the parts in an order that their number alone decides. The same bits in every run, without atomics.

#include "common.cuh"

#if defined(STAGE_WEIGHT) || defined(STAGE_ADD)
// What a column of the gradient, seen as a matrix of K rows, stands for.
struct Term {
    INDEX c, t, r, s;
};

DEVICE Term find_term(INDEX column, const Conv& conv)
{
    Term term;
    if (ORDER == NHWC) {
        term.c = column % conv.C;
        column /= conv.C;
    }
    term.s = column % conv.S;
    column /= conv.S;
    term.r = column % conv.R;
    column /= conv.R;
    term.t = column % conv.T;
    if (ORDER == NCHW) term.c = column / conv.T;
    return term;
}

DEVICE INDEX offset_in_gradient(INDEX k, const Term& term, const Conv& conv)
{
    return k * conv.w_k + term.c * conv.w_c + term.t * conv.w_t + term.r * conv.w_r + term.s * conv.w_s;
}
#endif

#ifdef STAGE_ADD
constexpr int kElements = 32, kShares = THREADS / kElements;

// Add the parts of each sum and round it once. A thread adds every kShares-th part of an element, so that there are
// threads enough even for few elements of many parts.
KERNEL(const ACC* __restrict__ partial, STORAGE* __restrict__ grad_w, const Conv conv, int parts)
{
    __shared__ ACC shares[kShares][kElements];
    const int element = threadIdx.x % kElements, share = threadIdx.x / kElements;
    const INDEX columns = conv.C * conv.T * conv.R * conv.S, count = conv.groups * conv.K * columns;
    const long long at = static_cast<long long>(blockIdx.x) * kElements + element;
    ACC sum = 0;
    for (int part = share; at < count && part < parts; part += kShares) sum += partial[part * count + at];
    shares[share][element] = sum;
    __syncthreads();
    if (share > 0 || at >= count) return;
    for (int other = 1; other < kShares; ++other) sum += shares[other][element];
    const INDEX k = at / columns, column = at % columns;
    narrow(sum, grad_w[offset_in_gradient(k, find_term(column, conv), conv)]);
}
#endif
