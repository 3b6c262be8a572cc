// Products of weights and tokens transposed: weight rows are wgmma's M, tokens its N, which may be any multiple of 8. A tile
// is ROWS weight rows by TOKENS tokens.
//
// A CTA is a warp that produces, and two warpgroups that multiply, each 128 weight rows by all tokens of the tile. The
// producer copies blocks of 128 bytes of K of both operands into a ring of SLOTS, swizzled as wgmma reads them.
//
// Set in front: K; N weight rows; TOKENS; SLOTS; E4M3, whether the operands are (else bfloat16); REGISTERS, OPERANDS, INPUTS
// and ADD, the lists of a wgmma.

#include "hopper.cuh"

constexpr int ROW_BYTES = 128;
constexpr int BLOCK = E4M3 ? 128 : 64;  // of K
constexpr int BLOCKS = K / BLOCK;
constexpr int ROWS = 2 * GROUP;
constexpr int WEIGHT_BYTES = ROWS * ROW_BYTES, SLOT_BYTES = WEIGHT_BYTES + TOKENS * ROW_BYTES;
constexpr int BARRIERS_AT = SLOTS * SLOT_BYTES;
static_assert(K % BLOCK == 0 && N % ROWS == 0 && TOKENS % 8 == 0, "whole tiles");

#include "ring.cuh"

// d[b][4 j + 2 h + e] is weight row 64 b + 16 w + 8 h + g of the warpgroup's 128, token 8 j + 2 t + e, for lane 4 g + t of warp w.
typedef float Sums[2][TOKENS / 2];

// By one thread, which the others wait for.
__device__ __forceinline__ void prepare_ring() {
  for (Ring ring; ring.parity == 0; ring.advance()) init(ring.filled(), 1), init(ring.emptied(), ROWS / 32);
  show_barriers();
}

// Copies blocks into the ring: weights are read once, tokens again and again.
struct Producer {
  const u64 *weights, *tokens;  // tensor maps
  u64 once, again;
  int asked = 0;  // blocks whose weights are on their way
  Ring ring;

  __device__ Producer(const u64* weights, const u64* tokens) : weights(weights), tokens(tokens) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(again));
  }

  __device__ void ask(const Ring& ring, int block, int row) {
    expect(ring.filled(), SLOT_BYTES);
    copy_box(weights, ring.data(), block * BLOCK, row, ring.filled(), once);
  }

  // The first weights, which no kernel writes, before the kernel in front has ended; tokens only then.
  __device__ void begin(int first, int last, int row) {
    for (Ring ahead = ring; asked < SLOTS && first + asked < last; ++asked, ahead.advance()) ask(ahead, first + asked, row);
    after_the_last();
  }

  __device__ void fetch(int block, int row, int token) {
    if (asked > 0) {
      --asked;
    } else {
      wait(ring.emptied(), ring.parity ^ 1);
      ask(ring, block, row);
    }
    copy_box(tokens, ring.data() + WEIGHT_BYTES, block * BLOCK, token, ring.filled(), again);
    ring.advance();
  }
};

// d (64 weight rows, TOKENS) += 32 bytes of K, or = if not `add`. By a warpgroup; its registers are not ready before a wait.
__device__ __forceinline__ void multiply(float (&d)[TOKENS / 2], u64 weights, u64 tokens, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned.m64n" TEXT(TOKENS) KIND REGISTERS ", " INPUTS ", p, " AS_STORED ";\n}"
               : OPERANDS
               : "l"(weights), "l"(tokens), "r"(add));
}

// d += a block, or = if not `add`, by warpgroup `group`.
__device__ __forceinline__ void multiply_block(Sums& d, const Ring& ring, int group, int add) {
  const u64 weights = descriptor(ring.data() + group * GROUP * ROW_BYTES), tokens = descriptor(ring.data() + WEIGHT_BYTES);
  fence();
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      multiply(d[half], weights + half * (64 * ROW_BYTES >> 4) + step * 2, tokens + step * 2, step > 0 || add);
}

// The next so many blocks of the ring.
__device__ __forceinline__ void sum_up(Sums& d, Ring& ring, int group, int blocks) {
  u32 last = 0;
  written(d[0]), written(d[1]);  // or zeros would be moved in between the products, which then wait for each other
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    wait(ring.filled(), ring.parity);
    multiply_block(d, ring, group, block > 0);
    commit<1>();
    if (block > 0) release(last);  // the block before this one is done, and its slot free
    last = ring.emptied();
    ring.advance();
  }
  drain<0>();
  written(d[0]), written(d[1]);
  release(last);
}
