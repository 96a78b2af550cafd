// c = alpha · a·b, or c += that: a [m, k] and b [k, n], or one of them stored transposed; f32 or bf16 in, sums in f32.
//
// A block of 256 threads makes a tile of 64 × 64 of c, 16 of k at a time: the tiles of a and b go to shared memory,
// and a thread keeps 4 × 4 sums in registers. Each k-step moves 2·64·16 elements for 64·64·16 multiply-adds, by FMA
// units; sums run in the order of k. On a GPU dense products are cuBLASLt's: this kernel is their stand-in on the
// host, and what they are compared with.
#include "common.cuh"

constexpr u32 TILE = 64;
constexpr u32 DEPTH = 16;
constexpr u32 THREADS = 256;
// Of the c tile, a thread's share each way.
constexpr u32 EACH = 4;

// A matrix of `rows` of the product's outer dimension by `k`: row r, depth d lies at r·by_row + d·by_depth.
template <typename T> struct Operand {
    const T* x;
    u32 rows, k;
    u64 by_row, by_depth;

    __device__ float at(u32 row, u32 depth) const {
        return row < rows && depth < k ? to_float(x[row * by_row + depth * by_depth]) : 0.0f;
    }
};

// Neighbouring threads take neighbouring elements of memory, whichever way the operand is stored.
template <typename T> __device__ void load(const Operand<T>& operand, u32 row, u32 depth, float (&tile)[DEPTH][TILE + 1]) {
    for (u32 i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
        bool along_depth = operand.by_depth == 1;
        u32 r = along_depth ? i / DEPTH : i % TILE, d = along_depth ? i % DEPTH : i / TILE;
        tile[d][r] = operand.at(row + r, depth + d);
    }
}

template <typename T>
__device__ void gemm(const Operand<T>& a, const Operand<T>& b, float* c, float alpha, u32 accumulate) {
    SHARED(float, tile_a, [DEPTH][TILE + 1]);
    SHARED(float, tile_b, [DEPTH][TILE + 1]);
    u32 row = blockIdx.y * TILE, column = blockIdx.x * TILE;
    u32 my_row = threadIdx.x / (TILE / EACH) * EACH, my_column = threadIdx.x % (TILE / EACH) * EACH;
    float sums[EACH][EACH] = {};
    for (u32 depth = 0; depth < a.k; depth += DEPTH) {
        load(a, row, depth, tile_a);
        load(b, column, depth, tile_b);
        __syncthreads();
        for (u32 d = 0; d < DEPTH; ++d)
            for (u32 i = 0; i < EACH; ++i)
                for (u32 j = 0; j < EACH; ++j)
                    sums[i][j] = fmaf(tile_a[d][my_row + i], tile_b[d][my_column + j], sums[i][j]);
        __syncthreads();
    }
    for (u32 i = 0; i < EACH; ++i)
        for (u32 j = 0; j < EACH; ++j) {
            u32 r = row + my_row + i, s = column + my_column + j;
            if (r >= a.rows || s >= b.rows) continue;
            u64 at = u64(r) * b.rows + s;
            c[at] = accumulate ? fmaf(alpha, sums[i][j], c[at]) : alpha * sums[i][j];
        }
}

template <typename T> __device__ void nn(const T* a, const T* b, float* c, u32 m, u32 n, u32 k, float alpha, u32 accumulate) {
    gemm(Operand<T>{a, m, k, k, 1}, Operand<T>{b, n, k, 1, n}, c, alpha, accumulate);
}
template <typename T> __device__ void nt(const T* a, const T* b, float* c, u32 m, u32 n, u32 k, float alpha, u32 accumulate) {
    gemm(Operand<T>{a, m, k, k, 1}, Operand<T>{b, n, k, k, 1}, c, alpha, accumulate);
}
template <typename T> __device__ void tn(const T* a, const T* b, float* c, u32 m, u32 n, u32 k, float alpha, u32 accumulate) {
    gemm(Operand<T>{a, m, k, 1, m}, Operand<T>{b, n, k, 1, n}, c, alpha, accumulate);
}

extern "C" __global__ void gemm_nn_f32(const float* a, const float* b, float* c, u32 m, u32 n, u32 k, float alpha, u32 accumulate) {
    nn(a, b, c, m, n, k, alpha, accumulate);
}
extern "C" __global__ void gemm_nt_f32(const float* a, const float* b, float* c, u32 m, u32 n, u32 k, float alpha, u32 accumulate) {
    nt(a, b, c, m, n, k, alpha, accumulate);
}
extern "C" __global__ void gemm_tn_f32(const float* a, const float* b, float* c, u32 m, u32 n, u32 k, float alpha, u32 accumulate) {
    tn(a, b, c, m, n, k, alpha, accumulate);
}
extern "C" __global__ void gemm_nn_bf16(const bf16* a, const bf16* b, float* c, u32 m, u32 n, u32 k, float alpha, u32 accumulate) {
    nn(a, b, c, m, n, k, alpha, accumulate);
}
extern "C" __global__ void gemm_nt_bf16(const bf16* a, const bf16* b, float* c, u32 m, u32 n, u32 k, float alpha, u32 accumulate) {
    nt(a, b, c, m, n, k, alpha, accumulate);
}
extern "C" __global__ void gemm_tn_bf16(const bf16* a, const bf16* b, float* c, u32 m, u32 n, u32 k, float alpha, u32 accumulate) {
    tn(a, b, c, m, n, k, alpha, accumulate);
}
