// The Euclidean norm of every row: ‖W + sBA‖ of DoRA (Liu et al. 2024, eq. 5), norms_r = √(Σ_j x_rj²).
//
// x [rows, width]; norms [rows]. The squares are exact in f64, and so none overflows or is lost to 0.
//
// A row has a block, of a warp for 128 elements of its width and at most 256 threads: 4 bytes in an element. Bound by
// memory, one fused f64 multiply-add for 4 bytes being within what any device has.
#include "common.cuh"

constexpr u32 MOST_THREADS = 256;

extern "C" __global__ void row_norms_f32(const float* x, float* norms, u64 width) {
    SHARED(double, warps, [MOST_THREADS / WARP]);
    x += blockIdx.x * width;
    double squares = 0;
    for (u64 i = threadIdx.x; i < width; i += blockDim.x) squares += double(x[i]) * double(x[i]);
    squares = block_sum(squares, warps);
    if (threadIdx.x == 0) norms[blockIdx.x] = float(sqrt(squares));
}
