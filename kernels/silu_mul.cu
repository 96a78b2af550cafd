// The gate of a SwiGLU feed-forward layer (Shazeer 2020, eq. 6): out = silu(gate) · up, silu(g) = g·σ(g).
//
// A grid of 256-thread blocks strides over the elements; neighbouring threads touch neighbouring elements. Bound by
// memory: forward moves 12 bytes an element, backward 20, or 16 where one of its gradients is asked for.
#include "sigmoid.cuh"

// out = gate · σ(gate) · up
extern "C" __global__ void silu_mul_f32(const float* gate, const float* up, float* out, u64 n) {
    for (u64 i = global_thread(); i < n; i += global_threads()) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// dgate = dout · up · σ(1 + gate(1 − σ)), from silu' = σ + gate·σ' and σ' = σ(1 − σ); dup = dout · gate · σ.
// Either may be null.
extern "C" __global__ void silu_mul_grad_f32(const float* gate, const float* up, const float* dout, float* dgate,
                                             float* dup, u64 n) {
    for (u64 i = global_thread(); i < n; i += global_threads()) {
        float sigma = sigmoid(gate[i]);
        if (dgate) dgate[i] = dout[i] * up[i] * (sigma * (1.0f + gate[i] * (1.0f - sigma)));
        if (dup) dup[i] = gate[i] * sigma * dout[i];
    }
}
