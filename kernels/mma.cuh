// Tensor-core steps and asynchronous copies, a warp tile at a time: on the device PTX, on the host collectives.h.
//
// A step multiplies bf16 and sums in f32: D [16, 8] += A [16, 16] · B [16, 8] (mma.sync.m16n8k16). Over a warp, with
// group = lane / 4 and pair = lane % 4, each register holding two neighbours, the first in its lower half:
//   A: a[0] rows group,     columns 2·pair and 2·pair + 1;  a[1] rows group + 8, the same columns;
//      a[2] rows group,     columns 8 + 2·pair and the next; a[3] rows group + 8, those columns
//   B: b[0] rows 2·pair and 2·pair + 1, column group;        b[1] rows 8 + 2·pair and the next, column group
//   D: d[0], d[1] row group, columns 2·pair and 2·pair + 1;  d[2], d[3] row group + 8, those columns
//
// ldmatrix loads four 8×8 matrices of 16-bit elements: lane 8·j + i gives the address of row i of matrix j, and gets of
// matrix j in r[j] the two elements of row `group` at columns 2·pair and 2·pair + 1; transposed, those of column
// `group` at rows 2·pair and 2·pair + 1.
#pragma once

#include "common.cuh"

#ifdef __CUDACC_RTC__

// d[i][j] += a[i]·b[j], a warp tile of 16·M by 8·N.
template <u32 M, u32 N>
__device__ inline void mma_tile(float (&d)[M][N][4], const u32 (&a)[M][4], const u32 (&b)[N][2]) {
#pragma unroll
    for (u32 i = 0; i < M; ++i)
#pragma unroll
        for (u32 j = 0; j < N; ++j)
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+f"(d[i][j][0]), "+f"(d[i][j][1]), "+f"(d[i][j][2]), "+f"(d[i][j][3])
                : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
}

// Four matrices a row of r; `rows` are this lane's addresses.
template <u32 COUNT> __device__ inline void ldmatrix_tile(u32 (&r)[COUNT][4], const bf16* const (&rows)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[i][0]), "=r"(r[i][1]), "=r"(r[i][2]), "=r"(r[i][3])
                     : "r"(u32(__cvta_generic_to_shared(rows[i])))
                     : "memory");
}
template <u32 COUNT> __device__ inline void ldmatrix_transposed_tile(u32 (&r)[COUNT][4], const bf16* const (&rows)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[i][0]), "=r"(r[i][1]), "=r"(r[i][2]), "=r"(r[i][3])
                     : "r"(u32(__cvta_generic_to_shared(rows[i])))
                     : "memory");
}

// 16 bytes to shared memory, of which the first `valid` come from `from` and the rest are 0; both aligned to 16.
__device__ inline void cp_async(void* to, const void* from, u32 valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(u32(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from)), "r"(valid)
                 : "memory");
}
// What this thread has set off since becomes a group.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's groups are on their way.
template <u32 PENDING> __device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// Two f32 to bf16 in one register, the first in its lower half.
__device__ inline u32 pack_bf16(float first, float second) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
}

#else

#include "collectives.h"

#endif
