// tile.cuh - 64 sums per thread, and what becomes of them: the tile that all matrix-like kernels compute.
//
//   a (rows: output channels)   b (columns: pixels)     a tile is BLOCK_M x BLOCK_N, a warp computes 32 x 64 of it
//
//   lane: rows 4 * (lane / 8) + {0..3, 16..19}, columns 4 * (lane % 8) + {0..3, 32..35}
//   so the 8 lanes that shared memory serves together read one 16-byte word of a, and 128 bytes in a row of b.
//   With BLOCK_M 8, for groups of few channels, a warp computes 8 x 256: rows 0..7, columns 4 * lane + {0..3, 128 ..}.
//
// Set by the host: BLOCK_M (8, 32, 64, 128), BLOCK_N (a multiple of what a warp computes).

#include "common.cuh"

// Add the products of one k.
DEVICE void multiply(ACC (&sum)[8][8], const ACC (&rows)[8], const ACC (&columns)[8])
{
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = fma(rows[i], columns[j], sum[i][j]);
    }
}

#if defined(BLOCK_M) && BLOCK_M == 8
constexpr int kLanesM = 1;
#else
constexpr int kLanesM = 4;
#endif
constexpr int kLanesN = 32 / kLanesM;
constexpr int kWarpM = 8 * kLanesM, kWarpN = 8 * kLanesN;  // what a warp computes

// Where a thread's sums lie in a tile, of which its warp's part begins at a row and a column.
struct Place {
    int row, column;  // of sum[0][0]

    DEVICE Place(int warp_row, int warp_column)
    {
        const int lane = threadIdx.x % 32;
        row = warp_row + lane / kLanesN * 4;
        column = warp_column + lane % kLanesN * 4;
    }
    DEVICE int row_of(int i) const { return row + i % 4 + i / 4 * (kWarpM / 2); }
    DEVICE int column_of(int j) const { return column + j % 4 + j / 4 * (kWarpN / 2); }
};

#ifdef BLOCK_M
constexpr int kWarpsN = BLOCK_N / kWarpN;
static_assert(BLOCK_M % kWarpM == 0 && BLOCK_N % kWarpN == 0, "a tile is made of what warps compute");
static_assert(THREADS == 32 * (BLOCK_M / kWarpM) * kWarpsN, "every warp has its part of the tile");

DEVICE Place place_of_thread()
{
    const int warp = threadIdx.x / 32;
    return Place(warp / kWarpsN * kWarpM, warp % kWarpsN * kWarpN);
}

// Where the pixels lie that the columns of a tile stand for.
struct Columns {
    INDEX y_at[BLOCK_N];         // in y; kNowhere behind the last one
    INDEX residual_at[BLOCK_N];  // in the residual

    DEVICE void locate(int column, bool exists, const Pixel& pixel, const Conv& conv)
    {
        y_at[column] = exists ? offset_in_y(pixel, conv) : kNowhere;
        residual_at[column] = exists ? offset_in_residual(pixel, conv) : kNowhere;
    }
};

#ifdef ACTIVATION
// The four sums that a thread stores together: neighbours in the output, if its memory has the order ORDER.
struct Quad {
    int i[4], j[4];

    DEVICE explicit Quad(int quad)
    {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            i[e] = ORDER == NHWC ? quad % 2 * 4 + e : quad / 2;
            j[e] = ORDER == NHWC ? quad / 2 : quad % 2 * 4 + e;
        }
    }
};

// Finish a tile and write it to y.
DEVICE void store_tile(const ACC (&sum)[8][8], const Columns& columns, const Place& place, INDEX group,
                       INDEX first_row, const Conv& conv, const Epilogue& epilogue)
{
#pragma unroll
    for (int number = 0; number < 16; ++number) {
        const Quad quad(number);
        INDEX at[4];
        Four four;
        int stored = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const INDEX row = first_row + place.row_of(quad.i[e]), k = group * conv.K + row;
            const int column = place.column_of(quad.j[e]);
            at[e] = kNowhere;
            if (row < conv.K && columns.y_at[column] != kNowhere) {
                at[e] = columns.y_at[column] + k * conv.y_k;
                const INDEX residual_at = columns.residual_at[column] + k * conv.r_k;
                four.value[e] = epilogue.finish(sum[quad.i[e]][quad.j[e]], k, residual_at);
                ++stored;
            }
        }
        store_four(epilogue.y, at, four, stored);
    }
}
#endif  // ACTIVATION
#endif  // BLOCK_M

#ifdef STAGE_PACK
constexpr int kSide = 32;  // a block turns a square of weights: rows of it are read, columns written

// Lay the weight out as the matrix a: packed[group][chunk, t, r, s, c of the chunk][k], zeros where there is nothing.
//
// A chunk is `together` channels; pitch is K rounded up to a multiple of 4.
KERNEL(const STORAGE* __restrict__ weight, ACC* __restrict__ packed, const Conv conv, int together, INDEX rows,
       INDEX pitch)
{
    __shared__ ACC square[kSide][kSide + 1];  // + 1: a column lies in 32 banks
    const INDEX across = divide_up<INDEX>(pitch, kSide), along = divide_up<INDEX>(rows, kSide);
    const INDEX first_k = blockIdx.x % across * kSide, first = blockIdx.x / across % along * kSide;
    const INDEX group = blockIdx.x / across / along, taps = conv.T * conv.R * conv.S;
    const int lane = threadIdx.x % kSide;
    for (int i = threadIdx.x / kSide; i < kSide; i += THREADS / kSide) {
        const INDEX k = first_k + i, c = (first + lane) / taps, tap = (first + lane) % taps;
        const INDEX s = tap % conv.S, r = tap / conv.S % conv.R, t = tap / conv.S / conv.R;
        square[i][lane] = 0;
        if (k < conv.K && c < conv.C) {
            const INDEX of_k = (group * conv.K + k) * conv.w_k, of_c = c * conv.w_c;
            square[i][lane] = widen(weight[of_k + of_c + t * conv.w_t + r * conv.w_r + s * conv.w_s]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x / kSide; i < kSide; i += THREADS / kSide) {
        const INDEX k = first_k + lane, c = (first + i) / taps, tap = (first + i) % taps;
        const INDEX row = (c / together * taps + tap) * together + c % together;
        if (k < pitch && first + i < rows) packed[(group * rows + row) * pitch + k] = square[lane][i];
    }
}
#endif
