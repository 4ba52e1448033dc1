// winograd.cu - convolution with fewer multiplications: Winograd's minimal filtering F(M x M, 3 x 3).
//
//   M x M outputs = A^T [sum over c of U * V] A,   U = G w G^T,   V = B^T d B,   d: (M + 2) x (M + 2) inputs
//   Along an axis on which the filter has one tap nothing is transformed: F(M, 2) to F(M, 5) for rows and columns.
//   Nor is depth: a tile lies in one plane of y, and the T planes of x that its windows meet count as more channels.
//   So do the phases of a stride: even rows of x meet even rows of w alone, with stride 1 from one to the next.
//
//   w --FILTER--> U[e][group][t, c, phase][k] ----+
//                                                 +--MULTIPLY (gemm.cuh)--> products[e][k][tile] --OUTPUT--> y
//   x --INPUT---> V[e][group][t, c, phase][tile] -+
//
//   x --B^T d B in registers--> shared V --+
//                                          +--FUSED: 2 x 64 sums per thread--> shared products --A^T . A--> y
//   U --16-byte copies--------> shared U --+
//
//   e counts the places in a tile of inputs; each is a matrix product of its own. Tiles count n, planes, rows, columns.
//
// Set by fastconv/gpu/winograd.py: FILTER_R, FILTER_S, STRIDE_H, STRIDE_W (which leave 2 to 5 taps in a phase, or 1
// where nothing is transformed), WINOGRAD_M (2, 4; 1 for 1 x 1, which some parts of a gradient are) and what
// fastconv/winograd_math.py makes for them, WINOGRAD_BT, WINOGRAD_G, WINOGRAD_AT; for MULTIPLY only BLOCK_M and BLOCK_N
// (see tile.cuh); for FUSED BLOCK_TILES and BLOCK_CHANNELS too.

#ifdef STAGE_INPUT
#define RESIDENT 1  // left to itself, ptxas spills a register or two so that a block more is resident
#endif
#include "gemm.cuh"

#ifdef WINOGRAD_M
constexpr int kPhases = STRIDE_H * STRIDE_W;
constexpr int kTapsH = (FILTER_R + STRIDE_H - 1) / STRIDE_H;  // of a phase
constexpr int kTapsW = (FILTER_S + STRIDE_W - 1) / STRIDE_W;
constexpr int kTaps = kTapsH > kTapsW ? kTapsH : kTapsW;
constexpr int kOut = WINOGRAD_M, kIn = kOut + kTaps - 1;                 // of a transformed axis
constexpr int kOutH = kTapsH > 1 ? kOut : 1, kInH = kOutH + kTapsH - 1;  // a tile has kOutH x kOutW outputs
constexpr int kOutW = kTapsW > 1 ? kOut : 1, kInW = kOutW + kTapsW - 1;  // and kInH x kInW inputs in each phase
constexpr int kPlaces = kInH * kInW;

// Multiply a matrix of constants and a vector: zeros and ones cost nothing once the loops are unrolled.
template <int kRows, int kColumns>
DEVICE void apply(ACC (&to)[kRows], const ACC (&matrix)[kRows][kColumns], const ACC (&from)[kColumns])
{
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        bool is_first = true;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            if (matrix[i][j] == 0) continue;
            to[i] = is_first ? matrix[i][j] * from[j] : fma(matrix[i][j], from[j], to[i]);
            is_first = false;
        }
    }
}

// An axis of one element is not transformed.
template <int kRows, int kColumns>
DEVICE void apply(ACC (&to)[1], const ACC (&)[kRows][kColumns], const ACC (&from)[1])
{
    to[0] = from[0];
}

// Nor is anything of a filter of 1 x 1; without this the compiler could take either of the two above.
DEVICE void apply(ACC (&to)[1], const ACC (&)[1][1], const ACC (&from)[1]) { to[0] = from[0]; }

// Transform a tile: matrix * from * matrix^T.
template <int kToH, int kToW, int kRows, int kColumns, int kFromH, int kFromW>
DEVICE void transform(ACC (&to)[kToH][kToW], const ACC (&matrix)[kRows][kColumns], const ACC (&from)[kFromH][kFromW])
{
    ACC half[kToH][kFromW];
#pragma unroll
    for (int j = 0; j < kFromW; ++j) {
        ACC column[kFromH], transformed[kToH];
#pragma unroll
        for (int i = 0; i < kFromH; ++i) column[i] = from[i][j];
        apply(transformed, matrix, column);
#pragma unroll
        for (int i = 0; i < kToH; ++i) half[i][j] = transformed[i];
    }
#pragma unroll
    for (int i = 0; i < kToH; ++i) apply(to[i], matrix, half[i]);
}

// The first output pixel of a tile.
DEVICE Pixel find_tile(INDEX tile, const Conv& conv)
{
    const INDEX across = divide_up<INDEX>(conv.Q, kOutW), down = divide_up<INDEX>(conv.P, kOutH);
    const INDEX plane = tile / across / down;
    return {plane / conv.O, plane % conv.O, tile / across % down * kOutH, tile % across * kOutW};
}

// The plane of x that tap t meets from a tile on, which may lie in the padding.
DEVICE INDEX find_plane(const Pixel& tile, INDEX t, const Conv& conv)
{
    return tile.o * conv.stride_d + t * conv.dilation_d - conv.padding_d;
}

DEVICE INDEX count_tiles(const Conv& conv)
{
    return conv.N * conv.O * divide_up<INDEX>(conv.P, kOutH) * divide_up<INDEX>(conv.Q, kOutW);
}
#endif

// Which channel of which tile a thread handles, where one thread does one. Neighbours in memory go to neighbouring
// threads: tiles, or 4 channels of 8 tiles, because U, V and the products have neighbouring tiles in either order.
struct Item {
    INDEX channel, tile;

    DEVICE Item(INDEX channels, bool is_last)
    {
        const int run = is_last ? 8 : 32;
        const long long thread = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
        channel = thread / run % channels;
        tile = thread / run / channels * run + thread % run;
    }
};

#ifdef STAGE_FILTER
// U = G w G^T with zeros up to `rows` (t, c, phase) and `pitch` output channels: one thread per row and output channel.
KERNEL(const STORAGE* __restrict__ weight, ACC* __restrict__ U, const Conv conv, INDEX rows, INDEX pitch)
{
    constexpr ACC kG[kIn][kTaps] = WINOGRAD_G;
    const long long thread = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    const long long size = static_cast<long long>(conv.groups) * rows * pitch;
    if (thread >= size) return;
    const INDEX k = thread % pitch, row = thread / pitch % rows, group = thread / pitch / rows;
    const bool exists = k < conv.K && row < conv.T * conv.C * kPhases;
    const INDEX t = smaller(row / kPhases / conv.C, conv.T - 1), c = row / kPhases % conv.C;
    const int phase_h = row % kPhases / STRIDE_W, phase_w = row % STRIDE_W;
    weight += (group * conv.K + smaller(k, conv.K - 1)) * conv.w_k + c * conv.w_c + t * conv.w_t;
    ACC w[kTapsH][kTapsW], u[kInH][kInW];
#pragma unroll
    for (int i = 0; i < kTapsH * kTapsW; ++i) {
        const int r = i / kTapsW * STRIDE_H + phase_h, s = i % kTapsW * STRIDE_W + phase_w;
        const bool is_tap = exists && r < FILTER_R && s < FILTER_S;
        w[i / kTapsW][i % kTapsW] = is_tap ? widen(weight[r * conv.w_r + s * conv.w_s]) : ACC(0);
    }
    transform(u, kG, w);
#pragma unroll
    for (int e = 0; e < kPlaces; ++e) U[e * size + thread] = u[e / kInW][e % kInW];
}
#endif

#ifdef STAGE_INPUT
// V = B^T d B of `tiles` tiles, counted from tile `first` on, with rows of zeros up to a multiple of kBlockK per group.
KERNEL(const STORAGE* __restrict__ x, ACC* __restrict__ V, const Conv conv, INDEX first, INDEX tiles, int slices)
{
    constexpr ACC kBT[kIn][kIn] = WINOGRAD_BT;
    const INDEX pitch = divide_up<INDEX>(tiles, 4) * 4, rows = static_cast<INDEX>(slices) * kBlockK;
    const INDEX used = conv.T * conv.C * kPhases;  // rows of a group
    const Item item(conv.groups * used, ORDER == NHWC);
    if (item.tile >= pitch) return;
    const INDEX group = item.channel / used, row = item.channel % used;
    const INDEX channel = group * conv.C + row / kPhases % conv.C;
    const int phase_h = row % kPhases / STRIDE_W, phase_w = row % STRIDE_W;
    const Pixel pixel = find_tile(smaller<INDEX>(first + item.tile, count_tiles(conv) - 1), conv);
    const INDEX depth = find_plane(pixel, row / kPhases / conv.C, conv);
    const STORAGE* plane = x + (pixel.n * conv.x_n + channel * conv.x_c + depth * conv.x_d);
    ACC d[kInH][kInW], v[kInH][kInW];
#pragma unroll
    for (int i = 0; i < kInH; ++i) {
        const INDEX h = (pixel.p + i) * STRIDE_H + phase_h - conv.padding_h;
#pragma unroll
        for (int j = 0; j < kInW; ++j) {
            const INDEX w = (pixel.q + j) * STRIDE_W + phase_w - conv.padding_w;
            const bool inside = is_within(depth, conv.D) && is_within(h, conv.H) && is_within(w, conv.W);
            d[i][j] = inside ? widen(plane[h * conv.x_h + w * conv.x_w]) : ACC(0);
        }
    }
    transform(v, kBT, d);
    const INDEX size = conv.groups * rows * pitch;
    ACC* to = V + ((group * rows + row) * pitch + item.tile);
#pragma unroll
    for (int e = 0; e < kPlaces; ++e) to[e * size] = v[e / kInW][e % kInW];
    if (row < used - 1) return;
    for (INDEX rest = used; rest < rows; ++rest) {
        to += pitch;
        for (int e = 0; e < kPlaces; ++e) to[e * size] = 0;
    }
}
#endif

#ifdef STAGE_MULTIPLY
// The products of all places and groups, each a product of matrices by itself.
KERNEL(const ACC* __restrict__ U, const ACC* __restrict__ V, ACC* __restrict__ products, const Conv conv, int places,
       INDEX pitch, int slices)
{
    __shared__ Shared shared;
    const Tile tile(conv.K, pitch, places * conv.groups);
    const Place place = place_of_thread();
    const INDEX rows = static_cast<INDEX>(slices) * kBlockK, pitch_k = divide_up<INDEX>(conv.K, 4) * 4;
    RowLoader<BLOCK_M> a(U + tile.group * rows * pitch_k, pitch_k, tile.first_row);
    RowLoader<BLOCK_N> b(V + tile.group * rows * pitch, pitch, tile.first_column);
    ACC sum[8][8] = {};
    multiply_tile(sum, shared, a, b, place, 0, slices);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const INDEX row = tile.first_row + place.row_of(i);
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            const INDEX column = tile.first_column + place.column_of(j);
            if (row >= conv.K || column >= pitch) continue;
            const AccFour four = {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]};
            *reinterpret_cast<AccFour*>(products + ((tile.group * conv.K + row) * pitch + column)) = four;
        }
    }
}
#endif

#ifdef ACTIVATION
// Finish the outputs of a tile, the sums of channel k from a pixel on, and write those that exist.
DEVICE void store_outputs(const ACC (&sum)[kOutH][kOutW], const Pixel& first, INDEX k, const Conv& conv,
                          const Epilogue& epilogue)
{
#pragma unroll
    for (int i = 0; i < kOutH; ++i) {
        INDEX at[4] = {kNowhere, kNowhere, kNowhere, kNowhere};
        Four four;
        int stored = 0;
#pragma unroll
        for (int j = 0; j < kOutW; ++j) {
            const Pixel pixel = {first.n, first.o, first.p + i, first.q + j};
            if (pixel.p >= conv.P || pixel.q >= conv.Q) continue;
            at[j] = offset_in_y(pixel, conv) + k * conv.y_k;
            four.value[j] = epilogue.finish(sum[i][j], k, offset_in_residual(pixel, conv) + k * conv.r_k);
            ++stored;
        }
        store_four(epilogue.y, at, four, stored);
    }
}
#endif

#ifdef STAGE_OUTPUT
// y = A^T products A, of `tiles` tiles counted from tile `first` on.
KERNEL(const ACC* __restrict__ products, const STORAGE* __restrict__ bias, const STORAGE* __restrict__ residual,
       STORAGE* __restrict__ y, const Conv conv, INDEX first, INDEX tiles)
{
    constexpr ACC kAT[kOut][kIn] = WINOGRAD_AT;
    const INDEX pitch = divide_up<INDEX>(tiles, 4) * 4, channels = conv.groups * conv.K;
    const Item item(channels, ORDER == NHWC);
    if (item.tile >= tiles) return;
    ACC product[kInH][kInW], sum[kOutH][kOutW];
    const ACC* from = products + (item.channel * pitch + item.tile);
#pragma unroll
    for (int e = 0; e < kPlaces; ++e) product[e / kInW][e % kInW] = from[e * (channels * pitch)];
    transform(sum, kAT, product);
    store_outputs(sum, find_tile(first + item.tile, conv), item.channel, conv, Epilogue{conv, bias, residual, y});
}
#endif

#ifdef STAGE_FUSED
static_assert(kOutH == 2 && kInW == 4 && kPhases == 1, "16 places");
static_assert(BLOCK_TILES == 32 && BLOCK_CHANNELS == 64 && THREADS == 256, "each warp sums two of them");

constexpr int kSlice = 4;  // channels that are in shared memory at a time, twice

struct SharedTiles {
    alignas(16) ACC U[2][kPlaces][kSlice][BLOCK_CHANNELS];
    alignas(16) ACC V[2][kPlaces][kSlice][BLOCK_TILES];
};

// Where a tile lies in shared V, and which tile lies there: of sixteen, rows and columns of four change places. The
// lanes that finish tiles together then have neighbouring ones.
DEVICE int swap_place(int tile) { return tile / 16 * 16 + tile % 4 * 4 + tile / 4 % 4; }

// Loads inputs of one tile and channel, and transforms them to one half of V: two of its four rows need three of d's.
struct HalfLoader {
    const STORAGE* x;
    const Conv& conv;
    INDEX at, c;      // of the first input in the next slice, and its channel
    unsigned inside;  // a bit for each input that is not padding
    int half, channel, tile;
    STORAGE d[3][4];

    DEVICE HalfLoader(const STORAGE* x, INDEX first_tile, INDEX group, const Conv& conv) : x(x), conv(conv), inside(0)
    {
        half = threadIdx.x / (kSlice * BLOCK_TILES);
        channel = threadIdx.x / BLOCK_TILES % kSlice;
        tile = threadIdx.x % BLOCK_TILES;
        const Pixel pixel = find_tile(smaller<INDEX>(first_tile + tile, count_tiles(conv) - 1), conv);
        const INDEX d = find_plane(pixel, 0, conv), h = pixel.p + half - conv.padding_h, w = pixel.q - conv.padding_w;
        c = channel;
        at = pixel.n * conv.x_n + (group * conv.C + c) * conv.x_c + d * conv.x_d + h * conv.x_h + w * conv.x_w;
        if (!is_within(d, conv.D)) return;
#pragma unroll
        for (int i = 0; i < 12; ++i) {
            inside |= static_cast<unsigned>(is_within(h + i / 4, conv.H) && is_within(w + i % 4, conv.W)) << i;
        }
    }
    DEVICE void fetch()
    {
        const unsigned wanted = c < conv.C ? inside : 0;
#pragma unroll
        for (int i = 0; i < 12; ++i) {
            d[i / 4][i % 4] = wanted >> i & 1 ? x[at + i / 4 * conv.x_h + i % 4 * conv.x_w] : STORAGE{};
        }
        c += kSlice;
        at += kSlice * conv.x_c;
    }
    DEVICE void place(ACC (*V)[kSlice][BLOCK_TILES]) const
    {
        if (half == 0) {
            place_half<0>(V);
        } else {
            place_half<1>(V);
        }
    }
    template <int kHalf>
    DEVICE void place_half(ACC (*V)[kSlice][BLOCK_TILES]) const
    {
        constexpr ACC kBT[kIn][kIn] = WINOGRAD_BT;
        static_assert(kBT[2 * kHalf][3 - 3 * kHalf] == 0 && kBT[2 * kHalf + 1][3 - 3 * kHalf] == 0, "three rows do");
        ACC rows[2][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            ACC column[4] = {}, transformed[4];
#pragma unroll
            for (int i = 0; i < 3; ++i) column[kHalf + i] = widen(d[i][j]);
            apply(transformed, kBT, column);
            rows[0][j] = transformed[2 * kHalf];
            rows[1][j] = transformed[2 * kHalf + 1];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            ACC v[4];
            apply(v, kBT, rows[i]);
#pragma unroll
            for (int j = 0; j < 4; ++j) V[(2 * kHalf + i) * 4 + j][channel][swap_place(tile)] = v[j];
        }
    }
};

// Copy a slice of U, which points to its first channel; behind the last output channel the last ones come again.
DEVICE void load_filters(ACC (*to)[kSlice][BLOCK_CHANNELS], const ACC* U, INDEX size, INDEX pitch, INDEX first_k)
{
    constexpr int kPerRow = BLOCK_CHANNELS / 4, kTogether = THREADS / (kPerRow * kSlice);
    const int channel = threadIdx.x / kPerRow % kSlice, column = threadIdx.x % kPerRow * 4;
    const ACC* from = U + (channel * pitch + smaller<INDEX>(first_k + column, pitch - 4));
#pragma unroll
    for (int i = 0; i < kPlaces; i += kTogether) {
        const int e = i + threadIdx.x / (kPerRow * kSlice);
        copy_async_16(&to[e][channel][column], from + e * size);
    }
}

// All stages at once for 32 tiles and 64 output channels: each warp sums the products of two places.
KERNEL(const STORAGE* __restrict__ x, const ACC* __restrict__ U, const STORAGE* __restrict__ bias,
       const STORAGE* __restrict__ residual, STORAGE* __restrict__ y, const Conv conv, INDEX rows)
{
    __shared__ SharedTiles shared;
    constexpr ACC kAT[kOut][kIn] = WINOGRAD_AT;
    const INDEX tiles = count_tiles(conv), pitch = divide_up<INDEX>(conv.K, 4) * 4, size = conv.groups * rows * pitch;
    const INDEX blocks_k = divide_up<INDEX>(conv.K, BLOCK_CHANNELS), strips = divide_up<INDEX>(tiles, BLOCK_TILES);
    const INDEX block = blockIdx.x, first_k = block % blocks_k * BLOCK_CHANNELS;
    const INDEX first_tile = block / blocks_k % strips * BLOCK_TILES, group = block / blocks_k / strips;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Place place(0, 0);
    HalfLoader loader(x, first_tile, group, conv);
    U += group * rows * pitch;
    ACC sum[2][8][8] = {};
    loader.fetch();
    load_filters(shared.U[0], U, size, pitch, first_k);
    loader.place(shared.V[0]);
    wait_async();
    __syncthreads();
    const int slices = static_cast<int>(divide_up<INDEX>(conv.C, kSlice));
    for (int slice = 0; slice < slices; ++slice) {
        const int now = slice % 2;
        const bool more = slice + 1 < slices;
        if (more) {
            U += kSlice * pitch;
            loader.fetch();
            load_filters(shared.U[1 - now], U, size, pitch, first_k);
        }
#pragma unroll
        for (int i = 0; i < 2 * kSlice; ++i) {
            const int e = 2 * warp + i % 2;
            ACC inputs[8], filters[8];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                read_four(&inputs[half * 4], &shared.V[now][e][i / 2][place.row_of(half * 4)]);
                read_four(&filters[half * 4], &shared.U[now][e][i / 2][place.column_of(half * 4)]);
            }
            multiply(sum[i % 2], inputs, filters);
        }
        if (more) loader.place(shared.V[1 - now]);
        wait_async();
        __syncthreads();
    }
    // Each warp has two of a tile's sixteen products: through shared memory a thread gets all of one tile and channel.
    auto* products = reinterpret_cast<ACC(*)[8][32]>(shared.U);
    const INDEX tile = first_tile + swap_place(place.row_of(warp));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            products[2 * warp][i][lane] = sum[0][i][j];
            products[2 * warp + 1][i][lane] = sum[1][i][j];
        }
        __syncthreads();
        ACC product[4][4], outputs[2][2];
#pragma unroll
        for (int e = 0; e < kPlaces; ++e) product[e / 4][e % 4] = products[e][warp][lane];
        __syncthreads();
        const INDEX row = first_k + place.column_of(j);
        if (tile >= tiles || row >= conv.K) continue;
        transform(outputs, kAT, product);
        const Epilogue epilogue{conv, bias, residual, y};
        store_outputs(outputs, find_tile(tile, conv), group * conv.K + row, conv, epilogue);
    }
}
#endif
