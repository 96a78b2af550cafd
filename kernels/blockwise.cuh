// Blockwise quantisation, in 4 bits or in 8 (Dettmers et al. 2022, §2.1): absmax, and elements in [−1, 1].
//
//   absmax_b = max |x_i| of block b,   v_i = x_i · (1 / max(absmax_b, 10⁻³⁸))
//
// A lane takes runs of 8 consecutive elements, and a block as many lanes as it has runs, at most a warp: 4 lanes for
// 32 elements, so that a warp has 8 blocks, 8 for 64, all 32 from 256 on, where a lane has block/256 runs. A run is
// one or two 16-byte loads; the maximum takes log₂(lanes) shuffles for 8 elements or more.
//
// What is finite: an f32 without its sign is ordered as its bits are, with infinity and then NaN above all numbers.
// So one maximum of integers is absmax, and tells whether there is anything to report.
#pragma once

#include "common.cuh"

constexpr u32 RUN = 8;

// The least bits without sign that are no number's.
constexpr u32 NON_FINITE = 0x7f800000;

__device__ inline u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }

// Whether an address is a multiple of `bytes`: a view may start anywhere.
__device__ inline bool aligned(const void* x, u32 bytes) { return reinterpret_cast<u64>(x) % bytes == 0; }

// 8 elements from a multiple of 16 bytes.
__device__ inline void load_run(const float* x, float (&run)[RUN]) {
    for (u32 i = 0; i < RUN; i += 4) {
        float4 part = *reinterpret_cast<const float4*>(x + i);
        run[i] = part.x, run[i + 1] = part.y, run[i + 2] = part.z, run[i + 3] = part.w;
    }
}
template <typename Half> __device__ inline void load_run(const Half* x, float (&run)[RUN]) {
    uint4 words = *reinterpret_cast<const uint4*>(x);
    u32 pairs[RUN / 2] = {words.x, words.y, words.z, words.w};
    for (u32 i = 0; i < RUN; ++i) run[i] = to_float(Half{u16(pairs[i / 2] >> 16 * (i % 2))});
}

// What is quantised: n elements.
template <typename T> struct Elements {
    const T* x;
    u64 n;

    // The run from element i on, 0 beyond the end: 0 changes no absmax, and its code is the padding's.
    __device__ void load(u64 i, float (&run)[RUN]) const {
        if (i + RUN <= n && aligned(x, 16)) return load_run(x + i, run);
        for (u32 j = 0; j < RUN; ++j) run[j] = i + j < n ? to_float(x[i + j]) : 0.0f;
    }
};

// How many of SIZE − 1 ascending thresholds v exceeds; SIZE is a power of two.
template <u32 SIZE> __device__ inline u32 exceeded(const float* thresholds, float v) {
    u32 count = 0;
    for (u32 step = SIZE / 2; step > 0; step /= 2) count += u32(v > thresholds[count + step - 1]) * step;
    return count;
}

// The lane's share of a block: runs of RUN elements, `stride` elements apart.
struct Share {
    u64 block, first;
    u32 lane, lanes, runs, stride;

    __device__ explicit Share(u32 log_block) {
        // Powers of two all: nothing is divided.
        u32 log_run = 3, log_lanes = min(5u, log_block - log_run);
        lanes = 1u << log_lanes;
        lane = threadIdx.x & (lanes - 1);
        runs = 1u << (log_block - log_run - log_lanes);
        stride = lanes * RUN;
        block = global_thread() >> log_lanes;
        first = (block << log_block) + lane * RUN;
    }
};

// The first element of a share that is not finite; there is one.
template <typename Source> __device__ u64 first_non_finite(const Source& x, const Share& share) {
    float run[RUN];
    for (u64 i = share.first;; i += share.stride) {
        x.load(i, run);
        for (u32 j = 0; j < RUN; ++j)
            if (magnitude(run[j]) >= NON_FINITE) return i + j;
    }
}

// Every block of x: its absmax, and its runs of v to `codes.store(first element, run)`. The product may round past 1,
// which is clamped in the formula and not here, as no threshold lies beyond. The least index of an element that is
// not finite goes to `non_finite`, and then no other result counts.
template <typename Source, typename Codes>
__device__ void quantize(const Source& x, u64 n, u32 log_block, float* absmax, const Codes& codes, u64* non_finite) {
    Share share(log_block);
    float run[RUN];
    u32 largest = 0;
    for (u32 r = 0; r < share.runs; ++r) {
        x.load(share.first + r * share.stride, run);
        for (u32 j = 0; j < RUN; ++j) largest = max(largest, magnitude(run[j]));
    }
    if (largest >= NON_FINITE) atomicMin(non_finite, first_non_finite(x, share));
    for (u32 by = share.lanes / 2; by > 0; by /= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, by));

    float scale = __uint_as_float(largest);
    if (share.lane == 0 && share.first < n) absmax[share.block] = scale;
    // The least divisor keeps a zero block's reciprocal finite.
    float reciprocal = 1.0f / fmaxf(scale, 1e-38f);
    // Backwards: the last run is still in registers.
    for (u32 r = share.runs; r-- > 0;) {
        u64 i = share.first + r * share.stride;
        if (r + 1 < share.runs) x.load(i, run);
        for (u32 j = 0; j < RUN; ++j) run[j] *= reciprocal;
        codes.store(i, run);
    }
}
