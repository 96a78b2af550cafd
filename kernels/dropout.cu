// Dropout (Srivastava et al. 2014), inverted: y_i = x_i · keep_scale where kept, 0 where dropped.
//
// Element i is kept where the Philox word at position i of the stream is at least `threshold`. dx is the same kernel
// on dy.
//
// A thread draws the four words of a group and has its four elements, 16 bytes in and 16 out, in one load and one
// store where they are aligned. Bound by memory: ten rounds are some 60 integer operations for 32 bytes.
#include "philox.cuh"

constexpr u64 GROUP = 4;

// What is dropped is 0 whatever it was, NaN and infinity too: hence no product with a mask.
__device__ inline float dropped(float x, u32 word, u32 threshold, float keep_scale) {
    return word >= threshold ? x * keep_scale : 0.0f;
}

extern "C" __global__ void dropout_f32(const float* x, float* y, u64 n, u64 seed, u64 stream, u32 threshold,
                                       float keep_scale) {
    bool aligned = u64(x) % sizeof(float4) == 0 && u64(y) % sizeof(float4) == 0;
    for (u64 group = global_thread(); GROUP * group < n; group += global_threads()) {
        u64 first = GROUP * group;
        uint4 words = philox_words(seed, stream, group);
        if (aligned && first + GROUP <= n) {
            float4 in = *reinterpret_cast<const float4*>(x + first);
            *reinterpret_cast<float4*>(y + first) = make_float4(
                dropped(in.x, words.x, threshold, keep_scale), dropped(in.y, words.y, threshold, keep_scale),
                dropped(in.z, words.z, threshold, keep_scale), dropped(in.w, words.w, threshold, keep_scale));
            continue;
        }
        u32 word[GROUP] = {words.x, words.y, words.z, words.w};
        for (u32 i = 0; i < GROUP && first + i < n; ++i)
            y[first + i] = dropped(x[first + i], word[i], threshold, keep_scale);
    }
}
