// pointwise.cu - 1x1 convolution: the weight times the pixels, which are the columns of a matrix as they lie.
//
//   packed weight (K rows, C)  -------------------------------------------------+
//                                                                               +--> tiles of y (gemm.cuh)
//   VECTOR_PIXELS: four pixels of a channel  --16-byte loads-->  shared memory--+
//   else: four channels of a pixel, at once if LOADS is VECTOR   (any stride) --+
//
//   WEIGHT, the gradient of the weight: gradient of y (pixels, K)  ---+
//                                                                     +--> tiles of it (outer.cuh)
//   x (pixels, C)  ---------------------------------------------------+
//
// Set by fastconv/gpu/pointwise.py: BLOCK_M, BLOCK_N, PARTS_INSIDE (see gemm.cuh), LOADS, VECTOR_PIXELS. By that of its
// name in grad_weight: BLOCK_M, BLOCK_N, X_LOADS, Y_LOADS (see outer.cuh).

#include "outer.cuh"

#ifdef STAGE_MULTIPLY
#if VECTOR_PIXELS
// Loads four neighbouring pixels of one channel at once; the pixels of a sample lie in a row.
struct PixelLoader {
    static constexpr int kPerRow = BLOCK_N / 4;

    const STORAGE* x;  // of the group
    const Conv& conv;
    INDEX at[kFours];
    INDEX c;  // first channel of the next slice
    Four loaded[kFours];

    DEVICE PixelLoader(const STORAGE* x, const Tile& tile, INDEX columns, const Conv& conv)
        : x(x + tile.group * conv.C * conv.x_c), conv(conv)
    {
        const INDEX plane = conv.O * conv.P * conv.Q;
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const INDEX column = smaller<INDEX>(tile.first_column + column_of(i), columns - 4);
            at[i] = column / plane * conv.x_n + column % plane;
        }
    }
    DEVICE void seek(int slice) { c = static_cast<INDEX>(slice) * kBlockK; }
    DEVICE void fetch(ACC (*)[BLOCK_N])
    {
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const INDEX channel = c + row_of(i);
            loaded[i] = Four{};
            if (channel < conv.C) loaded[i] = *reinterpret_cast<const Four*>(x + at[i] + channel * conv.x_c);
        }
        c += kBlockK;
    }
    DEVICE void place(ACC (*b)[BLOCK_N]) const
    {
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            AccFour four;
#pragma unroll
            for (int e = 0; e < 4; ++e) four.value[e] = widen(loaded[i].value[e]);
            *reinterpret_cast<AccFour*>(&b[row_of(i)][column_of(i)]) = four;
        }
    }
    DEVICE static int row_of(int i) { return (threadIdx.x + i * THREADS) / kPerRow; }
    DEVICE static int column_of(int i) { return (threadIdx.x + i * THREADS) % kPerRow * 4; }
};
#else
// Loads four channels of one pixel.
struct PixelLoader : ChannelLoader {
    INDEX at[kFours];
    INDEX c;  // first channel of the next slice

    DEVICE PixelLoader(const STORAGE* x, const Tile& tile, INDEX columns, const Conv& conv)
        : ChannelLoader(x, tile, conv)
    {
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const Pixel pixel = find_pixel(smaller<INDEX>(tile.first_column + column_of(i), columns - 1), conv);
            at[i] = pixel.n * conv.x_n + pixel.o * conv.stride_d * conv.x_d + pixel.p * conv.stride_h * conv.x_h +
                    pixel.q * conv.stride_w * conv.x_w;
        }
    }
    DEVICE void seek(int slice) { c = static_cast<INDEX>(slice) * kBlockK; }
    DEVICE void fetch(ACC (*)[BLOCK_N])
    {
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const INDEX channel = c + row_of(i);
            loaded[i].load(x + (at[i] + channel * conv.x_c), conv.x_c, true, conv.C - channel);
        }
        c += kBlockK;
    }
};
#endif

KERNEL(const STORAGE* __restrict__ x, const ACC* __restrict__ packed, const STORAGE* __restrict__ bias,
       const STORAGE* __restrict__ residual, STORAGE* __restrict__ y, ACC* __restrict__ partial, const Conv conv,
       INDEX columns, int slices, int parts)
{
    __shared__ Shared shared;
    const Tile tile(conv.K, columns, conv.groups);
    const Place place = place_of_thread();
    const INDEX pitch = divide_up<INDEX>(conv.K, 4) * 4;
    locate_columns(shared.columns, 0, tile.first_column, columns, conv);
    RowLoader<BLOCK_M> a(packed + tile.group * slices * kBlockK * pitch, pitch, tile.first_row);
    PixelLoader b(x, tile, columns, conv);
    ACC sum[8][8] = {};
    multiply_parts(sum, shared, a, b, place, tile, slices, parts);
    if (partial != nullptr) {
        store_part(sum, place, tile, columns, conv, partial);
    } else {
        store_tile(sum, shared.columns, place, tile.group, tile.first_row, conv, Epilogue{conv, bias, residual, y});
    }
}
#endif

#ifdef STAGE_WEIGHT
KERNEL(const STORAGE* __restrict__ x, const STORAGE* __restrict__ grad_y, STORAGE* __restrict__ grad_w,
       ACC* __restrict__ partial, const Conv conv, int slices, int parts)
{
    __shared__ Slices shared;
    const Tile tile(conv.K, conv.C, conv.groups);
    const Place place = place_of_thread();
    const Steps steps = {conv.x_n, conv.stride_d * conv.x_d, conv.stride_h * conv.x_h, conv.stride_w * conv.x_w,
                         conv.x_c};
    GradientLoader a(grad_y, tile, conv);
    OperandLoader<BLOCK_N, X_LOADS> b(x, steps, tile.group, tile.first_column, conv.C, conv);
    ACC sum[8][8] = {};
    multiply_parts(sum, shared, a, b, place, tile, slices, parts);
    store_sums(sum, place, tile, conv.C, conv, partial, grad_w);
}
#endif
