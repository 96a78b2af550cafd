// Rotary position embedding (Su et al. 2021, RoFormer, eq. 34), pairs half a head apart as Llama stores them.
//
// For pair (i, j = i + half) of every head of a token at position p, with cos, sin of row p of the tables:
// y_i = x_i cos − x_j sin,   y_j = x_j cos + x_i sin
//
// x, y [tokens, heads, 2·half]; cos, sin [positions, half]. A rotation is orthogonal: its gradient is its inverse,
// the same turn with −sin, for which `sign` is −1.
//
// A token has a block of 256 threads, and a pair a thread at a time. Bound by memory: 4 bytes in and 4 out an
// element; the token's row of the tables stays in cache for all its heads.
#include "common.cuh"

extern "C" __global__ void rope_f32(const float* x, const u32* positions, const float* cos, const float* sin, float* y,
                                    u32 heads, u32 half, float sign) {
    u32 pairs = heads * half;
    u64 token = blockIdx.x, table = u64(positions[token]) * half;
    x += token * 2 * pairs;
    y += token * 2 * pairs;
    for (u32 pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        u32 head = pair / half, in_head = pair % half;
        u32 i = pair + head * half, j = i + half;
        float c = cos[table + in_head], s = sign * sin[table + in_head];
        y[i] = x[i] * c - x[j] * s;
        y[j] = x[j] * c + x[i] * s;
    }
}
