// The pointwise non-linearities of bottleneck adapters (Houlsby et al. 2019, §2.1) and of prefix tuning's
// reparametrisation (Li & Liang 2021, §4.3): relu, silu(x) = x·σ(x), tanh. What is NaN in x is NaN in y and dx.
//
// A grid of 256-thread blocks strides over the elements; neighbouring threads touch neighbouring elements. Bound by
// memory: forward moves 8 bytes an element, backward 12.
#include "sigmoid.cuh"

// y = f(x)
template <typename F> __device__ void activate(const float* x, float* y, u64 n, F f) {
    for (u64 i = global_thread(); i < n; i += global_threads()) y[i] = f(x[i]);
}

extern "C" __global__ void relu_f32(const float* x, float* y, u64 n) {
    activate(x, y, n, [](float x) { return x <= 0.0f ? 0.0f : x; });
}
extern "C" __global__ void silu_f32(const float* x, float* y, u64 n) {
    activate(x, y, n, [](float x) { return x * sigmoid(x); });
}
extern "C" __global__ void tanh_f32(const float* x, float* y, u64 n) {
    activate(x, y, n, [](float x) { return tanhf(x); });
}

// dx = dy · f'(x)
template <typename F> __device__ void activate_grad(const float* x, const float* dy, float* dx, u64 n, F slope) {
    for (u64 i = global_thread(); i < n; i += global_threads()) dx[i] = dy[i] * slope(x[i]);
}

// 1 above 0, 0 at 0 and below.
extern "C" __global__ void relu_grad_f32(const float* x, const float* dy, float* dx, u64 n) {
    activate_grad(x, dy, dx, n, [](float x) { return x > 0.0f ? 1.0f : x <= 0.0f ? 0.0f : x; });
}

// σ(1 + x(1 − σ)), from σ' = σ(1 − σ).
extern "C" __global__ void silu_grad_f32(const float* x, const float* dy, float* dx, u64 n) {
    activate_grad(x, dy, dx, n, [](float x) {
        float sigma = sigmoid(x);
        return sigma * (1.0f + x * (1.0f - sigma));
    });
}

// 1 − tanh² = 1/cosh² = 4e/(1 + e)² with e = e^−2|x|, since cosh x = (1 + e)/2 · e^|x|: no difference of two numbers
// near 1.
extern "C" __global__ void tanh_grad_f32(const float* x, const float* dy, float* dx, u64 n) {
    activate_grad(x, dy, dx, n, [](float x) {
        float e = expf(-2.0f * fabsf(x));
        return 4.0f * e / ((1.0f + e) * (1.0f + e));
    });
}
