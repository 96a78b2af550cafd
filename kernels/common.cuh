// What every kernel may use: integer names, the half-width floats, shared arrays, reductions.
//
// One source, two sides. Under NVRTC this file holds the device's side; anywhere else it takes the host's from
// shim.h, under which the same kernels run in fibres. Nothing else in this folder knows which side it is on, but for
// two headers of instructions that CUDA C++ has no names for: mma.cuh and between_blocks.cuh.
//
// Rules of the house, stricter than the hardware:
// - blocks talk only through atomics, whose order does not change the result;
// - every thread of a block reaches the same barrier, so nobody returns before the last one;
// - nothing is contracted behind the source's back (-fmad=false): a fused multiply-add is written fmaf.
#pragma once

#ifdef __CUDACC_RTC__

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define SHARED(type, name, dimensions) __shared__ type name dimensions
// Shared memory whose size the launch gives.
#define DYNAMIC_SHARED(type, name)                              \
    extern __shared__ __align__(16) unsigned char name##_raw[]; \
    type* name = reinterpret_cast<type*>(name##_raw)

#define INFINITY __int_as_float(0x7f800000)

#else

#include "shim.h"

#endif

// The upper half of a binary32.
struct bf16 {
    u16 bits;
};

// A binary16.
struct f16 {
    u16 bits;
};

// To f32: exact from either half-width type.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

// To a type, to nearest even; a NaN stays one.
template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }

#ifdef __CUDACC_RTC__

__device__ inline float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <> __device__ inline bf16 from_float<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

template <> __device__ inline f16 from_float<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

#else

__device__ inline float to_float(f16 x) { return host_f16_to_float(x.bits); }
template <> __device__ inline bf16 from_float<bf16>(float x) { return bf16{host_float_to_bf16(x)}; }
template <> __device__ inline f16 from_float<f16>(float x) { return f16{host_float_to_f16(x)}; }

#endif

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffff;

// The index of this thread among all of a one-dimensional launch, and how many there are.
__device__ inline u64 global_thread() { return u64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline u64 global_threads() { return u64(gridDim.x) * blockDim.x; }

// The sum over the warp, in every lane: a butterfly, so that all lanes hold the same bits.
template <typename T> __device__ inline T warp_sum(T x) {
    for (u32 offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

// The largest of the warp, in every lane; a NaN among them is passed over.
__device__ inline float warp_max(float x) {
    for (u32 offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// The sum over a block of whole warps, in every thread. `partials` has an element a warp and is free again after
// the next barrier of the caller.
template <typename T> __device__ inline T block_sum(T x, T* partials) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) partials[threadIdx.x / WARP] = x;
    __syncthreads();
    T sum = 0;
    for (u32 warp = 0; warp < blockDim.x / WARP; ++warp) sum += partials[warp];
    return sum;
}

// The largest over a block of whole warps, in every thread; `partials` as in block_sum.
__device__ inline float block_max(float x, float* partials) {
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) partials[threadIdx.x / WARP] = x;
    __syncthreads();
    float largest = partials[0];
    for (u32 warp = 1; warp < blockDim.x / WARP; ++warp) largest = fmaxf(largest, partials[warp]);
    return largest;
}
