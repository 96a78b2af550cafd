// Embedding: rows_t = table_(ids_t). Its gradient adds each row's gradient to the table's row that it came from.
//
// ids u32 [tokens], table [vocab, width], rows [tokens, width]. Both kernels are bound by memory, in rows that lie
// anywhere but are read whole, neighbouring threads at neighbouring elements.
#include "common.cuh"

// A token has a block of 256 threads. To nearest even; a row is moved once, at its two types' sizes.
template <typename From, typename To>
__device__ void embedding(const u32* ids, const From* table, To* rows, u64 width) {
    table += ids[blockIdx.x] * width;
    rows += blockIdx.x * width;
    for (u64 i = threadIdx.x; i < width; i += blockDim.x) rows[i] = from_float<To>(to_float(table[i]));
}
extern "C" __global__ void embedding_f32_f32(const u32* ids, const float* table, float* rows, u64 width) {
    embedding(ids, table, rows, width);
}
extern "C" __global__ void embedding_f32_bf16(const u32* ids, const float* table, bf16* rows, u64 width) {
    embedding(ids, table, rows, width);
}
extern "C" __global__ void embedding_f32_f16(const u32* ids, const float* table, f16* rows, u64 width) {
    embedding(ids, table, rows, width);
}
extern "C" __global__ void embedding_bf16_f32(const u32* ids, const bf16* table, float* rows, u64 width) {
    embedding(ids, table, rows, width);
}
extern "C" __global__ void embedding_bf16_bf16(const u32* ids, const bf16* table, bf16* rows, u64 width) {
    embedding(ids, table, rows, width);
}
extern "C" __global__ void embedding_bf16_f16(const u32* ids, const bf16* table, f16* rows, u64 width) {
    embedding(ids, table, rows, width);
}
extern "C" __global__ void embedding_f16_f32(const u32* ids, const f16* table, float* rows, u64 width) {
    embedding(ids, table, rows, width);
}
extern "C" __global__ void embedding_f16_bf16(const u32* ids, const f16* table, bf16* rows, u64 width) {
    embedding(ids, table, rows, width);
}
extern "C" __global__ void embedding_f16_f16(const u32* ids, const f16* table, f16* rows, u64 width) {
    embedding(ids, table, rows, width);
}

// dtable_(ids_t) += drows_t, in the order of t.
//
// `order` has the tokens sorted by id, equal ids in the order of t; `starts` says where in it each run of one id
// begins, and behind the last where it ends. A run has a block for every 256 columns, and a thread one column, whose
// sum stays in a register: 4 bytes in an element of drows, 8 in and out an element of a row that occurs.
extern "C" __global__ void embedding_grad_f32(const u32* ids, const u32* order, const u32* starts, const float* drows,
                                              float* dtable, u64 width) {
    u64 column = u64(blockIdx.y) * blockDim.x + threadIdx.x;
    if (column >= width) return;
    u32 first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    u64 at = ids[order[first]] * width + column;
    float sum = dtable[at];
    for (u32 i = first; i < end; ++i) sum += drows[order[i] * width + column];
    dtable[at] = sum;
}
