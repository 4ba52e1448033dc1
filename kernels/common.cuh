// common.cuh - what every kernel shares: element types, the convolution's sizes and strides, the epilogue.
//
// Set by fastconv/gpu/source.py:
//   STORAGE      float, double, Half or BFloat16: what the arrays hold
//   ACC          float or double: what is multiplied and summed
//   INDEX        int, or long long where an offset reaches 2**31 elements
//   ORDER        NCHW or NHWC: whether pixels or channels of the output lie together in memory
//   ACTIVATION   none, relu, relu6, silu, gelu, sigmoid, tanh or leaky_relu
//   THREADS      per block
//   KERNEL_NAME  the symbol;  STAGE_<stage>  which kernel of the file is compiled

#include "ptx.cuh"

#if PARTS_INSIDE  // two sets of sums: all registers, even if only one block is then resident
#define RESIDENT 1
#endif
#ifdef RESIDENT  // blocks of an SM that there must be registers for
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) KERNEL_NAME
#else
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS) KERNEL_NAME
#endif
#define DEVICE __device__ __forceinline__
#define PASTE_NOW(a, b) a##b
#define PASTE(a, b) PASTE_NOW(a, b)
#define NCHW 0
#define NHWC 1

struct Half {
    unsigned short bits;  // IEEE 754 binary16
};
struct BFloat16 {
    unsigned short bits;  // the upper half of a float
};

// One convolution: sizes by the field's letters (C and K of one group), strides in elements.
struct Conv {
    INDEX N, C, D, H, W, K, T, R, S, O, P, Q, groups;
    INDEX stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w, padding_d, padding_h, padding_w;
    INDEX x_n, x_c, x_d, x_h, x_w;
    INDEX w_k, w_c, w_t, w_r, w_s;
    INDEX y_n, y_k, y_o, y_p, y_q;
    INDEX r_n, r_k, r_o, r_p, r_q;
    INDEX bias_k;
    ACC slope;
};

// Four neighbours in memory, moved at once.
struct alignas(sizeof(STORAGE) < 4 ? 8 : 16) Four {
    STORAGE value[4];
};

struct alignas(16) AccFour {
    ACC value[4];
};

// Read four neighbours from an aligned address of shared memory.
DEVICE void read_four(ACC* to, const ACC* from)
{
    const AccFour four = *reinterpret_cast<const AccFour*>(from);
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = four.value[e];
}

DEVICE float widen(float value) { return value; }
DEVICE double widen(double value) { return value; }
DEVICE float widen(Half value) { return half_to_float(value.bits); }
DEVICE float widen(BFloat16 value) { return bits_to_float(static_cast<unsigned>(value.bits) << 16); }

DEVICE void narrow(float sum, float& value) { value = sum; }
DEVICE void narrow(double sum, double& value) { value = sum; }
DEVICE void narrow(float sum, Half& value) { value.bits = float_to_half(sum); }
DEVICE void narrow(float sum, BFloat16& value)
{
    const unsigned bits = float_to_bits(sum);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        value.bits = 0x7fff;  // NaN: rounding could turn its bits into those of inf
    } else {
        const unsigned to_nearest_even = bits + 0x7fffu + (bits >> 16 & 1u);
        value.bits = static_cast<unsigned short>(to_nearest_even >> 16);
    }
}

template <class Number>
DEVICE Number smaller(Number a, Number b)
{
    return a < b ? a : b;
}

template <class Number>
DEVICE Number divide_up(Number a, Number b)
{
    return (a + b - 1) / b;
}

DEVICE bool is_within(int at, int size) { return static_cast<unsigned>(at) < static_cast<unsigned>(size); }
DEVICE bool is_within(long long at, long long size) { return 0 <= at && at < size; }

// Comparisons are written so that a NaN passes through.
DEVICE ACC activate_none(ACC x, ACC) { return x; }
DEVICE ACC activate_relu(ACC x, ACC) { return x < 0 ? ACC(0) : x; }
DEVICE ACC activate_relu6(ACC x, ACC) { return x < 0 ? ACC(0) : x > 6 ? ACC(6) : x; }
DEVICE ACC activate_leaky_relu(ACC x, ACC slope) { return x < 0 ? slope * x : x; }
DEVICE ACC activate_tanh(ACC x, ACC) { return tanh(x); }
DEVICE ACC activate_sigmoid(ACC x, ACC)
{
    const ACC e = exp(x < 0 ? x : -x);  // at most 1: no overflow
    return (x < 0 ? e : ACC(1)) / (1 + e);
}
DEVICE ACC activate_silu(ACC x, ACC slope) { return x * activate_sigmoid(x, slope); }
DEVICE ACC activate_gelu(ACC x, ACC) { return x * ACC(0.5) * (1 + erf(x * ACC(0.70710678118654752))); }

// An output pixel: which sample, which plane, row and column.
struct Pixel {
    INDEX n, o, p, q;
};

// The pixel that a column of the matrix product stands for: columns count n, o, p, q, the last fastest.
DEVICE Pixel find_pixel(INDEX column, const Conv& conv)
{
    Pixel pixel;
    pixel.q = column % conv.Q;
    column /= conv.Q;
    pixel.p = column % conv.P;
    column /= conv.P;
    pixel.o = column % conv.O;
    pixel.n = column / conv.O;
    return pixel;
}

DEVICE INDEX offset_in_y(const Pixel& pixel, const Conv& conv)
{
    return pixel.n * conv.y_n + pixel.o * conv.y_o + pixel.p * conv.y_p + pixel.q * conv.y_q;
}

DEVICE INDEX offset_in_residual(const Pixel& pixel, const Conv& conv)
{
    return pixel.n * conv.r_n + pixel.o * conv.r_o + pixel.p * conv.r_p + pixel.q * conv.r_q;
}

#ifdef ACTIVATION
// What follows the sum, and where the result goes; bias and residual may be null.
struct Epilogue {
    const Conv& conv;
    const STORAGE* bias;
    const STORAGE* residual;
    STORAGE* y;

    // Return activation(sum + bias[k] + residual[at]), rounded once.
    DEVICE STORAGE finish(ACC sum, INDEX k, INDEX at) const
    {
        if (bias != nullptr) sum += widen(bias[k * conv.bias_k]);
        if (residual != nullptr) sum += widen(residual[at]);
        STORAGE value;
        narrow(PASTE(activate_, ACTIVATION)(sum, conv.slope), value);
        return value;
    }
};
#endif

constexpr INDEX kNowhere = static_cast<INDEX>(1) << (sizeof(INDEX) * 8 - 2) << 1;  // no offset: the least number

// Write `stored` of four values, those whose offset is not kNowhere; at once if they are neighbours.
DEVICE void store_four(STORAGE* y, const INDEX (&at)[4], const Four& four, int stored)
{
    const bool neighbours = stored == 4 && at[1] == at[0] + 1 && at[2] == at[0] + 2 && at[3] == at[0] + 3;
    if (neighbours && reinterpret_cast<unsigned long long>(y + at[0]) % alignof(Four) == 0) {
        *reinterpret_cast<Four*>(y + at[0]) = four;
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if (at[e] != kNowhere) y[at[e]] = four.value[e];
    }
}
