// Kernels that work element by element, and the sum of squares.
//
// A grid of 256-thread blocks strides over the elements; neighbouring threads touch neighbouring elements. Each is
// bound by memory: it moves its inputs and outputs once, 4 bytes an f32.
#include "common.cuh"

// out_i = bits, for elements of 1, 2, 4 and 8 bytes: the host has rounded the value to the type.
template <typename T> __device__ void fill(T bits, T* out, u64 n) {
    for (u64 i = global_thread(); i < n; i += global_threads()) out[i] = bits;
}
extern "C" __global__ void fill_u8(u8 bits, u8* out, u64 n) { fill(bits, out, n); }
extern "C" __global__ void fill_u16(u16 bits, u16* out, u64 n) { fill(bits, out, n); }
extern "C" __global__ void fill_u32(u32 bits, u32* out, u64 n) { fill(bits, out, n); }
extern "C" __global__ void fill_u64(u64 bits, u64* out, u64 n) { fill(bits, out, n); }

// out_i = x_i, to nearest even. Between the two half-width types by way of f32, which holds both.
template <typename From, typename To> __device__ void cast(const From* x, To* out, u64 n) {
    for (u64 i = global_thread(); i < n; i += global_threads()) out[i] = from_float<To>(to_float(x[i]));
}
extern "C" __global__ void cast_f32_bf16(const float* x, bf16* out, u64 n) { cast(x, out, n); }
extern "C" __global__ void cast_f32_f16(const float* x, f16* out, u64 n) { cast(x, out, n); }
extern "C" __global__ void cast_bf16_f32(const bf16* x, float* out, u64 n) { cast(x, out, n); }
extern "C" __global__ void cast_bf16_f16(const bf16* x, f16* out, u64 n) { cast(x, out, n); }
extern "C" __global__ void cast_f16_f32(const f16* x, float* out, u64 n) { cast(x, out, n); }
extern "C" __global__ void cast_f16_bf16(const f16* x, bf16* out, u64 n) { cast(x, out, n); }

// out_i = x_i rounded to bf16, as an f32.
extern "C" __global__ void round_bf16_f32(const float* x, float* out, u64 n) {
    for (u64 i = global_thread(); i < n; i += global_threads()) out[i] = to_float(from_float<bf16>(x[i]));
}

// x_i ← factor · x_i
extern "C" __global__ void scale_f32(float factor, float* x, u64 n) {
    for (u64 i = global_thread(); i < n; i += global_threads()) x[i] = factor * x[i];
}

// out = a + b
extern "C" __global__ void add_f32(const float* a, const float* b, float* out, u64 n) {
    for (u64 i = global_thread(); i < n; i += global_threads()) out[i] = a[i] + b[i];
}

// out = a / b, 0 where b is
extern "C" __global__ void divide_f32(const float* a, const float* b, float* out, u64 n) {
    for (u64 i = global_thread(); i < n; i += global_threads()) out[i] = b[i] == 0 ? 0 : a[i] / b[i];
}

// out ← out + x
extern "C" __global__ void add_in_place_f32(const float* x, float* out, u64 n) {
    for (u64 i = global_thread(); i < n; i += global_threads()) out[i] += x[i];
}

// Σ x_i² in f64, where the square of an f32 is exact. A block sums the elements first·chunk … and writes one
// partial; a second launch of one block sums the partials. Which elements a thread has depends on `chunk` alone, so
// that the sum's order, and its bits, are the same on every device.
constexpr u32 SUM_THREADS = 256;

extern "C" __global__ void sum_squares_f32(const float* x, u64 n, u64 chunk, double* partials) {
    SHARED(double, warps, [SUM_THREADS / WARP]);
    u64 start = blockIdx.x * chunk, end = min(n, start + chunk);
    double sum = 0;
    for (u64 i = start + threadIdx.x; i < end; i += SUM_THREADS) sum += double(x[i]) * double(x[i]);
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

extern "C" __global__ void sum_f64(const double* partials, u64 n, double* out) {
    SHARED(double, warps, [SUM_THREADS / WARP]);
    double sum = 0;
    for (u64 i = threadIdx.x; i < n; i += SUM_THREADS) sum += partials[i];
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) out[0] = sum;
}
