// Causal grouped-query attention on tensor cores, backward (Dao 2023, FlashAttention-2): attention_grad.cu's formulas,
// shapes and order of sums, D from its kernel; products of bf16, P and dS too, and sums in f32. The geometry is
// attention_mma.cuh's.
//
// Two kernels, so that no two blocks add to one element: dq by tiles of queries, which walk the keys (3 multiply-adds a
// score and element of head_dim); dk and dv by tiles of keys, which walk the queries (4, or 2 for dv alone). Bound by
// tensor cores. A tile of the walked side, 4 bytes an element from L2, serves 64 rows.
#include "attention_mma.cuh"

// Rows of the tiles that a block walks: half of its own, for two products of scores lie in registers beside the sums.
constexpr u32 WALKED = WARP;

// A block owns 64 queries of one head, their q and dout in registers, and walks the keys that they see, as forward
// does.
template <u32 WIDTH>
__device__ void grad_queries(
    const Shape& shape, float scale, const float* q, const bf16* k, const bf16* v, const float* dout, const float* lse,
    const float* dots, float* dq) {
    struct Memory {
        Tile<WALKED, WIDTH> k[STAGES], v[STAGES];
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
    Factor q_rows[WIDTH / STEP], dout_rows[WIDTH / STEP];
    load(q, of_q, query, q_rows);
    load(dout, of_q, query, dout_rows);
    u32 row = query + first_row(), first[2];
    float row_lse[2], row_dot[2];
    for (u32 i = 0; i < 2; ++i) {
        bool inside = row + 8 * i < shape.queries;
        u64 at = shape.saved(batch, head) + row + 8 * i;
        first[i] = shape.first(batch, row + 8 * i);
        row_lse[i] = inside ? lse[at] : 0.0f;
        row_dot[i] = inside ? dots[at] : 0.0f;
    }

    Result<WIDTH> sums = {};
    for (u32 stage = 0; key < end; key += WALKED, stage ^= 1) {
        // This tile has landed, every thread's part of it, and every thread is done with the one before, which the
        // next overwrites.
        cp_async_wait<0>();
        __syncthreads();
        if (key + WALKED < end) {
            fetch(k, of_k, key + WALKED, memory->k[stage ^ 1]);
            fetch(v, of_k, key + WALKED, memory->v[stage ^ 1]);
            cp_async_commit();
        }
        Sums<WALKED / 8> s, dp;
        scores(q_rows, memory->k[stage], s);
        scores(dout_rows, memory->v[stage], dp);
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            u32 at = row + 8 * i;
#pragma unroll
            for (u32 j = 0; j < WALKED / 4; ++j) {
                bool seen = shape.sees(at, first[i], key + j / 2 * 8 + 2 * lane_pair() + j % 2);
                u32 r = 2 * i + j % 2;
                float p = probability(seen, s[0][j / 2][r], scale, row_lse[i]);
                s[0][j / 2][r] = grad_score(p, dp[0][j / 2][r], row_dot[i]);
            }
        }
        accumulate(s, memory->k[stage], sums);
    }
    float scales[2] = {scale, scale};
    store(sums, scales, dq, of_q, query);
}

// What a query brings to each key.
struct __align__(16) Column {
    float lse, dot;
    u32 first;
};

// The tiles of queries that a block of keys walks: those of a group's heads one after another, each from `begin` to
// `end`, but for tiles of which every segment starts behind the last key.
struct Walk {
    u32 begin, end, last_key, heads;
    // Where it is; done at the end of the heads.
    u32 head, query;

    __device__ bool done() const { return head >= heads; }

    __device__ void skip(const Shape& shape, u32 batch) {
        u32 lane = threadIdx.x % WARP;
        while (!done() && __reduce_min_sync(ALL_LANES, shape.first(batch, query + lane)) > last_key) step();
    }

    __device__ void step() {
        query += WALKED;
        if (query < end) return;
        query = begin;
        ++head;
    }
};

// A block owns 64 keys of one key head, their k and v in shared memory, and walks the queries of each head of the group
// that may see them. Here the scores' rows are keys and their columns queries. Blocks come with the first keys, which
// most queries see, first.
template <u32 WIDTH>
__device__ void grad_keys(
    const Shape& shape, float scale, const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,
    const float* dots, float* dk, float* dv) {
    struct Memory {
        Tile<TILE, WIDTH> k, v;
        Tile<WALKED, WIDTH> q[STAGES], dout[STAGES];
        Column columns[STAGES][WALKED];
    };
    DYNAMIC_SHARED(Memory, memory);
    u32 key = blockIdx.x * TILE, kv_head = blockIdx.y, batch = blockIdx.z;
    Head of_k = shape.keys_of(batch, kv_head);

    // Queries at the first key's position and behind it, while the last key is in their window.
    u32 begin = key > shape.query_offset ? key - shape.query_offset : 0, last_key = min(key + TILE, shape.keys) - 1;
    u64 out_of_window = u64(last_key) + shape.window;
    u32 end = out_of_window > shape.query_offset ? u32(min(u64(shape.queries), out_of_window - shape.query_offset)) : 0;
    u32 heads = (kv_head + 1) * shape.group;
    Walk walk = {begin, end, last_key, heads, begin < end ? kv_head * shape.group : heads, begin};

    // Sends for the tile that the walk is at.
    auto send = [&](u32 stage) {
        Head of_q = shape.queries_of(batch, walk.head).until(end);
        fetch(q, of_q, walk.query, memory->q[stage]);
        fetch(dout, of_q, walk.query, memory->dout[stage]);
        cp_async_commit();
    };
    // Of the tile's columns this thread's; the first warp has them all.
    auto column = [&] {
        u32 query = walk.query + threadIdx.x;
        if (query >= shape.queries) return Column{0, 0, 0xffffffff};
        u64 at = shape.saved(batch, walk.head) + query;
        return Column{lse[at], dk ? dots[at] : 0.0f, shape.first(batch, query)};
    };

    Result<WIDTH> sums_k = {}, sums_v = {};
    walk.skip(shape, batch);
    if (!walk.done()) {
        fetch(k, of_k, key, memory->k);
        fetch(v, of_k, key, memory->v);
        send(0);
        if (threadIdx.x < WALKED) memory->columns[0][threadIdx.x] = column();
    }
    for (u32 stage = 0; !walk.done(); stage ^= 1) {
        // This tile has landed, every thread's part of it, and every thread is done with the one before, which the
        // next overwrites.
        cp_async_wait<0>();
        __syncthreads();
        u32 query = walk.query;
        walk.step();
        walk.skip(shape, batch);
        Column next = {};
        if (!walk.done()) {
            send(stage ^ 1);
            if (threadIdx.x < WALKED) next = column();
        }
        Sums<WALKED / 8> s, dp;
        scores(memory->k, memory->q[stage], s);
#pragma unroll
        for (u32 j = 0; j < WALKED / 4; ++j) {
            u32 at = j / 2 * 8 + 2 * lane_pair() + j % 2;
            const Column& of = memory->columns[stage][at];
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                float& score = s[0][j / 2][2 * i + j % 2];
                bool seen = shape.sees(query + at, of.first, key + first_row() + 8 * i);
                score = probability(seen, score, scale, of.lse);
            }
        }
        if (dv) accumulate(s, memory->dout[stage], sums_v);
        if (dk) {
            scores(memory->v, memory->dout[stage], dp);
#pragma unroll
            for (u32 j = 0; j < WALKED / 4; ++j) {
                float dot = memory->columns[stage][j / 2 * 8 + 2 * lane_pair() + j % 2].dot;
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    u32 r = 2 * i + j % 2;
                    s[0][j / 2][r] = grad_score(s[0][j / 2][r], dp[0][j / 2][r], dot);
                }
            }
            accumulate(s, memory->q[stage], sums_k);
        }
        if (!walk.done() && threadIdx.x < WALKED) memory->columns[stage ^ 1][threadIdx.x] = next;
    }
    float once[2] = {1, 1}, scales[2] = {scale, scale};
    if (dk) store(sums_k, scales, dk, of_k, key);
    if (dv) store(sums_v, once, dv, of_k, key);
}

// For head_dim up to 64 and 128.
extern "C" __global__ __launch_bounds__(MMA_THREADS, 3) void attention_dq_mma_64(
    const float* q, const bf16* k, const bf16* v, const u32* starts, const float* dout, const float* lse,
    const float* dots, float* dq, u32 queries, u32 keys, u32 kv_heads, u32 group, u32 head_dim, float scale,
    u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    grad_queries<64>(shape, scale, q, k, v, dout, lse, dots, dq);
}
extern "C" __global__ __launch_bounds__(MMA_THREADS, 2) void attention_dq_mma_128(
    const float* q, const bf16* k, const bf16* v, const u32* starts, const float* dout, const float* lse,
    const float* dots, float* dq, u32 queries, u32 keys, u32 kv_heads, u32 group, u32 head_dim, float scale,
    u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    grad_queries<128>(shape, scale, q, k, v, dout, lse, dots, dq);
}

// dk or dv may be null.
extern "C" __global__ __launch_bounds__(MMA_THREADS, 3) void attention_dkv_mma_64(
    const bf16* q, const bf16* k, const bf16* v, const u32* starts, const bf16* dout, const float* lse,
    const float* dots, float* dk, float* dv, u32 queries, u32 keys, u32 kv_heads, u32 group, u32 head_dim, float scale,
    u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    grad_keys<64>(shape, scale, q, k, v, dout, lse, dots, dk, dv);
}
extern "C" __global__ __launch_bounds__(MMA_THREADS, 2) void attention_dkv_mma_128(
    const bf16* q, const bf16* k, const bf16* v, const u32* starts, const bf16* dout, const float* lse,
    const float* dots, float* dk, float* dv, u32 queries, u32 keys, u32 kv_heads, u32 group, u32 head_dim, float scale,
    u32 query_offset, u32 window) {
    Shape shape = {queries, keys, kv_heads, group, head_dim, query_offset, window, starts};
    grad_keys<128>(shape, scale, q, k, v, dout, lse, dots, dk, dv);
}
