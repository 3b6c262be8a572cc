// out = activation(norm(x) W^T + bias) + residual in bfloat16, by Hopper's warpgroup instructions: one tile a CTA, all at once.
//
// For products that are over in ten microseconds, where too few and too large tiles are what takes the time. A tile is
// TOKENS rows of x, 64 a warpgroup, by COLUMNS rows of W, any multiple of 8, so that there are nearly as many tiles as
// multiprocessors. Where there would be too few, SPLITS CTAs of a cluster, as many as there are warpgroups in each, multiply
// a part of K each; a warpgroup sends what it has summed up to the CTA that finishes its 64 rows, always in the same order.
//
// A warp produces: it copies blocks of 64 of K of both operands into a ring of SLOTS, rows of 128 bytes swizzled as wgmma
// reads them. It fetches its first weights before the kernel in front has ended.
//
// x may be the stream in front of a LayerNorm: W (x - mean) * rstd is (W x - mean * sums of W's rows) * rstd, so the norm
// happens behind the product. Its moments come from whoever made x, by tiles of columns: their sums, and the squared
// distances from their own means, which add up to those of the row without cancellation.
//
// Set in front of this file: K; N rows of W; GROUPS of 64 rows of x; COLUMNS; SLOTS; SPLITS; BIAS, RESIDUAL and GELU, 0 or
// 1; NORMED, by how many tiles of moments x is to be normed, or 0; MOMENTS, whether those of out are wanted; REGISTERS,
// OPERANDS and INPUTS, the lists of a wgmma.

#include "hopper.cuh"

__host__ __device__ constexpr int parts(int a, int part) { return (a + part - 1) / part; }

constexpr int BLOCK = 64;  // of K
constexpr int BLOCKS = parts(K, BLOCK);
constexpr int ROW_BYTES = BLOCK * 2;
constexpr int TOKENS = 64 * GROUPS, CONSUMERS = 128 * GROUPS;
constexpr int TOKEN_BYTES = TOKENS * ROW_BYTES, SLOT_BYTES = TOKEN_BYTES + COLUMNS * ROW_BYTES;
constexpr int BARRIERS_AT = SLOTS * SLOT_BYTES, VECTORS_AT = BARRIERS_AT + SLOTS * 16;
constexpr int SENT_BYTES = 64 * COLUMNS * 4;  // of a warpgroup
constexpr int RECEIVED_AT = VECTORS_AT + COLUMNS * 8, ARRIVED_AT = RECEIVED_AT + (SPLITS - 1) * SENT_BYTES;
static_assert(K % 8 == 0 && N % 8 == 0 && COLUMNS % 8 == 0, "whole rows of 16 bytes");
static_assert(BLOCKS >= SPLITS, "a block for each part");
static_assert(SPLITS == 1 || SPLITS == GROUPS, "a group of rows for each CTA to finish");
static_assert(!MOMENTS || N % COLUMNS == 0, "moments are of whole tiles");
static_assert(!NORMED || (SPLITS == 1 && K % (NORMED ? NORMED : 1) == 0), "the norm is taken where sums are whole");
constexpr float EPSILON = 1e-6f;

struct Arguments {
  alignas(64) u64 tokens[16];  // tensor maps
  alignas(64) u64 weights[16];
  const u16* bias;
  const u16* residual;
  u16* out;
  const float* weight_sums;    // of each row of W, if NORMED
  const float2* moments_of_x;  // (rows, NORMED)
  float2* moments;             // (rows, N / COLUMNS)
  int rows, residual_stride, out_stride;
};

// ---------------------------------------------------------------- a cluster, and what it fetches

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return SPLITS > 1 ? rank : 0;
}

// Where `address` of this CTA is in CTA `rank` of the cluster.
__device__ __forceinline__ u32 there(u32 address, u32 rank) {
  u32 found;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(address), "r"(rank));
  return found;
}

// All CTAs of the cluster are there, and what they wrote before they said so.
__device__ __forceinline__ void say_here() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void all_here() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

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

// The tile of this CTA, and its blocks [first, last) of K. Neighbouring clusters have the same columns.
struct Work {
  int token, column, split, first, last;

  __device__ explicit Work(int rows) : split(cluster_rank()) {
    const int tile = blockIdx.x / SPLITS, token_tiles = parts(rows, TOKENS);
    token = tile % token_tiles * TOKENS, column = tile / token_tiles * COLUMNS;
    first = BLOCKS * split / SPLITS, last = BLOCKS * (split + 1) / SPLITS;
  }
};

__device__ __forceinline__ void produce(const Arguments& p, const Work& work) {
  u64 once, again;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(again));
  const auto fetch_weights = [&](const Ring& ring, int block) {
    expect(ring.filled(), SLOT_BYTES);
    copy_box(p.weights, ring.data() + TOKEN_BYTES, block * BLOCK, work.column, ring.filled(), once);
  };
  const auto fetch_tokens = [&](const Ring& ring, int block) {
    copy_box(p.tokens, ring.data(), block * BLOCK, work.token, ring.filled(), again);
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

// d (64 tokens, COLUMNS) += 16 of K. By a warpgroup; its registers are not ready before a wait.
__device__ __forceinline__ void multiply(float (&d)[COLUMNS / 2], u64 tokens, u64 weights) {
  asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n" TEXT(COLUMNS) "k16.f32.bf16.bf16 " REGISTERS ", " INPUTS ", add, 1, 1, 0, 0;\n}"
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
    for (int step = 0; step < BLOCK / 16; ++step)
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

// ---------------------------------------------------------------- epilogue

// tanh-GELU as x * sigmoid(2 inner), of two numbers with one reciprocal. Powers end at 2^60, so that their product is finite.
__device__ __forceinline__ void gelu(float& a, float& b) {
  const auto one_and_power = [](float x) {
    float power;  // e^(-2 inner), as a power of 2
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fminf(x * fmaf(x * x, -0.10294324f, -2.3022082f), 60.0f)));
    return 1.0f + power;
  };
  const float under_a = one_and_power(a), under_b = one_and_power(b);
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(under_a * under_b));
  a *= inverse * under_b, b *= inverse * under_a;
}

// Two bfloat16 are added to two numbers.
__device__ __forceinline__ void add_pair(float& first, float& second, u32 pair) {
  first += __uint_as_float(pair << 16), second += __uint_as_float(pair & 0xffff0000u);
}

// Over 2, 4, ... neighbouring lanes.
template <int LANES>
__device__ __forceinline__ float over_lanes(float v) {
#pragma unroll
  for (int lane = 1; lane < LANES; lane *= 2) v += __shfl_xor_sync(~0u, v, lane);
  return v;
}

__device__ __forceinline__ float squared_distance(u32 pair, float mean) {
  const float first = __uint_as_float(pair << 16) - mean, second = __uint_as_float(pair & 0xffff0000u) - mean;
  return first * first + second * second;
}

// Of values that are kept as bfloat16, some pairs a lane, LANES lanes a row: the row's sum and squared distances.
template <int LANES, int PAIRS>
__device__ __forceinline__ float2 moments_of(const u32 (&pairs)[PAIRS]) {
  float sum = 0.0f, distances = 0.0f;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) sum += __uint_as_float(pairs[i] << 16) + __uint_as_float(pairs[i] & 0xffff0000u);
  sum = over_lanes<LANES>(sum);
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) distances += squared_distance(pairs[i], sum * (1.0f / COLUMNS));
  return make_float2(sum, over_lanes<LANES>(distances));
}

// d[4 j + 2 h + e] is row 8 h + g of this warp's 16, column 8 j + 2 t + e: lane = 4 g + t. Everything stays where it was
// summed up; what is added is asked for before the first product.
constexpr int EIGHTS = COLUMNS / 8, PIECES = parts(COLUMNS, CONSUMERS);

struct Epilogue {
  int column, columns;  // this lane's first, and how many there are from there to N
  int row, rows;        // likewise
  float2 vector[PIECES] = {};
  u32 residual[2][RESIDUAL ? EIGHTS : 1];
  float2 found[2][parts(NORMED, 4) + 1];  // moments of this lane's rows: of every fourth tile
  float scale[2], shift[2];               // by rstd, and -mean * rstd times a sum of weights

  // Sums of weights and the bias, which no kernel writes, are asked for.
  __device__ __forceinline__ Epilogue(const Arguments& p, const Work& work) {
    const int lane = threadIdx.x % 32;
    column = work.column + lane % 4 * 2, columns = N - column;
    row = work.token + threadIdx.x / 32 * 16 + lane / 4, rows = p.rows - row;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int at = threadIdx.x + i * CONSUMERS;
      const u32 from = at < COLUMNS && work.column + at < N ? work.column + at : 0;
      if (NORMED) vector[i].x = __ldg(p.weight_sums + from);
      if (BIAS) vector[i].y = __uint_as_float((u32)__ldg(p.bias + from) << 16);
    }
  }

  // They came while products were summed up; a lane needs those of other lanes. By all that multiply.
  __device__ __forceinline__ void share() const {
    if (!NORMED && !BIAS) return;
#pragma unroll
    for (int i = 0; i < PIECES; ++i)
      if (threadIdx.x + i * CONSUMERS < COLUMNS) vectors()[threadIdx.x + i * CONSUMERS] = vector[i];
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
  }

  __device__ static float2* vectors() { return (float2*)(memory + VECTORS_AT); }

  // What the kernels in front have made, asked for. Beyond the end something is read that exists, and not used.
  __device__ __forceinline__ void fetch(const Arguments& p) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u64 from = 8 * h < rows ? row + 8 * h : 0;
#pragma unroll
      for (int i = 0, tile = threadIdx.x % 4; i < parts(NORMED, 4); ++i, tile += 4)
        found[h][i] = __ldcg(p.moments_of_x + from * NORMED + (tile < NORMED ? tile : 0));
#pragma unroll
      for (int j = 0; RESIDUAL && j < EIGHTS; ++j)
        residual[h][j] = __ldcg((const u32*)(p.residual + from * p.residual_stride + (8 * j < columns ? column + 8 * j : 0)));
    }
  }

  // The four lanes of a row have a quarter of its tiles each.
  __device__ __forceinline__ void norm() {
    constexpr int WIDTH = NORMED ? K / (NORMED ? NORMED : 1) : 1;
#pragma unroll
    for (int h = 0; NORMED && h < 2; ++h) {
      float sum = 0.0f, distances = 0.0f;
#pragma unroll
      for (int i = 0, tile = threadIdx.x % 4; i < parts(NORMED, 4); ++i, tile += 4)
        if (tile < NORMED) sum += found[h][i].x;
      const float mean = over_lanes<4>(sum) * (1.0f / K);
#pragma unroll
      for (int i = 0, tile = threadIdx.x % 4; i < parts(NORMED, 4); ++i, tile += 4) {
        const float off = found[h][i].x * (1.0f / WIDTH) - mean;
        if (tile < NORMED) distances += found[h][i].y + WIDTH * off * off;
      }
      scale[h] = rsqrtf(over_lanes<4>(distances) * (1.0f / K) + EPSILON), shift[h] = -mean * scale[h];
    }
  }

  __device__ __forceinline__ u32 finished(float first, float second, int j, int h) const {
    if (NORMED || BIAS) {
      const float4 v = *(const float4*)(vectors() + 8 * j + threadIdx.x % 4 * 2);
      first = NORMED ? fmaf(first, scale[h], fmaf(v.x, shift[h], v.y)) : first + v.y;
      second = NORMED ? fmaf(second, scale[h], fmaf(v.z, shift[h], v.w)) : second + v.w;
    }
    if (GELU) gelu(first, second);
    if (RESIDUAL) add_pair(first, second, residual[h][j]);
    return narrow2(first, second);
  }
};

__device__ __forceinline__ void store_if(bool exists, u16* to, u32 pair) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"((int)exists), "l"(to), "r"(pair)
               : "memory");
}

__device__ __forceinline__ void store_if(bool exists, u16* to, u32 pair, u32 next) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v2.b32 [%1], {%2, %3};\n}" ::"r"((int)exists), "l"(to),
               "r"(pair), "r"(next)
               : "memory");
}

// Lanes 2 i and 2 i + 1 exchange, so that each has four neighbours: the even one of eight columns, the odd one of the next.
__device__ __forceinline__ void store(const Arguments& p, const Work& work, const Epilogue& e, const float (&d)[COLUMNS / 2]) {
  const bool odd = threadIdx.x % 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    u16* const line = p.out + (u64)(e.row + 8 * h) * p.out_stride + e.column;
    u32 pairs[EIGHTS];
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) pairs[j] = e.finished(d[4 * j + 2 * h], d[4 * j + 2 * h + 1], j, h);
#pragma unroll
    for (int j = 0; j + 1 < EIGHTS; j += 2) {
      const u32 got = __shfl_xor_sync(~0u, odd ? pairs[j] : pairs[j + 1], 1);
      store_if(8 * h < e.rows && 8 * (j + odd) < e.columns, line + 8 * j + (odd ? 6 : 0), odd ? got : pairs[j],
               odd ? pairs[j + 1] : got);
    }
    if (EIGHTS % 2)
      store_if(8 * h < e.rows && 8 * (EIGHTS - 1) < e.columns, line + 8 * (EIGHTS - 1), pairs[EIGHTS - 1]);
    if (MOMENTS) {
      const float2 found = moments_of<4>(pairs);
      if (8 * h < e.rows && threadIdx.x % 4 == 0)
        p.moments[(u64)(e.row + 8 * h) * (N / COLUMNS) + work.column / COLUMNS] = found;
    }
  }
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
  for (int j = 0; j < EIGHTS; ++j)
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
    for (int j = 0; j < EIGHTS; ++j) {
      float4 more;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(more.x), "=f"(more.y), "=f"(more.z), "=f"(more.w)
                   : "r"(received(sender, SPLITS) + j * 2048)
                   : "memory");
      d[4 * j] += more.x, d[4 * j + 1] += more.y, d[4 * j + 2] += more.z, d[4 * j + 3] += more.w;
    }
}

__device__ __forceinline__ void consume(const Arguments& p, const Work& work) {
  Epilogue epilogue(p, work);
  after_the_last();
  if (SPLITS == 1 || threadIdx.x / 128 == work.split) epilogue.fetch(p);
  float d[COLUMNS / 2] = {};
  sum_up(work, d);
  epilogue.share();
  if (SPLITS > 1) {
    all_here();
    if (threadIdx.x / 128 != work.split) {
      send(work, d);
      return;
    }
    add_received(work, d);
  }
  epilogue.norm();
  store(p, work, epilogue, d);
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1) tiled_linear(const __grid_constant__ Arguments p) {
  let_go();
  if (threadIdx.x == CONSUMERS) prefetch(p.weights), prefetch(p.tokens);
  if (threadIdx.x == 0) {
    for (Ring ring; ring.parity == 0; ring.advance()) init(ring.filled(), 1), init(ring.emptied(), CONSUMERS / 32);
    if (SPLITS > 1) init(shared_address(memory) + ARRIVED_AT, (SPLITS - 1) * 128);
    show_barriers();
  }
  __syncthreads();
  if (SPLITS > 1) say_here();
  const Work work(p.rows);
  if (threadIdx.x < CONSUMERS) {
    consume(p, work);
  } else {
    if (threadIdx.x == CONSUMERS) produce(p, work);
    if (SPLITS > 1) all_here();
  }
}
