// Causal grouped-query attention on tensor cores, forward (Dao 2023, FlashAttention-2): attention.cu's formula, shapes
// and masks, products of bf16 and sums in f32. k and v come in bf16, q is rounded as it is read. The geometry is
// attention_mma.cuh's.
//
// A block owns 64 queries of one head, q in registers, and walks the keys from the first to the last that one of them
// sees, 64 at a time: while it multiplies one tile of k and v the next is on its way by cp.async. Scores are kept in
// units of log 2, as exp2 takes them: with c = scale · log₂e a query keeps m, the largest c·s so far, l = Σ 2^(c·s − m)
// and Σ 2^(c·s − m) v; lse = m · log 2 + log l. scale is positive, so that the largest s has the largest c·s.
//
// P is rounded on its way into the product with v, not in l. Rounding m cancels: all exponents of a query are to the
// same m. Rounding c is an error of the score, of one unit and a quarter, in place of those that are not made: of its
// product with scale, and of the first product of q and k, which is exact.
//
// Two multiply-adds a score and element of head_dim; bound by tensor cores, and as much by the softmax where head_dim
// is 64. A tile of k and v, 4 bytes an element of head_dim and key from L2, serves 64 queries. Memory sees q and out
// once, 4 bytes an element each.
#include "attention_mma.cuh"

constexpr float LOG2_E = 1.44269504f;
constexpr float LOG_2 = 0.693147182f;

// The largest of a row, in each of the four lanes that share it, and the sum.
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

template <u32 WIDTH>
__device__ void attention(
    const Shape& shape, float scale, const float* q, const bf16* k, const bf16* v, float* out, float* lse) {
    struct Memory {
        Tile<TILE, WIDTH> k[STAGES], v[STAGES];
    };
    DYNAMIC_SHARED(Memory, memory);
    u32 query = (gridDim.x - 1 - blockIdx.x) * TILE, head = blockIdx.y, batch = blockIdx.z;
    u32 kv_head = head / shape.group;
    u32 end = shape.query_offset + min(query + TILE, shape.queries);
    Head of_q = shape.queries_of(batch, head), of_k = shape.keys_of(batch, kv_head).until(end);

    u32 key = shape.first_seen(batch, query);
    fetch(k, of_k, key, memory->k[0]);
    fetch(v, of_k, key, memory->v[0]);
    cp_async_commit();
    Factor rows[WIDTH / STEP];
    load(q, of_q, query, rows);
    // l is this thread's share of the row's sum until the end.
    float c = LOG2_E * scale, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
    Result<WIDTH> sums = {};
    u32 first[2], row = query + first_row();
    for (u32 i = 0; i < 2; ++i) first[i] = shape.first(batch, row + 8 * i);

    for (u32 stage = 0; key < end; key += TILE, stage ^= 1) {
        // This tile has landed, every thread's part of it, and every thread is done with the one before, which the
        // next overwrites.
        cp_async_wait<0>();
        __syncthreads();
        if (key + TILE < end) {
            fetch(k, of_k, key + TILE, memory->k[stage ^ 1]);
            fetch(v, of_k, key + TILE, memory->v[stage ^ 1]);
            cp_async_commit();
        }
        Sums<TILE / 8> s;
        scores(rows, memory->k[stage], s);
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            u32 at = row + 8 * i;
            if (!(first[i] <= key && key + TILE - 1 <= shape.query_offset + at))
#pragma unroll
                for (u32 j = 0; j < 16; ++j) {
                    float& score = s[0][j / 2][2 * i + j % 2];
                    if (!shape.sees(at, first[i], key + j / 2 * 8 + 2 * lane_pair() + j % 2)) score = -INFINITY;
                }
            float largest = s[0][0][2 * i];
#pragma unroll
            for (u32 j = 1; j < 16; ++j) largest = fmaxf(largest, s[0][j / 2][2 * i + j % 2]);
            largest = fmaxf(m[i], c * quad_max(largest));
            // Where no key was seen yet, every power is 2^(−∞ − 0).
            float shift = largest == -INFINITY ? 0.0f : largest;
            float factor = exp2f(m[i] - shift);
            m[i] = largest;
            l[i] *= factor;
#pragma unroll
            for (u32 j = 0; j < 16; ++j) {
                float& power = s[0][j / 2][2 * i + j % 2];
                power = exp2f(fmaf(c, power, -shift));
                l[i] += power;
            }
#pragma unroll
            for (u32 part = 0; part < WIDTH / 64; ++part)
#pragma unroll
                for (u32 j = 0; j < 16; ++j) sums[part][0][j / 2][2 * i + j % 2] *= factor;
        }
        accumulate(s, memory->v[stage], sums);
    }

    float inverse[2];
    for (u32 i = 0; i < 2; ++i) {
        float sum = quad_sum(l[i]);
        inverse[i] = 1 / sum;
        u32 at = row + 8 * i;
        if (at < shape.queries && lane_pair() == 0) lse[shape.saved(batch, head) + at] = fmaf(m[i], LOG_2, logf(sum));
    }
    store(sums, inverse, out, of_q, query);
}

// For head_dim up to 64 and 128. On four and on two blocks a multiprocessor: one loads while another multiplies and
// another takes powers.
extern "C" __global__ __launch_bounds__(MMA_THREADS, 4) void attention_mma_64(
    const float* q, const bf16* k, const bf16* v, const u32* starts, float* out, float* lse, u32 queries, u32 keys,
    u32 kv_heads, u32 group, u32 head_dim, float scale, u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    attention<64>(shape, scale, q, k, v, out, lse);
}
extern "C" __global__ __launch_bounds__(MMA_THREADS, 2) void attention_mma_128(
    const float* q, const bf16* k, const bf16* v, const u32* starts, float* out, float* lse, u32 queries, u32 keys,
    u32 kv_heads, u32 group, u32 head_dim, float scale, u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    attention<128>(shape, scale, q, k, v, out, lse);
}
