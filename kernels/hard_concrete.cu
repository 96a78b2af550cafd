// The hard concrete gate (Louizos et al. 2018, eq. 10–12): the mask of diff pruning (Guo et al. 2021, §3.1).
//
// s = σ((ln u − ln(1 − u) + logα)/β), or σ(logα) without noise
// z = clamp(s̄, 0, 1),  s̄ = s·(ζ − γ) + γ
// P(z ≠ 0) = σ(logα − β·ln(−γ/ζ))
//
// u of element i is (w + ½)/2³², w the Philox word at position i of the stream, and 1 − u is that of ~w: the two
// logarithms are one of a ratio. A thread draws the four words of a group and has its four gates. Forward moves 8 bytes
// an element, backward 16; bound by arithmetic where there is noise, a quarter of ten rounds, a logarithm, two
// exponentials and three divisions an element.
#include "philox.cuh"
#include "sigmoid.cuh"

constexpr u32 GROUP = 4;

// What depends on the parameters alone is formed by the host in f64 and rounded once: inner = 1/β, or 1 without noise;
// span = ζ − γ; low = γ; shift = β·ln(−γ/ζ).
struct Gates {
    u32 noisy;
    u64 seed, stream;
    float inner, span, low, shift;

    // The words of a group, in order.
    __device__ void draw(u64 group, u32 (&words)[GROUP]) const {
        uint4 drawn = noisy ? philox_words(seed, stream, group) : uint4{};
        words[0] = drawn.x, words[1] = drawn.y, words[2] = drawn.z, words[3] = drawn.w;
    }
    __device__ float s(float log_alpha, u32 word) const {
        if (!noisy) return sigmoid(log_alpha);
        float odds = (float(word) + 0.5f) / (float(~word) + 0.5f);
        return sigmoid((logf(odds) + log_alpha) * inner);
    }
    __device__ float stretched(float s) const { return s * span + low; }
    __device__ float open(float log_alpha) const { return sigmoid(log_alpha - shift); }
};

constexpr u32 THREADS = 256;

// z, and the sum of P(z ≠ 0) over each block's `chunk` elements, a multiple of a group: elementwise.cu's sum_f64 adds
// these up. A NaN fails both comparisons, and stays.
extern "C" __global__ void hard_concrete_f32(const float* log_alpha, float* z, double* partials, u64 n, u64 chunk,
                                             u32 noisy, u64 seed, u64 stream, float inner, float span, float low,
                                             float shift) {
    SHARED(double, warps, [THREADS / WARP]);
    Gates gates{noisy, seed, stream, inner, span, low, shift};
    u64 start = blockIdx.x * chunk, end = min(n, start + chunk);
    double sum = 0;
    for (u64 first = start + GROUP * threadIdx.x; first < end; first += GROUP * THREADS) {
        u32 words[GROUP];
        gates.draw(first / GROUP, words);
        for (u32 i = 0; i < GROUP && first + i < end; ++i) {
            float at = log_alpha[first + i], stretched = gates.stretched(gates.s(at, words[i]));
            z[first + i] = stretched <= 0.0f ? 0.0f : stretched >= 1.0f ? 1.0f : stretched;
            sum += double(gates.open(at));
        }
    }
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// dlogα += dz · ∂z/∂logα + penalty · ∂P/∂logα
//
// Where 0 < s̄ < 1: ∂z/∂logα = (ζ − γ)·s(1 − s)/β, from σ' = σ(1 − σ) and the 1/β within σ; without noise there is no
// β. Where z was clamped it does not move. ∂P/∂logα = P(1 − P). A grid of 256-thread blocks strides over the groups.
extern "C" __global__ void hard_concrete_grad_f32(const float* log_alpha, const float* dz, float* dlog_alpha, u64 n,
                                                  float penalty, u32 noisy, u64 seed, u64 stream, float inner,
                                                  float span, float low, float shift) {
    Gates gates{noisy, seed, stream, inner, span, low, shift};
    for (u64 group = global_thread(); GROUP * group < n; group += global_threads()) {
        u32 words[GROUP];
        gates.draw(group, words);
        for (u32 j = 0; j < GROUP && GROUP * group + j < n; ++j) {
            u64 i = GROUP * group + j;
            float s = gates.s(log_alpha[i], words[j]), stretched = gates.stretched(s), p = gates.open(log_alpha[i]);
            float moves = stretched <= 0.0f || stretched >= 1.0f ? 0.0f : span * inner * s * (1.0f - s);
            dlog_alpha[i] += dz[i] * moves + penalty * p * (1.0f - p);
        }
    }
}
