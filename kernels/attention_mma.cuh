// What the kernels of attention on tensor cores share: tiles of bf16 in shared memory, and products with them.
//
// A block of 4 warps owns 64 rows (of queries, or of keys) of one head, a warp 16 of them, and walks the other side by
// tiles of ROWS rows, two stages of them: one is on its way by cp.async while the other is multiplied. A warp
// multiplies its 16 rows with up to 64 rows or columns of a tile, 16 of depth a step: half an ldmatrix for each
// mma.sync.m16n8k16.
// Two sums side by side are, as they lie in the lanes, a factor of the next product: scores become weights without
// leaving the registers.
//
// Kernels come for head_dim up to 64 and 128: tiles are that wide, and 0 from head_dim on, a multiple of 16.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

constexpr u32 MMA_THREADS = 128;
// Rows of a warp, and the depth of a step.
constexpr u32 WARP_ROWS = 16;
constexpr u32 STEP = 16;
constexpr u32 STAGES = 2;
// Elements of an asynchronous copy.
constexpr u32 CHUNK = 8;
// Elements behind each row of a tile, so that the eight rows of a matrix lie in different banks.
constexpr u32 PAD = 8;

// Rows of a tile lie PITCH elements apart, its width and PAD.
template <u32 ROWS, u32 WIDTH> using Tile = bf16[ROWS][WIDTH + PAD];
// 16 rows of a factor, 16 of depth.
typedef u32 Factor[1][4];
// 16 rows of a product, 8·EIGHTS columns: of rows `group` and `group` + 8 columns 8j + 2·pair and the next.
template <u32 EIGHTS> using Sums = float[1][EIGHTS][4];
// 16 rows of a result, as wide as the tiles.
template <u32 WIDTH> using Result = Sums<8>[WIDTH / 64];

__device__ inline u32 lane_group() { return threadIdx.x % WARP / 4; }
__device__ inline u32 lane_pair() { return threadIdx.x % 4; }
// The first of this warp's rows of the block's, and of this thread's two; the other is 8 below.
__device__ inline u32 warp_row() { return threadIdx.x / WARP * WARP_ROWS; }
__device__ inline u32 first_row() { return warp_row() + lane_group(); }

// Sends for the rows of x from `row` on; rows and columns that are not there become 0.
template <u32 ROWS, u32 PITCH>
__device__ inline void fetch(const bf16* x, const Head& head, u32 row, bf16 (&tile)[ROWS][PITCH]) {
    constexpr u32 CHUNKS = (PITCH - PAD) / CHUNK;
#pragma unroll
    for (u32 i = 0; i < ROWS * CHUNKS / MMA_THREADS; ++i) {
        u32 chunk = MMA_THREADS * i + threadIdx.x, r = chunk / CHUNKS, c = chunk % CHUNKS * CHUNK;
        bool inside = row + r < head.rows && c < head.width;
        cp_async(&tile[r][c], x + (inside ? head.row(row + r) + c : 0), inside ? 16 : 0);
    }
}

// This warp's rows of x, from the block's first on, rounded to bf16; 0 where they are not.
template <u32 STEPS> __device__ inline void load(const float* x, const Head& head, u32 row, Factor (&a)[STEPS]) {
#pragma unroll
    for (u32 step = 0; step < STEPS; ++step)
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            u32 line = row + first_row() + r % 2 * 8, column = STEP * step + r / 2 * 8 + 2 * lane_pair();
            const float* from = x + head.row(line) + column;
            a[step][0][r] = line < head.rows && column < head.width ? pack_bf16(from[0], from[1]) : 0;
        }
}

// Of four matrices, which one this lane gives a row of, and which row.
__device__ inline u32 matrix() { return threadIdx.x % WARP / 8; }
__device__ inline u32 line() { return threadIdx.x % 8; }

// sums += a · bᵀ, b the tile's columns from `depth` on.
template <u32 EIGHTS, u32 PITCH>
__device__ inline void times_rows(
    const Factor& a, const bf16 (&tile)[8 * EIGHTS][PITCH], u32 depth, Sums<EIGHTS>& sums) {
    const bf16* rows[EIGHTS / 2];
    u32 pairs[EIGHTS / 2][4], b[EIGHTS][2];
    // Two eights of the tile's rows at once: matrices 0 and 1 are the halves of depth of the first, 2 and 3 of the
    // second.
#pragma unroll
    for (u32 j = 0; j < EIGHTS / 2; ++j) rows[j] = &tile[16 * j + matrix() / 2 * 8 + line()][depth + matrix() % 2 * 8];
    ldmatrix_tile(pairs, rows);
#pragma unroll
    for (u32 j = 0; j < EIGHTS; ++j) b[j][0] = pairs[j / 2][j % 2 * 2], b[j][1] = pairs[j / 2][j % 2 * 2 + 1];
    mma_tile(sums, a, b);
}

// sums += a · b, b the tile's rows from `depth` on, of its columns 64 from `column` on.
template <u32 ROWS, u32 PITCH>
__device__ inline void times_columns(
    const Factor& a, const bf16 (&tile)[ROWS][PITCH], u32 depth, u32 column, Sums<8>& sums) {
    const bf16* rows[4];
    u32 pairs[4][4], b[8][2];
#pragma unroll
    for (u32 j = 0; j < 4; ++j) rows[j] = &tile[depth + matrix() % 2 * 8 + line()][column + 16 * j + matrix() / 2 * 8];
    ldmatrix_transposed_tile(pairs, rows);
#pragma unroll
    for (u32 j = 0; j < 8; ++j) b[j][0] = pairs[j / 2][j % 2 * 2], b[j][1] = pairs[j / 2][j % 2 * 2 + 1];
    mma_tile(sums, a, b);
}

template <u32 EIGHTS> __device__ inline void clear(Sums<EIGHTS>& s) {
#pragma unroll
    for (u32 j = 0; j < EIGHTS; ++j)
#pragma unroll
        for (u32 r = 0; r < 4; ++r) s[0][j][r] = 0;
}

// s = a · bᵀ over all of the width, this warp's rows of a in registers.
template <u32 STEPS, u32 EIGHTS, u32 PITCH>
__device__ inline void scores(const Factor (&a)[STEPS], const bf16 (&b)[8 * EIGHTS][PITCH], Sums<EIGHTS>& s) {
    clear(s);
#pragma unroll
    for (u32 step = 0; step < STEPS; ++step) times_rows(a[step], b, STEP * step, s);
}

// The same, and a the block's tile.
template <u32 EIGHTS, u32 PITCH>
__device__ inline void scores(const bf16 (&a)[TILE][PITCH], const bf16 (&b)[8 * EIGHTS][PITCH], Sums<EIGHTS>& s) {
    clear(s);
#pragma unroll
    for (u32 step = 0; step < (PITCH - PAD) / STEP; ++step) {
        const bf16* rows[1] = {&a[warp_row() + matrix() % 2 * 8 + line()][STEP * step + matrix() / 2 * 8]};
        Factor factor;
        ldmatrix_tile(factor, rows);
        times_rows(factor, b, STEP * step, s);
    }
}

// sums += w · b, w rounded to bf16: 16 columns of it are two eights of sums as they lie.
template <u32 EIGHTS, u32 PITCH>
__device__ inline void accumulate(
    const Sums<EIGHTS>& w, const bf16 (&b)[8 * EIGHTS][PITCH], Result<PITCH - PAD>& sums) {
#pragma unroll
    for (u32 step = 0; step < EIGHTS / 2; ++step) {
        Factor a;
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            const float* pair = &w[0][2 * step + r / 2][r % 2 * 2];
            a[0][r] = pack_bf16(pair[0], pair[1]);
        }
#pragma unroll
        for (u32 part = 0; part < (PITCH - PAD) / 64; ++part) times_columns(a, b, STEP * step, 64 * part, sums[part]);
    }
}

// out = factors_i · sums_i in the block's rows of out from `row` on, i the row of a thread's two.
template <u32 PARTS>
__device__ inline void store(
    const Sums<8> (&sums)[PARTS], const float (&factors)[2], float* out, const Head& head, u32 row) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        u32 line = row + first_row() + 8 * i;
        if (line >= head.rows) continue;
        float* x = out + head.row(line);
#pragma unroll
        for (u32 part = 0; part < PARTS; ++part)
#pragma unroll
            for (u32 j = 0; j < 8; ++j) {
                u32 column = 64 * part + 8 * j + 2 * lane_pair();
                if (column >= head.width) continue;
                x[column] = factors[i] * sums[part][0][j][2 * i];
                x[column + 1] = factors[i] * sums[part][0][j][2 * i + 1];
            }
    }
}
