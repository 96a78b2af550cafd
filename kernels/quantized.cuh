// A weight in 4 bits as kernels read it (Dettmers et al. 2023, QLoRA, §3; the contract's `Quantized`).
//
//   w_i = values[code_i] · scale_(i / block)
//   scale_b = absmax_b, or doubly quantised map[scale code_b] · absmax_(b / 256) + offset
//
// of the flattened row-major matrix. Two codes a byte, the first in the high nibble: of a word of n codes, number k
// lies 4·(k xor 1) bits up. A weight reads ½ byte an element and a scale a block: 4 bytes, or 1 + 1/64.
#pragma once

#include "common.cuh"

// Codes of a 4-bit format.
constexpr u32 CODES = 16;
// Scales of a block of scales: 2^8.
constexpr u32 LOG_NESTED = 8;

// A kernel takes the members as parameters, in this order.
struct Quantized {
    // u8 [⌈elements / 2⌉], a buffer of its own: aligned to 256 bytes.
    const u8* codes;
    // The scales, or the scales of the scales.
    const float* absmax;
    // One a block; null where the scales are plain.
    const u8* scale_codes;
    float offset;
    // The signed 8-bit map [256].
    const float* map;
    // The value of each code [16].
    const float* values;
    // Of the elements of a block: 5 to 12.
    u32 log_block;

    // Keeps the values in shared memory from here on: sixteen words in as many banks, where lanes that look up any
    // codes wait for no others. For all threads of a block; a barrier has to follow.
    __device__ void stage(float (&shared)[CODES]) {
        if (threadIdx.x < CODES) shared[threadIdx.x] = values[threadIdx.x];
        values = shared;
    }

    // The scale of a block: rounded after the multiply and again after the add.
    __device__ float scale(u64 block) const {
        if (!scale_codes) return absmax[block];
        return map[scale_codes[block]] * absmax[block >> LOG_NESTED] + offset;
    }

    // Two codes a byte of Word (u8, u16, u32, uint4) from element i on, a multiple of their number.
    template <typename Word> __device__ Word word(u64 i) const {
        return reinterpret_cast<const Word*>(codes)[i / (2 * sizeof(Word))];
    }

    // The value of code k of a word of up to eight.
    __device__ float value(u32 word, u32 k) const { return values[word >> 4 * (k ^ 1) & 15]; }

    // Element i, by itself.
    __device__ float at(u64 i) const { return value(codes[i / 2], i % 2) * scale(i >> log_block); }
};
