// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): counter-based random numbers.
//
// The number at a position is a pure function of (seed, stream, position), the same as crates/backend/src/philox.rs
// draws: a mask is never stored, and backward draws it again.
#pragma once

#include "common.cuh"

// Ten rounds on a 128-bit counter under a 64-bit key.
__device__ constexpr uint4 philox4x32_10(uint4 counter, uint2 key) {
    for (u32 round = 0; round < 10; ++round) {
        u64 p0 = u64(0xD2511F53) * counter.x, p1 = u64(0xCD9E8D57) * counter.z;
        counter = uint4{u32(p1 >> 32) ^ counter.y ^ key.x, u32(p1), u32(p0 >> 32) ^ counter.w ^ key.y, u32(p0)};
        key = uint2{key.x + 0x9E3779B9, key.y + 0xBB67AE85};
    }
    return counter;
}

// The known answers of the authors' Random123 distribution, on either side's compiler.
__device__ constexpr bool equal(uint4 a, uint4 b) { return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w; }
static_assert(equal(philox4x32_10(uint4{}, uint2{}), uint4{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}));
static_assert(equal(philox4x32_10(uint4{~0u, ~0u, ~0u, ~0u}, uint2{~0u, ~0u}),
                    uint4{0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}));

// The four words for positions 4·group … 4·group + 3 of `stream`.
__device__ inline uint4 philox_words(u64 seed, u64 stream, u64 group) {
    uint4 counter{u32(group), u32(group >> 32), u32(stream), u32(stream >> 32)};
    return philox4x32_10(counter, uint2{u32(seed), u32(seed >> 32)});
}
