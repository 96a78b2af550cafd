// Root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4), and its gradients.
//
// y_i = gain_i · x_i / ρ,   ρ = √(mean(x²) + ε)
//
// x, y [rows, width]; gain [width]; saved for backward: x, and 1/ρ of every row.
//
// A row has a block, of a warp for 128 elements of its width and at most 256 threads: a head's rows are short and
// many, a layer's long. It is read for its sum and again, from cache, for its elements: 4 bytes in and 4 out an
// element; in backward 8 in and 4 out, and 4 more in where dx is added to. Bound by memory.
#include "common.cuh"

constexpr u32 MOST_THREADS = 256;

extern "C" __global__ void rms_norm_f32(const float* x, const float* gain, float* y, float* inv_rms, u64 width,
                                        float eps) {
    SHARED(float, warps, [MOST_THREADS / WARP]);
    u64 row = blockIdx.x;
    x += row * width;
    y += row * width;
    float squares = 0;
    for (u64 i = threadIdx.x; i < width; i += blockDim.x) squares = fmaf(x[i], x[i], squares);
    float inverse = 1.0f / sqrtf(block_sum(squares, warps) / float(width) + eps);
    for (u64 i = threadIdx.x; i < width; i += blockDim.x) y[i] = gain[i] * x[i] * inverse;
    if (threadIdx.x == 0) inv_rms[row] = inverse;
}

// dx_i = (gain_i dy_i − x_i c) / ρ,   c = Σ_j gain_j x_j dy_j / (width·ρ²)
//
// From ∂y_j/∂x_i = gain_j (δ_ij / ρ − x_j/ρ² · ∂ρ/∂x_i) and ∂ρ/∂x_i = x_i / (width·ρ): every element pulls on ρ,
// and through it on every output; summed over j that pull is x_i c / ρ.
extern "C" __global__ void rms_norm_grad_x_f32(const float* x, const float* gain, const float* inv_rms, const float* dy,
                                               float* dx, u64 width, u32 accumulate) {
    SHARED(float, warps, [MOST_THREADS / WARP]);
    u64 row = blockIdx.x;
    x += row * width;
    dy += row * width;
    dx += row * width;
    float inverse = inv_rms[row], pull = 0;
    for (u64 i = threadIdx.x; i < width; i += blockDim.x) pull = fmaf(gain[i] * dy[i], x[i], pull);
    float c = block_sum(pull, warps) * inverse * inverse / float(width);
    for (u64 i = threadIdx.x; i < width; i += blockDim.x) {
        float grad = (gain[i] * dy[i] - x[i] * c) * inverse;
        dx[i] = accumulate ? dx[i] + grad : grad;
    }
}

// The sum over rows first … end − 1 of what `term` has for a row, in a thread's own column: the block is a warp's
// width of columns, and each of its warps has every eighth row. Complete in all of its threads.
constexpr u32 SUM_WARPS = 8;

template <typename Term> __device__ float column_sum(u64 first, u64 end, Term term) {
    SHARED(float, sums, [SUM_WARPS][WARP]);
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float sum = 0;
    for (u64 row = first + warp; row < end; row += SUM_WARPS) sum += term(row);
    sums[warp][lane] = sum;
    __syncthreads();
    sum = 0;
    for (u32 i = 0; i < SUM_WARPS; ++i) sum += sums[i][lane];
    return sum;
}

// dgain_i += Σ_rows dy_i x_i / ρ, in two launches: partial sums [chunks, width] over `chunk` rows each, 8 bytes in an
// element; then their sum. The chunks depend on the number of rows alone, and so does the order of the sum. Apart
// from dx because a frozen gain, as under an adapter, has no gradient.
extern "C" __global__ void rms_norm_grad_gain_f32(const float* x, const float* inv_rms, const float* dy,
                                                  float* partials, u64 rows, u64 width, u64 chunk) {
    u64 column = u64(blockIdx.x) * WARP + threadIdx.x % WARP, first = blockIdx.y * chunk;
    float sum = column_sum(first, min(rows, first + chunk), [=](u64 row) {
        u64 at = row * width + column;
        return column < width ? dy[at] * x[at] * inv_rms[row] : 0.0f;
    });
    if (threadIdx.x < WARP && column < width) partials[blockIdx.y * width + column] = sum;
}

extern "C" __global__ void rms_norm_add_gain_f32(const float* partials, float* dgain, u64 chunks, u64 width) {
    u64 column = u64(blockIdx.x) * WARP + threadIdx.x % WARP;
    float sum = column_sum(0, chunks, [=](u64 row) { return column < width ? partials[row * width + column] : 0.0f; });
    if (threadIdx.x < WARP && column < width) dgain[column] += sum;
}
