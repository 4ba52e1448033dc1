// outer.cuh - the gradient of the weight as a product of matrices, summed over pixels: a tile (gemm.cuh) per block.
//
//   gradient of y (pixels, K)  --OperandLoader--> registers --place--> shared.a[2][kBlockK][BLOCK_M] --+
//                                                                                                      +--> 8 x 8 sums
//   x (pixels, C * taps)  -------the file's own-> registers --place--> shared.b[2][kBlockK][BLOCK_N] --+    per thread
//
// A slice is kBlockK pixels, which count n, o, p, q. Channels that are neighbours in memory are so in shared memory
// too. Pixels that are neighbours in memory become columns there: rows are ROW_GAP words longer than the tile, so
// that a column lies in different banks.
//
// Set by fastconv/gpu/grad_weight/outer.py: BLOCK_M, BLOCK_N (see tile.cuh); X_LOADS, Y_LOADS: what a thread loads at
// a time: SINGLE, an element; PIXELS, CHANNELS: four neighbours in memory, which begin at an aligned address.

#if defined(STAGE_WEIGHT)
#define ROW_GAP 4
#if BLOCK_M == 32
#define RESIDENT 1  // left to itself, ptxas spills some registers so that a block more is resident
#endif
#endif
#include "gemm.cuh"
#include "gradient.cuh"

#define SINGLE 0
#define PIXELS 1
#define CHANNELS 2

#ifdef Y_LOADS
// How an operand lies in memory: steps from pixel to pixel and from channel to channel, in elements.
struct Steps {
    INDEX n, o, p, q, channel;
};

// The pixel of a slice that a thread loads, or the first of four. From slice to slice it goes on by kBlockK pixels,
// which are added digit by digit: to divide would take longer.
struct Cursor {
    const Conv& conv;
    const Pixel step;
    Pixel at;

    DEVICE explicit Cursor(const Conv& conv) : conv(conv), step(find_pixel(kBlockK, conv)), at{} {}

    DEVICE void seek(INDEX pixel) { at = find_pixel(pixel, conv); }
    DEVICE void advance()
    {
        at = {at.n + step.n, at.o + step.o, at.p + step.p, at.q + step.q};
        carry(at.q, conv.Q, at.p);
        carry(at.p, conv.P, at.o);
        carry(at.o, conv.O, at.n);
    }
    DEVICE static void carry(INDEX& digit, INDEX size, INDEX& next)
    {
        if (digit < size) return;
        digit -= size;
        ++next;
    }
    DEVICE bool exists() const { return at.n < conv.N; }
};

// What the threads of a block load of a slice, kBlockK pixels of kWidth channels: each one element or four of one
// pixel, or of four of them, for kUnits channels. Threads that are neighbours load neighbours.
template <int kWidth, int kLoads>
struct Loader {
    static constexpr int kPixels = kLoads == PIXELS ? 4 : 1, kChannels = kLoads == CHANNELS ? 4 : 1;
    static constexpr int kDown = kBlockK / kPixels, kAcross = THREADS / kDown;  // threads along pixels, along channels
    static constexpr int kUnits = kWidth / kChannels / kAcross;
    static constexpr int kPitch = kWidth + ROW_GAP;
    static constexpr bool kIsPixelFirst = kLoads == PIXELS || (kLoads == SINGLE && ORDER == NCHW);
    static_assert(kUnits * kChannels * kAcross == kWidth, "all threads load alike");

    Cursor cursor;
    Four loaded[kUnits];  // SINGLE: the first of them

    DEVICE explicit Loader(const Conv& conv) : cursor(conv) {}

    DEVICE void seek(int slice) { cursor.seek(static_cast<INDEX>(slice) * kBlockK + pixel()); }
    DEVICE void load(int i, const STORAGE* from)
    {
        if (kLoads == SINGLE) {
            loaded[i].value[0] = *from;
        } else {
            loaded[i] = *reinterpret_cast<const Four*>(from);
        }
    }
    DEVICE void place(ACC (*to)[kPitch]) const
    {
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            AccFour four;
#pragma unroll
            for (int e = 0; e < kPixels * kChannels; ++e) {
                four.value[e] = widen(loaded[i].value[e]);
                if (kLoads != CHANNELS) to[pixel() + e][channel(i)] = four.value[e];
            }
            if (kLoads == CHANNELS) *reinterpret_cast<AccFour*>(&to[pixel()][channel(i)]) = four;
        }
    }
    DEVICE static int pixel() { return (kIsPixelFirst ? threadIdx.x % kDown : threadIdx.x / kAcross) * kPixels; }
    DEVICE static int channel(int i)
    {
        const int first = kIsPixelFirst ? threadIdx.x / kDown : threadIdx.x % kAcross;
        return (first + i * kAcross) * kChannels;
    }
};

// Loads pixels where they lie: of the gradient of y, and of x if there is one tap.
template <int kWidth, int kLoads>
struct OperandLoader : Loader<kWidth, kLoads> {
    using Base = Loader<kWidth, kLoads>;

    const STORAGE* array;  // of the group
    const Steps steps;
    const INDEX first, last;  // channels: the tile's first; what a unit may begin with at most

    // Behind the last channel the last ones are read again: those sums are never stored.
    DEVICE OperandLoader(const STORAGE* array, const Steps& steps, INDEX group, INDEX first, INDEX channels,
                       const Conv& conv)
        : Base(conv), array(array + group * channels * steps.channel), steps(steps), first(first),
          last(channels - Base::kChannels)
    {
    }
    DEVICE void fetch(ACC (*)[Base::kPitch])
    {
        const Pixel& at = this->cursor.at;
        const bool exists = this->cursor.exists();
        const INDEX pixel = exists ? at.n * steps.n + at.o * steps.o + at.p * steps.p + at.q * steps.q : 0;
#pragma unroll
        for (int i = 0; i < Base::kUnits; ++i) {
            this->loaded[i] = Four{};
            const INDEX channel = smaller<INDEX>(first + this->channel(i), last);
            if (exists) this->load(i, array + (pixel + channel * steps.channel));
        }
        this->cursor.advance();
    }
};

// The loader of a, which is the same in all files.
struct GradientLoader : OperandLoader<BLOCK_M, Y_LOADS> {
    DEVICE GradientLoader(const STORAGE* grad_y, const Tile& tile, const Conv& conv)
        : OperandLoader(grad_y, {conv.y_n, conv.y_o, conv.y_p, conv.y_q, conv.y_k}, tile.group, tile.first_row, conv.K,
                      conv)
    {
    }
};

#endif  // Y_LOADS

#if defined(STAGE_WEIGHT)
// Write the sums of a part for the stage ADD; or of the only one, to the gradient itself: partial is null then.
template <class ItsPlace>
DEVICE void store_sums(const ACC (&sum)[8][8], const ItsPlace& place, const Tile& tile, INDEX columns, const Conv& conv,
                       ACC* partial, STORAGE* grad_w)
{
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const INDEX column = tile.first_column + place.column_of(j);
        if (column >= columns) continue;
        const Term term = find_term(column, conv);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const INDEX row = tile.first_row + place.row_of(i), k = tile.group * conv.K + row;
            if (row >= conv.K) continue;
            if (partial != nullptr) {
                partial[(tile.part * (conv.K * conv.groups) + k) * columns + column] = sum[i][j];
            } else {
                narrow(sum[i][j], grad_w[offset_in_gradient(k, term, conv)]);
            }
        }
    }
}
#endif
