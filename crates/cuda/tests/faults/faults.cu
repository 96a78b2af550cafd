// Kernels with one fault each, and beside it the kernel without: what the checker has to find, and what it must not.
#include "mma.cuh"

// Each thread hands its value to its neighbour by way of shared memory; `fault` leaves the barrier out.
extern "C" __global__ void neighbour(const u32* x, u32* out, u32 fault) {
    SHARED(u32, tile, [256]);
    tile[threadIdx.x] = x[threadIdx.x];
    if (!fault) __syncthreads();
    out[threadIdx.x] = tile[(threadIdx.x + 1) % blockDim.x];
}

// The same among the lanes of a warp, which meet.
extern "C" __global__ void neighbour_lane(const u32* x, u32* out, u32 fault) {
    SHARED(u32, tile, [256]);
    tile[threadIdx.x] = x[threadIdx.x];
    if (!fault) __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x / WARP * WARP + (threadIdx.x + 1) % WARP];
}

// All read an element, then one overwrites it; `fault` leaves the barrier between out.
extern "C" __global__ void overwrite(const u32* x, u32* out, u32 fault) {
    SHARED(u32, shared, [1]);
    if (threadIdx.x == 0) shared[0] = x[0];
    __syncthreads();
    out[threadIdx.x] = shared[0];
    if (!fault) __syncthreads();
    if (threadIdx.x == 40) shared[0] = 7;
}

// Counts elements by value; `fault` adds without an atomic.
extern "C" __global__ void count(const u32* x, u32* bins, u32 fault) {
    u32 bin = x[global_thread()];
    if (fault) bins[bin] += 1;
    else atomicAdd(&bins[bin], 1u);
}

// out_i = 2 x_i; `fault` goes one element too far.
extern "C" __global__ void twice(const u32* x, u32* out, u32 n, u32 fault) {
    u64 i = global_thread();
    if (i < n + fault) out[i] = 2 * x[i];
}

// Reads an element of shared memory that nobody wrote, or one beyond the array.
extern "C" __global__ void shared_element(u32* out, u32 element) {
    SHARED(u32, small, [40]);
    if (threadIdx.x < 32) small[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = small[element];
}

// A barrier that half of the block reaches.
extern "C" __global__ void half_barrier(u32* out, u32 fault) {
    if (threadIdx.x < 32 || !fault) __syncthreads();
    out[threadIdx.x] = threadIdx.x;
}

// A lane that its warp waits for in vain.
extern "C" __global__ void missing_lane(u32* out, u32 fault) {
    u32 x = threadIdx.x;
    if (x % WARP != 5 || !fault) x = __shfl_xor_sync(ALL_LANES, x, 1);
    out[threadIdx.x] = x;
}

// A tile fetched asynchronously; fault 1 reads it before it has landed, fault 2 before the others' have.
extern "C" __global__ void fetch(const u32* x, u32* out, u32 fault) {
    SHARED(u32, tile, [256]);
    cp_async(&tile[4 * threadIdx.x], &x[4 * threadIdx.x], 16);
    cp_async_commit();
    if (fault != 1) cp_async_wait<0>();
    if (fault != 2) __syncthreads();
    out[threadIdx.x] = tile[(4 * threadIdx.x + 4) % (4 * blockDim.x)];
}

// Two blocks write one element; `fault` is how many elements are theirs together.
extern "C" __global__ void overlap(u32* out, u32 fault) {
    if (threadIdx.x < 8) out[blockIdx.x * (8 - fault) + threadIdx.x] = blockIdx.x;
}

// Every thread counts itself, then thread 0 of each block reads the count; `fault` reads it as if nobody else did.
extern "C" __global__ void census(u32* count, u32* out, u32 fault) {
    atomicAdd(&count[0], 1u);
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = fault ? count[0] : atomicAdd(&count[0], 0u);
}
