// Softmax cross-entropy: loss_r = −log softmax(logits_r)[label_r] = log Σ_j exp(logits_rj) − logits_r[label_r].
//
// logits [rows, vocab], labels i64 [rows], losses [rows]; an ignored label (−100) has loss 0 and gradient 0.
//
// A row has a block of 256 threads. The largest logit and the sum are found in one pass, by a sum that is rescaled
// wherever its maximum grows (Milakov & Gimelshein 2018, algorithm 3), for a row of a large vocabulary is in no cache
// when it is read again. Bound by memory: 4 bytes an element, in backward 12: read, read again, written.
#include "common.cuh"

constexpr u32 THREADS = 256;
// Elements that a thread takes at once: so many loads are under way, and a rescaling is paid once for them.
constexpr u32 AT_ONCE = 4;
constexpr i64 IGNORED = -100;
constexpr float LOWEST = -3.402823466e38f;

// Σ exp(x_j − max), with max the largest of x; in every thread. A NaN of x has no part in max, but makes the sum NaN.
struct SumExp {
    float max, sum;
};

__device__ inline SumExp sum_exp(const float* x, u64 vocab) {
    SHARED(float, maxima, [THREADS / WARP]);
    SHARED(float, sums, [THREADS / WARP]);
    // Not −∞, from which a logit of −∞ would differ by NaN.
    float max = LOWEST, sum = 0;
    for (u64 first = threadIdx.x; first < vocab; first += AT_ONCE * THREADS) {
        float part[AT_ONCE], larger = max;
        for (u32 i = 0; i < AT_ONCE; ++i) {
            u64 at = first + i * THREADS;
            part[i] = at < vocab ? x[at] : -INFINITY;
            larger = fmaxf(larger, part[i]);
        }
        sum *= expf(max - larger);
        for (u32 i = 0; i < AT_ONCE; ++i) sum += expf(part[i] - larger);
        max = larger;
    }
    float largest = block_max(max, maxima);
    return {largest, block_sum(sum * expf(max - largest), sums)};
}

extern "C" __global__ void cross_entropy_f32(const float* logits, const i64* labels, float* losses, u64 vocab) {
    i64 label = labels[blockIdx.x];
    float loss = 0;
    if (label != IGNORED) {
        logits += blockIdx.x * vocab;
        SumExp row = sum_exp(logits, vocab);
        loss = logf(row.sum) + (row.max - logits[label]);
    }
    if (threadIdx.x == 0) losses[blockIdx.x] = loss;
}

// ∂loss/∂logits_j = softmax_j − [j = label]: from ∂/∂x_j log Σ exp(x) = exp(x_j) / Σ exp(x). In place of the logits,
// times `scale`; and the losses.
extern "C" __global__ void cross_entropy_grad_f32(float* logits, const i64* labels, float* losses, u64 vocab,
                                                  float scale) {
    i64 label = labels[blockIdx.x];
    logits += blockIdx.x * vocab;
    float loss = 0;
    if (label == IGNORED) {
        for (u64 i = threadIdx.x; i < vocab; i += THREADS) logits[i] = 0;
    } else {
        // Before the barriers of the sum: behind them its place is written.
        float logit = logits[label];
        SumExp row = sum_exp(logits, vocab);
        loss = logf(row.sum) + (row.max - logit);
        for (u64 i = threadIdx.x; i < vocab; i += THREADS) {
            float probability = expf(logits[i] - row.max) / row.sum;
            logits[i] = scale * (probability - (i == u64(label) ? 1.0f : 0.0f));
        }
    }
    if (threadIdx.x == 0) losses[blockIdx.x] = loss;
}
