// ptx.cuh - the only place with PTX: copies that do not wait (Ampere and later), half precision, bits of a float.
//
// The emulator in tests/emulator/ defines FASTCONV_PTX and gives every function here a twin on the CPU.

#ifndef FASTCONV_PTX
#define FASTCONV_PTX

#define ASYNC_COPIES (__CUDA_ARCH__ >= 800)

// Copy 16 bytes from global to shared memory, both addresses multiples of 16; see wait_async.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global)
{
#if ASYNC_COPIES
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(address), "l"(global) : "memory");
#else
    *static_cast<int4*>(shared) = *static_cast<const int4*>(global);
#endif
}

// Wait until all copies of this thread have arrived; a barrier then shows them to the other threads.
__device__ __forceinline__ void wait_async()
{
#if ASYNC_COPIES
    asm volatile("cp.async.wait_all;\n" ::: "memory");
#endif
}

__device__ __forceinline__ float half_to_float(unsigned short half)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

// Round to nearest, ties to even; too large becomes inf.
__device__ __forceinline__ unsigned short float_to_half(float value)
{
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

__device__ __forceinline__ float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned float_to_bits(float value) { return __float_as_uint(value); }

#endif
