// direct.cu - convolution by its definition: a patch of the input in shared memory serves all taps of the filter.
//
//   x: `channels` planes of a patch  --load_patch-->  shared.patch[channel][row][column]  --+
//                                                                                           +--> 64 sums per thread
//   packed weight, the same taps     --load_rows--->  shared.rows[r, s, channel][BLOCK_M] --+
//
//   tile: BLOCK_M output channels of BLOCK_P rows of BLOCK_Q pixels; a thread's share of it as in tile.cuh.
//   A stage is `channels` channels times `taps_r` x `taps_s` taps, as much as fits: all taps, a row of them, or one.
//
//   WEIGHT, the gradient of the weight, with terms c, t, r, s in place of pixels:
//   x: the planes of a tile's terms --load_planes------> shared.patch[plane][row][column] --+
//                                                                                           +--> 64 sums per thread
//   gradient of y: the pixels of a strip --load_strip--> shared.rows[pixel][BLOCK_M] -------+
//
//   A strip is as many rows and columns of pixels as fit; a plane of x, of one c and t, serves all taps of a filter, or
//   a row of them, or one tap.
//
// Set by fastconv/gpu/direct.py: BLOCK_M (8, 32, 64), BLOCK_P, BLOCK_Q, and FILTER_S with STRIDE_W: filter width and
// stride if the inputs of four neighbouring pixels are kept in registers for a whole row of taps; FILTER_S 0: any.
// By that of its name in grad_weight: BLOCK_M (32, 64), BLOCK_N (see tile.cuh).

#ifndef BLOCK_N
#define BLOCK_N (BLOCK_P * BLOCK_Q)
#endif
#include "outer.cuh"
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

#ifdef STAGE_WEIGHT
constexpr int kPixels = 16384 / (64 * sizeof(ACC)), kPatch = 16384 / sizeof(ACC);  // the host makes strips that fit

// What of x some taps meet: its channel, and where it begins for the pixel 0 without padding.
struct Plane {
    INDEX at, d, h, w;
};

struct SharedStrip {
    alignas(16) ACC rows[kPixels][BLOCK_M + 4];  // + 4: a column of 8 pixels lies in different banks
    ACC patch[kPatch];
    Plane planes[BLOCK_N];
};

// Which sums a thread has: 8 neighbouring lanes those of neighbouring terms, whose inputs lie in different banks.
struct TermPlace : Place {
    DEVICE explicit TermPlace(const Place& place) : Place(place)
    {
        column = column / kWarpN * kWarpN + threadIdx.x % 8;
    }

    DEVICE int column_of(int j) const { return column + 8 * j; }
};

// Pixels of a plane of y: strips count n, o, strips of rows, strips of columns, the last fastest.
struct Strip {
    INDEX n, o, p, q;
    int rows, columns;  // that exist

    DEVICE Strip(INDEX number, int height, int width, const Conv& conv)
    {
        const INDEX across = divide_up<INDEX>(conv.Q, width), down = divide_up<INDEX>(conv.P, height);
        q = number % across * width;
        number /= across;
        p = number % down * height;
        number /= down;
        o = number % conv.O;
        n = number / conv.O;
        rows = static_cast<int>(smaller<INDEX>(height, conv.P - p));
        columns = static_cast<int>(smaller<INDEX>(width, conv.Q - q));
    }
};

// The patch of a strip in every plane.
struct Planes {
    Axis rows, columns;
    int pitch, area, taps_r, taps_s;

    DEVICE Planes(int height, int width, int taps_r, int taps_s, const Conv& conv)
        : rows(height, taps_r, conv.stride_h, conv.dilation_h),
          columns(width, taps_s, conv.stride_w, conv.dilation_w),
          pitch(static_cast<int>(columns.extent)),
          area(static_cast<int>(rows.extent) * pitch),
          taps_r(taps_r),
          taps_s(taps_s)
    {
    }
    // The plane in which a term's taps are; terms count c, t, r, s, the last fastest.
    DEVICE INDEX plane_of(INDEX term) const { return term / (taps_r * taps_s); }

    // Where in its plane's patch a term meets the first pixel.
    DEVICE int offset_of(INDEX term) const
    {
        const int tap = static_cast<int>(term % (taps_r * taps_s));
        const INDEX at = tap / taps_s * rows.tap_step * pitch + tap % taps_s * columns.tap_step;
        return static_cast<int>(at);
    }
};

// Note once for all strips what the planes from the first on are.
DEVICE void find_planes(Plane* planes, INDEX first, int count, const Planes& patch, const Conv& conv)
{
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const Term term = find_term((first + i) * (patch.taps_r * patch.taps_s), conv);
        planes[i] = {term.c * conv.x_c, term.t * conv.dilation_d - conv.padding_d,
                     term.r * conv.dilation_h - conv.padding_h, term.s * conv.dilation_w - conv.padding_w};
    }
}

// Load what the taps of each plane see of a strip; zeros outside.
DEVICE void load_planes(ACC* to, const STORAGE* x, const Plane* planes, int count, const Planes& patch,
                        const Strip& strip, const Conv& conv)
{
    x += strip.n * conv.x_n;
    for (int i = 0; i < count; ++i, to += patch.area) {
        const Plane plane = planes[i];
        const INDEX d = strip.o * conv.stride_d + plane.d;
        const INDEX first_h = strip.p * conv.stride_h + plane.h, first_w = strip.q * conv.stride_w + plane.w;
        const bool is_plane = is_within(d, conv.D);
        for (int at = threadIdx.x; at < patch.area; at += THREADS) {
            const INDEX h = first_h + at / patch.pitch * patch.rows.input_step;
            const INDEX w = first_w + at % patch.pitch * patch.columns.input_step;
            to[at] = element_of(x + (plane.at + d * conv.x_d), h, w, is_plane, conv);
        }
    }
}

// Load the gradients of a strip's pixels: threads that are neighbours load neighbouring pixels, 8 of a channel.
DEVICE void load_strip(ACC (*rows)[BLOCK_M + 4], const STORAGE* grad_y, INDEX first_row, const Strip& strip,
                       const Conv& conv)
{
    grad_y += strip.n * conv.y_n + strip.o * conv.y_o + strip.p * conv.y_p + strip.q * conv.y_q;
    for (int pixel = threadIdx.x % 8; pixel < strip.rows * strip.columns; pixel += 8) {
        const STORAGE* from = grad_y + (pixel / strip.columns * conv.y_p + pixel % strip.columns * conv.y_q);
#pragma unroll
        for (int i = 0; i < BLOCK_M * 8 / THREADS; ++i) {
            const int row = threadIdx.x / 8 + i * (THREADS / 8);
            rows[pixel][row] = widen(from[smaller<INDEX>(first_row + row, conv.K - 1) * conv.y_k]);
        }
    }
}

// Add the products of the pixels of a strip; at: where in the patches a thread's terms meet the first of them.
DEVICE void multiply_strip(ACC (&sum)[8][8], const SharedStrip& shared, const int (&at)[8], const Planes& patch,
                           const Strip& strip, const Place& place)
{
    const int step = static_cast<int>(patch.columns.pixel_step);
    const ACC(*pixel)[BLOCK_M + 4] = shared.rows;
    for (int p = 0; p < strip.rows; ++p) {
        const ACC* line = shared.patch + p * patch.rows.pixel_step * patch.pitch;
#pragma unroll(sizeof(INDEX) == 8 && BLOCK_N == 128 ? 1 : 2)  // there ptxas spills two pixels
        for (int q = 0; q < strip.columns; ++q, ++pixel, line += step) {
            ACC rows[8], terms[8];
            read_four(&rows[0], &(*pixel)[place.row_of(0)]);
            read_four(&rows[4], &(*pixel)[place.row_of(4)]);
#pragma unroll
            for (int j = 0; j < 8; ++j) terms[j] = line[at[j]];
            multiply(sum, rows, terms);
        }
    }
}

KERNEL(const STORAGE* __restrict__ x, const STORAGE* __restrict__ grad_y, STORAGE* __restrict__ grad_w,
       ACC* __restrict__ partial, const Conv conv, int height, int width, int taps_r, int taps_s, INDEX strips,
       int parts)
{
    __shared__ SharedStrip shared;
    const INDEX columns = conv.C * conv.T * conv.R * conv.S;
    const Tile tile(conv.K, columns, conv.groups);
    const TermPlace place(place_of_thread());
    const Planes patch(height, width, taps_r, taps_s, conv);
    const INDEX first_plane = patch.plane_of(tile.first_column);
    const INDEX last_plane = patch.plane_of(smaller<INDEX>(tile.first_column + BLOCK_N, columns) - 1);
    const int count = static_cast<int>(last_plane - first_plane + 1);
    find_planes(shared.planes, first_plane, count, patch, conv);
    int at[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const INDEX term = smaller<INDEX>(tile.first_column + place.column_of(j), columns - 1);
        at[j] = static_cast<int>(patch.plane_of(term) - first_plane) * patch.area + patch.offset_of(term);
    }
    x += tile.group * conv.C * conv.x_c;
    grad_y += tile.group * conv.K * conv.y_k;
    const INDEX last = static_cast<INDEX>(static_cast<long long>(tile.part + 1) * strips / parts);
    ACC sum[8][8] = {};
    for (INDEX i = static_cast<INDEX>(static_cast<long long>(tile.part) * strips / parts); i < last; ++i) {
        const Strip strip(i, height, width, conv);
        __syncthreads();  // nobody reads the strip before any more
        load_planes(shared.patch, x, shared.planes, count, patch, strip, conv);
        load_strip(shared.rows, grad_y, tile.first_row, strip, conv);
        __syncthreads();
        multiply_strip(sum, shared, at, patch, strip, place);
    }
    store_sums(sum, place, tile, columns, conv, partial, grad_w);
}
#endif
