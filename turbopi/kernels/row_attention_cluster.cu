// Softmax attention of few queries over many keys, one key head: a cluster of CTAs has 32 rows, each CTA a part of the keys.
//
// A row is a query and one of its heads. A CTA asks for its part of the prefix's keys and values before its turn comes,
// and for the queries and the suffix's keys and values behind it. Keys are the rows of the products: logits^T = K q^T, and
// the part^T = V^T weights^T. The parts are added up by reading one another's shared memory, each CTA for its share of rows.
//
// Slots behind the valid keys may hold NaN: their logits are replaced, and their values made zeros in shared memory.
//
// Set in front of this file: D head size; PARTS, CTAs of a cluster; E4M3, whether the result is.

#include "hopper.cuh"

constexpr int ROWS = 32, KEYS = 1024 / PARTS, RUN = 32;  // of a CTA; of those that are fetched together
constexpr int WARPS = KEYS / 16, GROUPS = WARPS / 4;     // of four warps, each with 64 keys, later with 64 dims at a time
constexpr int PIECE = 64;                                // dims: rows of 128 bytes, swizzled
constexpr int PIECES = D / PIECE, RUNS = KEYS / RUN;
constexpr int RUN_BYTES = RUN * 128, PIECE_BYTES = KEYS * 128, QUERY_BYTES = ROWS * 128;
constexpr int KEYS_AT = 0, VALUES_AT = PIECES * PIECE_BYTES, QUERIES_AT = 2 * VALUES_AT;
constexpr int WEIGHTS_AT = QUERIES_AT + PIECES * QUERY_BYTES;  // (rows, 64 keys) for each group
constexpr int SMALL_AT = WEIGHTS_AT + GROUPS * QUERY_BYTES;
constexpr int STRIDE = D + 4;  // floats from row to row of the part, which takes the place of the keys
static_assert(ROWS * STRIDE * 4 <= VALUES_AT && PIECES % GROUPS == 0 && PIECES % RUNS == 0 && ROWS % PARTS == 0, "nothing left over");

#define MINUS_INFINITY __int_as_float(0xff800000)

struct Small {
  u64 keys, values;           // barriers
  int best[ROWS];             // of the logits, in the order of integers
  float mass[WARPS][ROWS];
  float2 stats[ROWS];         // maximum and mass of the part
};
static_assert(sizeof(Small) <= 2048, "what the launch asks for");

struct Arguments {
  alignas(64) u64 queries[16];  // tensor maps
  alignas(64) u64 keys[16];
  alignas(64) u64 values[16];
  const int* lengths;           // valid keys of each sample, without the suffix
  char* out;                    // as the queries, or E4M3
  const char* ahead;            // to be brought into L2
  u64 ahead_bytes;
  int rows, slots, extra;       // of a sample: queries times heads; of its keys and values; the suffix's
  int token_rows;               // the first so many rows see one key behind the prefix's alone
  float scale, inverse;         // of the logits, times log2(e); of the result, if that is E4M3
};

// ---------------------------------------------------------------- products

// d (64, 32 rows) += a (64, 16) b (16, 32 rows); COLUMNS: the 64 run along a's rows in memory.
template <int COLUMNS>
__device__ __forceinline__ void multiply(float (&d)[16], u64 a, u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "
      "%15}, %16, %17, 1, 1, 1, %18, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
        "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "l"(a), "l"(b), "n"(COLUMNS));
}

// What was stored by ordinary means is seen by the tensor cores.
__device__ __forceinline__ void seen() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// An order of integers that is the order of floats, and its own inverse.
__device__ __forceinline__ int ordered(int bits) { return bits < 0 ? bits ^ 0x7fffffff : bits; }

// ---------------------------------------------------------------- the part of a CTA

struct Place {
  int sample, row, begin, end, prefix;  // first row; the part's slots; up to here they are the prefix's
};

__device__ __forceinline__ Place place(const Arguments& p, int rank) {
  const int tiles = (p.rows + ROWS - 1) / ROWS, tile = blockIdx.x / PARTS, sample = tile / tiles;
  const int length = p.lengths[sample], total = min(length + p.extra, p.slots);
  const int part = (total + PARTS * RUN - 1) / (PARTS * RUN) * RUN, begin = min(rank * part, total);
  return {sample, tile % tiles * ROWS, begin, min(begin + part, total), length};
}

// Each warp has a run of slots, half of them of keys, half of values. Those that are wholly the prefix's, or, `behind`, the others.
__device__ __forceinline__ void ask(const Arguments& p, const Place& at, Small& small, int warp, bool behind) {
  const int run = warp % RUNS, first = at.begin + run * RUN;
  if ((first + RUN > at.prefix) != behind) return;
  const bool values = warp >= RUNS;
  const u32 barrier = shared_address(values ? &small.values : &small.keys);
  const u32 to = shared_address(memory) + (values ? VALUES_AT : KEYS_AT) + run * RUN_BYTES;
  const bool used = first < at.end;
  expect(barrier, used ? PIECES * RUN_BYTES : 0);
  if (!used) return;
#pragma unroll
  for (int piece = 0; piece < PIECES; ++piece)
    copy_box(values ? p.values : p.keys, to + piece * PIECE_BYTES, piece * PIECE, at.sample * p.slots + first, barrier);
}

__device__ __forceinline__ void ask_for_queries(const Arguments& p, const Place& at, Small& small, int piece) {
  const u32 barrier = shared_address(&small.keys);
  expect(barrier, QUERY_BYTES);
  const u32 to = shared_address(memory) + QUERIES_AT + piece * QUERY_BYTES;
  copy_box(p.queries, to, piece * PIECE, at.sample * p.rows + at.row, barrier);
}

// A share of what a later kernel reads, into L2.
__device__ __forceinline__ void fetch_ahead(const Arguments& p) {
  const u64 share = (p.ahead_bytes / gridDim.x + 15) / 16 * 16, from = blockIdx.x * share;
  const u64 piece = (share / 32 + 15) / 16 * 16, at = from + threadIdx.x % 32 * piece;
  const u64 last = p.ahead_bytes / 16 * 16;
  const u64 end = from + share < last ? from + share : last;
  if (at < end)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p.ahead + at), "r"((u32)(piece < end - at ? piece : end - at)) : "memory");
}

// Values behind the valid ones, up to what a product takes at once, to zeros.
__device__ __forceinline__ void blank(int keys) {
  const int words = ((keys + 15) / 16 * 16 - keys) * 8;  // of 16 bytes, in each piece
  for (int i = threadIdx.x; i < PIECES * words; i += blockDim.x)
    *(uint4*)(memory + VALUES_AT + i / words * PIECE_BYTES + keys * 128 + i % words * 16) = uint4{0, 0, 0, 0};
}

// Logits of this thread's rows of keys to weights; leaves them and the part's maxima and masses in shared memory.
// d[4 j + 2 h + c]: key 16 warp + lane / 4 + 8 h, row 8 j + lane % 4 * 2 + c.
__device__ __forceinline__ void softmax(const Arguments& p, const Place& at, Small& small, float (&d)[16]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slot = at.begin + warp * 16 + lane / 4;
  const int token_end = min(at.prefix + 1, at.end);
  float highest[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int j = i / 2, c = i % 2, end = at.row + 8 * j + lane % 4 * 2 + c < p.token_rows ? token_end : at.end;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& logit = d[4 * j + 2 * h + c];
      logit = slot + 8 * h < end ? logit * p.scale : MINUS_INFINITY;
    }
    highest[i] = fmaxf(d[4 * j + c], d[4 * j + 2 + c]);
#pragma unroll
    for (int other = 4; other < 32; other *= 2) highest[i] = fmaxf(highest[i], __shfl_xor_sync(~0u, highest[i], other));
  }
  // Of eight lanes with the same columns each stores one.
  const int mine = lane / 4, column = mine / 2 * 8 + lane % 4 * 2 + mine % 2;
  float one = highest[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) one = mine == i ? highest[i] : one;
  atomicMax(&small.best[column], ordered(__float_as_int(one)));
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int j = i / 2, c = i % 2;
    const float best = __int_as_float(ordered(small.best[8 * j + lane % 4 * 2 + c])), base = fmaxf(best, -1e30f);
#pragma unroll
    for (int h = 0; h < 2; ++h) d[4 * j + 2 * h + c] = power(d[4 * j + 2 * h + c] - base);
    highest[i] = d[4 * j + c] + d[4 * j + 2 + c];
#pragma unroll
    for (int other = 4; other < 32; other *= 2) highest[i] += __shfl_xor_sync(~0u, highest[i], other);
  }
  one = highest[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) one = mine == i ? highest[i] : one;
  small.mass[warp][column] = one;
  // Transposed on the way: rows of 64 keys, swizzled.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const u32 to = shared_address(memory) + WEIGHTS_AT + warp / 4 * QUERY_BYTES + lane * 128 + ((warp % 4 * 2 + h) ^ lane % 8) * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(narrow2(d[2 * h], d[2 * h + 1])), "r"(narrow2(d[4 + 2 * h], d[5 + 2 * h])),
                 "r"(narrow2(d[8 + 2 * h], d[9 + 2 * h])), "r"(narrow2(d[12 + 2 * h], d[13 + 2 * h]))
                 : "memory");
  }
}

// The part's sums to the place of the keys: this warpgroup's dims [64 piece, 64 piece + 64).
__device__ __forceinline__ void leave(const float (&d)[16], int piece) {
  const int lane = threadIdx.x % 32, dim = piece * PIECE + threadIdx.x / 32 % 4 * 16 + lane / 4;
  float* const part = (float*)(memory + KEYS_AT) + lane % 4 * 2 * STRIDE + dim;
#pragma unroll
  for (int i = 0; i < 16; ++i) part[(i / 4 * 8 + i % 2) * STRIDE + i / 2 % 2 * 8] = d[i];
}

__device__ __forceinline__ void compute(const Arguments& p, const Place& at, Small& small) {
  const int group = threadIdx.x / 128, keys = at.end - at.begin;
  const u32 base = shared_address(memory);
  float d[16] = {};
  wait(shared_address(&small.keys), 0);
  const u64 queries = descriptor(base + QUERIES_AT), mine = descriptor(base + KEYS_AT + group * (64 * 128));
  written(d);
  fence();
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    const int inside = step % 4 * 32;
    multiply<0>(d, mine + (step / 4 * PIECE_BYTES + inside >> 4), queries + (step / 4 * QUERY_BYTES + inside >> 4));
  }
  commit<0>();
  written(d);
  softmax(p, at, small, d);
  wait(shared_address(&small.values), 0);
  if (keys % 16) blank(keys);
  seen();
  __syncthreads();
  if (threadIdx.x < ROWS) {
    float mass = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) mass += small.mass[warp][threadIdx.x];
    small.stats[threadIdx.x] = {__int_as_float(ordered(small.best[threadIdx.x])), mass};
  }
  constexpr int OWN = PIECES / GROUPS;
  float e[OWN][16] = {};
  const u64 weights = descriptor(base + WEIGHTS_AT);
#pragma unroll
  for (int i = 0; i < OWN; ++i) written(e[i]);
  fence();
#pragma unroll
  for (int step = 0; step < KEYS / 16; ++step) {
    if (step * 16 >= keys) break;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      multiply<1>(e[i], descriptor(base + VALUES_AT + (OWN * group + i) * PIECE_BYTES) + (step * 16 * 128 >> 4),
                  weights + (step / 4 * QUERY_BYTES + step % 4 * 32 >> 4));
  }
  commit<0>();
#pragma unroll
  for (int i = 0; i < OWN; ++i) written(e[i]), leave(e[i], OWN * group + i);
}

// ---------------------------------------------------------------- the cluster

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// What was written to shared memory before is seen by the whole cluster behind it. An arrival that orders memory by itself
// waits for all memory of the GPU, half a microsecond; compilers before CUDA 12.8 know no other.
__device__ __forceinline__ void meet() {
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;\nbarrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;\nfence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#else
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// This CTA has read what it wants from the others. Nothing has to be seen behind it: they only must not end earlier.
__device__ __forceinline__ void done_reading() {
  __syncthreads();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void wait_for_readers() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// This CTA's share of the rows, its parts added up in the order of the CTAs, four dims a thread.
__device__ __forceinline__ void combine(const Arguments& p, const Place& at, const Small& small, int rank) {
  constexpr int SHARE = ROWS / PARTS;
  static_assert(SHARE * D == 4 * 32 * WARPS, "four values a thread");
  const int row = rank * SHARE + threadIdx.x / (D / 4), dim = threadIdx.x % (D / 4) * 4;
  const u32 part = shared_address(memory) + KEYS_AT + (row * STRIDE + dim) * 4, stats = shared_address(&small.stats[row]);
  float4 sums[PARTS];
  float2 found[PARTS];
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(found[i].x), "=f"(found[i].y) : "r"(there(stats, i)) : "memory");
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(sums[i].x), "=f"(sums[i].y), "=f"(sums[i].z), "=f"(sums[i].w)
                 : "r"(there(part, i))
                 : "memory");
  }
  float best = -1e30f, mass = 0.0f;
  float4 whole = {};
#pragma unroll
  for (int i = 0; i < PARTS; ++i) best = fmaxf(best, found[i].x);
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    const float weight = power(found[i].x - best);
    mass += found[i].y * weight;
    whole.x += sums[i].x * weight, whole.y += sums[i].y * weight, whole.z += sums[i].z * weight, whole.w += sums[i].w * weight;
  }
  done_reading();
  const float share = mass > 0.0f ? 1.0f / mass : 0.0f;
  if (at.row + row < p.rows) {
    const u64 to = ((u64)at.sample * p.rows + at.row + row) * D + dim;
#if E4M3
    const float factor = share * p.inverse;
    *(u32*)(p.out + to) = narrow2_e4m3(whole.x * factor, whole.y * factor) | (u32)narrow2_e4m3(whole.z * factor, whole.w * factor) << 16;
#else
    *(uint2*)(p.out + 2 * to) = {narrow2(whole.x * share, whole.y * share), narrow2(whole.z * share, whole.w * share)};
#endif
  }
  wait_for_readers();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) row_attention_cluster(const __grid_constant__ Arguments p) {
  Small& small = *(Small*)(memory + SMALL_AT);
  const int rank = cluster_rank(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place at = place(p, rank);
  if (threadIdx.x == 0) {
    init(shared_address(&small.keys), RUNS + PIECES), init(shared_address(&small.values), RUNS);
    show_barriers();
    asm volatile("prefetch.tensormap [%0];" ::"l"(p.queries) : "memory");
  }
  if (threadIdx.x < ROWS) small.best[threadIdx.x] = 1 << 31;
  __syncthreads();
  if (lane == 0) ask(p, at, small, warp, false);
  __syncwarp();
  after_the_last();
  let_go();
  if (lane == 0) {
    if (warp >= RUNS)
      for (int piece = warp - RUNS; piece < PIECES; piece += RUNS) ask_for_queries(p, at, small, piece);
    ask(p, at, small, warp, true);
  }
  __syncwarp();
  if (warp == 0 && p.ahead_bytes) fetch_ahead(p);
  compute(p, at, small);
  meet();
  combine(p, at, small, rank);
}
