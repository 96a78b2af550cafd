// Blockwise 4-bit quantisation and back (Dettmers et al. 2023, QLoRA, eq. 1 and §3), exact to the contract's bits.
//
//   v = w · (1 / max(absmax, 10⁻³⁸)),   code = order[number of thresholds below v]   ŵ = values[code] · scale
//
// Both are bound by memory. Quantising moves an f32's 4 bytes (a half's 2) in, ½ + 4/block out; a block of more than
// 256 elements is read twice, from the caches the second time. Back it is the other way round.
#include "blockwise.cuh"
#include "quantized.cuh"

constexpr u32 THREADS = 256;

// Where codes go.
struct Nibbles {
    // The format's thresholds in shared memory, +∞ where it has fewer than 15.
    const float* thresholds;
    // The codes by ascending value, the least in the lowest nibble.
    u64 order;
    u8* codes;
    u64 n;

    // Eight of them from element i on. The word's bytes are in order; those beyond the end are left out, and the
    // nibble beyond an odd count is the code of 0.
    __device__ void store(u64 i, const float (&v)[RUN]) const {
        u32 word = 0;
        for (u32 j = 0; j < RUN; ++j) {
            u32 code = u32(order >> 4 * exceeded<CODES>(thresholds, v[j])) & 15;
            word |= code << 4 * (j ^ 1);
        }
        if (i + RUN <= n && aligned(codes, 4)) {
            reinterpret_cast<u32*>(codes)[i / RUN] = word;
            return;
        }
        for (u32 j = 0; j < RUN && i + j < n; j += 2) codes[(i + j) / 2] = u8(word >> 4 * j);
    }
};

// 256 threads a block of threads, as many lanes a block of elements as blockwise.cuh says. The code is a search of
// four steps among thresholds in shared memory, which lie in sixteen banks.
template <typename T>
__device__ void quantize4(const T* w, u8* codes, float* absmax, u64 n, u32 log_block, const float* thresholds,
                          u64 order, u64* non_finite) {
    SHARED(float, staged, [CODES]);
    if (threadIdx.x < CODES) staged[threadIdx.x] = thresholds[threadIdx.x];
    __syncthreads();
    quantize(Elements<T>{w, n}, n, log_block, absmax, Nibbles{staged, order, codes, n}, non_finite);
}

extern "C" __global__ void quantize4_f32(const float* w, u8* codes, float* absmax, u64 n, u32 log_block,
                                         const float* thresholds, u64 order, u64* non_finite) {
    quantize4(w, codes, absmax, n, log_block, thresholds, order, non_finite);
}
extern "C" __global__ void quantize4_bf16(const bf16* w, u8* codes, float* absmax, u64 n, u32 log_block,
                                          const float* thresholds, u64 order, u64* non_finite) {
    quantize4(w, codes, absmax, n, log_block, thresholds, order, non_finite);
}
extern "C" __global__ void quantize4_f16(const f16* w, u8* codes, float* absmax, u64 n, u32 log_block,
                                         const float* thresholds, u64 order, u64* non_finite) {
    quantize4(w, codes, absmax, n, log_block, thresholds, order, non_finite);
}

// Elements that a block of threads decodes.
constexpr u32 TILE = 4096;

// 16 bytes of the output, at a multiple of 16: 4 elements or 8.
__device__ inline void store(float* out, const float (&w)[4]) {
    *reinterpret_cast<float4*>(out) = make_float4(w[0], w[1], w[2], w[3]);
}
template <typename Half> __device__ inline void store(Half* out, const float (&w)[8]) {
    u32 pairs[4];
    for (u32 i = 0; i < 4; ++i)
        pairs[i] = u32(from_float<Half>(w[2 * i]).bits) | u32(from_float<Half>(w[2 * i + 1]).bits) << 16;
    *reinterpret_cast<uint4*>(out) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// The codes of 16 bytes of the output.
template <typename T> struct Word {
    typedef u32 Type;
};
template <> struct Word<float> {
    typedef u16 Type;
};

// Neighbouring threads write neighbouring 16 bytes; all loads of a thread are on their way before its first store. A
// ragged tile, and one of a view that is not aligned, goes element by element.
template <typename T> __device__ void dequantize4(Quantized q, u64 n, T* out) {
    constexpr u32 VECTOR = 16 / sizeof(T), EACH = TILE / (THREADS * VECTOR);
    SHARED(float, values, [CODES]);
    q.stage(values);
    __syncthreads();
    u64 start = u64(blockIdx.x) * TILE, end = min(n, start + TILE);
    if (end - start < TILE || !aligned(out, 16)) {
        for (u64 i = start + threadIdx.x; i < end; i += THREADS) out[i] = from_float<T>(q.at(i));
        return;
    }
    u64 first = start + threadIdx.x * VECTOR;
    u32 words[EACH];
    float scales[EACH];
    for (u32 j = 0; j < EACH; ++j) {
        u64 i = first + j * THREADS * VECTOR;
        words[j] = q.word<typename Word<T>::Type>(i);
        scales[j] = q.scale(i >> q.log_block);
    }
    for (u32 j = 0; j < EACH; ++j) {
        float w[VECTOR];
        for (u32 k = 0; k < VECTOR; ++k) w[k] = q.value(words[j], k) * scales[j];
        store(out + first + j * THREADS * VECTOR, w);
    }
}

extern "C" __global__ void dequantize4_f32(const u8* codes, const float* absmax, const u8* scale_codes, float offset,
                                           const float* map, const float* values, u32 log_block, u64 n, float* out) {
    dequantize4(Quantized{codes, absmax, scale_codes, offset, map, values, log_block}, n, out);
}
extern "C" __global__ void dequantize4_bf16(const u8* codes, const float* absmax, const u8* scale_codes, float offset,
                                            const float* map, const float* values, u32 log_block, u64 n, bf16* out) {
    dequantize4(Quantized{codes, absmax, scale_codes, offset, map, values, log_block}, n, out);
}
extern "C" __global__ void dequantize4_f16(const u8* codes, const float* absmax, const u8* scale_codes, float offset,
                                           const float* map, const float* values, u32 log_block, u64 n, f16* out) {
    dequantize4(Quantized{codes, absmax, scale_codes, offset, map, values, log_block}, n, out);
}
