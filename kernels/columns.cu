// Factors of the rows and of the columns of a matrix, a bias, sums over rows: what a linear layer has around its
// products, and what (IA)³ (Liu et al. 2022, §3.3) and the scores of AdaLoRA's columns are made of.
//
// Matrices are row-major [rows, columns], f32. But for the sums a block of 256 threads has a row, whose neighbouring
// elements neighbouring threads move; each matrix is moved once, and that is the bound.
#include "common.cuh"

// out_rc = factor_r · x_rc: AdaLoRA's E on A.
extern "C" __global__ void scale_rows_f32(const float* x, const float* factors, float* out, u32 columns) {
    u64 row = u64(blockIdx.x) * columns;
    float factor = factors[blockIdx.x];
    for (u32 c = threadIdx.x; c < columns; c += blockDim.x) out[row + c] = factor * x[row + c];
}

// out_rc = (factor_c + shift) · x_rc: (IA)³'s factors; DoRA's row scale on the outputs, and less one. `out` may be `x`.
extern "C" __global__ void scale_columns_f32(const float* x, const float* factors, float shift, float* out, u32 columns) {
    u64 row = u64(blockIdx.x) * columns;
    for (u32 c = threadIdx.x; c < columns; c += blockDim.x) out[row + c] = (factors[c] + shift) * x[row + c];
}

// out_rc += factor_c · x_rc
extern "C" __global__ void add_scaled_columns_f32(const float* x, const float* factors, float* out, u32 columns) {
    u64 row = u64(blockIdx.x) * columns;
    for (u32 c = threadIdx.x; c < columns; c += blockDim.x) out[row + c] += factors[c] * x[row + c];
}

// y_rc += bias_c
extern "C" __global__ void add_bias_f32(const float* bias, float* y, u32 columns) {
    u64 row = u64(blockIdx.x) * columns;
    for (u32 c = threadIdx.x; c < columns; c += blockDim.x) y[row + c] += bias[c];
}

// partials [chunks, columns]: Σ x_rc, or Σ x_rc y_rc where there is a y, over `chunk` rows each. A block has 128
// columns of a chunk, a thread one of them; its rows are summed in order, neighbours read neighbouring columns.
extern "C" __global__ void column_sums_f32(const float* x, const float* y, float* partials, u32 rows, u32 columns, u32 chunk) {
    u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    u32 first = blockIdx.y * chunk, last = min(rows, first + chunk);
    float sum = 0;
    for (u32 row = first; row < last; ++row) {
        u64 at = u64(row) * columns + column;
        sum = y ? fmaf(x[at], y[at], sum) : sum + x[at];
    }
    partials[u64(blockIdx.y) * columns + column] = sum;
}

// out_c += factor · Σ of the partials of column c, in order.
extern "C" __global__ void add_column_sums_f32(const float* partials, float factor, float* out, u32 chunks, u32 columns) {
    u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float sum = 0;
    for (u32 chunk = 0; chunk < chunks; ++chunk) sum += partials[u64(chunk) * columns + column];
    out[column] = fmaf(factor, sum, out[column]);
}
