// direct.cu - convolution by its definition: a patch of the input in shared memory serves all taps of the filter.
//
//   x: `channels` planes of a patch  --load_patch-->  shared.patch[channel][row][column]  --+
//                                                                                           +--> 64 sums per thread
//   packed weight, the same taps     --load_rows--->  shared.rows[r, s, channel][BLOCK_M] --+
//
//   tile: BLOCK_M output channels of BLOCK_P rows of BLOCK_Q pixels; a thread's share of it as in tile.cuh.
//   A stage is `channels` channels times `taps_r` x `taps_s` taps, as much as fits: all taps, a row of them, or one.
//
// Set by fastconv/gpu/direct.py: BLOCK_M (8, 32, 64), BLOCK_P, BLOCK_Q, and FILTER_S with STRIDE_W: filter width and
// stride if the inputs of four neighbouring pixels are kept in registers for a whole row of taps; FILTER_S 0: any.

#define BLOCK_N (BLOCK_P * BLOCK_Q)
#include "tile.cuh"
#include "patch.cuh"

#ifdef STAGE_CONVOLVE
static_assert(BLOCK_Q % 4 == 0, "the four neighbouring pixels of a thread lie in one row");

constexpr int kRows = 16384 / (64 * sizeof(ACC));   // the host makes stages that fit
constexpr int kPatch = 24576 / sizeof(ACC);

struct SharedPatch {
    alignas(16) ACC rows[kRows][BLOCK_M];
    alignas(16) ACC patch[kPatch];
    Columns columns;
};

// What a block computes: blocks count n, group, o, strips of rows, strips of columns, channels, the last fastest.
struct PatchTile {
    INDEX n, group, o, p, q, first_row;

    DEVICE explicit PatchTile(const Conv& conv)
    {
        const INDEX rows = divide_up<INDEX>(conv.K, BLOCK_M), width = divide_up<INDEX>(conv.Q, BLOCK_Q);
        const INDEX height = divide_up<INDEX>(conv.P, BLOCK_P);
        INDEX block = blockIdx.x;
        first_row = block % rows * BLOCK_M;
        block /= rows;
        q = block % width * BLOCK_Q;
        block /= width;
        p = block % height * BLOCK_P;
        block /= height;
        o = block % conv.O;
        block /= conv.O;
        group = block % conv.groups;
        n = block / conv.groups;
    }
    DEVICE void locate(Columns& columns, const Conv& conv) const
    {
        for (int i = threadIdx.x; i < BLOCK_N; i += THREADS) {
            const Pixel pixel = {n, o, p + i / BLOCK_Q, q + i % BLOCK_Q};
            columns.locate(i, pixel.p < conv.P && pixel.q < conv.Q, pixel, conv);
        }
    }
};

// Load the planes of `channels` channels from x, which points to the first of them in plane d; zeros outside.
DEVICE void load_patch(ACC* patch, const STORAGE* x, int channels, const Axis& rows, const Axis& columns, INDEX pitch,
                       INDEX first_h, INDEX first_w, bool is_plane, const Conv& conv)
{
    const int area = static_cast<int>(rows.extent * pitch);
    for (int i = threadIdx.x; i < channels * area; i += THREADS) {
        const int c = i / area, row = i % area / static_cast<int>(pitch), column = i % static_cast<int>(pitch);
        const INDEX h = first_h + row * rows.input_step, w = first_w + column * columns.input_step;
        patch[i] = element_of(x + c * conv.x_c, h, w, is_plane, conv);
    }
}

// Load `count` rows of the packed weight.
DEVICE void load_rows(ACC (*rows)[BLOCK_M], const ACC* packed, int count, INDEX pitch, INDEX first_row)
{
    constexpr int kChunk = 16 / sizeof(ACC), kPerRow = BLOCK_M / kChunk;
    for (int i = threadIdx.x; i < count * kPerRow; i += THREADS) {
        const int row = i / kPerRow, column = i % kPerRow * kChunk;
        copy_async_16(&rows[row][column], packed + row * pitch + smaller<INDEX>(first_row + column, pitch - kChunk));
    }
}

// Add the products of a row of taps of one channel.
//
// line   the patch's row that the first tap of the row sees, of a thread's first four pixels; `apart` elements on lies
//        that of the second four
// rows   the weights' rows of the taps, `apart_rows` apart
DEVICE void multiply_taps(ACC (&sum)[8][8], const ACC* line, INDEX apart, const ACC (*rows)[BLOCK_M], int taps,
                          int apart_rows, const Axis& columns, const Place& place)
{
#if FILTER_S
    constexpr int kWindow = (3 * STRIDE_W + FILTER_S + 3) / 4 * 4;
    ACC window[2][kWindow];
#pragma unroll
    for (int i = 0; i < kWindow; i += 4) {
        read_four(&window[0][i], line + i);
        read_four(&window[1][i], line + apart + i);
    }
#pragma unroll
    for (int s = 0; s < FILTER_S; ++s) {
#else
    for (int s = 0; s < taps; ++s) {
#endif
        ACC weights[8], pixels[8];
        read_four(&weights[0], &rows[s * apart_rows][place.row_of(0)]);
        read_four(&weights[4], &rows[s * apart_rows][place.row_of(4)]);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#if FILTER_S
            pixels[j] = window[j / 4][j % 4 * STRIDE_W + s];
#else
            pixels[j] = line[j / 4 * apart + j % 4 * columns.pixel_step + s * columns.tap_step];
#endif
        }
        multiply(sum, weights, pixels);
    }
}

KERNEL(const STORAGE* __restrict__ x, const ACC* __restrict__ packed, const STORAGE* __restrict__ bias,
       const STORAGE* __restrict__ residual, STORAGE* __restrict__ y, const Conv conv, int channels, int taps_r,
       int taps_s)
{
    __shared__ SharedPatch shared;
    const PatchTile tile(conv);
    const Place place = place_of_thread();
    const Axis rows(BLOCK_P, taps_r, conv.stride_h, conv.dilation_h);
    const Axis columns(BLOCK_Q, taps_s, conv.stride_w, conv.dilation_w);
    const INDEX pitch = divide_up<INDEX>(columns.extent, 4) * 4, row_pitch = divide_up<INDEX>(conv.K, 4) * 4;
    const auto pixel_at = [&](int column) {
        return column / BLOCK_Q * rows.pixel_step * pitch + column % BLOCK_Q * columns.pixel_step;
    };
    const INDEX first_at = pixel_at(place.column_of(0)), apart = pixel_at(place.column_of(4)) - first_at;
    const INDEX chunks = divide_up<INDEX>(conv.C, channels);
    packed += tile.group * chunks * channels * conv.T * conv.R * conv.S * row_pitch;
    tile.locate(shared.columns, conv);
    ACC sum[8][8] = {};
    for (INDEX stage = 0; stage < chunks * conv.T * (conv.R / taps_r) * (conv.S / taps_s); ++stage) {
        INDEX at = stage;
        const INDEX s = at % (conv.S / taps_s);
        at /= conv.S / taps_s;
        const INDEX r = at % (conv.R / taps_r);
        at /= conv.R / taps_r;
        const INDEX t = at % conv.T, c = at / conv.T * channels;
        const int present = static_cast<int>(smaller<INDEX>(channels, conv.C - c));
        const INDEX d = tile.o * conv.stride_d - conv.padding_d + t * conv.dilation_d;
        const INDEX h = tile.p * conv.stride_h - conv.padding_h + r * conv.dilation_h;
        const INDEX w = tile.q * conv.stride_w - conv.padding_w + s * conv.dilation_w;
        const STORAGE* planes = x + (tile.n * conv.x_n + (tile.group * conv.C + c) * conv.x_c + d * conv.x_d);
        __syncthreads();  // nobody reads the stage before any more
        load_patch(shared.patch, planes, present, rows, columns, pitch, h, w, is_within(d, conv.D), conv);
        load_rows(shared.rows, packed, channels * taps_r * taps_s, row_pitch, tile.first_row);
        packed += static_cast<INDEX>(channels * taps_r * taps_s) * row_pitch;
        wait_async();
        __syncthreads();
        for (int channel = 0; channel < present; ++channel) {
            for (int tap = 0; tap < taps_r; ++tap) {
                const ACC* line = shared.patch + ((channel * rows.extent + tap * rows.tap_step) * pitch + first_at);
                const auto* weights = &shared.rows[tap * taps_s * channels + channel];
                multiply_taps(sum, line, apart, weights, taps_s, channels, columns, place);
            }
        }
    }
    store_tile(sum, shared.columns, place, tile.group, tile.first_row, conv, Epilogue{conv, bias, residual, y});
}
#endif
