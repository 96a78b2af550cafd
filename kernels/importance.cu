// AdaLoRA's importance of a triplet (Zhang et al. 2023, eq. 8–10): smoothed sensitivity times its uncertainty.
//
// With I = |w · g|, g = grad_scale·grad:
//   mean ← β1 mean + (1 − β1) I,   deviation ← β2 deviation + (1 − β2) |I − mean|
//   scores_i = the mean over triplet i's elements of mean · deviation
//
// An element moves 16 bytes in and 8 out. Bound by memory.
#include "common.cuh"

struct Averages {
    float grad_scale, beta1, one_less_beta1, beta2, one_less_beta2;

    // The new averages of one element; their product.
    __device__ float operator()(float weight, float grad, float& mean, float& deviation) const {
        float sensitivity = fabsf(weight * (grad_scale * grad));
        float average = beta1 * mean + one_less_beta1 * sensitivity;
        mean = average;
        deviation = beta2 * deviation + one_less_beta2 * fabsf(sensitivity - average);
        return average * deviation;
    }
};

// Both averages. A grid of 256-thread blocks strides over the elements. The scores of triplets that are columns are
// then a sum of columns.cu, which reads both again.
extern "C" __global__ void importance_f32(const float* weight, const float* grad, float* mean, float* deviation, u64 n,
                                          float grad_scale, float beta1, float one_less_beta1, float beta2,
                                          float one_less_beta2) {
    Averages step{grad_scale, beta1, one_less_beta1, beta2, one_less_beta2};
    for (u64 i = global_thread(); i < n; i += global_threads()) step(weight[i], grad[i], mean[i], deviation[i]);
}

constexpr u32 MOST_THREADS = 256;

// The same where the triplets are rows, and their scores: a row has a block, of a warp for 128 elements of its width
// and at most 256 threads.
extern "C" __global__ void importance_of_rows_f32(const float* weight, const float* grad, float* mean, float* deviation,
                                                  float* scores, u64 width, float grad_scale, float beta1,
                                                  float one_less_beta1, float beta2, float one_less_beta2) {
    SHARED(float, warps, [MOST_THREADS / WARP]);
    Averages step{grad_scale, beta1, one_less_beta1, beta2, one_less_beta2};
    u64 start = blockIdx.x * width;
    float sum = 0;
    for (u64 i = start + threadIdx.x; i < start + width; i += blockDim.x)
        sum += step(weight[i], grad[i], mean[i], deviation[i]);
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) scores[blockIdx.x] = sum / float(width);
}
