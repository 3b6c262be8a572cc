// Softmax attention of many queries over a cache of valid keys, one key head, by Hopper's warpgroup instructions.
//
// A row is a query and one of its heads, so queries are a plain matrix (rows, D). A CTA has 64 of a sample's rows. Its two
// warpgroups take turns at blocks of 64 keys, each with a softmax of its own; at the end each adds up half of the dims. So
// one does its softmax while the other multiplies. A third brings keys and values into a ring, each block in D / 64 pieces
// of 64 dims: 64 rows of 128 bytes, swizzled as wgmma reads them.
//
// Slots behind the valid keys may hold NaN: their logits are replaced, and their values made zeros in shared memory.
//
// Set in front of this file: D head size; SLOTS of the ring; E4M3, whether the result is; and for products of 64 and of D
// columns the lists of a wgmma, LOGITS_REGISTERS, LOGITS_OPERANDS, LOGITS_INPUTS, LOGITS_ADD, and SUMS_... likewise.

#include "hopper.cuh"

constexpr int TILE = 64;               // rows of a CTA; keys of a block; dims of a piece
constexpr int PIECES = D / TILE;
constexpr int PIECE_BYTES = TILE * 128, BLOCK_BYTES = PIECES * PIECE_BYTES;
constexpr int RING_AT = BLOCK_BYTES;   // behind the queries
constexpr int BARRIERS_AT = RING_AT + SLOTS * BLOCK_BYTES;
constexpr int HALF = D / 4;            // sums of a thread for half of the dims
static_assert(D % TILE == 0 && D <= 256, "whole pieces");

#define MINUS_INFINITY __int_as_float(0xff800000)

struct Arguments {
  alignas(64) u64 queries[16];  // tensor maps
  alignas(64) u64 keys[16];
  alignas(64) u64 values[16];
  const int* lengths;           // valid keys of each sample
  char* out;                    // as the queries, or E4M3
  int rows, slots;              // of a sample: queries times heads; of its keys and values
  float scale, inverse;         // of the logits, times log2(e); of the result, if that is E4M3
};

// ---------------------------------------------------------------- copies

// 64 rows of a matrix of D columns, a piece after another.
__device__ __forceinline__ void copy(const u64* map, u32 to, int row, u32 barrier) {
  expect(barrier, BLOCK_BYTES);
#pragma unroll
  for (int piece = 0; piece < PIECES; ++piece) copy_box(map, to + piece * PIECE_BYTES, piece * TILE, row, barrier);
}

__device__ __forceinline__ u32 queries_arrived() { return shared_address(memory) + BARRIERS_AT + SLOTS * 16; }

// Blocks in the order keys, values, keys, values, ...; a warpgroup takes every other pair.
struct Ring {
  int at;

  __device__ u32 data() const { return shared_address(memory) + RING_AT + at % SLOTS * BLOCK_BYTES; }
  __device__ u32 filled() const { return shared_address(memory) + BARRIERS_AT + at % SLOTS * 16; }
  __device__ u32 emptied() const { return filled() + 8; }
  __device__ u32 parity() const { return at / SLOTS & 1; }
};

__device__ __forceinline__ int key_blocks(int length) { return (length + TILE - 1) / TILE; }

__device__ __forceinline__ void produce(const Arguments& p, int sample, int row, int length) {
  copy(p.queries, shared_address(memory), sample * p.rows + row, queries_arrived());
#pragma unroll 1
  for (Ring ring{0}; ring.at < 2 * key_blocks(length); ++ring.at) {
    wait(ring.emptied(), ring.parity() ^ 1);
    copy(ring.at % 2 ? p.values : p.keys, ring.data(), sample * p.slots + ring.at / 2 * TILE, ring.filled());
  }
}

// ---------------------------------------------------------------- products

// d (64 queries, 64 keys) += 16 dims of queries times keys^T, or = if not `add`.
__device__ __forceinline__ void multiply_keys(float (&d)[TILE / 2], u64 queries, u64 keys, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " LOGITS_ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " LOGITS_REGISTERS ", " LOGITS_INPUTS ", p, 1, 1, 0, 0;\n}"
               : LOGITS_OPERANDS
               : "l"(queries), "l"(keys), "r"(add));
}

// d (64 queries, D) += 16 weights of this thread's rows times values.
__device__ __forceinline__ void multiply_values(float (&d)[D / 2], const u32* weights, u64 values) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n" TEXT(D) "k16.f32.bf16.bf16 " SUMS_REGISTERS ", " SUMS_INPUTS ", 1, 1, 1, 1;"
               : SUMS_OPERANDS
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
}

template <int COUNT>
__device__ __forceinline__ void finish(float (&d)[COUNT]) {
  commit<0>();
  written(d);
}

__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The four lanes that share a row.
__device__ __forceinline__ float row_maximum(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Of a warpgroup, by its threads: rows g and g + 8 of its warp's 16.
struct Softmax {
  float best[2] = {MINUS_INFINITY, MINUS_INFINITY}, mass[2] = {0.0f, 0.0f};  // a lane's own part of the mass

  // Logits become weights; `keys` of the block are valid.
  __device__ void apply(float (&logits)[TILE / 2], float (&sums)[D / 2], float scale, int keys) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float higher = best[h];
#pragma unroll
      for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& logit = logits[4 * j + 2 * h + e];
          logit = 8 * j + column + e < keys ? logit * scale : MINUS_INFINITY;
          higher = fmaxf(higher, logit);
        }
      higher = row_maximum(higher);
      const float base = higher == MINUS_INFINITY ? 0.0f : higher, decay = power(best[h] - base);
      mass[h] *= decay, best[h] = higher;
#pragma unroll
      for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& logit = logits[4 * j + 2 * h + e];
          logit = power(logit - base);
          mass[h] += logit;
        }
#pragma unroll
      for (int i = 0; i < D / 8; ++i) sums[4 * i + 2 * h] *= decay, sums[4 * i + 2 * h + 1] *= decay;
    }
  }
};

// Values behind the valid ones, which may be NaN, to zeros. All of the warpgroup.
__device__ __forceinline__ void blank(u32 data, int keys, int group) {
  const int words = (TILE - keys) * 8;  // of 16 bytes, in each piece
  for (int i = threadIdx.x % GROUP; i < PIECES * words; i += GROUP)
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(data + i / words * PIECE_BYTES + keys * 128 + i % words * 16), "r"(0)
                 : "memory");
  asm volatile("fence.proxy.async.shared::cta;\nbar.sync %0, 128;" ::"r"(2 + group) : "memory");
}

// Both warpgroups' sums of half of the dims into d: the first's of the lower half, the second's of the upper half.
__device__ __forceinline__ void combine(float (&sums)[D / 2], Softmax& softmax, int group) {
  const int thread = threadIdx.x % GROUP;
  float* const exchange = (float*)(memory + RING_AT);
  float* const stats = exchange + 2 * HALF * GROUP;  // (group, {best, mass} of both rows, thread)
  static_assert(2 * HALF * GROUP * 4 + 2 * 4 * GROUP * 4 <= SLOTS * BLOCK_BYTES, "room for it");
  asm volatile("bar.sync 1, 256;" ::: "memory");  // nobody reads keys and values any more
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    softmax.mass[h] = row_sum(softmax.mass[h]);
    stats[(group * 4 + h) * GROUP + thread] = softmax.best[h];
    stats[(group * 4 + 2 + h) * GROUP + thread] = softmax.mass[h];
  }
#pragma unroll
  for (int i = 0; i < HALF; ++i) exchange[((1 - group) * HALF + i) * GROUP + thread] = group ? sums[i] : sums[HALF + i];
  asm volatile("bar.sync 1, 256;" ::: "memory");
  float mine[2], others[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float best = stats[((1 - group) * 4 + h) * GROUP + thread], mass = stats[((1 - group) * 4 + 2 + h) * GROUP + thread];
    const float base = fmaxf(fmaxf(best, softmax.best[h]), -1e30f);
    const float own = power(softmax.best[h] - base), other = power(best - base);
    const float whole = softmax.mass[h] * own + mass * other, share = whole > 0.0f ? 1.0f / whole : 0.0f;
    mine[h] = own * share, others[h] = other * share;
  }
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    const float other = exchange[(group * HALF + i) * GROUP + thread];
    sums[i] = (group ? sums[HALF + i] : sums[i]) * mine[i / 2 % 2] + other * others[i / 2 % 2];
  }
}

__device__ __forceinline__ void store(const Arguments& p, u64 pair, float first, float second) {
#if E4M3
  ((u16*)p.out)[pair] = narrow2_e4m3(first * p.inverse, second * p.inverse);
#else
  ((u32*)p.out)[pair] = narrow2(first, second);
#endif
}

__device__ __forceinline__ void consume(const Arguments& p, int sample, int row, int length, int group) {
  float sums[D / 2] = {}, logits[TILE / 2] = {};
  Softmax softmax;
  const u64 queries = descriptor(shared_address(memory));
  wait(queries_arrived(), 0);
#pragma unroll 1
  for (Ring ring{2 * group}; ring.at < 2 * key_blocks(length); ring.at += 3) {
    const int keys = length - ring.at / 2 * TILE;  // from this block on
    wait(ring.filled(), ring.parity());
    const u64 block = descriptor(ring.data());
    fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const int at = (step / 4 * PIECE_BYTES + step % 4 * 32) >> 4;
      multiply_keys(logits, queries + at, block + at, step > 0);
    }
    finish(logits);
    release(ring.emptied());
    softmax.apply(logits, sums, p.scale, keys);
    u32 weights[TILE / 4];
#pragma unroll
    for (int i = 0; i < TILE / 4; ++i) weights[i] = narrow2(logits[2 * i], logits[2 * i + 1]);
    ++ring.at;
    wait(ring.filled(), ring.parity());
    if (keys < TILE) blank(ring.data(), keys, group);
    const u64 values = descriptor(ring.data(), PIECE_BYTES);
    written(weights), written(sums);
    fence();
#pragma unroll
    for (int step = 0; step < TILE / 16; ++step) multiply_values(sums, weights + 4 * step, values + (step * 16 * 128 >> 4));
    finish(sums);
    release(ring.emptied());
  }
  combine(sums, softmax, group);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int to = row + warp * 16 + lane / 4 + 8 * h;
    if (to >= p.rows) continue;
    const u64 at = ((u64)sample * p.rows + to) * (D / 2) + group * (D / 4) + lane % 4;  // pairs
#pragma unroll
    for (int j = 0; j < D / 16; ++j) store(p, at + 4 * j, sums[4 * j + 2 * h], sums[4 * j + 2 * h + 1]);
  }
}

extern "C" __global__ void __launch_bounds__(3 * GROUP, 1) prefix_attention(const __grid_constant__ Arguments p) {
  if (threadIdx.x == 0) {
    for (Ring ring{0}; ring.at < SLOTS; ++ring.at) init(ring.filled(), 1), init(ring.emptied(), GROUP / 32);
    init(queries_arrived(), 1);
    show_barriers();
  }
  __syncthreads();
  const int tiles = (p.rows + TILE - 1) / TILE, sample = blockIdx.x / tiles, row = blockIdx.x % tiles * TILE;
  const int valid = p.lengths[sample], length = valid < p.slots ? valid : p.slots;
  // Registers go from the warpgroup that only copies to those that hold sums.
  if (threadIdx.x >= 2 * GROUP) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 2 * GROUP) produce(p, sample, row, length);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    consume(p, sample, row, length, threadIdx.x / GROUP);
  }
}
