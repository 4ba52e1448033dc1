// im2col.cu - convolution as one matrix product, whose columns are the windows of the input.
//
//   packed weight (K rows, C * taps)  --------------------------------+
//                                                                     +--> tiles of y (gemm.cuh)
//   MULTIPLY, GATHERED 0: x --each window element as it is needed-----+    implicit: no workspace
//   MULTIPLY, GATHERED 1: x --GATHER--> columns (C * taps, pixels) ---+
//
// The implicit form walks along k by chunks of kBlockK channels, within them by taps: a slice is one tap of one
// chunk, so the padding is looked at once per slice and pixel. The gathered form takes c, t, r, s as they come.
//
//   WEIGHT, the gradient of the weight: gradient of y (pixels, K)  --------------------+
//                                                                                      +--> tiles of it (outer.cuh)
//   x --each window element as it is needed--> terms c, t, r, s (pixels, C * taps)  ---+
//
// Set by fastconv/gpu/im2col.py: BLOCK_M, BLOCK_N, PARTS_INSIDE, LOADS (see gemm.cuh), GATHERED (0, 1). By that of its
// name in grad_weight: BLOCK_M, BLOCK_N, X_LOADS (SINGLE, CHANNELS), Y_LOADS (see outer.cuh).

#include "outer.cuh"

#ifdef STAGE_MULTIPLY
// Loads the windows that are the columns of a tile straight from the input.
struct WindowLoader : ChannelLoader {
    INDEX base[kFours], d[kFours], h[kFours], w[kFours];  // each column's sample, and where its window begins
    INDEX c, t, r, s;                                     // the next slice's first channel and tap

    DEVICE WindowLoader(const STORAGE* x, const Tile& tile, INDEX columns, const Conv& conv)
        : ChannelLoader(x, tile, conv)
    {
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const Pixel pixel = find_pixel(smaller<INDEX>(tile.first_column + column_of(i), columns - 1), conv);
            base[i] = pixel.n * conv.x_n;
            d[i] = pixel.o * conv.stride_d - conv.padding_d;
            h[i] = pixel.p * conv.stride_h - conv.padding_h;
            w[i] = pixel.q * conv.stride_w - conv.padding_w;
        }
    }
    DEVICE void seek(int slice)
    {
        s = slice % conv.S;
        r = slice / conv.S % conv.R;
        t = slice / (conv.S * conv.R) % conv.T;
        c = slice / (conv.S * conv.R * conv.T) * kBlockK;
    }
    DEVICE void fetch(ACC (*)[BLOCK_N])
    {
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const INDEX at_d = d[i] + t * conv.dilation_d;
            const INDEX at_h = h[i] + r * conv.dilation_h;
            const INDEX at_w = w[i] + s * conv.dilation_w;
            const bool inside = is_within(at_d, conv.D) && is_within(at_h, conv.H) && is_within(at_w, conv.W);
            const INDEX channel = c + row_of(i);
            const INDEX at = base[i] + at_d * conv.x_d + at_h * conv.x_h + at_w * conv.x_w + channel * conv.x_c;
            loaded[i].load(x + at, conv.x_c, inside, conv.C - channel);
        }
        advance();
    }
    DEVICE void advance()
    {
        if (++s < conv.S) return;
        s = 0;
        if (++r < conv.R) return;
        r = 0;
        if (++t < conv.T) return;
        t = 0;
        c += kBlockK;
    }
};

// One tile of the product. Gathered, `columns` of `gathered` count from pixel `first` on; else all pixels are meant.
KERNEL(const STORAGE* __restrict__ x, const ACC* __restrict__ gathered, const ACC* __restrict__ packed,
       const STORAGE* __restrict__ bias, const STORAGE* __restrict__ residual, STORAGE* __restrict__ y,
       ACC* __restrict__ partial, const Conv conv, INDEX first, INDEX columns, int slices, int parts)
{
    __shared__ Shared shared;
    const Tile tile(conv.K, columns, conv.groups);
    const Place place = place_of_thread();
    const INDEX pitch = divide_up<INDEX>(conv.K, 4) * 4, rows = static_cast<INDEX>(slices) * kBlockK;
    locate_columns(shared.columns, first, tile.first_column, columns, conv);
    RowLoader<BLOCK_M> a(packed + tile.group * rows * pitch, pitch, tile.first_row);
#if GATHERED
    const INDEX row = divide_up<INDEX>(columns, 4) * 4;
    RowLoader<BLOCK_N> b(gathered + tile.group * rows * row, row, tile.first_column);
#else
    WindowLoader b(x, tile, columns, conv);
#endif
    ACC sum[8][8] = {};
    multiply_parts(sum, shared, a, b, place, tile, slices, parts);
    if (partial != nullptr) {
        store_part(sum, place, tile, columns, conv, partial);
    } else {
        store_tile(sum, shared.columns, place, tile.group, tile.first_row, conv, Epilogue{conv, bias, residual, y});
    }
}
#endif

#ifdef STAGE_GATHER
// Lay out the windows of `columns` pixels, counted from pixel `first` on: gathered[group][c, t, r, s][pixel], with
// rows of zeros up to a multiple of kBlockK per group. One thread per channel and pixel.
KERNEL(const STORAGE* __restrict__ x, ACC* __restrict__ gathered, const Conv conv, INDEX first, INDEX columns,
       int slices)
{
    const INDEX pitch = divide_up<INDEX>(columns, 4) * 4;
    const long long thread = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (thread >= static_cast<long long>(conv.groups) * conv.C * pitch) return;
    const INDEX column = thread % pitch, channel = thread / pitch, group = channel / conv.C, c = channel % conv.C;
    const INDEX taps = conv.T * conv.R * conv.S, rows = static_cast<INDEX>(slices) * kBlockK;
    const Pixel pixel = find_pixel(smaller<INDEX>(first + column, conv.N * conv.O * conv.P * conv.Q - 1), conv);
    ACC* to = gathered + (group * rows + c * taps) * pitch + column;
    for (INDEX t = 0; t < conv.T; ++t) {
        const INDEX d = pixel.o * conv.stride_d - conv.padding_d + t * conv.dilation_d;
        for (INDEX r = 0; r < conv.R; ++r) {
            const INDEX h = pixel.p * conv.stride_h - conv.padding_h + r * conv.dilation_h;
            const bool is_row = is_within(d, conv.D) && is_within(h, conv.H);
            const INDEX row = pixel.n * conv.x_n + channel * conv.x_c + d * conv.x_d + h * conv.x_h;
            for (INDEX s = 0; s < conv.S; ++s) {
                const INDEX w = pixel.q * conv.stride_w - conv.padding_w + s * conv.dilation_w;
                *to = is_row && is_within(w, conv.W) ? widen(x[row + w * conv.x_w]) : ACC(0);
                to += pitch;
            }
        }
    }
    if (c < conv.C - 1) return;
    for (INDEX row = conv.C * taps; row < rows; ++row, to += pitch) *to = 0;
}
#endif

#ifdef STAGE_WEIGHT
// Where a term finds its element of x, from where a pixel's window would begin without padding.
struct alignas(16) Reach {
    INDEX at, d, h, w;
};

// Loads the elements of x that the terms of a tile meet at the pixels of a slice.
struct TermLoader : Loader<BLOCK_N, X_LOADS> {
    const STORAGE* x;      // of the group
    const Reach* reaches;  // of the tile's terms or, CHANNELS, of the first of each four; in shared memory
    const Conv& conv;

    DEVICE TermLoader(const STORAGE* x, const Reach* reaches, const Tile& tile, const Conv& conv)
        : Loader(conv), x(x + tile.group * conv.C * conv.x_c), reaches(reaches), conv(conv)
    {
    }
    DEVICE void fetch(ACC (*)[kPitch])
    {
        const bool exists = cursor.exists();
        const Pixel at = exists ? cursor.at : Pixel{};
        const INDEX d = at.o * conv.stride_d, h = at.p * conv.stride_h, w = at.q * conv.stride_w;
        const INDEX pixel = at.n * conv.x_n + d * conv.x_d + h * conv.x_h + w * conv.x_w;
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            const Reach reach = reaches[channel(i) / kChannels];
            const bool inside = is_within(d + reach.d, conv.D) && is_within(h + reach.h, conv.H) &&
                                is_within(w + reach.w, conv.W);
            loaded[i] = Four{};
            if (exists && inside) load(i, x + (pixel + reach.at));
        }
        cursor.advance();
    }
};

// Note once for all pixels where the terms of a tile reach; behind the last ones these are meant again.
DEVICE void find_reaches(Reach* reaches, INDEX first_column, INDEX columns, const Conv& conv)
{
    constexpr int kChannels = TermLoader::kChannels;
    for (int i = threadIdx.x; i < BLOCK_N / kChannels; i += THREADS) {
        const Term term = find_term(smaller<INDEX>(first_column + i * kChannels, columns - kChannels), conv);
        const INDEX d = term.t * conv.dilation_d - conv.padding_d, h = term.r * conv.dilation_h - conv.padding_h;
        const INDEX w = term.s * conv.dilation_w - conv.padding_w;
        reaches[i] = {term.c * conv.x_c + d * conv.x_d + h * conv.x_h + w * conv.x_w, d, h, w};
    }
}

KERNEL(const STORAGE* __restrict__ x, const STORAGE* __restrict__ grad_y, STORAGE* __restrict__ grad_w,
       ACC* __restrict__ partial, const Conv conv, int slices, int parts)
{
    __shared__ Slices shared;
    __shared__ Reach reaches[BLOCK_N / TermLoader::kChannels];
    const INDEX columns = conv.C * conv.T * conv.R * conv.S;
    const Tile tile(conv.K, columns, conv.groups);
    const Place place = place_of_thread();
    find_reaches(reaches, tile.first_column, columns, conv);
    __syncthreads();
    GradientLoader a(grad_y, tile, conv);
    TermLoader b(x, reaches, tile, conv);
    ACC sum[8][8] = {};
    multiply_parts(sum, shared, a, b, place, tile, slices, parts);
    store_sums(sum, place, tile, columns, conv, partial, grad_w);
}
#endif
