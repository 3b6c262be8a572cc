// hidden (rows, N / 2) = tanh-GELU(x gate^T) * (x up^T) in bfloat16, by Hopper's warpgroup instructions.
//
// Computed transposed, weights x tokens^T: weight rows are wgmma's M, tokens its N, which may be any multiple of 8. So a
// tile is ROWS weight rows by TOKENS tokens, and TOKENS is chosen to divide a prefix where tiles of 128 would be padded.
//
// A CTA a multiprocessor: a warp that produces, and two warpgroups that multiply, each 128 weight rows by all tokens of the
// tile. The producer copies blocks of 64 of K of both operands into a ring of SLOTS, each row 128 bytes, swizzled as wgmma
// reads them. Neighbouring CTAs take the token tiles of one weight tile at the same time, so that memory is asked for it
// once.
//
// Weight rows are reordered at load (`geglu_order` in tiled_geglu.py), so that what one thread has summed up is gate and up
// of two neighbouring units: rows g and g + 8 of two blocks of 64.
//
// Set in front of this file: K; N weight rows; TOKENS; SLOTS; REGISTERS, OPERANDS, INPUTS and ADD, the lists of a wgmma.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

constexpr int BLOCK = 64;  // of K
constexpr int BLOCKS = K / BLOCK;
constexpr int ROW_BYTES = BLOCK * 2;
constexpr int GROUP = 128;  // threads of a warpgroup, and weight rows that it multiplies
constexpr int ROWS = 2 * GROUP;
constexpr int HIDDEN = N / 2;
constexpr int TOGETHER = 12;
constexpr int WEIGHT_BYTES = ROWS * ROW_BYTES, SLOT_BYTES = WEIGHT_BYTES + TOKENS * ROW_BYTES;
constexpr int BARRIERS_AT = SLOTS * SLOT_BYTES;
static_assert(K % BLOCK == 0 && N % ROWS == 0 && TOKENS % 8 == 0, "whole tiles");

extern __shared__ __align__(1024) char memory[];

struct Arguments {
  alignas(64) u64 weights[16];  // tensor maps
  alignas(64) u64 tokens[16];
  u16* hidden;
  int rows;
};

// ---------------------------------------------------------------- barriers and copies

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  u64 address;
  asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(pointer));
  return (u32)address;
}

__device__ __forceinline__ void init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive; the barrier opens when as many bytes have also been copied.
__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
}

// A box at column k and row `row` of a matrix, kept in L2 as `policy` says.
__device__ __forceinline__ void copy(const u64* map, u32 to, int k, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(k), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

struct Ring {
  int slot = 0;
  u32 parity = 0;

  __device__ u32 data() const { return shared_address(memory) + slot * SLOT_BYTES; }
  __device__ u32 filled() const { return shared_address(memory) + BARRIERS_AT + slot * 16; }
  __device__ u32 emptied() const { return filled() + 8; }
  __device__ void advance() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
};

// The tiles of this CTA. Tokens of several samples go by TOGETHER of their tiles, so that L2 holds them for all weights.
struct Work {
  int token_tiles, tile;

  __device__ explicit Work(int rows) : token_tiles((rows + TOKENS - 1) / TOKENS), tile(blockIdx.x) {}
  __device__ bool more() const { return tile < N / ROWS * token_tiles; }
  __device__ void next() { tile += gridDim.x; }

  __device__ int before() const { return tile / (TOGETHER * (N / ROWS)) * TOGETHER; }  // token tiles
  __device__ int beside() const { return token_tiles - before() < TOGETHER ? token_tiles - before() : TOGETHER; }
  __device__ int weight_row() const { return (tile - before() * (N / ROWS)) / beside() * ROWS; }
  __device__ int token() const { return (before() + (tile - before() * (N / ROWS)) % beside()) * TOKENS; }
};

__device__ __forceinline__ void produce(const Arguments& p) {
  u64 once, again;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(again));
  Ring ring;
#pragma unroll 1
  for (Work work(p.rows); work.more(); work.next()) {
    const int row = work.weight_row(), token = work.token();
#pragma unroll 1
    for (int block = 0; block < BLOCKS; ++block) {
      wait(ring.emptied(), ring.parity ^ 1);
      expect(ring.filled(), SLOT_BYTES);
      copy(p.weights, ring.data(), block * BLOCK, row, ring.filled(), once);
      copy(p.tokens, ring.data() + WEIGHT_BYTES, block * BLOCK, token, ring.filled(), again);
      ring.advance();
    }
  }
}

// ---------------------------------------------------------------- products

// d (64 weight rows, TOKENS) += 16 of K, or = if not `add`. By a warpgroup; its registers are not ready before a wait.
__device__ __forceinline__ void multiply(float (&d)[TOKENS / 2], u64 weights, u64 tokens, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned.m64n" TEXT(TOKENS) "k16.f32.bf16.bf16 " REGISTERS ", " INPUTS ", p, 1, 1, 0, 0;\n}"
               : OPERANDS
               : "l"(weights), "l"(tokens), "r"(add));
}

// What wgmma is told of an operand: its address, groups of 8 rows 1024 bytes apart, swizzled over 128 bytes. In units of 16
// bytes, so that + 2 is the next 16 of K.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)(address >> 4) | 1ull << 16 | (u64)(8 * ROW_BYTES >> 4) << 32 | 1ull << 62;
}

// tanh-GELU(gate) * up, as gate * sigmoid(2 inner) * up
__device__ __forceinline__ float geglu(float gate, float up) {
  const float inner = gate * (0.7978845608028654f + 0.035677408136300125f * gate * gate);
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-2.885390081777927f * inner));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return gate * up * inverse;
}

// Two units of a token, if it exists. No branch: all of a thread's arithmetic can be interleaved.
__device__ __forceinline__ void store_if(bool exists, u16* to, float first, float second) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"((int)exists), "l"(to), "r"(pair)
               : "memory");
}

// d[b][4 j + 2 h + e] is row 64 b + 8 h + g of this warp's 16, token 8 j + 2 t + e: lane = 4 g + t.
__device__ __forceinline__ void store(const Arguments& p, const Work& work, int group, const float (&d)[2][TOKENS / 2]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int token = work.token() + lane % 4 * 2, tokens = p.rows - token;
  const int unit = (work.weight_row() + group * GROUP) / 2 + warp * 16 + lane / 4 * 2;
  u16* const to = p.hidden + (u64)token * HIDDEN + unit;
#pragma unroll
  for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      store_if(8 * j + e < tokens, to + (8 * j + e) * HIDDEN, geglu(d[0][4 * j + e], d[0][4 * j + 2 + e]),
               geglu(d[1][4 * j + e], d[1][4 * j + 2 + e]));
}

__device__ __forceinline__ void release(u32 emptied) {
  if (threadIdx.x % 32 == 0) arrive(emptied);
}

__device__ __forceinline__ void consume(const Arguments& p, int group) {
  float d[2][TOKENS / 2] = {};
  Ring ring;
#pragma unroll 1
  for (Work work(p.rows); work.more(); work.next()) {
    u32 last = 0;
#pragma unroll 1
    for (int block = 0; block < BLOCKS; ++block) {
      wait(ring.filled(), ring.parity);
      const u64 weights = descriptor(ring.data() + group * GROUP * ROW_BYTES), tokens = descriptor(ring.data() + WEIGHT_BYTES);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int step = 0; step < BLOCK / 16; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          multiply(d[half], weights + half * (64 * ROW_BYTES >> 4) + step * 2, tokens + step * 2, step > 0 || block > 0);
      // The block before this one is done, and its slot free.
      asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (block > 0) release(last);
      last = ring.emptied();
      ring.advance();
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < TOKENS / 2; ++i) asm volatile("" : "+f"(d[half][i])::"memory");  // not read before the wait
    release(last);
    store(p, work, group, d);
  }
}

extern "C" __global__ void __launch_bounds__(3 * GROUP, 1) tiled_geglu(const __grid_constant__ Arguments p) {
  if (threadIdx.x == 0) {
    for (Ring ring; ring.parity == 0; ring.advance()) init(ring.filled(), 1), init(ring.emptied(), ROWS / 32);
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  // Registers go from the warpgroup that only copies to those that hold sums.
  if (threadIdx.x >= ROWS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == ROWS) produce(p);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    consume(p, threadIdx.x / GROUP);
  }
}
