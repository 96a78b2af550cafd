// Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), its moments in f32 or in 8 bits.
//
// With g = grad_scale·grad at step t ≥ 1:
//   m ← β1 m + (1 − β1) g,   v ← β2 v + (1 − β2) g²
//   param ← param·(1 − lr·weight_decay) − lr · m̂ / (√v̂ + ε),   m̂ = m/(1 − β1^t), v̂ = v/(1 − β2^t)
#include "blockwise.cuh"

// What depends on the step alone is formed by the host in f64 and rounded once: decay = 1 − lr·weight_decay,
// rate = lr/(1 − β1^t), correction2 = 1/(1 − β2^t).
struct Step {
    float grad_scale, beta1, one_less_beta1, beta2, one_less_beta2, decay, rate, correction2, eps;

    // New moments, and by them the new parameter.
    __device__ float operator()(float grad, float param, float& mean, float& square) const {
        float g = grad_scale * grad;
        mean = beta1 * mean + one_less_beta1 * g;
        square = beta2 * square + one_less_beta2 * g * g;
        return decay * param - rate * mean / (sqrtf(correction2 * square) + eps);
    }
};

// A grid of 256-thread blocks strides over the elements; neighbouring threads touch neighbouring elements. Bound by
// memory: 16 bytes in and 12 out an element.
extern "C" __global__ void adamw_f32(const float* grad, float* param, float* m, float* v, u64 n, float grad_scale,
                                     float beta1, float one_less_beta1, float beta2, float one_less_beta2, float decay,
                                     float rate, float correction2, float eps) {
    Step step{grad_scale, beta1, one_less_beta1, beta2, one_less_beta2, decay, rate, correction2, eps};
    for (u64 i = global_thread(); i < n; i += global_threads()) {
        float mean = m[i], square = v[i];
        param[i] = step(grad[i], param[i], mean, square);
        m[i] = mean;
        v[i] = square;
    }
}

// Threads of a block, elements of a moment's, and values of a map.
constexpr u32 BLOCK = 256;

// Moments in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", §2): m by the signed dynamic
// map, v by the unsigned, decoded and encoded as in quantize8.cu.
//
//   m = map[code]·absmax, v likewise; the step above; absmax ← max |m|, code ← midpoints below m·(1/max(absmax, 10⁻³⁸))
//
// but a v that is not 0 has code 1 at the least: m̂/ε would be the next step of one that became 0 before its m did.
//
// A block of threads has a block of elements, a thread one, and its new moments never leave the registers: two maxima
// over the block are all that passes between threads. Beyond the end a thread has moments of 0, which change no
// maximum. The maps are read through cache, and the midpoints, at eight of which each moment looks, in shared memory.
//
// An element moves 10 bytes in (grad, param, two codes) and 6 out, and 1/32 each way of scales: bound by memory, with
// the searches, sixteen reads of shared memory an element, close behind.
extern "C" __global__ void adamw_8bit_f32(const float* grad, float* param, u8* m_codes, float* m_absmax, u8* v_codes,
                                          float* v_absmax, u64 n, const float* m_map, const float* m_midpoints,
                                          const float* v_map, const float* v_midpoints, float grad_scale, float beta1,
                                          float one_less_beta1, float beta2, float one_less_beta2, float decay,
                                          float rate, float correction2, float eps) {
    SHARED(float, m_staged, [BLOCK]);
    SHARED(float, v_staged, [BLOCK]);
    SHARED(float, m_warps, [BLOCK / WARP]);
    SHARED(float, v_warps, [BLOCK / WARP]);
    Step step{grad_scale, beta1, one_less_beta1, beta2, one_less_beta2, decay, rate, correction2, eps};
    u64 i = global_thread();
    float mean = 0, square = 0;
    if (i < n) {
        mean = m_map[m_codes[i]] * m_absmax[blockIdx.x];
        square = v_map[v_codes[i]] * v_absmax[blockIdx.x];
        param[i] = step(grad[i], param[i], mean, square);
    }
    m_staged[threadIdx.x] = m_midpoints[threadIdx.x];
    v_staged[threadIdx.x] = v_midpoints[threadIdx.x];
    // The barriers of the maxima lie between the old scales and the new ones, and between the staging and the search.
    float m_scale = block_max(fabsf(mean), m_warps), v_scale = block_max(square, v_warps);
    if (i < n) {
        m_codes[i] = u8(exceeded<BLOCK>(m_staged, mean * (1.0f / fmaxf(m_scale, 1e-38f))));
        u32 v_code = exceeded<BLOCK>(v_staged, square * (1.0f / fmaxf(v_scale, 1e-38f)));
        v_codes[i] = u8(max(v_code, u32(square > 0)));
    }
    if (threadIdx.x == 0) {
        m_absmax[blockIdx.x] = m_scale;
        v_absmax[blockIdx.x] = v_scale;
    }
}
