// Causal grouped-query attention, forward (Dao 2023, FlashAttention-2; the online softmax is Milakov & Gimelshein's):
//
//     s_ij = scale · q_i·k_j,   out_i = Σ_j exp(s_ij) v_j / Σ_j exp(s_ij),   lse_i = log Σ_j exp(s_ij)
//
// over the keys j that query i sees. q, out [batch, queries, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim];
// lse [batch, heads, queries]; query head h reads key head h / (heads / kv_heads). The geometry is attention.cuh's.
//
// A block of 256 threads owns 64 queries of one head and walks the keys from the first to the last that one of them
// sees, 64 at a time. A query keeps m, the largest score so far, l = Σ exp(s − m) and Σ exp(s − m) v; a larger score
// scales the latter two by exp(m_old − m_new). Blocks come with the last queries, which see most keys, first.
//
// Two multiply-adds a score and element of head_dim, bound by FMA units; q is read again for each tile of keys, from
// the caches. Memory sees q and out once, and k and v once for each tile of queries that L2 does not serve.
#include "attention.cuh"

// The largest of a row, in each of the lanes that share it.
__device__ float row_max(float x) {
    for (u32 offset = LANES / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

__device__ float row_sum(float x) {
    for (u32 offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

template <u32 SLABS>
__device__ void attention(
    const Shape& shape, float scale, const float* q, const float* k, const float* v, float* out, float* lse) {
    SHARED(float4, stage, [2][TILE][SLICE / 4 + 1]);
    SHARED(float4, weights, [TILE][TILE / 4 + 1]);
    u32 query = (gridDim.x - 1 - blockIdx.x) * TILE, head = blockIdx.y, batch = blockIdx.z;
    u32 kv_head = head / shape.group;
    u32 rows = min(TILE, shape.queries - query);
    u32 end = shape.query_offset + query + rows;
    Head of_q = shape.queries_of(batch, head), of_k = shape.keys_of(batch, kv_head).until(end);

    // l is this thread's share of the row's sum until the end.
    float m[EACH], l[EACH];
    float4 sums[SLABS][EACH] = {};
    for (u32 i = 0; i < EACH; ++i) {
        m[i] = -INFINITY;
        l[i] = 0;
    }

    for (u32 key = shape.first_seen(batch, query); key < end; key += TILE) {
        float s[EACH][EACH];
        scores(q, of_q, query, k, of_k, key, stage, s);
        for (u32 i = 0; i < EACH; ++i) {
            u32 row = query + my_row() + i, first = shape.first(batch, row);
            float largest = m[i];
            for (u32 j = 0; j < EACH; ++j) {
                bool seen = shape.sees(row, first, key + my_column() + LANES * j);
                s[i][j] = seen ? scale * s[i][j] : -INFINITY;
                largest = fmaxf(largest, s[i][j]);
            }
            largest = row_max(largest);
            // Where no key was seen yet, every exponential is exp(−∞ − 0).
            float shift = largest == -INFINITY ? 0.0f : largest;
            float factor = expf(m[i] - shift);
            m[i] = largest;
            l[i] *= factor;
            for (u32 j = 0; j < EACH; ++j) {
                float e = expf(s[i][j] - shift);
                l[i] += e;
                weight(weights, i, j) = e;
            }
#pragma unroll
            for (u32 slab = 0; slab < SLABS; ++slab) {
                float4& sum = sums[slab][i];
                sum = make_float4(factor * sum.x, factor * sum.y, factor * sum.z, factor * sum.w);
            }
        }
        accumulate(weights, rows, v, of_k, key, stage, sums);
    }

    float factors[EACH];
    for (u32 i = 0; i < EACH; ++i) {
        float sum = row_sum(l[i]);
        factors[i] = 1 / sum;
        u32 row = my_row() + i;
        if (row < rows && my_column() == 0) lse[shape.saved(batch, head) + query + row] = m[i] + logf(sum);
    }
    store(sums, factors, out, of_q, query);
}

// For head_dim up to 64, 128 and 256. On two blocks a multiprocessor, where registers allow: one loads while the other
// multiplies.
extern "C" __global__ __launch_bounds__(THREADS, 2) void attention_64_f32(
    const float* q, const float* k, const float* v, const u32* starts, float* out, float* lse, u32 queries, u32 keys,
    u32 kv_heads, u32 group, u32 head_dim, float scale, u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    attention<1>(shape, scale, q, k, v, out, lse);
}
extern "C" __global__ __launch_bounds__(THREADS, 2) void attention_128_f32(
    const float* q, const float* k, const float* v, const u32* starts, float* out, float* lse, u32 queries, u32 keys,
    u32 kv_heads, u32 group, u32 head_dim, float scale, u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    attention<2>(shape, scale, q, k, v, out, lse);
}
extern "C" __global__ __launch_bounds__(THREADS, 1) void attention_256_f32(
    const float* q, const float* k, const float* v, const u32* starts, float* out, float* lse, u32 queries, u32 keys,
    u32 kv_heads, u32 group, u32 head_dim, float scale, u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    attention<4>(shape, scale, q, k, v, out, lse);
}
