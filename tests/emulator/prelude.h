// prelude.h - stands before a kernel's source for a C++ compiler: CUDA's words, and twins of kernels/ptx.cuh.
//
// No standard header is included: parsing <cmath> would take longer than compiling most kernels.

#define FASTCONV_PTX  // the twins below take the place of ptx.cuh

#define __global__ __attribute__((noinline))  // with checks: not to be merged into emulated_thread without
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared"), used))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define alignas(bytes) __attribute__((aligned(bytes)))  // may stand behind __shared__, as nvcc lets it

extern "C" {
// Constant for a thread, so that the compiler may keep them in registers.
unsigned emulated_thread_index() __attribute__((const));
unsigned emulated_block_index() __attribute__((const));
unsigned emulated_block_size() __attribute__((const));
unsigned emulated_grid_size() __attribute__((const));

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffff);
unsigned long long emulated_shuffle(unsigned mask, unsigned long long bits, unsigned from_lane);

void emulated_copy_async(void* shared, const void* global);
void emulated_wait_async();

void* memcpy(void*, const void*, decltype(sizeof 0)) noexcept;
void* memmove(void*, const void*, decltype(sizeof 0)) noexcept;
void* memset(void*, int, decltype(sizeof 0)) noexcept;

float fmaf(float, float, float) noexcept;
float expf(float) noexcept;
float tanhf(float) noexcept;
float erff(float) noexcept;
float sqrtf(float) noexcept;
float fabsf(float) noexcept;
float fminf(float, float) noexcept;
float fmaxf(float, float) noexcept;
double fma(double, double, double) noexcept;
double exp(double) noexcept;
double tanh(double) noexcept;
double erf(double) noexcept;
double sqrt(double) noexcept;
double fabs(double) noexcept;
double fmin(double, double) noexcept;
double fmax(double, double) noexcept;
}

// CUDA overloads these for float.
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float exp(float x) { return expf(x); }
inline float tanh(float x) { return tanhf(x); }
inline float erf(float x) { return erff(x); }

struct EmulatedIndex {
    unsigned x, y, z;
};
#define threadIdx (EmulatedIndex{emulated_thread_index(), 0, 0})
#define blockIdx (EmulatedIndex{emulated_block_index(), 0, 0})
#define blockDim (EmulatedIndex{emulated_block_size(), 1, 1})
#define gridDim (EmulatedIndex{emulated_grid_size(), 1, 1})

// Two arguments of one type, as CUDA's overloads take them.
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }

// ---- warp collectives: whole warps only, a shuffle moves 4 or 8 bytes ----

template <class T>
inline T emulated_shuffle_of(unsigned mask, T value, unsigned from_lane) {
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    bits = emulated_shuffle(mask, bits, from_lane);
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane) {
    return emulated_shuffle_of(mask, value, unsigned(lane) % 32);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip) {
    return emulated_shuffle_of(mask, value, (threadIdx.x % 32) ^ unsigned(flip));
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
    unsigned lane = threadIdx.x % 32;
    return emulated_shuffle_of(mask, value, lane + distance < 32 ? lane + distance : lane);
}

// ---- twins of kernels/ptx.cuh ----

inline void copy_async_16(void* shared, const void* global) { emulated_copy_async(shared, global); }
inline void wait_async() { emulated_wait_async(); }

inline float bits_to_float(unsigned bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
inline unsigned float_to_bits(float value) {
    unsigned bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

// Integers only: not every compiler has a 16-bit float.
inline float half_to_float(unsigned short half) {
    unsigned sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
    unsigned bits = sign | (exponent + 112) << 23 | fraction << 13;
    if (exponent == 31) bits = sign | 0x7f800000u | fraction << 13;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    if (exponent == 0) value = (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
    return value;
}
inline unsigned short float_to_half(float value) {
    unsigned bits;
    __builtin_memcpy(&bits, &value, 4);
    unsigned sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;                             // NaN: the one that the GPU gives
    if (magnitude >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);  // 65520 and more: infinity
    if (magnitude < 0x33000000u) return (unsigned short)sign;               // below half the least: zero
    unsigned exponent = magnitude >> 23, fraction = magnitude & 0x7fffffu, drop = 13;
    unsigned half = (exponent - 112) << 10 | fraction >> 13;
    if (exponent < 113) {  // subnormal: the implicit one is written out
        fraction |= 0x800000u;
        drop = 126 - exponent;
        half = fraction >> drop;
    }
    unsigned rest = fraction & ((1u << drop) - 1), tie = 1u << (drop - 1);
    half += rest > tie || (rest == tie && (half & 1u));  // may carry into the exponent, as it should
    return (unsigned short)(sign | half);
}

// ---- how the runtime calls the kernel: arguments are addresses of values, as in cuLaunchKernel ----

#define EMULATED_PLAIN __attribute__((no_sanitize("thread", "undefined")))

struct EmulatedParameter {
    unsigned long long bytes;
    int is_array, is_written;
};
template <class T>
struct EmulatedKind {
    static constexpr EmulatedParameter value{sizeof(T), 0, 0};
};
template <class T>
struct EmulatedKind<T*> {
    static constexpr EmulatedParameter value{sizeof(T), 1, 1};
};
template <class T>
struct EmulatedKind<const T*> {
    static constexpr EmulatedParameter value{sizeof(T), 1, 0};
};

template <int... I>
struct EmulatedIndices {};
template <int N, int... I>
struct EmulatedCount : EmulatedCount<N - 1, N - 1, I...> {};
template <int... I>
struct EmulatedCount<0, I...> {
    typedef EmulatedIndices<I...> type;
};

template <class... A, int... I>
EMULATED_PLAIN inline void emulated_unpack(
    void (*kernel)(A...), void** arguments, EmulatedIndices<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A>
EMULATED_PLAIN inline void emulated_call(void (*kernel)(A...), void** arguments) {
    emulated_unpack(kernel, arguments, typename EmulatedCount<sizeof...(A)>::type());
}
template <class... A>
EMULATED_PLAIN inline int emulated_describe(
    void (*)(A...), EmulatedParameter* parameters) {
    const EmulatedParameter all[] = {EmulatedKind<A>::value..., {0, 0, 0}};
    for (int i = 0; i < int(sizeof...(A)); ++i) parameters[i] = all[i];
    return sizeof...(A);
}

// Stands behind the kernel's source.
#define EMULATED_ENTRY(name)                                                                        \
    extern "C" EMULATED_PLAIN __attribute__((visibility("hidden"))) void emulated_thread(void** a) { \
        emulated_call(name, a);                                                                     \
    }                                                                                               \
    extern "C" EMULATED_PLAIN __attribute__((visibility("default"))) int emulated_parameters(       \
        EmulatedParameter* p) {                                                                     \
        return emulated_describe(name, p);                                                          \
    }
