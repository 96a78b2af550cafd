// y = g ∘ (x Wᵀ + s·(x (e∘A)ᵀ) Bᵀ) + bias for a W in 4 bits and one to four tokens: the base, the adapter and what
// stands around them in one launch, which writes no decoded weight anywhere.
//
// Blocks of 128 threads, one for each of the `rank` rows of A and one for every 16 outputs. They draw tickets: the
// first `rank` make u = x (e∘A)ᵀ, a row each; the others multiply their 16 rows of W, four a warp, and then wait for u,
// which by then is there. A lane decodes 32 consecutive codes of each of its warp's rows (a 16-byte load; a warp reads
// 512 bytes in a row) from a table of 16 in shared memory, and multiplies them with x, which lies in shared memory as
// eight planes of four neighbours (one run apart more than they need, so that storing x meets in no bank either than the
// lanes' 16-byte loads do). A run's codes and scales are fetched while the one before is multiplied, the first ones
// before x is. Lanes add up by shuffles, once.
//
// Moves ½ byte a weight and a scale a block, once: bound by memory as long as decoding keeps up, which takes a shared
// load and a multiply-add a weight and token. x [tokens, inputs] comes out of the L2 cache for every block.
//
// With compute in bf16, x, the decoded weights, e∘A, u and B are rounded to bf16 before they are multiplied; the sums
// are f32's.
#include "between_blocks.cuh"
#include "quantized.cuh"

constexpr u32 THREADS = 128;
constexpr u32 WARPS = THREADS / WARP;
// Rows of W that a warp multiplies side by side: x is loaded once for all.
constexpr u32 ROWS = 4;
// Consecutive codes of a lane: 16 bytes.
constexpr u32 RUN = 32;
// Planes of x, of four neighbours of each run.
constexpr u32 PLANES = RUN / 4;

// The low-rank part and the factors around; null where absent.
struct Adapter {
    const float* a;
    const float* b;
    const float* e;
    const float* g;
    const float* bias;
    u32 rank;
    float scale;
};

template <bool BF16> __device__ inline float taken(float x) { return BF16 ? to_float(from_float<bf16>(x)) : x; }

// u_tr = Σ_i x_ti e_r A_ri for one r and all tokens.
template <u32 TOKENS, bool BF16>
__device__ void inner_row(const float* x, const Adapter& adapter, u32 r, float* u, u32 tokens, u32 inputs, float (&partials)[TOKENS][WARPS]) {
    float sums[TOKENS] = {};
    float e = adapter.e ? adapter.e[r] : 1.0f;
    for (u32 i = threadIdx.x; i < inputs; i += THREADS) {
        float a = taken<BF16>(e * adapter.a[u64(r) * inputs + i]);
        for (u32 t = 0; t < TOKENS; ++t)
            if (t < tokens) sums[t] = fmaf(taken<BF16>(x[u64(t) * inputs + i]), a, sums[t]);
    }
    for (u32 t = 0; t < TOKENS; ++t) {
        float sum = block_sum(sums[t], partials[t]);
        if (threadIdx.x == 0 && t < tokens) atomic_store(&u[t * adapter.rank + r], sum);
    }
}

// One run of ROWS rows: codes and scales.
struct Fetched {
    uint4 words[ROWS];
    float scales[ROWS];

    // Rows beyond the last are the last once more, whose sums nobody stores; a run beyond the last is not fetched.
    __device__ void fetch(const Quantized& w, u32 row, u32 run, u32 inputs, u32 outputs) {
        if (run >= inputs / RUN) return;
#pragma unroll
        for (u32 q = 0; q < ROWS; ++q) {
            u64 first = u64(min(row + q, outputs - 1)) * inputs + u64(run) * RUN;
            words[q] = w.word<uint4>(first);
            scales[q] = w.scale(first >> w.log_block);
        }
    }
};

// Floats between two planes, and between two tokens' planes.
__device__ inline u32 plane_stride(u32 inputs) { return (inputs / RUN + 1) * 4; }
__device__ inline u32 token_stride(u32 inputs) { return PLANES * plane_stride(inputs); }

// Σ over this lane's runs, the first of them fetched, of ROWS rows from `row` on, for every token.
template <u32 TOKENS, bool BF16>
__device__ void base_rows(const Quantized& w, const float* planes, Fetched next, u32 row, u32 inputs, u32 outputs, float (&sums)[ROWS][TOKENS]) {
    u32 runs = inputs / RUN;
    for (u32 run = threadIdx.x % WARP; run < runs; run += WARP) {
        Fetched now = next;
        next.fetch(w, row, run + WARP, inputs, outputs);
        float parts[ROWS][TOKENS] = {};
#pragma unroll
        for (u32 plane = 0; plane < PLANES; ++plane) {
            float4 x[TOKENS];
#pragma unroll
            for (u32 t = 0; t < TOKENS; ++t)
                x[t] = *reinterpret_cast<const float4*>(planes + t * token_stride(inputs) + plane * plane_stride(inputs) + run * 4);
#pragma unroll
            for (u32 q = 0; q < ROWS; ++q) {
                u32 word = plane < 2 ? now.words[q].x : plane < 4 ? now.words[q].y : plane < 6 ? now.words[q].z : now.words[q].w;
                float v[4];
#pragma unroll
                for (u32 k = 0; k < 4; ++k) {
                    v[k] = w.value(word, plane % 2 * 4 + k);
                    if (BF16) v[k] = taken<BF16>(v[k] * now.scales[q]);
                }
#pragma unroll
                for (u32 t = 0; t < TOKENS; ++t) {
                    float part = parts[q][t];
                    part = fmaf(v[0], x[t].x, part);
                    part = fmaf(v[1], x[t].y, part);
                    part = fmaf(v[2], x[t].z, part);
                    parts[q][t] = fmaf(v[3], x[t].w, part);
                }
            }
        }
        // A run lies in one block: its scale is a factor of its sum.
#pragma unroll
        for (u32 q = 0; q < ROWS; ++q)
#pragma unroll
            for (u32 t = 0; t < TOKENS; ++t) sums[q][t] = BF16 ? sums[q][t] + parts[q][t] : fmaf(now.scales[q], parts[q][t], sums[q][t]);
    }
}

template <u32 TOKENS, bool BF16>
__device__ void linear_few(const float* x, Quantized w, const Adapter& adapter, float* u, Counters* counters, float* y, u32 tokens, u32 inputs, u32 outputs) {
    DYNAMIC_SHARED(float, planes);
    SHARED(float, values, [CODES]);
    SHARED(float, partials, [TOKENS][WARPS]);
    SHARED(u32, drawn, [1]);
    w.stage(values);
    u32 ticket = draw_ticket(counters, drawn);
    if (ticket < adapter.rank) {
        inner_row<TOKENS, BF16>(x, adapter, ticket, u, tokens, inputs, partials);
        arrive(counters);
        leave(counters);
        return;
    }
    u32 lane = threadIdx.x % WARP, row = ((ticket - adapter.rank) * WARPS + threadIdx.x / WARP) * ROWS;
    Fetched first;
    first.fetch(w, row, lane, inputs, outputs);
    for (u32 t = 0; t < TOKENS; ++t)
        for (u32 i = threadIdx.x; i < inputs; i += THREADS) {
            u32 run = i / RUN, plane = i % RUN / 4;
            float value = t < tokens ? taken<BF16>(x[u64(t) * inputs + i]) : 0.0f;
            planes[t * token_stride(inputs) + plane * plane_stride(inputs) + run * 4 + i % 4] = value;
        }
    __syncthreads();
    float sums[ROWS][TOKENS] = {};
    base_rows<TOKENS, BF16>(w, planes, first, row, inputs, outputs, sums);

    // The first warp fetches u for all, behind x.
    float* inner = planes + TOKENS * token_stride(inputs);
    if (threadIdx.x < WARP) {
        wait_for(counters, adapter.rank);
        for (u32 i = lane; i < tokens * adapter.rank; i += WARP) inner[i] = taken<BF16>(atomic_load(&u[i]));
    }
    __syncthreads();
    for (u32 r = lane; r < adapter.rank; r += WARP)
        for (u32 t = 0; t < TOKENS; ++t) {
            if (t >= tokens) continue;
            float factor = adapter.scale * inner[t * adapter.rank + r];
#pragma unroll
            for (u32 q = 0; q < ROWS; ++q) {
                float b = taken<BF16>(adapter.b[u64(min(row + q, outputs - 1)) * adapter.rank + r]);
                sums[q][t] = fmaf(factor, b, sums[q][t]);
            }
        }
#pragma unroll
    for (u32 q = 0; q < ROWS; ++q)
#pragma unroll
        for (u32 t = 0; t < TOKENS; ++t) {
            float sum = warp_sum(sums[q][t]);
            u32 output = row + q;
            if (lane > 0 || output >= outputs || t >= tokens) continue;
            if (adapter.g) sum *= adapter.g[output];
            y[u64(t) * outputs + output] = adapter.bias ? sum + adapter.bias[output] : sum;
        }
    leave(counters);
}

// One token.
extern "C" __global__ void linear_one_f32(
    const float* x, const u8* codes, const float* absmax, const u8* scale_codes, float offset, const float* map,
    const float* values, u32 log_block, const float* a, const float* b, const float* e, const float* g,
    const float* bias, u32 rank, float scale, float* u, u32* counters, float* y, u32 tokens, u32 inputs, u32 outputs) {
    linear_few<1, false>(x, {codes, absmax, scale_codes, offset, map, values, log_block}, {a, b, e, g, bias, rank, scale}, u,
                         reinterpret_cast<Counters*>(counters), y, tokens, inputs, outputs);
}
extern "C" __global__ void linear_one_bf16(
    const float* x, const u8* codes, const float* absmax, const u8* scale_codes, float offset, const float* map,
    const float* values, u32 log_block, const float* a, const float* b, const float* e, const float* g,
    const float* bias, u32 rank, float scale, float* u, u32* counters, float* y, u32 tokens, u32 inputs, u32 outputs) {
    linear_few<1, true>(x, {codes, absmax, scale_codes, offset, map, values, log_block}, {a, b, e, g, bias, rank, scale}, u,
                        reinterpret_cast<Counters*>(counters), y, tokens, inputs, outputs);
}
// Two to four.
extern "C" __global__ void linear_few_f32(
    const float* x, const u8* codes, const float* absmax, const u8* scale_codes, float offset, const float* map,
    const float* values, u32 log_block, const float* a, const float* b, const float* e, const float* g,
    const float* bias, u32 rank, float scale, float* u, u32* counters, float* y, u32 tokens, u32 inputs, u32 outputs) {
    linear_few<4, false>(x, {codes, absmax, scale_codes, offset, map, values, log_block}, {a, b, e, g, bias, rank, scale}, u,
                         reinterpret_cast<Counters*>(counters), y, tokens, inputs, outputs);
}
extern "C" __global__ void linear_few_bf16(
    const float* x, const u8* codes, const float* absmax, const u8* scale_codes, float offset, const float* map,
    const float* values, u32 log_block, const float* a, const float* b, const float* e, const float* g,
    const float* bias, u32 rank, float scale, float* u, u32* counters, float* y, u32 tokens, u32 inputs, u32 outputs) {
    linear_few<4, true>(x, {codes, absmax, scale_codes, offset, map, values, log_block}, {a, b, e, g, bias, rank, scale}, u,
                        reinterpret_cast<Counters*>(counters), y, tokens, inputs, outputs);
}
