// pool.cu - pooling and its gradients: one thread per element of the result, which is read and written in place.
//
//   POOL   x (N, C, D, H, W)  --a window per thread-->  y (N, C, O, P, Q), and the places of its maxima
//
//   INPUT  grad (N, C, O, P, Q)  --the windows that see an element, per thread-->  y (N, C, D, H, W)
//
// Neighbouring threads have neighbouring columns, or, channels last, neighbouring channels: what they read and write lies
// together. A gradient is gathered, not scattered: no two threads write one element, so that every run gives the same
// bits, and an index out of range is never an address.
//
// Set by fastconv/gpu/pool.py: POOL_MAX (1: the maximum, 0: the average), PLACES (1: indices come with the maxima),
// ORDER.

#define RESIDENT 2  // else the compiler spills registers for the sake of more blocks
#include "common.cuh"

// The windows along one axis; kernel 0: adaptive ones, which share out the input unevenly. The padding lies in front of the
// input, `after` behind it.
struct Windows {
    INDEX size, outputs, kernel, stride, padding, dilation, after;
};

// Sizes by the field's letters, the windows along d, h and w, and strides in elements: x of the array (N, C, D, H, W), y of
// the array (N, C, O, P, Q), i of the places, whichever of them a kernel writes.
struct Pool {
    INDEX N, C, D, H, W, O, P, Q;
    INDEX kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w;
    INDEX padding_d, padding_h, padding_w, dilation_d, dilation_h, dilation_w;
    INDEX after_d, after_h, after_w;
    INDEX x_n, x_c, x_d, x_h, x_w;
    INDEX y_n, y_c, y_o, y_p, y_q;
    INDEX i_n, i_c, i_o, i_p, i_q;
    INDEX count_padding;  // 1: an average counts the taps in the padding
    INDEX divisor;        // 0: it is the taps that a window counts
};

DEVICE Windows windows_d(const Pool& pool)
{
    return {pool.D, pool.O, pool.kernel_d, pool.stride_d, pool.padding_d, pool.dilation_d, pool.after_d};
}
DEVICE Windows windows_h(const Pool& pool)
{
    return {pool.H, pool.P, pool.kernel_h, pool.stride_h, pool.padding_h, pool.dilation_h, pool.after_h};
}
DEVICE Windows windows_w(const Pool& pool)
{
    return {pool.W, pool.Q, pool.kernel_w, pool.stride_w, pool.padding_w, pool.dilation_w, pool.after_w};
}

// The part of window i that lies in the input: taps first, first + dilation, ... before last.
struct Taps {
    INDEX first, last, counted;

    DEVICE Taps(const Windows& axis, INDEX i, INDEX count_padding)
    {
        if (axis.kernel == 0) {
            first = i * axis.size / axis.outputs;
            last = divide_up<INDEX>((i + 1) * axis.size, axis.outputs);
            counted = last - first;
        } else {
            const INDEX begin = i * axis.stride - axis.padding;
            const INDEX end = begin + (axis.kernel - 1) * axis.dilation + 1;
            first = begin >= 0 ? begin : begin + divide_up<INDEX>(-begin, axis.dilation) * axis.dilation;
            last = smaller(end, axis.size);
            counted = count_padding ? smaller(end, axis.size + axis.after) - begin : last - first;
        }
    }
};

// The windows that may see an element: first, first + 1, ... before last; of dilated ones not all of them do.
struct Viewers {
    INDEX first, last;

    DEVICE Viewers(const Windows& axis, INDEX at)
    {
        if (axis.kernel == 0) {
            first = at * axis.outputs / axis.size;
            last = divide_up<INDEX>((at + 1) * axis.outputs, axis.size);
        } else {
            const INDEX behind = at + axis.padding - (axis.kernel - 1) * axis.dilation;  // of the last tap
            first = behind > 0 ? divide_up<INDEX>(behind, axis.stride) : 0;
            last = smaller((at + axis.padding) / axis.stride + 1, axis.outputs);
        }
    }
};

// An element of the result: sample, channel, plane, row and column.
struct Element {
    INDEX n, c, d, h, w;

    // Threads count the elements in the order of memory.
    DEVICE Element(INDEX thread, INDEX channels, INDEX depth, INDEX height, INDEX width)
    {
#if ORDER == NHWC
        c = thread % channels;
        thread /= channels;
#endif
        w = thread % width;
        thread /= width;
        h = thread % height;
        thread /= height;
        d = thread % depth;
        thread /= depth;
#if ORDER == NCHW
        c = thread % channels;
        thread /= channels;
#endif
        n = thread;
    }
};

DEVICE INDEX offset_in_places(const Pool& pool, INDEX n, INDEX c, INDEX o, INDEX p, INDEX q)
{
    return n * pool.i_n + c * pool.i_c + o * pool.i_o + p * pool.i_p + q * pool.i_q;
}

DEVICE INDEX find_divisor(const Pool& pool, const Taps& d, const Taps& h, const Taps& w)
{
    return pool.divisor ? pool.divisor : d.counted * h.counted * w.counted;
}

#ifdef STAGE_POOL
KERNEL(const STORAGE* __restrict__ x, STORAGE* __restrict__ y, long long* __restrict__ places, const Pool pool,
       INDEX outputs)
{
    const INDEX thread = static_cast<INDEX>(blockIdx.x) * THREADS + threadIdx.x;
    if (thread >= outputs) return;
    const Element y_at(thread, pool.C, pool.O, pool.P, pool.Q);
    const Taps planes(windows_d(pool), y_at.d, pool.count_padding);
    const Taps rows(windows_h(pool), y_at.h, pool.count_padding);
    const Taps columns(windows_w(pool), y_at.w, pool.count_padding);
    const STORAGE* channel = x + (y_at.n * pool.x_n + y_at.c * pool.x_c);
    ACC found = 0;
    INDEX place = -1;  // no element has been seen
    for (INDEX d = planes.first; d < planes.last; d += pool.dilation_d) {
        for (INDEX h = rows.first; h < rows.last; h += pool.dilation_h) {
            for (INDEX w = columns.first; w < columns.last; w += pool.dilation_w) {
                const ACC value = widen(channel[d * pool.x_d + h * pool.x_h + w * pool.x_w]);
#if POOL_MAX
                if (place >= 0 && !(value > found) && value == value) continue;  // of NaNs the last one wins
                found = value;
                place = (d * pool.H + h) * pool.W + w;
#else
                found += value;
#endif
            }
        }
    }
#if POOL_MAX
    if (place < 0) found = bits_to_float(0xff800000u);  // -inf
#else
    found /= static_cast<ACC>(find_divisor(pool, planes, rows, columns));
#endif
    narrow(found, y[y_at.n * pool.y_n + y_at.c * pool.y_c + y_at.d * pool.y_o + y_at.h * pool.y_p + y_at.w * pool.y_q]);
#if PLACES
    places[offset_in_places(pool, y_at.n, y_at.c, y_at.d, y_at.h, y_at.w)] = place;
#endif
}
#endif

#ifdef STAGE_INPUT
// What window (o, p, q) gives to the element at (d, h, w).
DEVICE ACC share_of(const STORAGE* grad, const long long* places, const Pool& pool, const Element& at, INDEX o, INDEX p,
                    INDEX q)
{
    const ACC value =
        widen(grad[at.n * pool.y_n + at.c * pool.y_c + o * pool.y_o + p * pool.y_p + q * pool.y_q]);
#if POOL_MAX
    const long long place = (static_cast<long long>(at.d) * pool.H + at.h) * pool.W + at.w;
    return places[offset_in_places(pool, at.n, at.c, o, p, q)] == place ? value : ACC(0);
#else
    const Taps planes(windows_d(pool), o, pool.count_padding);
    const Taps rows(windows_h(pool), p, pool.count_padding);
    const Taps columns(windows_w(pool), q, pool.count_padding);
    return value / static_cast<ACC>(find_divisor(pool, planes, rows, columns));
#endif
}

KERNEL(const STORAGE* __restrict__ grad, const long long* __restrict__ places, STORAGE* __restrict__ y, const Pool pool,
       INDEX elements)
{
    const INDEX thread = static_cast<INDEX>(blockIdx.x) * THREADS + threadIdx.x;
    if (thread >= elements) return;
    const Element at(thread, pool.C, pool.D, pool.H, pool.W);
    const Viewers planes(windows_d(pool), at.d), rows(windows_h(pool), at.h), columns(windows_w(pool), at.w);
    ACC sum = 0;
    for (INDEX o = planes.first; o < planes.last; ++o) {
        for (INDEX p = rows.first; p < rows.last; ++p) {
            for (INDEX q = columns.first; q < columns.last; ++q) sum += share_of(grad, places, pool, at, o, p, q);
        }
    }
    narrow(sum, y[at.n * pool.x_n + at.c * pool.x_c + at.d * pool.x_d + at.h * pool.x_h + at.w * pool.x_w]);
}
#endif
