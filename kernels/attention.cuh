// What the kernels of attention share: the geometry of the problem, and two products of tiles.
//
// A block owns a tile of 64 rows (of queries, or of keys) of one head and walks the other side tile by tile. Each
// thread holds 4 × 4 of a tile of 64 × 64 scores: 4 neighbouring rows and every 16th column, so that a row lies in 16
// lanes of one warp. Both products run on slices of 32 columns in shared memory, two at a time, whatever head_dim:
//
//     scores       s [64, 64]        = a [64, head_dim] · b [64, head_dim]ᵀ, a slice of a and one of b;
//     accumulate   sums [64, head_dim] += weights [64, 64] · b [64, head_dim], two slices of b.
//
// Two slices are 16 KiB from the caches, for 8 multiply-adds a byte in `scores` and 16 in `accumulate`: FMA units bound
// both. In their loops 8 vectors from shared memory serve 64 multiply-adds of a thread. Rows of shared memory are an
// odd number of 16-byte vectors apart: 8 lanes that read a vector of 8 rows meet no bank twice, nor do the two rows of
// a warp, 4 apart, where they are written.
#pragma once

#include "common.cuh"

// Rows of a tile, columns of a slice, and threads of a block.
constexpr u32 TILE = 64;
constexpr u32 SLICE = 32;
constexpr u32 THREADS = 256;
// A thread's rows and columns of a tile, and the lanes that share a row.
constexpr u32 EACH = 4;
constexpr u32 LANES = TILE / EACH;
// Columns that sums are held for at a time: two slices, a vector a lane. Kernels come for 1, 2 and 4 of these slabs.
constexpr u32 SLAB = 2 * SLICE;

typedef float4 Slice[TILE][SLICE / 4 + 1];
typedef float4 Stage[2][TILE][SLICE / 4 + 1];
typedef float4 Weights[TILE][TILE / 4 + 1];

// The first of this thread's rows of a tile, and of its columns.
__device__ inline u32 my_row() { return threadIdx.x / LANES * EACH; }
__device__ inline u32 my_column() { return threadIdx.x % LANES; }

__device__ inline u32 vectors(u32 n) { return (n + 3) / 4; }

// Where the rows of one head lie in a tensor [batch, rows, heads, head_dim]: the first, the next one's distance, how
// many there are and of how many columns.
struct Head {
    u64 first;
    u32 stride, rows, width;

    __device__ u64 row(u32 row) const { return first + u64(row) * stride; }
    // The same, but for the rows from `rows` on.
    __device__ Head until(u32 rows) const { return Head{first, stride, rows, width}; }
};

// Sizes of the problem; `window` is beyond any position where there is none, `starts` may be null.
struct Shape {
    u32 queries, keys, kv_heads, group, head_dim, query_offset, window;
    const u32* starts;

    __device__ u32 heads() const { return kv_heads * group; }

    // Of q, out and their gradients.
    __device__ Head queries_of(u32 batch, u32 head) const {
        return Head{(u64(batch) * queries * heads() + head) * head_dim, heads() * head_dim, queries, head_dim};
    }

    // Of k, v and their gradients.
    __device__ Head keys_of(u32 batch, u32 kv_head) const {
        return Head{(u64(batch) * keys * kv_heads + kv_head) * head_dim, kv_heads * head_dim, keys, head_dim};
    }

    // The first query's value in [batch, heads, queries].
    __device__ u64 saved(u32 batch, u32 head) const { return (u64(batch) * heads() + head) * queries; }

    // The first key that a query sees; the last is that of its own position.
    __device__ u32 first(u32 batch, u32 query) const {
        // Beyond the last query: no key, and no part in a minimum.
        if (query >= queries) return 0xffffffff;
        u32 position = query_offset + query;
        u32 first = position >= window ? position + 1 - window : 0;
        return starts ? max(first, starts[u64(batch) * queries + query]) : first;
    }

    __device__ bool sees(u32 query, u32 first, u32 key) const { return first <= key && key <= query_offset + query; }

    // The first key that a query of the tile from `query` on sees, in every thread; each warp finds it by itself.
    __device__ u32 first_seen(u32 batch, u32 query) const {
        u32 lane = threadIdx.x % WARP;
        return __reduce_min_sync(ALL_LANES, min(first(batch, query + lane), first(batch, query + WARP + lane)));
    }
};

// Rows from `row` and columns from `column` on into a slice; rows that are not there, and what is missing to a whole
// vector, become 0. Of each of its rows a thread takes two columns, so that 16 lanes read 64 neighbouring bytes.
__device__ inline void load(const float* x, const Head& head, u32 row, u32 column, Slice& slice) {
    u32 width = head.width - column, left = row + my_row() < head.rows ? head.rows - row - my_row() : 0;
    x += head.first;
    u32 at = (row + my_row()) * head.stride + column + my_column();
    // All on their way before the first is needed.
    float values[EACH][2];
    for (u32 i = 0; i < EACH; ++i, at += head.stride) {
        values[i][0] = i < left && my_column() < width ? x[at] : 0.0f;
        values[i][1] = i < left && my_column() + LANES < width ? x[at + LANES] : 0.0f;
    }
    for (u32 i = 0; i < EACH; ++i) {
        float* to = reinterpret_cast<float*>(slice[my_row() + i]) + my_column();
        to[0] = values[i][0];
        to[LANES] = values[i][1];
    }
}

// sum + Σ a_i b_i
__device__ inline float dot(const float4& a, const float4& b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// y += factor · x
__device__ inline void add_scaled(float factor, const float4& x, float4& y) {
    y.x = fmaf(factor, x.x, y.x);
    y.y = fmaf(factor, x.y, y.y);
    y.z = fmaf(factor, x.z, y.z);
    y.w = fmaf(factor, x.w, y.w);
}

// s_ij = Σ_d a_id b_jd for the tiles of a from `row_a` and of b from `row_b` on: this thread's rows and columns.
__device__ inline void scores(
    const float* a, const Head& of_a, u32 row_a, const float* b, const Head& of_b, u32 row_b, Stage& stage,
    float (&s)[EACH][EACH]) {
    for (u32 i = 0; i < EACH; ++i)
        for (u32 j = 0; j < EACH; ++j) s[i][j] = 0;
#pragma unroll 1
    for (u32 column = 0; column < of_a.width; column += SLICE) {
        __syncthreads();
        load(a, of_a, row_a, column, stage[0]);
        load(b, of_b, row_b, column, stage[1]);
        __syncthreads();
        if (row_a + my_row() >= of_a.rows) continue;
        u32 depth = vectors(min(SLICE, of_a.width - column));
#pragma unroll 1
        for (u32 d = 0; d < depth; ++d) {
            float4 y[EACH];
            for (u32 j = 0; j < EACH; ++j) y[j] = stage[1][my_column() + LANES * j][d];
            for (u32 i = 0; i < EACH; ++i) {
                float4 x = stage[0][my_row() + i][d];
                for (u32 j = 0; j < EACH; ++j) s[i][j] = dot(x, y[j], s[i][j]);
            }
        }
    }
}

// This thread's place for a weight. Between writing it and reading it in `accumulate` lies the latter's first barrier,
// between that and the next writing those of the next `scores`.
__device__ inline float& weight(Weights& weights, u32 i, u32 j) {
    return reinterpret_cast<float*>(weights[my_row() + i])[my_column() + LANES * j];
}

// sums_i += Σ_j weights_ij b_j for the tile of b from `row` on, and this thread's rows below `rows`: of slab n it holds
// 4 columns from SLAB·n + 4·my_column() on.
template <u32 SLABS>
__device__ void accumulate(
    const Weights& weights, u32 rows, const float* b, const Head& of_b, u32 row, Stage& stage,
    float4 (&sums)[SLABS][EACH]) {
    u32 depth = vectors(min(TILE, of_b.rows - row));
#pragma unroll
    for (u32 slab = 0; slab < SLABS; ++slab) {
        u32 column = SLAB * slab;
        if (column >= of_b.width) break;
        __syncthreads();
        load(b, of_b, row, column, stage[0]);
        if (column + SLICE < of_b.width) load(b, of_b, row, column + SLICE, stage[1]);
        __syncthreads();
        if (my_row() >= rows || column + 4 * my_column() >= of_b.width) continue;
        u32 half = my_column() / (SLICE / 4), at = my_column() % (SLICE / 4);
#pragma unroll 1
        for (u32 j = 0; j < depth; ++j) {
            float4 y[4];
            for (u32 e = 0; e < 4; ++e) y[e] = stage[half][4 * j + e][at];
            for (u32 i = 0; i < EACH; ++i) {
                float4 w = weights[my_row() + i][j];
                add_scaled(w.x, y[0], sums[slab][i]);
                add_scaled(w.y, y[1], sums[slab][i]);
                add_scaled(w.z, y[2], sums[slab][i]);
                add_scaled(w.w, y[3], sums[slab][i]);
            }
        }
    }
}

// out = factors_i · sums_i in the tile of out from `row` on.
template <u32 SLABS>
__device__ void store(
    const float4 (&sums)[SLABS][EACH], const float (&factors)[EACH], float* out, const Head& head, u32 row) {
    for (u32 i = 0; i < EACH; ++i) {
        if (row + my_row() + i >= head.rows) continue;
        float* x = out + head.row(row + my_row() + i);
#pragma unroll
        for (u32 slab = 0; slab < SLABS; ++slab) {
            u32 column = SLAB * slab + 4 * my_column();
            const float4& y = sums[slab][i];
            if (column < head.width) x[column] = factors[i] * y.x;
            if (column + 1 < head.width) x[column + 1] = factors[i] * y.y;
            if (column + 2 < head.width) x[column + 2] = factors[i] * y.z;
            if (column + 3 < head.width) x[column + 3] = factors[i] * y.w;
        }
    }
}

// P where a query sees a key, and 0 elsewhere.
__device__ inline float probability(bool seen, float score, float scale, float lse) {
    return seen ? expf(fmaf(scale, score, -lse)) : 0.0f;
}

// dS = P (dP − D). Where P is 0, which is where the key is not seen, that is 0 whatever dP.
__device__ inline float grad_score(float p, float dp, float d) { return p == 0 ? 0.0f : p * (dp - d); }
