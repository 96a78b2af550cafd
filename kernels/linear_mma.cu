// Products with a 4-bit weight on tensor cores: bf16 inputs, f32 sums, the adapter as an extra slice of depth.
//
//   forward:  y  [tokens, outputs] = g ∘ (x Wᵀ + (s·u) Bᵀ) + bias     u = x̃ (e∘A)ᵀ [tokens, rank]
//   backward: dx [tokens, inputs]  = dz W + (s·v) A, or dx += that     v = (dz B)∘e [tokens, rank]
//
// x, dz bf16, and W [outputs, inputs] decoded to bf16 as it is needed. Depth is what is summed over: inputs forward,
// outputs backward. Inputs are a multiple of 32, depth of 8.
//
// A block makes a tile of the result, DEPTH of depth at a time. Stages of x and of codes are on their way by cp.async. Every thread decodes the 16 bytes of codes that it fetched itself, 32 weights of one scale, into the tile
// that comes next while the tensor cores multiply this one (mma.sync.m16n8k16): one barrier a step. Forward the tile of W
// lies as it is stored, a row an output; backward it is the rows' own columns that are wanted, which ldmatrix turns.
//
// With few tokens there are few tiles, too few to fill a device: depth is then split over gridDim.z blocks, each of which
// leaves its sums in a matrix of its own, and a second launch adds those in order.
//
// Reads W once for every tile's rows of tokens, ½ byte a weight and a scale a block; x once for every tile's columns. Bound by
// memory for few tokens, by decoding and the tensor cores for many.
#include "mma.cuh"
#include "quantized.cuh"

constexpr u32 DEPTH = 64;
// Weights that a thread decodes a step: 16 bytes of codes.
constexpr u32 RUN = 32;
// Elements behind each row of a tile, so that the eight rows of a matrix lie in different banks.
constexpr u32 PAD = 8;

// Rows and columns of a block's result: warps each way, and each warp's 16×8 steps each way; and how many stages of x
// and of codes are on their way.
template <u32 WARPS_DOWN, u32 WARPS_ACROSS, u32 STEPS_DOWN, u32 STEPS_ACROSS, u32 STAGES> struct Shape {
    static constexpr u32 stages = STAGES;
    static constexpr u32 warps_across = WARPS_ACROSS;
    static constexpr u32 down = STEPS_DOWN, across = STEPS_ACROSS;
    static constexpr u32 rows = WARPS_DOWN * STEPS_DOWN * 16, columns = WARPS_ACROSS * STEPS_ACROSS * 8;
    static constexpr u32 threads = WARPS_DOWN * WARPS_ACROSS * WARP;
    static_assert(columns * DEPTH == threads * RUN, "every thread decodes one run a step");
};

// What a tile of W is taken from, and where a run of it goes.
//
// Forward: `columns` rows of W, DEPTH inputs each; backward: DEPTH rows of W, `columns` inputs each.
template <typename S, bool BACKWARD> struct WeightTile {
    static constexpr u32 rows = BACKWARD ? DEPTH : S::columns, width = BACKWARD ? S::columns : DEPTH;
    typedef bf16 Tile[rows][width + PAD];
};

template <typename S, bool BACKWARD> struct Product {
    typedef WeightTile<S, BACKWARD> Weights;

    const bf16* x;
    Quantized w;
    u32 tokens, inputs, outputs;
    // The first row and column of this block's result.
    u32 row, column;

    __device__ u32 depth() const { return BACKWARD ? outputs : inputs; }

    // This thread's run of the tile at `depth`: its first element of W, and whether it is one.
    __device__ u64 run(u32 depth, bool& inside) const {
        u32 runs = Weights::width / RUN, r = threadIdx.x / runs, c = threadIdx.x % runs * RUN;
        u32 w_row = (BACKWARD ? depth : column) + r, w_column = (BACKWARD ? column : depth) + c;
        inside = w_row < outputs && w_column < inputs;
        return inside ? u64(w_row) * inputs + w_column : 0;
    }

    // Sends for the tile of x at `depth`, and for this thread's codes.
    __device__ void fetch(u32 depth, bf16 (&x_tile)[S::rows][DEPTH + PAD], uint4& codes) const {
        constexpr u32 CHUNK = 8;
        for (u32 i = threadIdx.x; i < S::rows * DEPTH / CHUNK; i += S::threads) {
            u32 r = i / (DEPTH / CHUNK), d = i % (DEPTH / CHUNK) * CHUNK;
            // All of a chunk is x's or nothing: the whole depth is a multiple of 8.
            bool inside = row + r < tokens && depth + d < this->depth();
            u64 from = inside ? u64(row + r) * this->depth() + depth + d : 0;
            cp_async(&x_tile[r][d], x + from, inside ? 16 : 0);
        }
        bool inside;
        u64 first = run(depth, inside);
        cp_async(&codes, w.codes + first / 2, inside ? 16 : 0);
    }

    __device__ float scale(u32 depth) const {
        bool inside;
        u64 first = run(depth, inside);
        return inside ? w.scale(first >> w.log_block) : 0.0f;
    }

    // This thread's run, decoded: beyond W it is 0 times whatever.
    __device__ void decode(uint4 codes, float scale, typename Weights::Tile& tile) const {
        u32 runs = Weights::width / RUN, r = threadIdx.x / runs, c = threadIdx.x % runs * RUN;
#pragma unroll
        for (u32 part = 0; part < 4; ++part) {
            u32 word = part == 0 ? codes.x : part == 1 ? codes.y : part == 2 ? codes.z : codes.w;
            uint4 packed;
            packed.x = pack_bf16(w.value(word, 0) * scale, w.value(word, 1) * scale);
            packed.y = pack_bf16(w.value(word, 2) * scale, w.value(word, 3) * scale);
            packed.z = pack_bf16(w.value(word, 4) * scale, w.value(word, 5) * scale);
            packed.w = pack_bf16(w.value(word, 6) * scale, w.value(word, 7) * scale);
            *reinterpret_cast<uint4*>(&tile[r][c + 8 * part]) = packed;
        }
    }
};

// sums += the tile of x times the tile of W, `steps` of 16 of depth.
template <typename S, bool BACKWARD>
__device__ void multiply(const bf16 (&x_tile)[S::rows][DEPTH + PAD], const typename WeightTile<S, BACKWARD>::Tile& w_tile, u32 steps, float (&sums)[S::down][S::across][4]) {
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 down = warp / S::warps_across * S::down * 16, across = warp % S::warps_across * S::across * 8;
    // Of four matrices, which one this lane gives a row of, and which row.
    u32 matrix = lane / 8, line = lane % 8;
    for (u32 step = 0; step < steps; ++step) {
        u32 a[S::down][4], pairs[S::across / 2][4], b[S::across][2];
        const bf16* a_rows[S::down];
        const bf16* b_rows[S::across / 2];
#pragma unroll
        for (u32 i = 0; i < S::down; ++i)
            a_rows[i] = &x_tile[down + 16 * i + matrix % 2 * 8 + line][16 * step + matrix / 2 * 8];
        // Two columns' steps at once: matrices 0 and 1 are the halves of depth of the first, 2 and 3 of the second.
#pragma unroll
        for (u32 j = 0; j < S::across / 2; ++j) {
            u32 n = across + 16 * j + matrix / 2 * 8, k = 16 * step + matrix % 2 * 8;
            b_rows[j] = BACKWARD ? &w_tile[k + line][n] : &w_tile[n + line][k];
        }
        ldmatrix_tile(a, a_rows);
        if (BACKWARD) ldmatrix_transposed_tile(pairs, b_rows);
        else ldmatrix_tile(pairs, b_rows);
#pragma unroll
        for (u32 j = 0; j < S::across; ++j) b[j][0] = pairs[j / 2][j % 2 * 2], b[j][1] = pairs[j / 2][j % 2 * 2 + 1];
        mma_tile(sums, a, b);
    }
}

// The adapter: inner [tokens, rank] (u or v), outer B [outputs, rank] or A [rank, inputs]; null where absent.
struct Slice {
    const float* inner;
    const float* outer;
    u32 rank;
    float scale;
};

// Where the result goes, and what is done to it on the way; null where absent.
struct Result {
    float* out;
    const float* factors;
    const float* bias;
    u32 accumulate;

    __device__ void store(u64 at, u32 column, float sum) const {
        if (factors) sum *= factors[column];
        if (bias) sum += bias[column];
        out[at] = accumulate ? out[at] + sum : sum;
    }
};

template <typename S, bool BACKWARD> __device__ void linear_mma(Product<S, BACKWARD> p, const Slice& slice, const Result& result) {
    typedef WeightTile<S, BACKWARD> Weights;
    typedef bf16 XTile[S::rows][DEPTH + PAD];
    struct Memory {
        XTile x[S::stages];
        typename Weights::Tile w[2];
        uint4 codes[S::stages][S::threads];
        float values[CODES];
    };
    DYNAMIC_SHARED(Memory, memory);
    p.row = blockIdx.y * S::rows, p.column = blockIdx.x * S::columns;
    p.w.stage(memory->values);
    float sums[S::down][S::across][4] = {};
    // This block's share of the depth: `steps` steps from `start` on.
    u32 all = (p.depth() + DEPTH - 1) / DEPTH;
    u32 first = u32(u64(all) * blockIdx.z / gridDim.z), steps = u32(u64(all) * (blockIdx.z + 1) / gridDim.z) - first;
    u32 start = first * DEPTH;

    for (u32 stage = 0; stage < S::stages - 1; ++stage) {
        if (stage < steps) p.fetch(start + stage * DEPTH, memory->x[stage], memory->codes[stage][threadIdx.x]);
        cp_async_commit();
    }
    float scale = p.scale(start);
    cp_async_wait<S::stages - 2>();
    __syncthreads();
    if (steps > 0) p.decode(memory->codes[0][threadIdx.x], scale, memory->w[0]);
    scale = p.scale(start + DEPTH);
    for (u32 step = 0; step < steps; ++step) {
        // What this thread decodes next has landed; after the barrier so have all tiles of x, and every thread is done
        // with the stage that is fetched anew and with the tile that is decoded anew.
        cp_async_wait<S::stages - 3>();
        __syncthreads();
        u32 ahead = step + S::stages - 1;
        if (ahead < steps) p.fetch(start + ahead * DEPTH, memory->x[ahead % S::stages], memory->codes[ahead % S::stages][threadIdx.x]);
        cp_async_commit();
        if (step + 1 < steps) p.decode(memory->codes[(step + 1) % S::stages][threadIdx.x], scale, memory->w[(step + 1) % 2]);
        scale = p.scale(start + (step + 2) * DEPTH);
        multiply<S, BACKWARD>(memory->x[step % S::stages], memory->w[step % 2], DEPTH / 16, sums);
    }

    u32 columns = BACKWARD ? p.inputs : p.outputs;
    u32 rank = blockIdx.z == 0 ? slice.rank : 0;
    for (u32 r = 0; r < rank; r += DEPTH) {
        u32 depth = min(DEPTH, slice.rank - r), padded = (depth + 15) / 16 * 16;
        cp_async_wait<0>();
        __syncthreads();
        for (u32 i = threadIdx.x; i < S::rows * padded; i += S::threads) {
            u32 t = i / padded, d = i % padded;
            bool inside = p.row + t < p.tokens && d < depth;
            float value = inside ? slice.scale * slice.inner[u64(p.row + t) * slice.rank + r + d] : 0.0f;
            memory->x[0][t][d] = from_float<bf16>(value);
        }
        for (u32 i = threadIdx.x; i < S::columns * padded; i += S::threads) {
            u32 d = BACKWARD ? i / S::columns : i % padded, n = BACKWARD ? i % S::columns : i / padded;
            bool inside = p.column + n < columns && d < depth;
            u64 at = BACKWARD ? u64(r + d) * columns + p.column + n : u64(p.column + n) * slice.rank + r + d;
            memory->w[0][BACKWARD ? d : n][BACKWARD ? n : d] = from_float<bf16>(inside ? slice.outer[at] : 0.0f);
        }
        __syncthreads();
        multiply<S, BACKWARD>(memory->x[0], memory->w[0], padded / 16, sums);
    }

    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 down = p.row + warp / S::warps_across * S::down * 16 + lane / 4;
    u32 across = p.column + warp % S::warps_across * S::across * 8 + lane % 4 * 2;
#pragma unroll
    for (u32 i = 0; i < S::down; ++i)
#pragma unroll
        for (u32 j = 0; j < S::across; ++j)
#pragma unroll
            for (u32 r = 0; r < 4; ++r) {
                u32 t = down + 16 * i + r / 2 * 8, n = across + 8 * j + r % 2;
                if (t >= p.tokens || n >= columns) continue;
                u64 at = u64(t) * columns + n;
                if (gridDim.z > 1) result.out[u64(blockIdx.z) * p.tokens * columns + at] = sums[i][j][r];
                else result.store(at, n, sums[i][j][r]);
            }
}

// The sums of all shares of the depth, in order. A grid of 256-thread blocks strides over the elements.
extern "C" __global__ void linear_mma_sum(
    const float* shares, u32 count, float* out, const float* factors, const float* bias, u32 accumulate, u32 tokens,
    u32 columns) {
    Result result = {out, factors, bias, accumulate};
    u64 n = u64(tokens) * columns;
    for (u64 i = global_thread(); i < n; i += global_threads()) {
        float sum = 0;
        for (u32 share = 0; share < count; ++share) sum += shares[share * n + i];
        result.store(i, u32(i % columns), sum);
    }
}

// 16 tokens by 64 columns, 64 by 64, and 128 by 128.
typedef Shape<1, 4, 1, 2, 4> Narrow;
typedef Shape<2, 2, 2, 4, 4> Square;
// With three stages two blocks share a multiprocessor.
typedef Shape<2, 4, 4, 4, 3> Wide;

extern "C" __global__ void __launch_bounds__(128) linear_mma_16(
    const bf16* x, const u8* codes, const float* absmax, const u8* scale_codes, float offset, const float* map,
    const float* values, u32 log_block, const float* inner, const float* outer, u32 rank, float scale, float* out,
    const float* factors, const float* bias, u32 accumulate, u32 tokens, u32 inputs, u32 outputs) {
    linear_mma(Product<Narrow, false>{x, {codes, absmax, scale_codes, offset, map, values, log_block}, tokens, inputs, outputs, 0, 0},
               {inner, outer, rank, scale}, {out, factors, bias, accumulate});
}
extern "C" __global__ void __launch_bounds__(128) linear_mma_64(
    const bf16* x, const u8* codes, const float* absmax, const u8* scale_codes, float offset, const float* map,
    const float* values, u32 log_block, const float* inner, const float* outer, u32 rank, float scale, float* out,
    const float* factors, const float* bias, u32 accumulate, u32 tokens, u32 inputs, u32 outputs) {
    linear_mma(Product<Square, false>{x, {codes, absmax, scale_codes, offset, map, values, log_block}, tokens, inputs, outputs, 0, 0},
               {inner, outer, rank, scale}, {out, factors, bias, accumulate});
}
extern "C" __global__ void __launch_bounds__(256) linear_mma_128(
    const bf16* x, const u8* codes, const float* absmax, const u8* scale_codes, float offset, const float* map,
    const float* values, u32 log_block, const float* inner, const float* outer, u32 rank, float scale, float* out,
    const float* factors, const float* bias, u32 accumulate, u32 tokens, u32 inputs, u32 outputs) {
    linear_mma(Product<Wide, false>{x, {codes, absmax, scale_codes, offset, map, values, log_block}, tokens, inputs, outputs, 0, 0},
               {inner, outer, rank, scale}, {out, factors, bias, accumulate});
}
extern "C" __global__ void __launch_bounds__(128) linear_grad_mma_16(
    const bf16* x, const u8* codes, const float* absmax, const u8* scale_codes, float offset, const float* map,
    const float* values, u32 log_block, const float* inner, const float* outer, u32 rank, float scale, float* out,
    const float* factors, const float* bias, u32 accumulate, u32 tokens, u32 inputs, u32 outputs) {
    linear_mma(Product<Narrow, true>{x, {codes, absmax, scale_codes, offset, map, values, log_block}, tokens, inputs, outputs, 0, 0},
               {inner, outer, rank, scale}, {out, factors, bias, accumulate});
}
extern "C" __global__ void __launch_bounds__(128) linear_grad_mma_64(
    const bf16* x, const u8* codes, const float* absmax, const u8* scale_codes, float offset, const float* map,
    const float* values, u32 log_block, const float* inner, const float* outer, u32 rank, float scale, float* out,
    const float* factors, const float* bias, u32 accumulate, u32 tokens, u32 inputs, u32 outputs) {
    linear_mma(Product<Square, true>{x, {codes, absmax, scale_codes, offset, map, values, log_block}, tokens, inputs, outputs, 0, 0},
               {inner, outer, rank, scale}, {out, factors, bias, accumulate});
}
extern "C" __global__ void __launch_bounds__(256) linear_grad_mma_128(
    const bf16* x, const u8* codes, const float* absmax, const u8* scale_codes, float offset, const float* map,
    const float* values, u32 log_block, const float* inner, const float* outer, u32 rank, float scale, float* out,
    const float* factors, const float* bias, u32 accumulate, u32 tokens, u32 inputs, u32 outputs) {
    linear_mma(Product<Wide, true>{x, {codes, absmax, scale_codes, offset, map, values, log_block}, tokens, inputs, outputs, 0, 0},
               {inner, outer, rank, scale}, {out, factors, bias, accumulate});
}
