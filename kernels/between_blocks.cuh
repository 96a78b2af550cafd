// How blocks of one launch hand work to each other: by atomics, and in an order that cannot stand still.
//
// Blocks take their work by ticket and not by index: who draws a ticket runs, so that work with a higher ticket may
// wait for work with a lower one whichever blocks the device starts first. What is handed over is stored and loaded
// atomically; `arrive` after it and `wait_for` before it put the two in order.
#pragma once

#include "common.cuh"

// Counters of one launch, all 0 before it and after it.
struct Counters {
    u32 tickets, arrived, done;
};

#ifdef __CUDACC_RTC__

__device__ inline void atomic_store(float* to, float x) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" : : "l"(__cvta_generic_to_global(to)), "f"(x) : "memory");
}
__device__ inline float atomic_load(const float* from) {
    float x;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(__cvta_generic_to_global(from)) : "memory");
    return x;
}
__device__ inline void atomic_clear(u32* counter) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" : : "l"(__cvta_generic_to_global(counter)) : "memory");
}
// What was stored before is seen by who sees the sum.
__device__ inline u32 atomic_increment(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
    return before;
}
__device__ inline u32 atomic_acquire(const u32* counter) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(counter)) : "memory");
    return x;
}

#else

inline void atomic_store(float* to, float x, RF_SITE) { rf_atomic_store(to, x, file, line); }
inline float atomic_load(const float* from, RF_SITE) { return rf_atomic_load(from, file, line); }
inline void atomic_clear(u32* counter, RF_SITE) { rf_atomic_store(counter, u32(0), file, line); }
inline u32 atomic_increment(u32* counter, RF_SITE) { return atomicAdd(counter, 1u, file, line); }
inline u32 atomic_acquire(const u32* counter, RF_SITE) { return rf_atomic_load(counter, file, line); }

#endif

// The block's ticket, in every thread. `shared` is free again after the caller's next barrier.
__device__ inline u32 draw_ticket(Counters* counters, u32* shared) {
    if (threadIdx.x == 0) *shared = atomic_increment(&counters->tickets);
    __syncthreads();
    return *shared;
}

// After a barrier that follows the block's stores.
__device__ inline void arrive(Counters* counters) {
    if (threadIdx.x == 0) atomic_increment(&counters->arrived);
}

// Until so many have arrived, for the threads that call it.
__device__ inline void wait_for(const Counters* counters, u32 arrivals) {
    while (atomic_acquire(&counters->arrived) < arrivals) {
    }
}

// The last of all blocks leaves the counters as it found them: nobody waits any more. Thread 0 leaves, so it has to have
// been among those that waited, or behind a barrier after them.
__device__ inline void leave(Counters* counters) {
    if (threadIdx.x == 0 && atomic_increment(&counters->done) == gridDim.x - 1) {
        atomic_clear(&counters->tickets);
        atomic_clear(&counters->arrived);
        atomic_clear(&counters->done);
    }
}
