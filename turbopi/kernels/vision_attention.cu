// Softmax attention of each image's tokens among themselves, by Hopper's warpgroup instructions.
//
// q, k and v stand beside one another in the rows of one matrix, HEADS heads of 64 + 8 dims each. A CTA has 64 queries of
// one head and all KEYS keys, so the softmax is over whole rows, and its warpgroup keeps all logits in registers. 64 dims
// come by TMA, 128 bytes a row, swizzled, for wgmma; the last 8 by ordinary loads, 16 bytes a row, for mma.sync, whose
// sums lie in the same registers. Keys are taken in two halves: while one is multiplied the other has its softmax.
//
// Set in front of this file: HEADS; KEYS, rows of an image; E4M3, whether the result is; and for products of half the keys
// and of 64 dims the lists of a wgmma, LOGITS_REGISTERS, LOGITS_OPERANDS, LOGITS_INPUTS, and SUMS_... likewise.

#include "hopper.cuh"

constexpr int TILE = 64;    // queries of a CTA; dims that wgmma multiplies; rows of a box
constexpr int TAIL = 8;     // dims behind those
constexpr int DIM = TILE + TAIL, WIDTH = HEADS * DIM;
constexpr int HALF = HALF_KEYS;
constexpr int BOX_BYTES = TILE * 128;
constexpr int KEYS_AT = BOX_BYTES, VALUES_AT = KEYS_AT + KEYS / TILE * BOX_BYTES;  // behind the queries
constexpr int TAILS_AT = VALUES_AT + KEYS / TILE * BOX_BYTES, TAIL_BYTES = KEYS * TAIL * 2;  // of keys, of values
constexpr int BARRIERS_AT = TAILS_AT + 2 * TAIL_BYTES;
static_assert(KEYS == 2 * HALF && HALF % TILE == 0 && HALF <= 128, "two halves, one wgmma wide each");

struct Arguments {
  alignas(64) u64 boxes[16];  // a tensor map of q, k and v
  const u16* qkv;
  char* out;  // bfloat16 or E4M3
  int qkv_stride, out_stride;
  float inverse;  // of the result, if that is E4M3
};

// ---------------------------------------------------------------- copies

// COUNT boxes below one another of 64 rows by 64 columns.
template <int COUNT>
__device__ __forceinline__ void copy(const u64* map, u32 to, int column, int row, u32 barrier) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) copy_box(map, to + i * BOX_BYTES, column, row + i * TILE, barrier);
}

// By one thread. First what the first products need.
__device__ __forceinline__ void fetch(const Arguments& p, u32 base, int head, int first, int query) {
  constexpr int BOXES = HALF / TILE;
  const u32 barriers = base + BARRIERS_AT;
  const int column = head * DIM;
  expect(barriers, (1 + BOXES) * BOX_BYTES);
  copy<1>(p.boxes, base, column, first + query, barriers);
  copy<BOXES>(p.boxes, base + KEYS_AT, WIDTH + column, first, barriers);
  expect(barriers + 8, BOXES * BOX_BYTES);
  copy<BOXES>(p.boxes, base + KEYS_AT + BOXES * BOX_BYTES, WIDTH + column, first + HALF, barriers + 8);
  expect(barriers + 16, 2 * BOXES * BOX_BYTES);
  copy<2 * BOXES>(p.boxes, base + VALUES_AT, 2 * WIDTH + column, first, barriers + 16);
}

// The last dims of all keys and values. By all threads.
__device__ __forceinline__ void fetch_tails(const Arguments& p, u32 base, int head, int first) {
  constexpr int EACH = KEYS / GROUP;
  uint4 found[2][EACH];
#pragma unroll
  for (int kind = 0; kind < 2; ++kind)
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      found[kind][i] = __ldcg((const uint4*)(p.qkv + (u64)(first + i * GROUP + threadIdx.x) * p.qkv_stride +
                                             (1 + kind) * WIDTH + head * DIM + TILE));
#pragma unroll
  for (int kind = 0; kind < 2; ++kind)
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(base + TAILS_AT + kind * TAIL_BYTES +
                                                                    (i * GROUP + threadIdx.x) * 16),
                   "r"(found[kind][i].x), "r"(found[kind][i].y), "r"(found[kind][i].z), "r"(found[kind][i].w)
                   : "memory");
}

// ---------------------------------------------------------------- products

// d (64 queries, half of the keys) += 16 dims of queries times keys^T.
__device__ __forceinline__ void multiply_keys(float (&d)[HALF / 2], u64 queries, u64 keys) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n" TEXT(HALF_KEYS) "k16.f32.bf16.bf16 " LOGITS_REGISTERS ", " LOGITS_INPUTS
               ", 1, 1, 1, 0, 0;"
               : LOGITS_OPERANDS
               : "l"(queries), "l"(keys));
}

// d (64 queries, 64 dims) += 16 weights of this thread's rows times values.
__device__ __forceinline__ void multiply_values(float (&d)[TILE / 2], const u32* weights, u64 values) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SUMS_REGISTERS ", " SUMS_INPUTS ", 1, 1, 1, 1;"
               : SUMS_OPERANDS
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
}

__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void finished() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void logits_of(float (&d)[HALF / 2], u32 base, int half) {
  const u64 queries = descriptor(base), keys = descriptor(base + KEYS_AT + half * (HALF / TILE) * BOX_BYTES);
#pragma unroll
  for (int step = 0; step < TILE / 16; ++step) multiply_keys(d, queries + step * 2, keys + step * 2);
  commit();
}

// The last dims of the queries times those of the keys: a warp's 16 rows.
__device__ __forceinline__ void tail_logits(float (&d)[HALF / 2], const u32 (&query)[2], u32 tails) {
#pragma unroll
  for (int j = 0; j < HALF / 8; ++j) {
    u32 key;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(key) : "r"(tails + j * 128 + threadIdx.x % 32 * 4) : "memory");
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[4 * j]), "+f"(d[4 * j + 1]), "+f"(d[4 * j + 2]), "+f"(d[4 * j + 3])
                 : "r"(query[0]), "r"(query[1]), "r"(key));
  }
}

// Weights times the last dims of the values.
__device__ __forceinline__ void tail_sums(float (&d)[4], const u32 (&weights)[HALF / 4], u32 tails) {
#pragma unroll
  for (int pair = 0; pair < HALF / 32; ++pair) {
    u32 v[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(tails + (pair * 32 + threadIdx.x % 32) * 16)
                 : "memory");
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32* const w = weights + 4 * (2 * pair + i);
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(v[2 * i]), "r"(v[2 * i + 1]));
    }
  }
}

// ---------------------------------------------------------------- softmax

__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rows g and g + 8 of a warp's 16: d[4 j + 2 h + e] is row g + 8 h, key 8 j + 2 t + e: lane = 4 g + t.
__device__ __forceinline__ void highest(const float (&d)[HALF / 2], float (&best)[2]) {
#pragma unroll
  for (int i = 0; i < HALF / 2; ++i) best[i / 2 % 2] = fmaxf(best[i / 2 % 2], d[i]);
}

__device__ __forceinline__ void weigh(float (&d)[HALF / 2], u32 (&weights)[HALF / 4], const float (&base)[2], float (&mass)[2]) {
#pragma unroll
  for (int i = 0; i < HALF / 2; ++i) {
    d[i] = power(fmaf(d[i], 1.4426950408889634f, -base[i / 2 % 2]));
    mass[i / 2 % 2] += d[i];
  }
#pragma unroll
  for (int i = 0; i < HALF / 4; ++i) weights[i] = narrow2(d[2 * i], d[2 * i + 1]);
}

__device__ __forceinline__ void store(const Arguments& p, int row, int column, float first, float second) {
  const u64 at = (u64)row * p.out_stride + column;
#if E4M3
  *(u16*)(p.out + at) = narrow2_e4m3(first * p.inverse, second * p.inverse);
#else
  *(u32*)(p.out + 2 * at) = narrow2(first, second);
#endif
}

extern "C" __global__ void __launch_bounds__(GROUP, 2) vision_attention(const __grid_constant__ Arguments p) {
  const u32 base = shared_address(memory);
  const int head = blockIdx.x % HEADS, query = blockIdx.x / HEADS % (KEYS / TILE) * TILE;
  const int first = blockIdx.x / HEADS / (KEYS / TILE) * KEYS;  // row of the image
  const int lane = threadIdx.x % 32, row = first + query + threadIdx.x / 32 * 16 + lane / 4, column = head * DIM + lane % 4 * 2;
  let_go();
  if (threadIdx.x == 0) {
    prefetch(p.boxes);
    for (int i = 0; i < 3; ++i) init(base + BARRIERS_AT + 8 * i, 1);
    show_barriers();
  }
  after_the_last();
  if (threadIdx.x == 0) fetch(p, base, head, first, query);
  u32 tail[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) tail[h] = __ldcg((const u32*)(p.qkv + (u64)(row + 8 * h) * p.qkv_stride + column + TILE));
  fetch_tails(p, base, head, first);
  __syncthreads();

  float d0[HALF / 2] = {}, d1[HALF / 2] = {}, sums[TILE / 2] = {}, last[4] = {};
  tail_logits(d0, tail, base + TAILS_AT);
  tail_logits(d1, tail, base + TAILS_AT + TAIL_BYTES / 2);
  written(d0), written(d1);
  wait(base + BARRIERS_AT, 0);
  fence();
  logits_of(d0, base, 0);
  wait(base + BARRIERS_AT + 8, 0);
  logits_of(d1, base, 1);
  float best[2] = {-1e30f, -1e30f}, mass[2] = {};
  finished<1>();
  written(d0);
  highest(d0, best);
  finished<0>();
  written(d1);
  highest(d1, best);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 1));
    best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 2)) * 1.4426950408889634f;
  }
  u32 w0[HALF / 4], w1[HALF / 4];
  const u64 values = descriptor(base + VALUES_AT);
  weigh(d0, w0, best, mass);
  wait(base + BARRIERS_AT + 16, 0);
  written(w0), written(sums);
  fence();
#pragma unroll
  for (int step = 0; step < HALF / 16; ++step) multiply_values(sums, w0 + 4 * step, values + (step * 16 * 128 >> 4));
  commit();
  weigh(d1, w1, best, mass);
  written(w1);
  fence();
#pragma unroll
  for (int step = 0; step < HALF / 16; ++step)
    multiply_values(sums, w1 + 4 * step, values + ((step + HALF / 16) * 16 * 128 >> 4));
  commit();
  tail_sums(last, w0, base + TAILS_AT + TAIL_BYTES);
  tail_sums(last, w1, base + TAILS_AT + TAIL_BYTES + TAIL_BYTES / 2);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    mass[h] += __shfl_xor_sync(~0u, mass[h], 1);
    mass[h] += __shfl_xor_sync(~0u, mass[h], 2);
    mass[h] = 1.0f / mass[h];
  }
  finished<0>();
  written(sums);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j)
      store(p, row + 8 * h, column + 8 * j, sums[4 * j + 2 * h] * mass[h], sums[4 * j + 2 * h + 1] * mass[h]);
    store(p, row + 8 * h, column + TILE, last[2 * h] * mass[h], last[2 * h + 1] * mass[h]);
  }
}
