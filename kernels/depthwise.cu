// depthwise.cu - every input channel has its own filters: output channel k reads input channel k / multiplier.
//
//   PLANES, LARGE  x: a patch of each of BLOCK_C planes --load_patch--> shared --+--> ROWS x 4 sums per thread
//                  weight of these planes  --> registers, or --> shared ---------+
//
//   WEIGHT         the gradient of the weight: x as in PLANES, gradient of y --> shared --> a sum per thread and tap
//
//   CHANNELS       x: rows of pixels, LANES channels of each --> registers ---+--> COLUMNS x LANES sums per thread,
//                  weight of these channels --> shared --> registers ---------+    for ROWS rows in turn
//
// PLANES and CHANNELS are compiled for one filter, which lies in registers. LARGE takes any: shared memory holds all
// rows of the filters, some rows, or one tap at a time. Sums are added in the order t, r, s everywhere. WEIGHT is
// compiled for a block of taps, whose sums lie in registers: the whole filter, or a part of it that fits.
//
// Set by fastconv/gpu/depthwise.py: for planes BLOCK_C, BLOCK_P, BLOCK_Q, a block's output channels, rows and columns,
// and ROWS (1, 4); for channels ROWS, COLUMNS and LANES (1, 4); for LARGE its bytes SHARED, and SLIDING: 1 if taps and
// columns that are neighbours are so in the input; for the others FILTER_R, FILTER_S, STRIDE_H, STRIDE_W, DILATION_H,
// DILATION_W. In struct Conv `groups` is the number of input channels, K the multiplier.

#define RESIDENT 1  // left to itself, ptxas spills some registers so that a block more is resident
#include "patch.cuh"
#include "gradient.cuh"

#ifdef BLOCK_C
static_assert(BLOCK_P % ROWS == 0 && BLOCK_Q % 4 == 0, "a thread computes ROWS rows of four neighbours");
static_assert(THREADS == BLOCK_C * (BLOCK_P / ROWS) * (BLOCK_Q / 4), "every thread has its outputs");

// The least number from `fours` on that leaves `rest` when divided by 4.
constexpr DEVICE int with_rest(int fours, int rest) { return fours + (rest - fours % 4 + 4) % 4; }

// A patch of a plane. Rows begin at multiples of four elements; how many decides that the 8 threads which shared
// memory serves together, of one row, of several or of two planes, find their fours in different banks.
struct Patch {
    Axis rows, columns;
    int pitch, area;  // from row to row, from plane to plane

    constexpr DEVICE Patch(const Axis& rows, const Axis& columns)
        : rows(rows),
          columns(columns),
          pitch(4 * row_fours(static_cast<int>((columns.extent + 3) / 4))),
          area(4 * with_rest(static_cast<int>(rows.extent) * (pitch / 4), 2))
    {
    }
    static constexpr DEVICE int row_fours(int fours) { return ROWS == 1 ? with_rest(fours, 2) : fours | 1; }
};

// What a block computes: blocks count n, o, strips of rows, strips of columns, channels, the last fastest.
struct PlaneTile {
    INDEX n, o, p, q, k;

    DEVICE PlaneTile(INDEX block, const Conv& conv)
    {
        const INDEX planes = divide_up<INDEX>(conv.groups * conv.K, BLOCK_C);
        const INDEX width = divide_up<INDEX>(conv.Q, BLOCK_Q), height = divide_up<INDEX>(conv.P, BLOCK_P);
        k = block % planes * BLOCK_C;
        block /= planes;
        q = block % width * BLOCK_Q;
        block /= width;
        p = block % height * BLOCK_P;
        block /= height;
        o = block % conv.O;
        n = block / conv.O;
    }
};

// Which of the tile's outputs a thread computes.
struct Place {
    int plane, row, column;

    DEVICE Place()
    {
        constexpr int kAcross = BLOCK_Q / 4, kDown = BLOCK_P / ROWS;
        column = threadIdx.x % kAcross * 4;
        row = threadIdx.x / kAcross % kDown * ROWS;
        plane = threadIdx.x / (kAcross * kDown);
    }
    DEVICE bool has_outputs(const PlaneTile& tile, const Conv& conv) const
    {
        return tile.k + plane < conv.groups * conv.K && tile.p + row < conv.P && tile.q + column < conv.Q;
    }
    // Where in the patches the first input of its first output lies.
    DEVICE int in(const Patch& patch) const
    {
        const INDEX at = row * patch.rows.pixel_step * patch.pitch + column * patch.columns.pixel_step;
        return plane * patch.area + static_cast<int>(at);
    }
};

// Load the patch of every plane that the taps from (t, r, s) on see; behind the last plane it comes again.
DEVICE void load_patch(ACC* to, const Patch& patch, const STORAGE* x, const PlaneTile& tile, INDEX t, INDEX r, INDEX s,
                       const Conv& conv)
{
    const INDEX d = tile.o * conv.stride_d - conv.padding_d + t * conv.dilation_d;
    const INDEX first_h = tile.p * conv.stride_h - conv.padding_h + r * conv.dilation_h;
    const INDEX first_w = tile.q * conv.stride_w - conv.padding_w + s * conv.dilation_w;
    const int size = static_cast<int>(patch.rows.extent) * patch.pitch;
    x += tile.n * conv.x_n + d * conv.x_d;
    for (int i = threadIdx.x; i < BLOCK_C * size; i += THREADS) {
        const int plane = BLOCK_C == 1 ? 0 : ORDER == NHWC ? i % BLOCK_C : i / size;  // neighbours in memory together
        const int at = BLOCK_C == 1 ? i : ORDER == NHWC ? i / BLOCK_C : i % size;
        const INDEX h = first_h + at / patch.pitch * patch.rows.input_step;
        const INDEX w = first_w + at % patch.pitch * patch.columns.input_step;
        const INDEX k = smaller<INDEX>(tile.k + plane, conv.groups * conv.K - 1), c = conv.K == 1 ? k : k / conv.K;
        to[plane * patch.area + at] = element_of(x + c * conv.x_c, h, w, is_within(d, conv.D), conv);
    }
}

#ifdef ACTIVATION
// Finish a thread's sums and write them to y.
DEVICE void store_rows(const ACC (&sum)[ROWS][4], const PlaneTile& tile, const Place& place, const Epilogue& epilogue)
{
    const Conv& conv = epilogue.conv;
    const INDEX k = tile.k + place.plane;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        INDEX at[4];
        Four four;
        int stored = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const Pixel pixel = {tile.n, tile.o, tile.p + place.row + i, tile.q + place.column + j};
            at[j] = kNowhere;
            if (pixel.p < conv.P && pixel.q < conv.Q) {
                at[j] = offset_in_y(pixel, conv) + k * conv.y_k;
                four.value[j] = epilogue.finish(sum[i][j], k, offset_in_residual(pixel, conv) + k * conv.r_k);
                ++stored;
            }
        }
        store_four(epilogue.y, at, four, stored);
    }
}
#endif  // ACTIVATION
#endif  // BLOCK_C

#if defined(STAGE_PLANES) || defined(STAGE_WEIGHT)
// The patch of a tile, known when the kernel is compiled.
constexpr DEVICE Patch filter_patch()
{
    return Patch(Axis(BLOCK_P, FILTER_R, STRIDE_H, DILATION_H), Axis(BLOCK_Q, FILTER_S, STRIDE_W, DILATION_W));
}

// Call add(r, s, i, j, pixel) for every tap and every output of a thread, which sees `pixel` there. What the thread
// needs of a line of the patch is read once, for all rows that see it.
template <class Add>
DEVICE void for_each_product(const ACC* corner, const Add& add)
{
    constexpr Patch patch = filter_patch();
    constexpr int kStepH = patch.rows.pixel_step, kStepW = patch.columns.pixel_step;
    constexpr int kTapH = patch.rows.tap_step, kTapW = patch.columns.tap_step;
    constexpr int kWindow = (3 * kStepW + (FILTER_S - 1) * kTapW + 4) / 4 * 4;
    constexpr int kLines = (ROWS - 1) * kStepH + (FILTER_R - 1) * kTapH + 1;
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
        ACC window[kWindow];
#pragma unroll
        for (int i = 0; i < kWindow; i += 4) read_four(&window[i], corner + line * patch.pitch + i);
#pragma unroll
        for (int tap = 0; tap < FILTER_R * ROWS; ++tap) {
            const int r = tap / ROWS, i = tap % ROWS;
            if (i * kStepH + r * kTapH != line) continue;
#pragma unroll
            for (int s = 0; s < FILTER_S; ++s) {
#pragma unroll
                for (int j = 0; j < 4; ++j) add(r, s, i, j, window[j * kStepW + s * kTapW]);
            }
        }
    }
}
#endif

#ifdef STAGE_PLANES
// Load the filter of output channel k in plane t.
DEVICE void load_filter(ACC (&filter)[FILTER_R][FILTER_S], const STORAGE* weight, INDEX k, INDEX t, const Conv& conv)
{
    weight += k * conv.w_k + t * conv.w_t;
#pragma unroll
    for (int r = 0; r < FILTER_R; ++r) {
#pragma unroll
        for (int s = 0; s < FILTER_S; ++s) filter[r][s] = widen(weight[r * conv.w_r + s * conv.w_s]);
    }
}

// Add the products of a filter.
DEVICE void multiply(ACC (&sum)[ROWS][4], const ACC* corner, const ACC (&filter)[FILTER_R][FILTER_S])
{
    for_each_product(corner, [&](int r, int s, int i, int j, ACC pixel) {
        sum[i][j] = fma(filter[r][s], pixel, sum[i][j]);
    });
}

KERNEL(const STORAGE* __restrict__ x, const STORAGE* __restrict__ weight, const STORAGE* __restrict__ bias,
       const STORAGE* __restrict__ residual, STORAGE* __restrict__ y, const Conv conv)
{
    constexpr Patch patch = filter_patch();
    __shared__ alignas(16) ACC shared[BLOCK_C * patch.area];
    const PlaneTile tile(blockIdx.x, conv);
    const Place place;
    const bool is_busy = place.has_outputs(tile, conv);
    ACC sum[ROWS][4] = {};
    for (INDEX t = 0; t < conv.T; ++t) {
        __syncthreads();  // nobody reads the plane before any more
        load_patch(shared, patch, x, tile, t, 0, 0, conv);
        ACC filter[FILTER_R][FILTER_S];
        if (is_busy) load_filter(filter, weight, tile.k + place.plane, t, conv);
        __syncthreads();
        if (is_busy) multiply(sum, shared + place.in(patch), filter);
    }
    if (is_busy) store_rows(sum, tile, place, Epilogue{conv, bias, residual, y});
}
#endif

#ifdef STAGE_WEIGHT
constexpr int kTaps = FILTER_R * FILTER_S;
constexpr int kPerPlane = THREADS / BLOCK_C;                   // threads that sum for the same filter
constexpr int kTogether = kPerPlane < 32 ? kPerPlane : 32;     // of one warp
static_assert(THREADS % 32 == 0 && 32 % kTogether == 0, "lanes that sum for one filter are a part of a warp");

constexpr DEVICE Patch gradient_patch() { return Patch(Axis(BLOCK_P, 1, 1, 1), Axis(BLOCK_Q, 1, 1, 1)); }

// What a block computes: blocks count parts, t, blocks of rows and of columns of taps, channels, the last fastest.
struct TapTile {
    INDEX part, t, r, s, channels;  // channels: which of the blocks of them

    DEVICE explicit TapTile(const Conv& conv)
    {
        const INDEX planes = divide_up<INDEX>(conv.groups * conv.K, BLOCK_C);
        const INDEX width = divide_up<INDEX>(conv.S, FILTER_S), height = divide_up<INDEX>(conv.R, FILTER_R);
        INDEX block = blockIdx.x;
        channels = block % planes;
        block /= planes;
        s = block % width * FILTER_S;
        block /= width;
        r = block % height * FILTER_R;
        block /= height;
        t = block % conv.T;
        part = block / conv.T;
    }
};

// Load the gradients of a tile's outputs, planes as in load_patch; zeros behind the last ones.
DEVICE void load_gradient(ACC* to, const STORAGE* grad_y, const PlaneTile& tile, const Conv& conv)
{
    constexpr Patch patch = gradient_patch();
    constexpr int kArea = BLOCK_P * BLOCK_Q;
    grad_y += tile.n * conv.y_n + tile.o * conv.y_o;
    for (int i = threadIdx.x; i < BLOCK_C * kArea; i += THREADS) {
        const int plane = ORDER == NHWC ? i % BLOCK_C : i / kArea, at = ORDER == NHWC ? i / BLOCK_C : i % kArea;
        const INDEX k = tile.k + plane, p = tile.p + at / BLOCK_Q, q = tile.q + at % BLOCK_Q;
        const bool exists = k < conv.groups * conv.K && p < conv.P && q < conv.Q;
        const ACC gradient = exists ? widen(grad_y[k * conv.y_k + p * conv.y_p + q * conv.y_q]) : ACC(0);
        to[plane * patch.area + at / BLOCK_Q * patch.pitch + at % BLOCK_Q] = gradient;
    }
}

// Add the products of a thread's outputs, of which so many rows and columns exist: inf behind them must not count.
DEVICE void multiply(ACC (&sum)[FILTER_R][FILTER_S], const ACC* corner, const ACC* gradients, INDEX rows, INDEX columns)
{
    ACC gradient[ROWS][4];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) read_four(gradient[i], gradients + i * gradient_patch().pitch);
    for_each_product(corner, [&](int r, int s, int i, int j, ACC pixel) {
        if (i < rows && j < columns) sum[r][s] = fma(gradient[i][j], pixel, sum[r][s]);
    });
}

// Add the sums of all threads of a plane, always in the same order, and write them as store_sums of outer.cuh does.
DEVICE void store_taps(const ACC (&sum)[FILTER_R][FILTER_S], ACC (*shares)[kTaps], const TapTile& tile,
                       const Conv& conv, ACC* partial, STORAGE* grad_w)
{
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
        ACC share = sum[tap / FILTER_S][tap % FILTER_S];
#pragma unroll
        for (int far = kTogether / 2; far > 0; far /= 2) share += __shfl_xor_sync(0xffffffff, share, far);
        if (threadIdx.x % kTogether == 0) shares[threadIdx.x / kTogether][tap] = share;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BLOCK_C * kTaps; i += THREADS) {
        const int plane = i / kTaps, tap = i % kTaps;
        const INDEX k = tile.channels * BLOCK_C + plane, r = tile.r + tap / FILTER_S, s = tile.s + tap % FILTER_S;
        if (k >= conv.groups * conv.K || r >= conv.R || s >= conv.S) continue;
        ACC total = 0;
#pragma unroll
        for (int j = 0; j < kPerPlane / kTogether; ++j) total += shares[plane * (kPerPlane / kTogether) + j][tap];
        if (partial != nullptr) {
            const INDEX row = tile.part * (conv.groups * conv.K) + k;
            partial[((row * conv.T + tile.t) * conv.R + r) * conv.S + s] = total;
        } else {
            narrow(total, grad_w[offset_in_gradient(k, {0, tile.t, r, s}, conv)]);
        }
    }
}

// Sum over the tiles of outputs of a part, of which there are `tiles` in all.
KERNEL(const STORAGE* __restrict__ x, const STORAGE* __restrict__ grad_y, STORAGE* __restrict__ grad_w,
       ACC* __restrict__ partial, const Conv conv, INDEX tiles, int parts)
{
    constexpr Patch patch = filter_patch(), gradients = gradient_patch();
    constexpr int kShares = THREADS / kTogether * kTaps, kPatches = BLOCK_C * (patch.area + gradients.area);
    __shared__ alignas(16) ACC shared[kShares > kPatches ? kShares : kPatches];
    ACC* gradient = shared + BLOCK_C * patch.area;
    const TapTile taps(conv);
    const Place place;
    const INDEX planes = divide_up<INDEX>(conv.groups * conv.K, BLOCK_C);
    const INDEX last = static_cast<INDEX>(static_cast<long long>(taps.part + 1) * tiles / parts);
    ACC sum[FILTER_R][FILTER_S] = {};
    for (INDEX i = static_cast<INDEX>(static_cast<long long>(taps.part) * tiles / parts); i < last; ++i) {
        const PlaneTile tile(i * planes + taps.channels, conv);
        __syncthreads();  // nobody reads the tile before any more
        load_patch(shared, patch, x, tile, taps.t, taps.r, taps.s, conv);
        load_gradient(gradient, grad_y, tile, conv);
        __syncthreads();
        multiply(sum, shared + place.in(patch), gradient + place.in(gradients), conv.P - tile.p - place.row,
                 conv.Q - tile.q - place.column);
    }
    __syncthreads();  // the patches make room
    store_taps(sum, reinterpret_cast<ACC (*)[kTaps]>(shared), taps, conv, partial, grad_w);
}
#endif

#ifdef STAGE_LARGE
// How filters lie in shared memory, taps_r x taps_s taps of each plane: [plane][s / 4][r][s % 4].
struct Filters {
    int taps_s;
    int step, apart;  // from four taps to the next of a row; from plane to plane, an odd number of fours

    DEVICE Filters(int taps_r, int taps_s)
        : taps_s(taps_s), step(4 * taps_r), apart(4 * (taps_r * ((taps_s + 3) / 4) | 1))
    {
    }
    DEVICE int at(int r, int s) const { return s / 4 * step + 4 * r + s % 4; }
};

// Load `count` rows of the filters from the tap (t, r, s) on; zeros where four taps go beyond the row.
DEVICE void load_filters(ACC* to, const Filters& filters, int count, const STORAGE* weight, const PlaneTile& tile,
                         INDEX t, INDEX r, INDEX s, const Conv& conv)
{
    const int width = divide_up(filters.taps_s, 4) * 4;
    for (int i = threadIdx.x; i < BLOCK_C * count * width; i += THREADS) {
        const int plane = i / width / count, row = i / width % count, column = i % width;
        const INDEX k = tile.k + plane;
        ACC tap = 0;
        if (k < conv.groups * conv.K && column < filters.taps_s) {
            tap = widen(weight[k * conv.w_k + t * conv.w_t + (r + row) * conv.w_r + (s + column) * conv.w_s]);
        }
        to[plane * filters.apart + filters.at(row, column)] = tap;
    }
}

#if SLIDING
// Which rows of the filter meet a line of the patch: row of[i] that of a thread's output row i; below 0 none does.
struct Meeting {
    int of[ROWS];

    DEVICE Meeting(int line, int count, const Axis& rows)
    {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int steps = line - i * static_cast<int>(rows.pixel_step);
            const int step = rows.tap_step > 1 ? static_cast<int>(rows.tap_step) : 1;
            of[i] = steps >= 0 && steps % step == 0 && steps / step < count ? steps / step : -1;
        }
    }
};

// Add the products of `taps` neighbouring taps and of seven inputs, of which `low` holds the first four.
//
// kAll  every output row meets a row of the filter: weights points to that of the first, which the others precede
template <bool kAll>
DEVICE void multiply_taps(ACC (&sum)[ROWS][4], const ACC (&low)[4], const ACC (&high)[4], const ACC* weights,
                          const Meeting& meeting, int taps)
{
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        if (!kAll && meeting.of[i] < 0) continue;
        ACC four[4];
        read_four(four, weights + 4 * (kAll ? -i : meeting.of[i]));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (e >= taps) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][j] = fma(four[e], j + e < 4 ? low[j + e] : high[j + e - 4], sum[i][j]);
        }
    }
}

// Add the products of a line of the patch, along which inputs slide through registers.
template <bool kAll>
DEVICE void multiply_line(ACC (&sum)[ROWS][4], const ACC* line, const ACC* weights, const Meeting& meeting,
                          const Filters& filters)
{
    ACC a[4], b[4] = {};
    read_four(a, line);
    int left = filters.taps_s;
#pragma unroll 1
    for (; kAll && left >= 8; left -= 8, line += 8, weights += 2 * filters.step) {
        read_four(b, line + 4);
        multiply_taps<kAll>(sum, a, b, weights, meeting, 4);
        read_four(a, line + 8);
        multiply_taps<kAll>(sum, b, a, weights + filters.step, meeting, 4);
    }
#pragma unroll 1
    for (; left > 0; left -= 4, line += 4, weights += filters.step) {
        if (left > 1) read_four(b, line + 4);
        multiply_taps<kAll>(sum, a, b, weights, meeting, left);
#pragma unroll
        for (int e = 0; e < 4; ++e) a[e] = b[e];
    }
}

// Add the products of `count` rows of the filter: line by line of the patch, for all output rows that see it.
DEVICE void multiply_stage(ACC (&sum)[ROWS][4], const ACC* corner, const ACC* weights, int count, const Patch& patch,
                           const Filters& filters)
{
    const bool is_dense = patch.rows.pixel_step == 1 && patch.rows.tap_step <= 1;
    const int lines = static_cast<int>((ROWS - 1) * patch.rows.pixel_step + (count - 1) * patch.rows.tap_step + 1);
    for (int line = 0; line < lines; ++line, corner += patch.pitch) {
        const Meeting meeting(line, count, patch.rows);
        if (is_dense && line >= ROWS - 1 && line < count) {
            multiply_line<true>(sum, corner, weights + 4 * line, meeting, filters);
        } else {
            multiply_line<false>(sum, corner, weights, meeting, filters);
        }
    }
}
#else
// Add the products of `count` rows of the filter.
DEVICE void multiply_stage(ACC (&sum)[ROWS][4], const ACC* corner, const ACC* weights, int count, const Patch& patch,
                           const Filters& filters)
{
    const int step_h = static_cast<int>(patch.rows.pixel_step) * patch.pitch;
    const int step_w = static_cast<int>(patch.columns.pixel_step);
    for (int r = 0; r < count; ++r) {
        for (int s = 0; s < filters.taps_s; ++s) {
            const ACC* first = corner + r * patch.rows.tap_step * patch.pitch + s * patch.columns.tap_step;
            const ACC tap = weights[filters.at(r, s)];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][j] = fma(tap, first[i * step_h + j * step_w], sum[i][j]);
            }
        }
    }
}
#endif

KERNEL(const STORAGE* __restrict__ x, const STORAGE* __restrict__ weight, const STORAGE* __restrict__ bias,
       const STORAGE* __restrict__ residual, STORAGE* __restrict__ y, const Conv conv, int taps_r, int taps_s)
{
    __shared__ alignas(16) ACC shared[SHARED / sizeof(ACC)];
    const PlaneTile tile(blockIdx.x, conv);
    const Place place;
    const Patch patch(Axis(BLOCK_P, taps_r, conv.stride_h, conv.dilation_h),
                      Axis(BLOCK_Q, taps_s, conv.stride_w, conv.dilation_w));
    const Filters filters(taps_r, taps_s);
    ACC* weights = shared + BLOCK_C * patch.area;
    const bool is_busy = place.has_outputs(tile, conv);
    ACC sum[ROWS][4] = {};
    for (INDEX t = 0; t < conv.T; ++t) {
        for (INDEX r = 0; r < conv.R; r += taps_r) {
            const int count = static_cast<int>(smaller<INDEX>(taps_r, conv.R - r));
            for (INDEX s = 0; s < conv.S; s += taps_s) {
                __syncthreads();  // nobody reads the stage before any more
                load_patch(shared, patch, x, tile, t, r, s, conv);
                load_filters(weights, filters, count, weight, tile, t, r, s, conv);
                __syncthreads();
                const ACC* own = weights + place.plane * filters.apart;
                if (is_busy) multiply_stage(sum, shared + place.in(patch), own, count, patch, filters);
            }
        }
    }
    if (is_busy) store_rows(sum, tile, place, Epilogue{conv, bias, residual, y});
}
#endif

#ifdef STAGE_CHANNELS
constexpr int kTaps = FILTER_R * FILTER_S;
constexpr int kSpan = THREADS * LANES + 4;  // + 4: eight taps of a channel lie in eight banks

// What a thread computes: threads count n, o, strips of rows, strips of columns, channels, the last fastest.
struct ChannelTile {
    INDEX first, n, o, p, q, k;  // first: the channel of the block's first thread
    int local;                   // channels of the block before k

    DEVICE explicit ChannelTile(const Conv& conv)
    {
        const INDEX lanes = conv.groups * conv.K / LANES;
        const INDEX width = divide_up<INDEX>(conv.Q, COLUMNS), height = divide_up<INDEX>(conv.P, ROWS);
        INDEX thread = static_cast<INDEX>(blockIdx.x) * THREADS;
        first = thread % lanes * LANES;
        thread += threadIdx.x;
        k = thread % lanes * LANES;
        thread /= lanes;
        q = thread % width * COLUMNS;
        thread /= width;
        p = thread % height * ROWS;
        thread /= height;
        o = thread % conv.O;
        n = thread / conv.O;
        local = static_cast<int>(threadIdx.x % lanes) * LANES;
    }
};

// Load the filters of the block's channels in plane t: those from the first on, as many as there are, round about.
DEVICE void load_filters(ACC (*filters)[kSpan], const STORAGE* weight, INDEX first, INDEX t, const Conv& conv)
{
    const INDEX channels = conv.groups * conv.K;
    const int count = static_cast<int>(smaller<INDEX>(THREADS * LANES, channels));
    for (int i = threadIdx.x; i < count * kTaps; i += THREADS) {
        const int tap = i % kTaps, local = i / kTaps;
        const INDEX k = first + local < channels ? first + local : first + local - channels;
        const INDEX at = k * conv.w_k + t * conv.w_t + tap / FILTER_S * conv.w_r + tap % FILTER_S * conv.w_s;
        filters[tap][local] = widen(weight[at]);
    }
}

// Read the filters of a thread's channels.
DEVICE void read_filter(ACC (&filter)[kTaps][LANES], const ACC (*filters)[kSpan], int local)
{
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
#if LANES == 4
        read_four(filter[tap], &filters[tap][local]);
#else
        filter[tap][0] = filters[tap][local];
#endif
    }
}

// Load the channels of a pixel of a row; zeros outside.
DEVICE void load_lanes(ACC (&lanes)[LANES], const STORAGE* row, INDEX w, bool is_row, const Conv& conv)
{
#if LANES == 4
    Four four = {};
    if (is_row && is_within(w, conv.W)) four = *reinterpret_cast<const Four*>(row + w * conv.x_w);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) lanes[lane] = widen(four.value[lane]);
#else
    lanes[0] = is_row && is_within(w, conv.W) ? widen(row[w * conv.x_w]) : ACC(0);
#endif
}

// Add the products of a filter to the sums of row p.
DEVICE void multiply(ACC (&sum)[COLUMNS][LANES], const STORAGE* plane, INDEX p, INDEX q, bool is_plane,
                     const ACC (&filter)[kTaps][LANES], const Conv& conv)
{
    constexpr int kWindow = (COLUMNS - 1) * STRIDE_W + (FILTER_S - 1) * DILATION_W + 1;
    const INDEX first_h = p * STRIDE_H - conv.padding_h, first_w = q * STRIDE_W - conv.padding_w;
#pragma unroll
    for (int r = 0; r < FILTER_R; ++r) {
        const INDEX h = first_h + r * DILATION_H;
        const bool is_row = is_plane && is_within(h, conv.H);
        ACC window[kWindow][LANES];
#pragma unroll
        for (int i = 0; i < kWindow; ++i) load_lanes(window[i], plane + h * conv.x_h, first_w + i, is_row, conv);
#pragma unroll
        for (int s = 0; s < FILTER_S; ++s) {
#pragma unroll
            for (int at = 0; at < COLUMNS * LANES; ++at) {
                const int j = at / LANES, lane = at % LANES;
                const ACC pixel = window[j * STRIDE_W + s * DILATION_W][lane];
                sum[j][lane] = fma(filter[r * FILTER_S + s][lane], pixel, sum[j][lane]);
            }
        }
    }
}

// Finish the sums of a pixel and write them to y.
DEVICE void store_lanes(const ACC (&sum)[LANES], const Pixel& pixel, INDEX k, const Epilogue& epilogue)
{
    const Conv& conv = epilogue.conv;
    INDEX at[4];
    Four four;
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) {
        at[lane] = offset_in_y(pixel, conv) + (k + lane) * conv.y_k;
        const INDEX residual_at = offset_in_residual(pixel, conv) + (k + lane) * conv.r_k;
        four.value[lane] = epilogue.finish(sum[lane], k + lane, residual_at);
    }
#if LANES == 4
    store_four(epilogue.y, at, four, 4);
#else
    epilogue.y[at[0]] = four.value[0];
#endif
}

KERNEL(const STORAGE* __restrict__ x, const STORAGE* __restrict__ weight, const STORAGE* __restrict__ bias,
       const STORAGE* __restrict__ residual, STORAGE* __restrict__ y, const Conv conv)
{
    __shared__ alignas(16) ACC shared[kTaps][kSpan];
    const ChannelTile tile(conv);
    const Epilogue epilogue = {conv, bias, residual, y};
#pragma unroll 1  // row by row: what two rows share comes from the level-1 cache, their sums would take all registers
    for (int row = 0; row < ROWS; ++row) {
        const INDEX p = tile.p + row;
        const bool is_busy = tile.n < conv.N && p < conv.P;
        ACC sum[COLUMNS][LANES] = {};
        for (INDEX t = 0; t < conv.T; ++t) {
            if (row == 0 || conv.T > 1) {
                __syncthreads();  // nobody reads the filters before any more
                load_filters(shared, weight, tile.first, t, conv);
                __syncthreads();
            }
            if (!is_busy) continue;
            ACC filter[kTaps][LANES];
            read_filter(filter, shared, tile.local);
            const INDEX d = tile.o * conv.stride_d - conv.padding_d + t * conv.dilation_d;
            const STORAGE* plane = x + (tile.n * conv.x_n + tile.k / conv.K * conv.x_c + d * conv.x_d);
            multiply(sum, plane, p, tile.q, is_within(d, conv.D), filter, conv);
        }
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            const Pixel pixel = {tile.n, tile.o, p, tile.q + j};
            if (is_busy && pixel.q < conv.Q) store_lanes(sum[j], pixel, tile.k, epilogue);
        }
    }
}
#endif
