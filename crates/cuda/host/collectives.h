// The host's side of kernels/mma.cuh: tensor-core steps by arithmetic, lane by lane as the hardware lays them out, and
// asynchronous copies as calls into Rust.
#pragma once

namespace {

inline float rf_half(u32 pair, u32 which) { return __uint_as_float(which ? pair & 0xffff0000 : pair << 16); }

template <u32 M, u32 N> struct RfMma {
    float (*d)[N][4];
    const u32 (*a)[4];
    const u32 (*b)[2];
};

// The whole tile's product, from and to the lanes' registers.
template <u32 M, u32 N> __attribute__((no_sanitize("thread"))) inline void rf_mma_op(void** slots, unsigned) {
    constexpr u32 ROWS = 16 * M, COLUMNS = 8 * N, DEPTH = 16;
    float a[ROWS][DEPTH], b[DEPTH][COLUMNS];
    for (u32 lane = 0; lane < 32; ++lane) {
        const RfMma<M, N>& slot = *static_cast<const RfMma<M, N>*>(slots[lane]);
        u32 group = lane / 4, pair = lane % 4;
        for (u32 half = 0; half < 2; ++half) {
            for (u32 i = 0; i < M; ++i)
                for (u32 r = 0; r < 4; ++r)
                    a[16 * i + group + 8 * (r % 2)][8 * (r / 2) + 2 * pair + half] = rf_half(slot.a[i][r], half);
            for (u32 j = 0; j < N; ++j)
                for (u32 r = 0; r < 2; ++r) b[8 * r + 2 * pair + half][8 * j + group] = rf_half(slot.b[j][r], half);
        }
    }
    // The products of two bf16 are exact in f32; how the hardware rounds their sums is its own business.
    float sums[ROWS][COLUMNS] = {};
    for (u32 row = 0; row < ROWS; ++row)
        for (u32 k = 0; k < DEPTH; ++k)
            for (u32 column = 0; column < COLUMNS; ++column) sums[row][column] += a[row][k] * b[k][column];
    for (u32 lane = 0; lane < 32; ++lane) {
        RfMma<M, N>& slot = *static_cast<RfMma<M, N>*>(slots[lane]);
        u32 group = lane / 4, pair = lane % 4;
        for (u32 i = 0; i < M; ++i)
            for (u32 j = 0; j < N; ++j)
                for (u32 r = 0; r < 4; ++r)
                    slot.d[i][j][r] += sums[16 * i + group + 8 * (r / 2)][8 * j + 2 * pair + r % 2];
    }
}

template <u32 M, u32 N>
__attribute__((no_sanitize("thread"))) inline void mma_tile(float (&d)[M][N][4], const u32 (&a)[M][4], const u32 (&b)[N][2], RF_SITE) {
    RfMma<M, N> slot = {d, a, b};
    rf_warp(0xffffffff, rf_mma_op<M, N>, &slot, file, line);
}

template <u32 COUNT> struct RfMatrices {
    u32 (*r)[4];
    const bf16* const* rows;
};

template <u32 COUNT, bool TRANSPOSED>
__attribute__((no_sanitize("thread"))) inline void rf_ldmatrix_op(void** slots, unsigned) {
    auto at = [&](u32 i, u32 matrix, u32 row, u32 column) __attribute__((no_sanitize("thread"))) {
        return u32(static_cast<const RfMatrices<COUNT>*>(slots[8 * matrix + row])->rows[i][column].bits);
    };
    for (u32 lane = 0; lane < 32; ++lane) {
        RfMatrices<COUNT>& slot = *static_cast<RfMatrices<COUNT>*>(slots[lane]);
        u32 group = lane / 4, pair = lane % 4;
        for (u32 i = 0; i < COUNT; ++i)
            for (u32 matrix = 0; matrix < 4; ++matrix) {
                u32 first = TRANSPOSED ? at(i, matrix, 2 * pair, group) : at(i, matrix, group, 2 * pair);
                u32 second = TRANSPOSED ? at(i, matrix, 2 * pair + 1, group) : at(i, matrix, group, 2 * pair + 1);
                slot.r[i][matrix] = first | second << 16;
            }
    }
}

template <u32 COUNT, bool TRANSPOSED>
__attribute__((no_sanitize("thread"))) inline void rf_ldmatrix(u32 (&r)[COUNT][4], const bf16* const (&rows)[COUNT], const char* file, int line) {
    // A lane answers for the row whose address it gives.
    for (u32 i = 0; i < COUNT; ++i) rf_touch(rows[i], 16, file, line);
    RfMatrices<COUNT> slot = {r, rows};
    rf_warp(0xffffffff, rf_ldmatrix_op<COUNT, TRANSPOSED>, &slot, file, line);
}

template <u32 COUNT> inline void ldmatrix_tile(u32 (&r)[COUNT][4], const bf16* const (&rows)[COUNT], RF_SITE) {
    rf_ldmatrix<COUNT, false>(r, rows, file, line);
}
template <u32 COUNT> inline void ldmatrix_transposed_tile(u32 (&r)[COUNT][4], const bf16* const (&rows)[COUNT], RF_SITE) {
    rf_ldmatrix<COUNT, true>(r, rows, file, line);
}

inline void cp_async(void* to, const void* from, u32 valid, RF_SITE) { rf_cp_async(to, from, valid, file, line); }
inline void cp_async_commit() { rf_cp_async_commit(); }
template <u32 PENDING> inline void cp_async_wait() { rf_cp_async_wait(PENDING); }

inline u32 pack_bf16(float first, float second) {
    return u32(host_float_to_bf16(first)) | u32(host_float_to_bf16(second)) << 16;
}

}  // namespace
