// hidden (rows, N / 2) = tanh-GELU(x gate^T) * (x up^T) by Hopper's warpgroup instructions, in bfloat16, or E4M3 throughout.
//
// Persistent tiles, a CTA a multiprocessor (tiles.cuh). TOKENS is chosen to divide a prefix where tiles of 128 would be
// padded. Neighbouring CTAs take the token tiles of one weight tile at the same time, so that memory is asked for it once.
//
// Weight rows are reordered at load (`geglu_order` in tiled_geglu.py), so that what one thread has summed up is gate and up
// of two neighbouring units: rows g and g + 8 of two blocks of 64.

#include "tiles.cuh"

constexpr int HIDDEN = N / 2, OUT_BYTES = E4M3 ? 1 : 2;
constexpr int TOGETHER = 12;

struct Arguments {
  alignas(64) u64 weights[16];  // tensor maps
  alignas(64) u64 tokens[16];
  char* hidden;
  const float* scale;  // E4M3: of each weight row, in their order; a sum times it is the product
  int rows;
  float inverse;  // E4M3: by which the result is multiplied
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
  Producer producer(p.weights, p.tokens);
  producer.begin(0, BLOCKS, Work(p.rows).weight_row());
#pragma unroll 1
  for (Work work(p.rows); work.more(); work.next()) {
    const int row = work.weight_row(), token = work.token();
#pragma unroll 1
    for (int block = 0; block < BLOCKS; ++block) producer.fetch(block, row, token);
  }
}

#if E4M3
// tanh-GELU(gate) * up of scaled sums: gate * (linear + cubic * gate^2) is tanh's argument, half the product of both scales.
struct Geglu {
  float linear, cubic, half;

  __device__ Geglu() {}

  // `row` is gate's, up's is 8 behind it.
  __device__ Geglu(const Arguments& p, int row) {
    const float gate = __ldg(p.scale + row), up = __ldg(p.scale + row + 8);
    linear = 0.7978845608028654f * gate, cubic = 0.035677408136300125f * gate * gate * gate, half = 0.5f * gate * up * p.inverse;
  }

  __device__ float operator()(float gate, float up) const {
    float tanh;
    asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(gate * (linear + cubic * gate * gate)));
    const float product = half * gate * up;
    return product + product * tanh;
  }
};
#else
// tanh-GELU(gate) * up, as gate * sigmoid(2 inner) * up
struct Geglu {
  __device__ Geglu() {}
  __device__ Geglu(const Arguments&, int) {}

  __device__ float operator()(float gate, float up) const {
    const float inner = gate * (0.7978845608028654f + 0.035677408136300125f * gate * gate);
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-2.885390081777927f * inner));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return gate * up * inverse;
  }
};
#endif

__device__ __forceinline__ u32 bytes(u32 a, u32 b, u32 which) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(which));
  return d;
}

// Four bytes, if their token exists. No branch: all of a thread's arithmetic can be interleaved.
__device__ __forceinline__ void store_if(bool exists, char* to, u32 word) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"((int)exists), "l"(to), "r"(word)
               : "memory");
}

// A tile's way out, half by half: the first half's units wait, rounded, for their neighbours in the second.
struct Exit {
  u32 first[E4M3 ? (TOKENS + 15) / 16 : TOKENS / 8];
  Geglu second;
  char* to;
  int tokens;

  __device__ __forceinline__ Exit() : second() {}

  __device__ __forceinline__ void take(const Arguments& p, const Work& work, int group, const float (&d)[TOKENS / 2]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, row = work.weight_row() + group * GROUP;
    const int token = work.token() + lane % 4 * 2 + (E4M3 ? g % 2 : 0);
    const int unit = row / 2 + warp * 16 + (E4M3 ? g / 2 * 4 : g * 2);
    const Geglu geglu(p, row + warp * 16 + g);
    second = Geglu(p, row + warp * 16 + g + 64);
    to = p.hidden + ((u64)token * HIDDEN + unit) * OUT_BYTES;
    tokens = p.rows - token;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
      const float a = geglu(d[4 * j], d[4 * j + 2]), b = geglu(d[4 * j + 1], d[4 * j + 3]);
#if E4M3
      first[j / 2] = j % 2 ? first[j / 2] | (u32)narrow2_e4m3(a, b) << 16 : narrow2_e4m3(a, b);
#else
      first[j] = narrow2(a, b);
#endif
    }
  }

  __device__ __forceinline__ void store(const float (&d)[TOKENS / 2]) const {
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
      const float a = second(d[4 * j], d[4 * j + 2]), b = second(d[4 * j + 1], d[4 * j + 3]);
#if E4M3
      // Lanes of an even and an odd g hold two units each of the same two tokens; they exchange, and store four units of one.
      const u32 mine = bytes(first[j / 2], narrow2_e4m3(a, b), j % 2 ? 0x5342 : 0x5140);
      const u32 got = __shfl_xor_sync(0xffffffffu, mine, 4);
      store_if(8 * j < tokens, to + 8 * j * HIDDEN, bytes(mine, got, threadIdx.x / 4 % 2 ? 0x3276 : 0x5410));
#else
      const u32 pair = narrow2(a, b);
      store_if(8 * j < tokens, to + 8 * j * HIDDEN * 2, bytes(first[j], pair, 0x5410));
      store_if(8 * j + 1 < tokens, to + (8 * j + 1) * HIDDEN * 2, bytes(first[j], pair, 0x7632));
#endif
    }
  }
};

#if K >= (E4M3 ? 640 : 320)  // blocks enough
// At a tile's end and at the next one's beginning the first half of the weight rows is a block ahead of the second: what one
// half leaves is computed while the other multiplies.

// The ring's next block for one half; `add` to its sums, or begin them.
__device__ __forceinline__ void sum_half(float (&d)[TOKENS / 2], const Ring& ring, int group, int half, int add) {
  wait(ring.filled(), ring.parity);
  const u64 weights = descriptor(ring.data() + (group * GROUP + half * 64) * ROW_BYTES);
  const u64 tokens = descriptor(ring.data() + WEIGHT_BYTES);
  fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) multiply(d, weights + step * 2, tokens + step * 2, step > 0 || add);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// A tile's blocks but its first and last, `ring` being at the first, whose slot it frees. Returns the last slot that is not free.
__device__ __forceinline__ u32 sum_between(Sums& d, Ring& ring, int group) {
  u32 last = ring.emptied();
  ring.advance();
#pragma unroll 1
  for (int block = 1; block < BLOCKS - 1; ++block) {
    wait(ring.filled(), ring.parity);
    multiply_block(d, ring, group, 1);
    commit<1>();
    release(last);
    last = ring.emptied();
    ring.advance();
  }
  return last;
}

__device__ __forceinline__ void consume(const Arguments& p, int group) {
  Sums d = {};
  Ring ring;
  Work work(p.rows);
  Exit exit;
  written(d[0]), written(d[1]);
  sum_half(d[0], ring, group, 0, 0);
  sum_half(d[1], ring, group, 1, 0);
#pragma unroll 1
  while (true) {
    const u32 last = sum_between(d, ring, group);
    sum_half(d[0], ring, group, 0, 1);
    sum_half(d[1], ring, group, 1, 1);
    drain<2>();
    release(last);
    drain<1>();
    written(d[0]);
    exit.take(p, work, group, d[0]);
    drain<0>();
    written(d[0]), written(d[1]);
    release(ring.emptied());
    ring.advance();
    work.next();
    if (!work.more()) break;
    sum_half(d[0], ring, group, 0, 0);
    written(d[1]);
    // A loop, or the compiler would move this in front of the products.
#pragma unroll 1
    for (int once = p.rows > 0; once > 0; --once) exit.store(d[1]);
    written(d[1]);
    sum_half(d[1], ring, group, 1, 0);
  }
  exit.store(d[1]);
}
#else
__device__ __forceinline__ void consume(const Arguments& p, int group) {
  Sums d = {};
  Ring ring;
  Exit exit;
#pragma unroll 1
  for (Work work(p.rows); work.more(); work.next()) {
    sum_up(d, ring, group, BLOCKS);
    exit.take(p, work, group, d[0]);
    exit.store(d[1]);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(3 * GROUP, 1) tiled_geglu(const __grid_constant__ Arguments p) {
  let_go();
  if (threadIdx.x == 0) prepare_ring();
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
