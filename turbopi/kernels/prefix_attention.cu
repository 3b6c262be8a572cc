// Softmax attention of many queries over a cache of valid keys, one key head: a cluster of CTAs has 128 rows, each CTA a part
// of the keys.
//
// A row is a query and one of its heads, so queries are a plain matrix (rows, D). Each of a CTA's two warpgroups has 64 rows
// and all of the part's keys, KEYS at a time. A third brings keys and values into a ring, in pieces of 64 dims: KEYS rows of
// 128 bytes, swizzled as wgmma reads them. The second warpgroup's queries come behind the first's keys, so that one does its
// softmax while the other multiplies.
//
// At the end each CTA finishes the rows of some warps: the others' sums are sent into its shared memory, where its queries
// were, and where keys were (cluster_sums.cuh).
//
// Slots behind the valid keys may hold NaN: their logits are replaced, and their values made zeros in shared memory.
//
// Set in front of this file: D head size; PARTS, CTAs of a cluster; KEYS; MANY, whether a part may be more than KEYS; SLOTS of
// the ring; COLUMNS, dims of the values that are multiplied at once; E4M3, whether the result is; and for products of KEYS and
// of COLUMNS columns the lists of a wgmma, LOGITS_REGISTERS, LOGITS_OPERANDS, LOGITS_INPUTS, LOGITS_ADD, and SUMS_... likewise.

#include "hopper.cuh"

constexpr int TILE = 64;  // rows of a warpgroup; dims of a piece
constexpr int ROWS = 2 * TILE, WARPS = ROWS / 16;
constexpr int PIECES = D / TILE;
constexpr int QUERY_BYTES = TILE * 128, SLOT_BYTES = KEYS * 128;  // of a piece
constexpr int BLOCKS = D / COLUMNS, BLOCK_PIECES = COLUMNS / TILE, EIGHTS = COLUMNS / 8;
constexpr int OWN = (WARPS + PARTS - 1) / PARTS;               // warps whose rows a CTA finishes, at most
constexpr int SENT_BYTES = 16 * D * 4, STATS_BYTES = 32 * 16;  // of a warp
constexpr int RING_AT = 2 * PIECES * QUERY_BYTES;              // behind the queries
constexpr int STATS_AT = RING_AT + SLOTS * SLOT_BYTES;
constexpr int BARRIERS_AT = STATS_AT + OWN * (PARTS - 1) * STATS_BYTES, ARRIVALS_AT = BARRIERS_AT + SLOTS * 16 + 8;
// What is received takes the place of the queries and of the ring's first slots, which the last values must not.
constexpr int RECEIVED_BYTES = OWN * (PARTS - 1) * SENT_BYTES;
constexpr int SPARED = RECEIVED_BYTES > RING_AT ? (RECEIVED_BYTES - RING_AT + SLOT_BYTES - 1) / SLOT_BYTES : 0;
constexpr int FIRST_SLOT = SPARED ? SLOTS - SPARED : 0;
static_assert(D % COLUMNS == 0 && COLUMNS % TILE == 0 && KEYS % 16 == 0 && KEYS <= 256, "whole pieces");
static_assert(SLOTS % BLOCK_PIECES == 0 && FIRST_SLOT % BLOCK_PIECES == 0, "pieces of a block side by side");
static_assert(!SPARED || (!MANY && SLOTS >= PIECES + SPARED && SPARED <= PIECES / 2), "last values elsewhere");

#define MINUS_INFINITY __int_as_float(0xff800000)

struct Arguments {
  alignas(64) u64 queries[16];  // tensor maps
  alignas(64) u64 keys[16];
  alignas(64) u64 values[16];
  const int* lengths;           // valid keys of each sample
  char* out;                    // as the queries, or E4M3
  int rows, slots;              // of a sample: queries times heads; of its keys and values
  float scale, inverse;         // of the logits, times log2(e), positive; of the result, if that is E4M3
};

typedef float Sums[BLOCKS][COLUMNS / 2];

// Of a warp's 16 rows, g and g + 8 in lanes 4 g to 4 g + 3.
struct Stats {
  float best[2] = {MINUS_INFINITY, MINUS_INFINITY}, mass[2] = {0.0f, 0.0f};  // scaled; a lane's own part of the mass
};

// ---------------------------------------------------------------- copies

// Pieces in the order keys, values, keys, values, ...; both warpgroups read all of them.
struct Ring {
  int at = 0;

  __device__ u32 slot() const { return (at + FIRST_SLOT) % SLOTS; }
  __device__ u32 data() const { return shared_address(memory) + RING_AT + slot() * SLOT_BYTES; }
  __device__ u32 filled() const { return shared_address(memory) + BARRIERS_AT + slot() * 16; }
  __device__ u32 emptied() const { return filled() + 8; }
  __device__ u32 parity() const { return at / SLOTS & 1; }
};

__device__ __forceinline__ u32 queries_arrived() { return shared_address(memory) + BARRIERS_AT + SLOTS * 16; }

// Read anew at each call, so that no register keeps it.
__device__ __forceinline__ int cluster_number() {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block / PARTS;
}

// The rows of a cluster.
struct Place {
  int sample, row;

  __device__ explicit Place(const Arguments& p) {
    const int tiles = (p.rows + ROWS - 1) / ROWS, tile = cluster_number();
    sample = tile / tiles, row = tile % tiles * ROWS;
  }
};

#include "cluster_sums.cuh"

// The keys of a CTA.
struct Work {
  int left, keys;  // valid keys of the sample from the part's first on; the part's

  __device__ explicit Work(const Arguments& p) {
    const int valid = p.lengths[Place(p).sample], length = valid < p.slots ? valid : p.slots;
    const int part = (length + PARTS - 1) / PARTS, begin = cluster_rank() * part;
    left = begin < length ? length - begin : 0, keys = left < part ? left : part;
  }

  __device__ int rounds() const { return MANY && keys > KEYS ? (keys + KEYS - 1) / KEYS : 1; }
};

__device__ __forceinline__ void copy_queries(const Arguments& p, const Place& place, int group, int piece, u32 barrier) {
  const u32 to = shared_address(memory) + (group * PIECES + piece) * QUERY_BYTES;
  copy_box(p.queries, to, piece * TILE, place.sample * p.rows + place.row + half(group) * TILE, barrier);
}

__device__ __forceinline__ void produce(const Arguments& p, const Work& work) {
  const Place place(p);
  const int valid = p.lengths[place.sample], length = valid < p.slots ? valid : p.slots;
  const int last = 2 * PIECES * work.rounds(), first = place.sample * p.slots + length - work.left;
#pragma unroll 1
  for (Ring ring; ring.at < last; ++ring.at) {
    wait(ring.emptied(), ring.parity() ^ 1);
    const int piece = ring.at % PIECES, block = ring.at / PIECES;
    const bool with_queries = ring.at < PIECES;
    expect(ring.filled(), SLOT_BYTES + (with_queries ? QUERY_BYTES : 0));
    if (with_queries) copy_queries(p, place, 0, piece, ring.filled());
    copy_box(block % 2 ? p.values : p.keys, ring.data(), piece * TILE, first + block / 2 * KEYS, ring.filled());
    if (ring.at == PIECES - 1) {
      expect(queries_arrived(), PIECES * QUERY_BYTES);
      for (int i = 0; i < PIECES; ++i) copy_queries(p, place, 1, i, queries_arrived());
    }
  }
}

// ---------------------------------------------------------------- products

// d (64 queries, KEYS) += 16 dims of queries times keys^T, or = if not `add`.
__device__ __forceinline__ void multiply_keys(float (&d)[KEYS / 2], u64 queries, u64 keys, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " LOGITS_ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned.m64n" TEXT(KEYS) "k16.f32.bf16.bf16 " LOGITS_REGISTERS ", " LOGITS_INPUTS
               ", p, 1, 1, 0, 0;\n}"
               : LOGITS_OPERANDS
               : "l"(queries), "l"(keys), "r"(add));
}

// d (64 queries, COLUMNS dims) += 16 weights of this thread's rows times values, or = if not `add`.
__device__ __forceinline__ void multiply_values(float (&d)[COLUMNS / 2], const u32* weights, u64 values, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " SUMS_ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned.m64n" TEXT(COLUMNS) "k16.f32.bf16.bf16 " SUMS_REGISTERS ", " SUMS_INPUTS
               ", p, 1, 1, 1;\n}"
               : SUMS_OPERANDS
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values), "r"(add));
}

__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// The four lanes that share a row.
__device__ __forceinline__ float row_maximum(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Of a warpgroup.
struct Softmax : Stats {
  // Logits become weights; `keys` of them are the part's.
  __device__ __forceinline__ void apply(float (&logits)[KEYS / 2], u32 (&weights)[KEYS / 4], Sums& sums, float scale,
                                        int keys, bool first) {
    if (keys < KEYS) {
      const int left = keys - threadIdx.x % 4 * 2;
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j)
        if (8 * j + 8 > keys)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (8 * j + i % 2 >= left) logits[4 * j + i] = MINUS_INFINITY;
    }
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest[2] = {MINUS_INFINITY, MINUS_INFINITY};
#pragma unroll
      for (int i = 0; i < KEYS / 4; ++i) highest[i % 2] = fmaxf(highest[i % 2], logits[i / 2 * 4 + 2 * h + i % 2]);
      const float found = row_maximum(fmaxf(highest[0], highest[1])) * scale, higher = MANY ? fmaxf(best[h], found) : found;
      base[h] = higher == MINUS_INFINITY ? 0.0f : higher;
      if (MANY && !first) {
        const float decay = power(best[h] - base[h]);
        mass[h] *= decay;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
          for (int i = 0; i < EIGHTS; ++i) sums[b][4 * i + 2 * h] *= decay, sums[b][4 * i + 2 * h + 1] *= decay;
      }
      best[h] = higher;
    }
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) {
      const float a = power(fmaf(logits[2 * i], scale, -base[i % 2]));
      const float b = power(fmaf(logits[2 * i + 1], scale, -base[i % 2]));
      mass[i % 2] += a + b;
      weights[i] = narrow2(a, b);
    }
  }
};

// Values behind the `valid` ones of a slot, which may be NaN, to zeros. All of the warpgroup.
__device__ __forceinline__ void blank(u32 data, int valid, int group) {
#pragma unroll 1
  for (int row = max(valid, 0) + threadIdx.x % GROUP / 8; row < KEYS; row += GROUP / 8)
#pragma unroll
    for (int piece = 0; piece < BLOCK_PIECES; ++piece)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(data + piece * SLOT_BYTES + row * 128 + threadIdx.x % 8 * 16),
                   "r"(0)
                   : "memory");
  asm volatile("fence.proxy.async.shared::cta;\nbar.sync %0, 128;" ::"r"(1 + group) : "memory");
}

// Lanes 2 i and 2 i + 1 exchange, so that each has four neighbours: the even one of eight columns, the odd one of the next.
__device__ __forceinline__ void store(const Arguments& p, const Sums& sums, int warp) {
  const Place place(p);
  const int lane = threadIdx.x % 32, odd = lane % 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = place.row + warp * 16 + lane / 4 + 8 * h;
    const u64 at = ((u64)place.sample * p.rows + row) * D + lane % 4 / 2 * 4 + odd * 8;
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      const float *const a = sums[j / EIGHTS] + j % EIGHTS * 4 + 2 * h, *const b = a + 4;
#if E4M3
      const u32 low = narrow2_e4m3(a[0] * p.inverse, a[1] * p.inverse);
      const u32 high = narrow2_e4m3(b[0] * p.inverse, b[1] * p.inverse);
      const u32 got = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
      if (row < p.rows) *(u32*)(p.out + at + 8 * j) = odd ? got | high << 16 : low | got << 16;
#else
      const u32 low = narrow2(a[0], a[1]), high = narrow2(b[0], b[1]);
      const u32 got = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
      if (row < p.rows) *(uint2*)(p.out + 2 * (at + 8 * j)) = odd ? uint2{got, high} : uint2{low, got};
#endif
    }
  }
}

// ---------------------------------------------------------------- a warpgroup

// The queries times the next KEYS keys.
__device__ __forceinline__ void sum_logits(float (&logits)[KEYS / 2], Ring& ring, int group) {
  const u64 queries = descriptor(shared_address(memory) + group * PIECES * QUERY_BYTES);
  u32 last = 0;
  written(logits);
#pragma unroll
  for (int piece = 0; piece < PIECES; ++piece) {
    wait(ring.filled(), ring.parity());
    const u64 keys = descriptor(ring.data());
    fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      multiply_keys(logits, queries + (piece * QUERY_BYTES >> 4) + step * 2, keys + step * 2, piece + step > 0);
    commit();
    if (piece > 0) {
      drain<1>();
      release(last);
    }
    last = ring.emptied();
    ++ring.at;
  }
  drain<0>();
  written(logits);
  release(last);
}

// Weights times the next COLUMNS dims of the values, of which `valid` rows are; not ready before a wait.
__device__ __forceinline__ void sum_values(float (&d)[COLUMNS / 2], const u32 (&weights)[KEYS / 4], Ring& ring, int valid,
                                           int group, bool add) {
  const u32 data = ring.data();
#pragma unroll
  for (int i = 0; i < BLOCK_PIECES; ++i, ++ring.at) wait(ring.filled(), ring.parity());
  if (valid < KEYS) blank(data, valid, group);
  // In a cluster an address holds the CTA's rank above its 18 bits.
  const u64 values = descriptor(data & 0x3ffff, SLOT_BYTES);
  written(d);
  fence();
#pragma unroll
  for (int step = 0; step < KEYS / 16; ++step)
    multiply_values(d, weights + 4 * step, values + (step * 16 * 128 >> 4), add || step > 0);
  commit();
}

// Of the values before the ring's place by `back` blocks.
__device__ __forceinline__ void release_block(const Ring& ring, int back) {
#pragma unroll
  for (int i = 0; i < BLOCK_PIECES; ++i) release(Ring{ring.at - back * BLOCK_PIECES + i}.emptied());
}

__device__ __forceinline__ void consume(const Arguments& p, const Work& work, int group) {
  const int warp = threadIdx.x / 32 % 4 + 4 * half(group), rounds = work.rounds();
  Sums sums;
  Softmax softmax;
  Ring ring;
  if (group == 1) wait(queries_arrived(), 0);
#pragma unroll 1
  for (int round = 0; round < (MANY ? rounds : 1); ++round) {
    const bool first = !MANY || round == 0, last = !MANY || round == rounds - 1;
    float logits[KEYS / 2];  // not kept from round to round
    sum_logits(logits, ring, group);
    if (PARTS > 1 && last) say_done();
    u32 weights[KEYS / 4];
    softmax.apply(logits, weights, sums, p.scale, work.keys - round * KEYS, first);
    written(weights);
    const auto finish = [&](int block, int back) {
      written(sums[block]);
      if (MANY) release_block(ring, back);
      if (PARTS > 1 && last && block == 0) all_done();
      if (PARTS > 1 && last && sends(warp)) send(sums[block], block, warp);
    };
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      sum_values(sums[block], weights, ring, work.left - round * KEYS, group, !first);
      if (block > 0) {
        drain<1>();
        finish(block - 1, 2);
      }
    }
    drain<0>();
    finish(BLOCKS - 1, 1);
  }
  softmax.mass[0] = row_sum(softmax.mass[0]), softmax.mass[1] = row_sum(softmax.mass[1]);
  if (sends(warp)) {
    send_stats(softmax, warp);
  } else {
    combine(sums, softmax, warp);
    store(p, sums, warp);
  }
}

extern "C" __global__ void __launch_bounds__(3 * GROUP, 1) prefix_attention(const __grid_constant__ Arguments p) {
  if (threadIdx.x == 0) {
    for (Ring ring; ring.at < SLOTS; ++ring.at) init(ring.filled(), 1), init(ring.emptied(), WARPS);
    init(queries_arrived(), 1);
    init_arrivals();
    show_barriers();
    expect_sums();
  }
  if (threadIdx.x == 2 * GROUP) prefetch(p.queries), prefetch(p.keys), prefetch(p.values);
  const Work work(p);
  __syncthreads();
  // Registers go from the warpgroup that only copies to those that hold sums.
  if (threadIdx.x >= 2 * GROUP) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (PARTS > 1) say_done();
    if (threadIdx.x == 2 * GROUP) produce(p, work);
    __syncwarp();
    if (PARTS > 1) all_done();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    consume(p, work, threadIdx.x / GROUP);
  }
}
