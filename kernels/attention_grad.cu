// Causal grouped-query attention, backward (Dao 2023, FlashAttention-2), from the forward's out and lse:
//
//     P_ij = exp(scale · q_i·k_j − lse_i)
//     dv_j = Σ_i P_ij dout_i
//     dP_ij = dout_i·v_j
//     dS_ij = P_ij (dP_ij − D_i): the softmax's Jacobian P_ij (δ_jl − P_il) applied to dP, where
//             D_i = Σ_l P_il dP_il = dout_i · Σ_l P_il v_l = dout_i·out_i needs no pass over the keys
//     dq_i = scale · Σ_j dS_ij k_j,   dk_j = scale · Σ_i dS_ij q_i
//
// over the pairs where query i sees key j; sums over i run over the queries of all heads of j's group. Shapes are the
// forward's; D is [batch, heads, queries] like lse. The geometry is attention.cuh's.
//
// Three kernels: D; dq by tiles of queries, which walk the keys (3 multiply-adds a score and element of head_dim); dk
// and dv by tiles of keys, which walk the queries (4, or 2 for dv alone). P is formed in both, so that no two blocks
// add to one element: sums run in a fixed order. Bound by FMA units.
#include "attention.cuh"

// D_i = Σ dout_i out_i; out and dout [batch, queries, heads, head_dim]. A warp a row; 8 bytes an element, bound by
// memory.
extern "C" __global__ __launch_bounds__(THREADS) void attention_dots_f32(
    const float* out, const float* dout, float* dots, u64 rows, u32 queries, u32 heads, u32 head_dim) {
    u64 row = global_thread() / WARP;
    // A warp has one row: all of its lanes go one way.
    if (row < rows) {
        float sum = 0;
        for (u32 i = threadIdx.x % WARP; i < head_dim; i += WARP)
            sum = fmaf(out[row * head_dim + i], dout[row * head_dim + i], sum);
        sum = warp_sum(sum);
        u64 head = row % heads, query = row / heads % queries, batch = row / heads / queries;
        if (threadIdx.x % WARP == 0) dots[(batch * heads + head) * queries + query] = sum;
    }
}

// A block owns 64 queries of one head and walks the keys that they see, as forward does.
template <u32 SLABS>
__device__ void grad_queries(
    const Shape& shape, float scale, const float* q, const float* k, const float* v, const float* dout,
    const float* lse, const float* dots, float* dq) {
    SHARED(float4, stage, [2][TILE][SLICE / 4 + 1]);
    SHARED(float4, weights, [TILE][TILE / 4 + 1]);
    u32 query = (gridDim.x - 1 - blockIdx.x) * TILE, head = blockIdx.y, batch = blockIdx.z;
    u32 kv_head = head / shape.group;
    u32 rows = min(TILE, shape.queries - query);
    u32 end = shape.query_offset + query + rows;
    Head of_q = shape.queries_of(batch, head), of_k = shape.keys_of(batch, kv_head).until(end);

    float4 sums[SLABS][EACH] = {};
    for (u32 key = shape.first_seen(batch, query); key < end; key += TILE) {
        float s[EACH][EACH];
        scores(q, of_q, query, k, of_k, key, stage, s);
        for (u32 i = 0; i < EACH; ++i) {
            u32 row = query + my_row() + i, first = shape.first(batch, row);
            float row_lse = row < shape.queries ? lse[shape.saved(batch, head) + row] : 0.0f;
            for (u32 j = 0; j < EACH; ++j) {
                bool seen = shape.sees(row, first, key + my_column() + LANES * j);
                weight(weights, i, j) = probability(seen, s[i][j], scale, row_lse);
            }
        }
        scores(dout, of_q, query, v, of_k, key, stage, s);
        for (u32 i = 0; i < EACH; ++i) {
            u32 row = query + my_row() + i;
            float row_dot = row < shape.queries ? dots[shape.saved(batch, head) + row] : 0.0f;
            for (u32 j = 0; j < EACH; ++j) {
                float& w = weight(weights, i, j);
                w = grad_score(w, s[i][j], row_dot);
            }
        }
        accumulate(weights, rows, k, of_k, key, stage, sums);
    }
    float factors[EACH] = {scale, scale, scale, scale};
    store(sums, factors, dq, of_q, query);
}

// A block owns 64 keys of one key head and walks the queries of each head of the group that may see them. Here the
// scores' rows are keys and their columns queries. Blocks come with the first keys, which most queries see, first.
template <u32 SLABS>
__device__ void grad_keys(
    const Shape& shape, float scale, const float* q, const float* k, const float* v, const float* dout,
    const float* lse, const float* dots, float* dk, float* dv) {
    SHARED(float4, stage, [2][TILE][SLICE / 4 + 1]);
    SHARED(float4, weights, [TILE][TILE / 4 + 1]);
    u32 key = blockIdx.x * TILE, kv_head = blockIdx.y, batch = blockIdx.z;
    u32 rows = min(TILE, shape.keys - key);
    Head of_k = shape.keys_of(batch, kv_head);
    float4 sums_k[SLABS][EACH] = {}, sums_v[SLABS][EACH] = {};

    // Queries at the first key's position and behind it, while the last key is in their window.
    u32 begin = key > shape.query_offset ? key - shape.query_offset : 0;
    u64 out_of_window = u64(key) + rows - 1 + shape.window;
    u32 end = out_of_window > shape.query_offset ? u32(min(u64(shape.queries), out_of_window - shape.query_offset)) : 0;
    for (u32 g = 0; g < shape.group; ++g) {
        u32 head = kv_head * shape.group + g;
        Head of_q = shape.queries_of(batch, head).until(end);
        for (u32 query = begin; query < end; query += TILE) {
            // Segments of all of these queries start behind the keys.
            if (shape.first_seen(batch, query) >= key + rows) continue;
            float s[EACH][EACH];
            scores(k, of_k, key, q, of_q, query, stage, s);
            for (u32 j = 0; j < EACH; ++j) {
                u32 column = query + my_column() + LANES * j;
                u32 first = shape.first(batch, column);
                float column_lse = column < end ? lse[shape.saved(batch, head) + column] : 0.0f;
                for (u32 i = 0; i < EACH; ++i) {
                    bool seen = shape.sees(column, first, key + my_row() + i);
                    weight(weights, i, j) = probability(seen, s[i][j], scale, column_lse);
                }
            }
            if (dv) accumulate(weights, rows, dout, of_q, query, stage, sums_v);
            if (!dk) continue;
            scores(v, of_k, key, dout, of_q, query, stage, s);
            for (u32 j = 0; j < EACH; ++j) {
                u32 column = query + my_column() + LANES * j;
                float column_dot = column < end ? dots[shape.saved(batch, head) + column] : 0.0f;
                for (u32 i = 0; i < EACH; ++i) {
                    float& w = weight(weights, i, j);
                    w = grad_score(w, s[i][j], column_dot);
                }
            }
            accumulate(weights, rows, q, of_q, query, stage, sums_k);
        }
    }
    float once[EACH] = {1, 1, 1, 1}, scales[EACH] = {scale, scale, scale, scale};
    if (dk) store(sums_k, scales, dk, of_k, key);
    if (dv) store(sums_v, once, dv, of_k, key);
}

// For head_dim up to 64, 128 and 256. On two blocks a multiprocessor, where registers allow: one loads while the other
// multiplies.
extern "C" __global__ __launch_bounds__(THREADS, 2) void attention_dq_64_f32(
    const float* q, const float* k, const float* v, const u32* starts, const float* dout, const float* lse,
    const float* dots, float* dq, u32 queries, u32 keys, u32 kv_heads, u32 group, u32 head_dim, float scale,
    u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    grad_queries<1>(shape, scale, q, k, v, dout, lse, dots, dq);
}
extern "C" __global__ __launch_bounds__(THREADS, 2) void attention_dq_128_f32(
    const float* q, const float* k, const float* v, const u32* starts, const float* dout, const float* lse,
    const float* dots, float* dq, u32 queries, u32 keys, u32 kv_heads, u32 group, u32 head_dim, float scale,
    u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    grad_queries<2>(shape, scale, q, k, v, dout, lse, dots, dq);
}
extern "C" __global__ __launch_bounds__(THREADS, 1) void attention_dq_256_f32(
    const float* q, const float* k, const float* v, const u32* starts, const float* dout, const float* lse,
    const float* dots, float* dq, u32 queries, u32 keys, u32 kv_heads, u32 group, u32 head_dim, float scale,
    u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    grad_queries<4>(shape, scale, q, k, v, dout, lse, dots, dq);
}

// dk or dv may be null.
extern "C" __global__ __launch_bounds__(THREADS, 2) void attention_dkv_64_f32(
    const float* q, const float* k, const float* v, const u32* starts, const float* dout, const float* lse,
    const float* dots, float* dk, float* dv, u32 queries, u32 keys, u32 kv_heads, u32 group, u32 head_dim, float scale,
    u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    grad_keys<1>(shape, scale, q, k, v, dout, lse, dots, dk, dv);
}
extern "C" __global__ __launch_bounds__(THREADS, 2) void attention_dkv_128_f32(
    const float* q, const float* k, const float* v, const u32* starts, const float* dout, const float* lse,
    const float* dots, float* dk, float* dv, u32 queries, u32 keys, u32 kv_heads, u32 group, u32 head_dim, float scale,
    u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    grad_keys<2>(shape, scale, q, k, v, dout, lse, dots, dk, dv);
}
extern "C" __global__ __launch_bounds__(THREADS, 1) void attention_dkv_256_f32(
    const float* q, const float* k, const float* v, const u32* starts, const float* dout, const float* lse,
    const float* dots, float* dk, float* dv, u32 queries, u32 keys, u32 kv_heads, u32 group, u32 head_dim, float scale,
    u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    grad_keys<4>(shape, scale, q, k, v, dout, lse, dots, dk, dv);
}
