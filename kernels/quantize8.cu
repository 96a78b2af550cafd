// Blockwise 8-bit quantisation with a dynamic map, and back (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
// Quantization"); with it double quantisation (QLoRA, §3). Exact to the contract's bits.
//
//   code = number of midpoints below v,   x̂ = map[code] · absmax
//
// Midpoints are exact in f64 and come rounded down to f32: an f32 exceeds one where it exceeds the other.
//
// An element moves 4 bytes in and 1 out, or 1 in and 4 out; bound by memory. Double quantisation has a scale for 32
// elements of a weight or more, and its mean is a chain of additions: bound by their latency.
#include "blockwise.cuh"

// Values of a map, and threads of a block.
constexpr u32 VALUES = 256;

// Where codes go.
struct Bytes {
    // The 255 midpoints in shared memory.
    const float* midpoints;
    u8* codes;
    u64 n;

    // Eight of them from element i on; those beyond the end are left out.
    __device__ void store(u64 i, const float (&v)[RUN]) const {
        u32 words[2] = {};
        for (u32 j = 0; j < RUN; ++j) words[j / 4] |= exceeded<VALUES>(midpoints, v[j]) << 8 * (j % 4);
        if (i + RUN <= n && aligned(codes, 8)) {
            reinterpret_cast<uint2*>(codes)[i / RUN] = make_uint2(words[0], words[1]);
            return;
        }
        for (u32 j = 0; j < RUN && i + j < n; ++j) codes[i + j] = u8(words[j / 4] >> 8 * (j % 4));
    }
};

// As many lanes a block as blockwise.cuh says; `midpoints` has an element more than there are, never exceeded.
template <typename Source>
__device__ void quantize8(const Source& x, u8* codes, float* absmax, u64 n, u32 log_block, const float* midpoints,
                          u64* non_finite) {
    SHARED(float, staged, [VALUES]);
    staged[threadIdx.x] = midpoints[threadIdx.x];
    __syncthreads();
    quantize(x, n, log_block, absmax, Bytes{staged, codes, n}, non_finite);
}

extern "C" __global__ void quantize8_f32(const float* x, u8* codes, float* absmax, u64 n, u32 log_block,
                                         const float* midpoints, u64* non_finite) {
    quantize8(Elements<float>{x, n}, codes, absmax, n, log_block, midpoints, non_finite);
}

// What scales differ from their mean by.
struct Centred {
    Elements<float> scales;
    float mean;

    __device__ void load(u64 i, float (&run)[RUN]) const {
        scales.load(i, run);
        for (u32 j = 0; j < RUN; ++j) run[j] = i + j < scales.n ? run[j] - mean : 0.0f;
    }
};

extern "C" __global__ void quantize_centred_f32(const float* scales, float mean, u8* codes, float* absmax, u64 n,
                                                u32 log_block, const float* midpoints, u64* non_finite) {
    quantize8(Centred{{scales, n}, mean}, codes, absmax, n, log_block, midpoints, non_finite);
}

// Scales that lie in shared memory at a time.
constexpr u32 STAGE = 2048;

// Σ x_i in f64, from left to right: one block, whose first thread adds what all of them have brought. The sum begins
// with −0, which changes no first term. The least index of an element that is not finite goes to `non_finite`.
extern "C" __global__ void sum_in_order_f32(const float* x, u64 n, double* sum, u64* non_finite) {
    SHARED(float, stage, [STAGE]);
    double total = -0.0;
    for (u64 start = 0; start < n; start += STAGE) {
        u32 count = u32(min(n - start, u64(STAGE)));
        for (u32 i = threadIdx.x; i < count; i += VALUES) {
            float scale = x[start + i];
            stage[i] = scale;
            if (magnitude(scale) >= NON_FINITE) atomicMin(non_finite, start + i);
        }
        __syncthreads();
        if (threadIdx.x == 0)
            for (u32 i = 0; i < count; ++i) total += double(stage[i]);
        __syncthreads();
    }
    if (threadIdx.x == 0) *sum = total;
}

// Elements that a block of threads decodes, 4 at a time to a thread.
constexpr u32 TILE = 4096;
constexpr u32 VECTOR = 4;
constexpr u32 EACH = TILE / (VALUES * VECTOR);

// Neighbouring threads write neighbouring 16 bytes; all loads of a thread are on their way before its first store. A
// ragged tile, and one of views that are not aligned, goes element by element.
extern "C" __global__ void dequantize8_f32(const u8* codes, const float* absmax, u64 n, u32 log_block, const float* map,
                                           float* out) {
    SHARED(float, values, [VALUES]);
    values[threadIdx.x] = map[threadIdx.x];
    __syncthreads();
    u64 start = u64(blockIdx.x) * TILE, end = min(n, start + TILE);
    if (end - start < TILE || !aligned(codes, 4) || !aligned(out, 16)) {
        for (u64 i = start + threadIdx.x; i < end; i += VALUES) out[i] = values[codes[i]] * absmax[i >> log_block];
        return;
    }
    u64 first = start + threadIdx.x * VECTOR;
    u32 words[EACH];
    float scales[EACH];
    for (u32 j = 0; j < EACH; ++j) {
        u64 i = first + j * VALUES * VECTOR;
        words[j] = *reinterpret_cast<const u32*>(codes + i);
        scales[j] = absmax[i >> log_block];
    }
    for (u32 j = 0; j < EACH; ++j) {
        float x[VECTOR];
        for (u32 k = 0; k < VECTOR; ++k) x[k] = values[words[j] >> 8 * k & 255] * scales[j];
        *reinterpret_cast<float4*>(out + first + j * VALUES * VECTOR) = make_float4(x[0], x[1], x[2], x[3]);
    }
}
