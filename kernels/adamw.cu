// Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).
//
// With g = grad_scale·grad at step t ≥ 1:
//   m ← β1 m + (1 − β1) g,   v ← β2 v + (1 − β2) g²
//   param ← param·(1 − lr·weight_decay) − lr · m̂ / (√v̂ + ε),   m̂ = m/(1 − β1^t), v̂ = v/(1 − β2^t)
//
// What depends on the step alone is formed by the host in f64 and rounded once: decay = 1 − lr·weight_decay,
// rate = lr/(1 − β1^t), correction2 = 1/(1 − β2^t).
//
// A grid of 256-thread blocks strides over the elements; neighbouring threads touch neighbouring elements. Bound by
// memory: 16 bytes in and 12 out an element.
#include "common.cuh"

extern "C" __global__ void adamw_f32(const float* grad, float* param, float* m, float* v, u64 n, float grad_scale,
                                     float beta1, float one_less_beta1, float beta2, float one_less_beta2, float decay,
                                     float rate, float correction2, float eps) {
    for (u64 i = global_thread(); i < n; i += global_threads()) {
        float g = grad_scale * grad[i];
        float mean = beta1 * m[i] + one_less_beta1 * g;
        float square = beta2 * v[i] + one_less_beta2 * g * g;
        param[i] = decay * param[i] - rate * mean / (sqrtf(correction2 * square) + eps);
        m[i] = mean;
        v[i] = square;
    }
}
