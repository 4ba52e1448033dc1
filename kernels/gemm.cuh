// gemm.cuh - sum[m][n] = sum over k of a[k][m] * b[k][n], a tile (tile.cuh) per block.
//
//   packed weight (rows k, columns m)   --16-byte copies-->  shared.a[2][kBlockK][BLOCK_M] --+
//                                                                                            +--> 64 sums per thread
//   whatever the loader of b reads      ------------------>  shared.b[2][kBlockK][BLOCK_N] --+
//
// While one half of shared memory is multiplied, the next slice of k is on its way to the other half.
//
// A sum of many terms for few outputs is cut into parts along k. Each part is summed by itself and the parts are
// added in order, by one block (PARTS_INSIDE) or by a block each and the stage REDUCE: the same bits either way.
//
// Set by the host: BLOCK_M, BLOCK_N (see tile.cuh), PARTS_INSIDE (0, 1), LOADS (CHECKED; WHOLE: C is a multiple of
// kBlockK; VECTOR: so it is, and channels are neighbours in memory, in fours that begin at aligned addresses).

#include "tile.cuh"

constexpr int kBlockK = 8;  // a slice

#define CHECKED 0
#define WHOLE 1
#define VECTOR 2

#ifdef ORDER
// Where a sum of the whole product lies within a part: in the order of the output.
DEVICE INDEX offset_in_part(INDEX k, INDEX column, INDEX columns, const Conv& conv)
{
    return ORDER == NHWC ? column * conv.K * conv.groups + k : k * columns + column;
}
#endif

#ifdef BLOCK_M

constexpr int kFours = BLOCK_N * kBlockK / 4 / THREADS;  // groups of four elements of b that a thread loads per slice
static_assert(kFours * 4 * THREADS == BLOCK_N * kBlockK, "all threads load alike");

#ifndef ROW_GAP  // words between the rows of a slice
#define ROW_GAP 0
#endif
constexpr int kPitchM = BLOCK_M + ROW_GAP, kPitchN = BLOCK_N + ROW_GAP;

struct Slices {
    alignas(16) ACC a[2][kBlockK][kPitchM];
    alignas(16) ACC b[2][kBlockK][kPitchN];
};

struct Shared : Slices {
    Columns columns;
};

// The first slice of a part; the last part ends where one more would begin.
DEVICE int first_slice(int part, int parts, int slices)
{
    return static_cast<int>(static_cast<long long>(part) * slices / parts);
}

// Which tile of which product a block computes: blocks count part, group, columns, rows, the last fastest, so
// that neighbours share the columns they read.
struct Tile {
    int part;
    INDEX group, first_row, first_column;

    DEVICE Tile(INDEX rows, INDEX columns, INDEX groups)
    {
        const INDEX blocks_m = divide_up<INDEX>(rows, BLOCK_M), blocks_n = divide_up<INDEX>(columns, BLOCK_N);
        INDEX block = blockIdx.x;
        first_row = block % blocks_m * BLOCK_M;
        block /= blocks_m;
        first_column = block % blocks_n * BLOCK_N;
        block /= blocks_n;
        group = block % groups;
        part = static_cast<int>(block / groups);
    }
};

// A loader is told by seek where to begin, and moves one slice on at every fetch. What a fetch has not brought to
// shared memory by itself, place puts there.

// Loads rows of a matrix whose rows are `pitch` long, a multiple of 4: the packed weight, or gathered columns.
template <int kWidth>
struct RowLoader {
    static constexpr int kChunk = 16 / sizeof(ACC);
    static constexpr int kPerRow = kWidth / kChunk;
    static constexpr int kChunks = kBlockK * kPerRow / THREADS;
    static_assert(kChunks * THREADS == kBlockK * kPerRow, "all threads load alike");

    const ACC* matrix;
    INDEX pitch, first;
    const ACC* from[kChunks];

    DEVICE RowLoader(const ACC* matrix, INDEX pitch, INDEX first) : matrix(matrix), pitch(pitch), first(first) {}

    // Behind the last column the last ones are read again: those sums are never stored.
    DEVICE void seek(int slice)
    {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const INDEX column = smaller<INDEX>(first + column_of(i), pitch - kChunk);
            from[i] = matrix + (static_cast<INDEX>(slice) * kBlockK + row_of(i)) * pitch + column;
        }
    }
    DEVICE void fetch(ACC (*to)[kWidth])
    {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            copy_async_16(&to[row_of(i)][column_of(i)], from[i]);
            from[i] += kBlockK * pitch;
        }
    }
    DEVICE void place(ACC (*)[kWidth]) const {}  // the copies arrive by themselves

    DEVICE static int row_of(int i) { return (threadIdx.x + i * THREADS) / kPerRow; }
    DEVICE static int column_of(int i) { return (threadIdx.x + i * THREADS) % kPerRow * kChunk; }
};

#ifdef LOADS
// Four channels of one pixel, which a thread holds until they are put into shared memory.
struct Channels {
    Four four;

    // Load the four from x on, `step` elements apart; zeros if not inside, and for those from `count` on.
    DEVICE void load(const STORAGE* x, long long step, bool inside, INDEX count)
    {
        four = Four{};
#if LOADS == VECTOR
        if (inside) four = *reinterpret_cast<const Four*>(x);
#else
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (inside && (LOADS == WHOLE || e < count)) four.value[e] = x[e * step];
        }
#endif
    }
    DEVICE void place(ACC (*b)[BLOCK_N], int row, int column) const
    {
#pragma unroll
        for (int e = 0; e < 4; ++e) b[row + e][column] = widen(four.value[e]);
    }
};

// What loaders of b have in common that bring four channels of a pixel at a time.
struct ChannelLoader {
    const STORAGE* x;  // of the group
    const Conv& conv;
    Channels loaded[kFours];

    DEVICE ChannelLoader(const STORAGE* x, const Tile& tile, const Conv& conv)
        : x(x + tile.group * conv.C * conv.x_c), conv(conv) {}

    DEVICE void place(ACC (*b)[BLOCK_N]) const
    {
#pragma unroll
        for (int i = 0; i < kFours; ++i) loaded[i].place(b, row_of(i), column_of(i));
    }
    DEVICE static int row_of(int i) { return (threadIdx.x + i * THREADS) / BLOCK_N * 4; }
    DEVICE static int column_of(int i) { return (threadIdx.x + i * THREADS) % BLOCK_N; }
};
#endif

// Note once for all rows where the columns of the tile lie; the first of all columns is pixel `first`.
DEVICE void locate_columns(Columns& table, INDEX first, INDEX first_column, INDEX columns, const Conv& conv)
{
    for (int i = threadIdx.x; i < BLOCK_N; i += THREADS) {
        const INDEX column = first_column + i;
        table.locate(i, column < columns, find_pixel(first + smaller<INDEX>(column, columns - 1), conv), conv);
    }
}

// Add the products of one slice.
DEVICE void multiply_slice(ACC (&sum)[8][8], const ACC (*a)[kPitchM], const ACC (*b)[kPitchN], const Place& place)
{
#pragma unroll
    for (int k = 0; k < kBlockK; ++k) {
        ACC rows[8], columns[8];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            read_four(&rows[half * 4], &a[k][place.row_of(half * 4)]);
            read_four(&columns[half * 4], &b[k][place.column_of(half * 4)]);
        }
        multiply(sum, rows, columns);
    }
}

// Multiply the slice that lies in one half of shared memory, while the next one comes into the other half.
template <int kHalf, class LoaderA, class LoaderB>
DEVICE void step(ACC (&sum)[8][8], Slices& shared, LoaderA& a, LoaderB& b, const Place& place, bool more)
{
    if (more) {
        a.fetch(shared.a[1 - kHalf]);
        b.fetch(shared.b[1 - kHalf]);
    }
    multiply_slice(sum, shared.a[kHalf], shared.b[kHalf], place);
    if (more) {
        a.place(shared.a[1 - kHalf]);
        b.place(shared.b[1 - kHalf]);
    }
    wait_async();
    __syncthreads();
}

// Sum over the slices from first to last, the last not included.
template <class LoaderA, class LoaderB>
DEVICE void multiply_tile(ACC (&sum)[8][8], Slices& shared, LoaderA& a, LoaderB& b, const Place& place, int first,
                          int last)
{
    a.seek(first);
    b.seek(first);
    a.fetch(shared.a[0]);
    b.fetch(shared.b[0]);
    a.place(shared.a[0]);
    b.place(shared.b[0]);
    wait_async();
    __syncthreads();
    for (int left = last - first; left > 0; left -= 2) {
        step<0>(sum, shared, a, b, place, left > 1);
        if (left > 1) step<1>(sum, shared, a, b, place, left > 2);
    }
}

// Sum all parts, each by itself, or only the one that is this block's.
template <class LoaderA, class LoaderB>
DEVICE void multiply_parts(ACC (&total)[8][8], Slices& shared, LoaderA& a, LoaderB& b, const Place& place,
                           const Tile& tile, int slices, int parts)
{
#if PARTS_INSIDE
    for (int part = 0; part < parts; ++part) {
        ACC sum[8][8] = {};
        multiply_tile(sum, shared, a, b, place, first_slice(part, parts, slices), first_slice(part + 1, parts, slices));
#pragma unroll
        for (int i = 0; i < 64; ++i) total[i / 8][i % 8] += sum[i / 8][i % 8];
    }
#else
    const int first = first_slice(tile.part, parts, slices), last = first_slice(tile.part + 1, parts, slices);
    multiply_tile(total, shared, a, b, place, first, last);
#endif
}

#ifdef ACTIVATION
// Write the sums of one part, for the stage REDUCE.
DEVICE void store_part(const ACC (&sum)[8][8], const Place& place, const Tile& tile, INDEX columns, const Conv& conv,
                       ACC* partial)
{
    ACC* part = partial + tile.part * (conv.K * conv.groups * columns);
#pragma unroll
    for (int number = 0; number < 16; ++number) {
        const Quad quad(number);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const INDEX row = tile.first_row + place.row_of(quad.i[e]);
            const INDEX column = tile.first_column + place.column_of(quad.j[e]);
            if (row < conv.K && column < columns) {
                part[offset_in_part(tile.group * conv.K + row, column, columns, conv)] = sum[quad.i[e]][quad.j[e]];
            }
        }
    }
}
#endif  // ACTIVATION
#endif  // BLOCK_M

#ifdef STAGE_REDUCE
// Add the parts of each sum in their order and finish it: one thread per output element.
KERNEL(const ACC* __restrict__ partial, const STORAGE* __restrict__ bias, const STORAGE* __restrict__ residual,
       STORAGE* __restrict__ y, const Conv conv, int parts)
{
    const INDEX columns = conv.N * conv.O * conv.P * conv.Q, channels = conv.K * conv.groups;
    const long long element = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (element >= static_cast<long long>(channels) * columns) return;
    const INDEX k = ORDER == NHWC ? element % channels : element / columns;
    const INDEX column = ORDER == NHWC ? element / channels : element % columns;
    ACC sum = 0;
    for (int part = 0; part < parts; ++part) {
        sum += partial[part * (channels * columns) + offset_in_part(k, column, columns, conv)];
    }
    const Pixel pixel = find_pixel(column, conv);
    const Epilogue epilogue{conv, bias, residual, y};
    const INDEX residual_at = offset_in_residual(pixel, conv) + k * conv.r_k;
    y[offset_in_y(pixel, conv) + k * conv.y_k] = epilogue.finish(sum, k, residual_at);
}
#endif
