// The host's side of kernels/common.cuh: CUDA's built-in names, declared. All that waits or is shared between
// threads is a call into Rust (crates/cuda/src/host), which runs each thread of a block as a fibre.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

// The interface to Rust. Sites are named by file and line for messages.
extern "C" {

struct RfDim {
    unsigned x, y, z;
};

// Who the running thread is; set before a fibre is resumed.
struct RfThread {
    RfDim thread, block, block_dim, grid_dim;
};
extern __thread RfThread rf_thread;

// A shared array as its source declares it.
struct RfShared {
    const char* name;
    size_t bytes;
    const char* file;
    int line;
};

void rf_barrier(const char* file, int line);
void rf_syncwarp(unsigned mask, const char* file, int line);
// Each lane of `mask` lays down `slot`; the last to arrive runs `op` on all slots (null outside the mask).
void rf_warp(unsigned mask, void (*op)(void** slots, unsigned mask), void* slot, const char* file, int line);
// Where the block keeps an array: one place for all its threads.
void* rf_shared(const RfShared* array);
// The shared memory whose size the launch gave.
void* rf_dynamic();
// To be called before an atomic operation that reads `bytes` bytes, or only writes them.
void rf_atomic(const void* address, unsigned bytes, const char* file, int line);
void rf_atomic_write(const void* address, unsigned bytes, const char* file, int line);
// To be called where watched code hands `bytes` bytes to be read by what is not watched.
void rf_touch(const void* address, unsigned bytes, const char* file, int line);
// An asynchronous copy of 16 bytes from global to shared memory, of which the first `valid` are taken from `from`
// and the rest are 0.
void rf_cp_async(void* to, const void* from, unsigned valid, const char* file, int line);
void rf_cp_async_commit();
// Waits until at most `pending` committed groups are still on their way.
void rf_cp_async_wait(unsigned pending);

}  // extern "C"

namespace {

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
// CUDA's own types: uint64_t is another one of the same size.
typedef unsigned long long u64;
typedef long long i64;

#define __device__ [[maybe_unused]]
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict

#define threadIdx (rf_thread.thread)
#define blockIdx (rf_thread.block)
#define blockDim (rf_thread.block_dim)
#define gridDim (rf_thread.grid_dim)

#define SHARED(type, name, dimensions)                                              \
    typedef type rf_type_of_##name dimensions;                                      \
    static const RfShared rf_array_##name = {#name, sizeof(rf_type_of_##name), __FILE__, __LINE__}; \
    rf_type_of_##name& name = *static_cast<rf_type_of_##name*>(rf_shared(&rf_array_##name))
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(rf_dynamic())

#define __syncthreads() rf_barrier(__FILE__, __LINE__)

// Functions that stand for an instruction take the site from where they are written.
#define RF_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncwarp(unsigned mask = 0xffffffff, RF_SITE) { rf_syncwarp(mask, file, line); }

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename To, typename From> inline To rf_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned x) { return rf_bits<float>(x); }
inline float __int_as_float(int x) { return rf_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return rf_bits<unsigned>(x); }
inline int __float_as_int(float x) { return rf_bits<int>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((u64(a) * b) >> 32); }

template <typename T> inline T min(T a, T b) { return b < a ? b : a; }
template <typename T> inline T max(T a, T b) { return a < b ? b : a; }

// Each lane of `mask` lays down a value and takes another's: `source` says whose, given the lane.
template <typename T> struct RfShuffle {
    T value;
    unsigned source;
};

template <typename T> __attribute__((no_sanitize("thread"))) inline void rf_shuffle_op(void** slots, unsigned mask) {
    T values[32];
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) values[lane] = static_cast<RfShuffle<T>*>(slots[lane])->value;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        RfShuffle<T>* slot = static_cast<RfShuffle<T>*>(slots[lane]);
        // From a lane outside the mask the hardware gives anything: here a pattern that is no number.
        if (mask >> slot->source & 1) slot->value = values[slot->source];
        else __builtin_memset(static_cast<void*>(&slot->value), 0xff, sizeof(T));
    }
}

template <typename T>
__attribute__((no_sanitize("thread"))) inline T rf_shuffle(unsigned mask, T value, unsigned source, const char* file, int line) {
    RfShuffle<T> slot = {value, source};
    rf_warp(mask, rf_shuffle_op<T>, &slot, file, line);
    return slot.value;
}

inline unsigned rf_lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}
template <typename T> inline T __shfl_sync(unsigned mask, T value, unsigned lane, RF_SITE) {
    return rf_shuffle(mask, value, lane % 32, file, line);
}
template <typename T> inline T __shfl_xor_sync(unsigned mask, T value, unsigned bits, RF_SITE) {
    return rf_shuffle(mask, value, rf_lane() ^ bits, file, line);
}
template <typename T> inline T __shfl_down_sync(unsigned mask, T value, unsigned by, RF_SITE) {
    unsigned lane = rf_lane();
    return rf_shuffle(mask, value, lane + by < 32 ? lane + by : lane, file, line);
}

struct RfVote {
    unsigned value;
};
__attribute__((no_sanitize("thread"))) inline void rf_ballot_op(void** slots, unsigned mask) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1 && static_cast<RfVote*>(slots[lane])->value) votes |= 1u << lane;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) static_cast<RfVote*>(slots[lane])->value = votes;
}
__attribute__((no_sanitize("thread"))) inline unsigned __ballot_sync(unsigned mask, bool vote, RF_SITE) {
    RfVote slot = {vote};
    rf_warp(mask, rf_ballot_op, &slot, file, line);
    return slot.value;
}
inline bool __any_sync(unsigned mask, bool vote, RF_SITE) { return __ballot_sync(mask, vote, file, line) != 0; }

__attribute__((no_sanitize("thread"))) inline void rf_reduce_min_op(void** slots, unsigned mask) {
    unsigned least = 0xffffffff;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) least = min(least, static_cast<RfVote*>(slots[lane])->value);
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) static_cast<RfVote*>(slots[lane])->value = least;
}
__attribute__((no_sanitize("thread"))) inline unsigned __reduce_min_sync(unsigned mask, unsigned value, RF_SITE) {
    RfVote slot = {value};
    rf_warp(mask, rf_reduce_min_op, &slot, file, line);
    return slot.value;
}

// Two blocks may run at once on two threads of the host: these are its atomics.
__attribute__((no_sanitize("thread"))) inline u64 atomicMin(u64* address, u64 value, RF_SITE) {
    rf_atomic(address, sizeof *address, file, line);
    u64 seen = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (value < seen && !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return seen;
}
__attribute__((no_sanitize("thread"))) inline unsigned atomicAdd(unsigned* address, unsigned value, RF_SITE) {
    rf_atomic(address, sizeof *address, file, line);
    return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

template <typename T> __attribute__((no_sanitize("thread"))) inline T rf_atomic_load(const T* address, const char* file, int line) {
    rf_atomic(address, sizeof(T), file, line);
    T value;
    __atomic_load(address, &value, __ATOMIC_ACQUIRE);
    return value;
}
template <typename T> __attribute__((no_sanitize("thread"))) inline void rf_atomic_store(T* address, T value, const char* file, int line) {
    rf_atomic_write(address, sizeof(T), file, line);
    __atomic_store(address, &value, __ATOMIC_RELEASE);
}

// Half-width floats by integer arithmetic, to nearest even; NaN to a quiet one.
inline u16 host_float_to_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return u16(bits >> 16 | 0x40);
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline u16 host_float_to_f16(float x) {
    u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return u16(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return u16(sign | 0x7c00);  // at least 65520: infinity
    if (magnitude < 0x38800000) {
        // Below 2⁻¹⁴: adding 2⁻¹ · 2⁻¹³ puts the last bit of a denormal where f32 rounds.
        u32 shifted = __float_as_uint(__uint_as_float(magnitude) + 0.5f);
        return u16(sign | (shifted - 0x3f000000));
    }
    u32 rebiased = magnitude - 0x38000000;
    return u16(sign | ((rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13));
}

inline float host_f16_to_float(u16 bits) {
    u32 sign = u32(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // The value is magnitude · 2⁻¹⁰ at the exponent of f16; a product rescales it, denormals too, exactly.
    float value = __uint_as_float(magnitude << 13) * 0x1p112f;
    return __uint_as_float(sign | __float_as_uint(value));
}

}  // namespace
