// Products of rows of x and rows of W, one tile a CTA: 64 rows of x a warpgroup are wgmma's M, COLUMNS rows of W its N.
//
// A warp produces: it copies blocks of 128 bytes of K of both operands into a ring of SLOTS, swizzled as wgmma reads them.
// It fetches its first weights before the kernel in front has ended.
//
// Where there would be too few tiles, SPLITS CTAs of a cluster, as many as there are warpgroups in each, multiply a part of K
// each; a warpgroup sends what it has summed up to the CTA that finishes its 64 rows, always in the same order.
//
// Set in front: what tiled_linear.cu names.

#include "hopper.cuh"

__host__ __device__ constexpr int parts(int a, int part) { return (a + part - 1) / part; }

constexpr int ROW_BYTES = 128;
constexpr int BLOCK = E4M3 ? 128 : 64;  // of K
constexpr int BLOCKS = parts(K, BLOCK);
constexpr int TOKENS = 64 * GROUPS, CONSUMERS = 128 * GROUPS;
constexpr int TOKEN_BYTES = TOKENS * ROW_BYTES, SLOT_BYTES = TOKEN_BYTES + COLUMNS * ROW_BYTES;
constexpr int BARRIERS_AT = SLOTS * SLOT_BYTES, VECTORS_AT = BARRIERS_AT + SLOTS * 16;
constexpr int SENT_BYTES = 64 * COLUMNS * 4;  // of a warpgroup
constexpr int RECEIVED_AT = VECTORS_AT + COLUMNS * 8, ARRIVED_AT = RECEIVED_AT + (SPLITS - 1) * SENT_BYTES;
static_assert(K % (E4M3 ? 16 : 8) == 0 && N % 8 == 0 && COLUMNS % 8 == 0, "whole rows of 16 bytes");
static_assert(BLOCKS >= SPLITS, "a block for each part");
static_assert(SPLITS == 1 || SPLITS == GROUPS, "a group of rows for each CTA to finish");

#include "ring.cuh"

// ---------------------------------------------------------------- a cluster

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return SPLITS > 1 ? rank : 0;
}

// All CTAs of the cluster are there, and what they wrote before they said so.
__device__ __forceinline__ void say_here() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void all_here() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// ---------------------------------------------------------------- copies

// The tile of this CTA, and its blocks [first, last) of K. Neighbouring clusters have the same columns.
struct Work {
  int token, column, split, first, last;

  __device__ explicit Work(int rows) : split(cluster_rank()) {
    const int tile = blockIdx.x / SPLITS, token_tiles = parts(rows, TOKENS);
    token = tile % token_tiles * TOKENS, column = tile / token_tiles * COLUMNS;
    first = BLOCKS * split / SPLITS, last = BLOCKS * (split + 1) / SPLITS;
  }
};

// By one thread; tensor maps of x and W.
__device__ __forceinline__ void produce(const u64* tokens, const u64* weights, const Work& work) {
  u64 once, again;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(again));
  const auto fetch_weights = [&](const Ring& ring, int block) {
    expect(ring.filled(), SLOT_BYTES);
    copy_box(weights, ring.data() + TOKEN_BYTES, block * BLOCK, work.column, ring.filled(), once);
  };
  const auto fetch_tokens = [&](const Ring& ring, int block) {
    copy_box(tokens, ring.data(), block * BLOCK, work.token, ring.filled(), again);
  };
  const int early = work.first + SLOTS < work.last ? work.first + SLOTS : work.last;
  Ring ring;
  for (int block = work.first; block < early; ++block) fetch_weights(ring, block), ring.advance();
  after_the_last();
  ring = Ring();
  for (int block = work.first; block < early; ++block) fetch_tokens(ring, block), ring.advance();
#pragma unroll 1
  for (int block = early; block < work.last; ++block) {
    wait(ring.emptied(), ring.parity ^ 1);
    fetch_weights(ring, block);
    fetch_tokens(ring, block);
    ring.advance();
  }
}

// ---------------------------------------------------------------- products

// d (64 tokens, COLUMNS) += 32 bytes of K. By a warpgroup; its registers are not ready before a wait.
__device__ __forceinline__ void multiply(float (&d)[COLUMNS / 2], u64 tokens, u64 weights) {
  asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n" TEXT(COLUMNS) KIND REGISTERS ", " INPUTS ", add, " AS_STORED ";\n}"
               : OPERANDS
               : "l"(tokens), "l"(weights));
}

__device__ __forceinline__ void sum_up(const Work& work, float (&d)[COLUMNS / 2]) {
  const u32 group = threadIdx.x / 128;
  Ring ring;
  u32 last = 0;
  written(d);  // or zeros would be moved in between the products, which then wait for each other
#pragma unroll 1
  for (int block = work.first; block < work.last; ++block) {
    wait(ring.filled(), ring.parity);
    const u64 tokens = descriptor(ring.data() + group * 64 * ROW_BYTES), weights = descriptor(ring.data() + TOKEN_BYTES);
    fence();
#pragma unroll
    for (int step = 0; step < ROW_BYTES / 32; ++step)
      multiply(d, tokens + step * 2, weights + step * 2);
    // The block before this one is done, and its slot free.
    commit<1>();
    if (block > work.first) release(last);
    last = ring.emptied();
    ring.advance();
  }
  // No commit: an empty one here makes the compiler let the products of the loop wait for each other.
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  written(d);  // not read before the wait
}

// ---------------------------------------------------------------- parts of K

// Where this thread's sums lie among what CTA `receiver` gets from CTA `sender`: whole warps, 16 bytes a lane.
__device__ __forceinline__ u32 received(int sender, int receiver) {
  const int place = sender < receiver ? sender : sender - 1;
  return shared_address(memory) + RECEIVED_AT + place * SENT_BYTES + threadIdx.x % 128 * 16;
}

// To the CTA that finishes this warpgroup's rows.
__device__ __forceinline__ void send(const Work& work, const float (&d)[COLUMNS / 2]) {
  const int group = threadIdx.x / 128;
  const u32 to = there(received(work.split, group), group);
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j)
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + j * 2048), "f"(d[4 * j]), "f"(d[4 * j + 1]),
                 "f"(d[4 * j + 2]), "f"(d[4 * j + 3])
                 : "memory");
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   there(shared_address(memory) + ARRIVED_AT, group))
               : "memory");
}

__device__ __forceinline__ void add_received(const Work& work, float (&d)[COLUMNS / 2]) {
  u32 done = 0;
  while (!done)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(memory) + ARRIVED_AT)
                 : "memory");
#pragma unroll
  for (int sender = 0; sender < SPLITS - 1; ++sender)  // by place: all but this one
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      float4 more;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(more.x), "=f"(more.y), "=f"(more.z), "=f"(more.w)
                   : "r"(received(sender, SPLITS) + j * 2048)
                   : "memory");
      d[4 * j] += more.x, d[4 * j + 1] += more.y, d[4 * j + 2] += more.z, d[4 * j + 3] += more.w;
    }
}
