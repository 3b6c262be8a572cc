// The whole denoise loop for one observation in one kernel that stays on the GPU: all layers, all steps (Hopper and later).
//
// With a dozen suffix rows a layer is latency, not arithmetic: five short phases, each of which needs all of the one before.
//   qkv        norm, queries, keys, values, rotary positions
//   attention  over the prefix's and the suffix's keys, split over CTAs and added up
//   out        attention's output product, gated residual
//   gate_up    norm, gate and up, GeGLU
//   down       MLP's output product, gated residual
// A CTA a multiprocessor takes the same share of the weights in every phase. What CTAs tell each other goes through global
// memory in words of 8 bytes, 4 of data and 4 that say in which round they were written: a reader asks again until the
// round is right. No barrier, no fence, and the answer to the question is the data. Rounds count layers; words of odd and
// even rounds lie apart, so nobody overwrites what somebody may still read.
//
// Weights do not depend on any phase, so a producer warp copies them in the order of use through a ring in shared memory
// and never stops for a phase. Prefix keys and values are fetched ahead likewise.
//
// Products are computed transposed, weights x activations^T: 16 weight rows ("tile") are the M of m16n8k16, tokens its N.
// Weights are packed at load in the order in which lanes consume them (`pack` in denoise.py): 32 of K is a "step", 1 KB a
// tile. A "unit" is what a CTA computes at once: a tile, for `out` and `down` over half of K (a cluster of two CTAs shares
// the tile), for `gate_up` GATE tiles.
//
// Launched in clusters of two CTAs. All of them must be on the GPU at once, for they wait for each other: nothing else that
// does so may run beside this kernel.
//
// Set by the compiler's command line: W expert width, H heads, KV key/value heads, D head size, F MLP width, N suffix rows,
// A action dims, LAYERS, GATE tiles of a gate_up unit, SPLITS of a head's keys and at most KEYS in each, CTAS, WARPS that
// compute, SLOTS of the ring, at most IN_FLIGHT of them being filled.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int THREADS = WARPS * 32;    // that compute; one more warp produces
constexpr int GROUPS = (N + 7) / 8;    // of 8 tokens, the N of one mma
constexpr int COLUMNS = GROUPS * 8;
constexpr int SUM_STRIDE = COLUMNS + 8 - COLUMNS % 16;  // floats; 8 or 24 modulo 32 spreads the sums over the banks
constexpr int CHUNK = 16;              // KB, what the ring moves at once
constexpr float EPSILON = 1e-6f;

constexpr int QKV_UNITS = (H + 2 * KV) * D / 16, GATE_UNITS = F / 8 / GATE, PAIRED_UNITS = W / 16 * 2;
constexpr int GATE_WM = GATE > 1 ? 2 : 1;  // warps along a unit's tiles; the others share K

__host__ __device__ constexpr int at_least(int a, int b) { return a > b ? a : b; }
constexpr int K_STRIDE = D + 32, V_STRIDE = D + 8, S_STRIDE = KEYS + 4, P_STRIDE = KEYS + 8;
constexpr int ROWS_BYTES = N * at_least(W, at_least(H * D / 2, F / 2)) * 2;
static_assert(N <= 16 && 8 * N <= THREADS, "an element a thread");
static_assert(H * SPLITS <= CTAS && PAIRED_UNITS <= CTAS, "a unit a CTA");
static_assert(F / 2 % (GATE * 8) == 0 && H * D / 2 % (D / SPLITS) == 0, "a half of K is whole CTAs' writing");
constexpr int CACHE_BYTES = KEYS * (K_STRIDE + V_STRIDE) * 2;
constexpr int SUM_BYTES = WARPS * 16 * SUM_STRIDE * 4, GATE_SUM_BYTES = WARPS / GATE_WM * GATE * 16 * SUM_STRIDE * 4;
constexpr int SCORE_BYTES = N * K_STRIDE * 2 + COLUMNS * (S_STRIDE * 4 + P_STRIDE * 2);
// Shared memory: ring; rows of the phase, or keys and values; partial sums, or queries and scores; a pair's exchange.
constexpr int ROWS_AT = SLOTS * CHUNK * 1024;
constexpr int GATE_SUMS_AT = ROWS_AT + (N * W * 2 + 127) / 128 * 128;  // behind gate_up's rows
constexpr int ROWS_END = at_least(ROWS_AT + at_least(ROWS_BYTES, CACHE_BYTES), GATE_SUMS_AT + GATE_SUM_BYTES);
constexpr int SUMS_AT = (ROWS_END + 127) / 128 * 128;
constexpr int EXCHANGE_AT = SUMS_AT + (at_least(SUM_BYTES, SCORE_BYTES) + 127) / 128 * 128;
constexpr int BARRIERS_AT = EXCHANGE_AT + (8 * N * 4 + 127) / 128 * 128;

#define MINUS_INFINITY __int_as_float(0xff800000)

extern __shared__ __align__(128) char memory[];

struct Arguments {
  int steps, slots;             // flow steps; rows of the key and value buffers
  const float* modulation;      // (steps, 2 * LAYERS + 1, 3, W): scale, shift, gate
  const char *qkv, *out, *gate_up, *down;  // packed, layer after layer
  const float *cosines, *sines;  // (positions, D / 2)
  const int* length;            // valid prefix tokens
  const u16 *keys, *values;     // (LAYERS, KV, slots, D), the prefix's
  float* x_t;                   // (N, A), noise in, actions out
  const float *in_weights, *in_bias;    // (A, W), (steps, W)
  const float *out_weights, *out_bias;  // (A, W), (A); -1/steps folded in
  uint2* mail;                  // zeros before, see Mail
};

// Words {data, round}. x, q, attended, hidden, keys and values hold two bf16 each; parts and stats one float.
struct Mail {
  static constexpr int X = N * W / 2, Q = N * H * D / 2, HIDDEN = N * F / 2, NEW = N * KV * D / 2;
  static constexpr int PARTS = H * SPLITS * N * D, STATS = H * SPLITS * N * 2;
  static constexpr int WORDS = 2 * X + 2 * Q + HIDDEN + 2 * NEW + PARTS + STATS;  // of one parity
  uint2 *x, *middle, *q, *attended, *hidden, *keys, *values, *parts, *stats;
  u32 round;  // never 0

  __device__ Mail(uint2* base, u32 round) : round(round) {
    x = base + (u64)(round & 1) * WORDS;  // enters a layer
    middle = x + X;                       // between attention and MLP
    q = middle + X;
    attended = q + Q;
    hidden = attended + Q;
    keys = hidden + HIDDEN;               // the suffix's
    values = keys + NEW;
    parts = values + NEW;                 // (H, SPLITS, N, D)
    stats = parts + PARTS;                // (H, SPLITS, N, {maximum, sum})
  }
};

// ---------------------------------------------------------------- small parts

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  u64 address;
  asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(pointer));
  return (u32)address;
}

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ u32 narrow2(float first, float second) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

__device__ __forceinline__ u16 narrow(float value) { return (u16)narrow2(value, 0.0f); }

// All warps that compute.
__device__ __forceinline__ void sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// Two words, past the L1. Each word arrives whole.
__device__ __forceinline__ uint4 ask(const uint2* words) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(words) : "memory");
  return v;
}

__device__ __forceinline__ bool answered(uint4 v, u32 round) { return v.y == round && v.w == round; }

__device__ __forceinline__ void tell(uint2* word, u32 data, u32 round) {
  asm volatile("st.volatile.global.v2.u32 [%0], {%1, %2};" ::"l"(word), "r"(data), "r"(round) : "memory");
}

__device__ __forceinline__ void tell2(uint2* words, u32 first, u32 second, u32 round) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(words), "r"(first), "r"(round), "r"(second) : "memory");
}

// All warps go on when COUNT CTAs have written: one warp asks for a pair of words of each, `stride` words apart. Many that
// ask at once would only slow down the answer.
template <int COUNT>
__device__ __forceinline__ void await(const uint2* words, int stride, u32 round) {
  constexpr int EACH = (COUNT + 31) / 32;
  if (threadIdx.x < 32) {
    bool all;
    do {
      uint4 v[EACH];
      all = true;
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int cta = i * 32 + threadIdx.x;
        v[i] = ask(words + (cta < COUNT ? cta : COUNT - 1) * stride);
      }
#pragma unroll
      for (int i = 0; i < EACH; ++i) all &= answered(v[i], round);
    } while (!__all_sync(0xffffffffu, all));
  }
  sync();
}

// COUNT pairs of words, `stride` words apart, all asked for at once, and again should one not be there yet.
template <int COUNT>
__device__ __forceinline__ void read(const uint2* words, int stride, u32 round, uint4 (&v)[COUNT]) {
  bool all;
  do {
    all = true;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] = ask(words + i * stride);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) all &= answered(v[i], round);
  } while (!all);
}

__device__ __forceinline__ void copy16_async(const void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Whether this thread's whole warp lies beyond the first `threads`.
__device__ __forceinline__ bool warp_beyond(int threads) { return (threadIdx.x & ~31) >= threads; }

__device__ __forceinline__ float gelu(float x) {  // tanh form
  return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// ---------------------------------------------------------------- barriers

__device__ __forceinline__ void init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive; the barrier opens when as many bytes have also been stored.
__device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}

__device__ __forceinline__ u32 there(const void* pointer, u32 rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

// Store into the other CTA of the pair, and count the bytes on its barrier.
__device__ __forceinline__ void send(float* to, float value, u64* barrier, u32 rank) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there(to, rank)),
               "r"(__float_as_uint(value)), "r"(there(barrier, rank))
               : "memory");
}

// ---------------------------------------------------------------- ring of weights

struct Ring {
  int slot = 0;
  u32 parity = 0;

  static __device__ u64* arrived(int slot) { return (u64*)(memory + BARRIERS_AT) + slot; }
  static __device__ u64* consumed(int slot) { return arrived(SLOTS + slot); }

  __device__ void advance() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }

  // By the producer: `kilobytes` from `source`, a chunk at a time, each when its slot is free and all but IN_FLIGHT - 1 of
  // the chunks before have arrived: more at once would queue up in the memory system, and what CTAs tell each other behind.
  __device__ void fill(const char* source, int kilobytes, Ring& oldest, int& started) {
#pragma unroll 1
    for (int done = 0; done < kilobytes; done += CHUNK) {
      const u32 bytes = 1024 * (kilobytes - done < CHUNK ? kilobytes - done : CHUNK);
      if (++started > IN_FLIGHT) {
        wait(arrived(oldest.slot), oldest.parity);
        oldest.advance();
      }
      wait(consumed(slot), parity ^ 1);
      expect(arrived(slot), bytes);
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(memory + slot * CHUNK * 1024)),
                   "l"(source + done * 1024), "r"(bytes), "r"(shared_address(arrived(slot)))
                   : "memory");
      advance();
    }
  }
};

__device__ __forceinline__ void produce(const Arguments& p) {
  Ring ring, oldest;
  int started = 0;
#pragma unroll 1
  for (int step = 0; step < p.steps; ++step)
#pragma unroll 1
    for (u64 layer = 0; layer < LAYERS; ++layer) {
      constexpr int QKV_KB = W / 32, OUT_KB = H * D / 64, GATE_KB = GATE * W / 32, DOWN_KB = F / 64;
      for (int u = blockIdx.x; u < QKV_UNITS; u += CTAS)
        ring.fill(p.qkv + (layer * QKV_UNITS + u) * QKV_KB * 1024, QKV_KB, oldest, started);
      for (int u = blockIdx.x; u < PAIRED_UNITS; u += CTAS)
        ring.fill(p.out + (layer * PAIRED_UNITS + u) * OUT_KB * 1024, OUT_KB, oldest, started);
      for (int u = blockIdx.x; u < GATE_UNITS; u += CTAS)
        ring.fill(p.gate_up + (layer * GATE_UNITS + u) * GATE_KB * 1024, GATE_KB, oldest, started);
      for (int u = blockIdx.x; u < PAIRED_UNITS; u += CTAS)
        ring.fill(p.down + (layer * PAIRED_UNITS + u) * DOWN_KB * 1024, DOWN_KB, oldest, started);
    }
}

// ---------------------------------------------------------------- products

// Where rows of STEPS x 32 values hold column `column`, a multiple of 4, of a token. Where two rows would meet in the same
// banks, odd ones are shifted by half a period.
template <int STEPS>
__device__ __forceinline__ int place(int token, int column) {
  return token * STEPS * 32 + (STEPS % 2 ? column : column ^ (token & 1) << 5);
}

// One unit: TILES x 16 weight rows over STEPS x 32 of K, by WM warps along the tiles and the rest along K, times the rows
// in shared memory. Leaves partial sums (WK, TILES * 16, SUM_STRIDE) at INTO.
template <int TILES, int WM, int STEPS, int INTO = SUMS_AT>
struct Product {
  static constexpr int WK = WARPS / WM, MINE = TILES / WM, ROWS = TILES * 16;
  static constexpr int PER_CHUNK = CHUNK / TILES;                 // steps
  static constexpr int DEPTH = (PER_CHUNK + WK - 1) / WK;         // of them, for each warp
  static constexpr int BATCH = STEPS % (2 * PER_CHUNK) == 0 ? 2 : 1;  // chunks at a time
  static_assert(WARPS % WM == 0 && TILES % WM == 0 && CHUNK % TILES == 0, "warps must divide the tiles, and tiles a chunk");

  static __device__ void multiply(Ring& ring) {
    const u16* rows = (const u16*)(memory + ROWS_AT);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int wm = warp % WM, wk = warp / WM;
    float total[MINE][GROUPS][4] = {};
#pragma unroll 1
    for (int first = 0; first < STEPS; first += BATCH * PER_CHUNK) {
      Ring next = ring;
#pragma unroll
      for (int c = 0; c < BATCH; ++c) {
        wait(Ring::arrived(next.slot), next.parity);
        next.advance();
      }
      next = ring;
#pragma unroll
      for (int c = 0; c < BATCH; ++c) {
        const char* chunk = memory + next.slot * CHUNK * 1024;
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
          const int local = wk + d * WK, step = first + c * PER_CHUNK + local;
          if ((PER_CHUNK % WK && local >= PER_CHUNK) || (STEPS % PER_CHUNK && step >= STEPS)) continue;
          uint4 b[GROUPS];
#pragma unroll
          for (int j = 0; j < GROUPS; ++j) {
            const int token = j * 8 + g < N ? j * 8 + g : N - 1;  // columns beyond N are computed and never read
            b[j] = *(const uint4*)(rows + place<STEPS>(token, step * 32 + t * 8));
          }
          const uint4* tile = (const uint4*)(chunk + (local * TILES + wm * MINE) * 1024) + lane;
#pragma unroll
          for (int m = 0; m < MINE; ++m) {
            const uint4 head = tile[m * 64], tail = tile[m * 64 + 32];
#pragma unroll
            for (int j = 0; j < GROUPS; ++j) mma(total[m][j], head.x, head.y, head.z, head.w, b[j].x, b[j].y);
#pragma unroll
            for (int j = 0; j < GROUPS; ++j) mma(total[m][j], tail.x, tail.y, tail.z, tail.w, b[j].z, b[j].w);
          }
        }
        next.advance();
      }
      __syncwarp();
#pragma unroll
      for (int c = 0; c < BATCH; ++c) {
        if (lane == 0) arrive(Ring::consumed(ring.slot));
        ring.advance();
      }
    }
    float* sums = (float*)(memory + INTO);
#pragma unroll
    for (int m = 0; m < MINE; ++m)
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        float* at = sums + ((wk * ROWS) + (wm * MINE + m) * 16 + g) * SUM_STRIDE + j * 8 + 2 * t;
        *(float2*)at = make_float2(total[m][j][0], total[m][j][1]);
        *(float2*)(at + 8 * SUM_STRIDE) = make_float2(total[m][j][2], total[m][j][3]);
      }
    sync();
  }

  static __device__ float sum(int row, int token) {
    const float* sums = (const float*)(memory + INTO);
    float value = 0.0f;
#pragma unroll
    for (int k = 0; k < WK; ++k) value += sums[(k * ROWS + row) * SUM_STRIDE + token];
    return value;
  }
};

using GateProduct = Product<GATE, GATE_WM, W / 32, GATE_SUMS_AT>;

// ---------------------------------------------------------------- norm

// Root-mean-square norm of x (N, W) with adaRMS scale and shift, bf16 into shared memory. A thread owns four columns, so
// that it can hold its part of the modulation before the rows are there.
struct Norm {
  static constexpr int BLOCKS = (W + THREADS * 4 - 1) / (THREADS * 4);
  float4 scale[BLOCKS], shift[BLOCKS];

  static __device__ int column(int block) { return (block * THREADS + threadIdx.x) * 4; }

  __device__ explicit Norm(const float* modulation) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      scale[b] = shift[b] = make_float4(0, 0, 0, 0);
      if (column(b) < W) {
        scale[b] = *(const float4*)(modulation + column(b));
        shift[b] = *(const float4*)(modulation + W + column(b));
      }
    }
  }

  // A lane keeps the sums of REST of its rows, and gives those of the others to a lane that keeps them.
  template <int REST>
  static __device__ void halve(float (&sums)[16]) {
    const bool upper = threadIdx.x & 2 * REST;
#pragma unroll
    for (int r = 0; r < REST; ++r) {
      const float keep = upper ? sums[r + REST] : sums[r], give = upper ? sums[r] : sums[r + REST];
      sums[r] = keep + __shfl_xor_sync(0xffffffffu, give, 2 * REST);
    }
  }

  __device__ void apply(const uint2* x, u32 round) const {
    __shared__ float partial[WARPS][16];
    u16* rows = (u16*)(memory + ROWS_AT);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint4 v[BLOCKS][N];
    float squares[16] = {};
    await<W / 8>(x + (N - 1) * W / 2, 4, round);  // each CTA of a pair wrote eight columns
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      if (column(b) >= W) continue;
      read(x + column(b) / 2, W / 2, round, v[b]);
#pragma unroll
      for (int r = 0; r < N; ++r)
        squares[r] += low(v[b][r].x) * low(v[b][r].x) + high(v[b][r].x) * high(v[b][r].x) + low(v[b][r].z) * low(v[b][r].z) +
                      high(v[b][r].z) * high(v[b][r].z);
    }
    // Each exchange halves the rows that a lane sums for: in the end lanes 2r and 2r + 1 hold row r.
    halve<8>(squares);
    halve<4>(squares);
    halve<2>(squares);
    halve<1>(squares);
    squares[0] += __shfl_xor_sync(0xffffffffu, squares[0], 1);
    if (!(lane & 1)) partial[warp][lane >> 1] = squares[0];
    sync();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += partial[w][lane & 15];
    const float factor = rsqrtf(sum / W + EPSILON);
#pragma unroll
    for (int r = 0; r < N; ++r) {
      const float f = __shfl_sync(0xffffffffu, factor, r);
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        if (column(b) >= W) continue;
        const u32 first = v[b][r].x, second = v[b][r].z;
        *(uint2*)(rows + place<W / 32>(r, column(b))) =
            make_uint2(narrow2(low(first) * f * (1.0f + scale[b].x) + shift[b].x, high(first) * f * (1.0f + scale[b].y) + shift[b].y),
                       narrow2(low(second) * f * (1.0f + scale[b].z) + shift[b].z, high(second) * f * (1.0f + scale[b].w) + shift[b].w));
      }
    }
    sync();
  }
};

// ---------------------------------------------------------------- attention

// This CTA's share of a head's keys.
struct Share {
  int head, rank, prefix, first, count, tiles;
  const u16 *keys, *values;

  __device__ Share(const Arguments& p, int layer) {
    head = blockIdx.x / SPLITS, rank = blockIdx.x % SPLITS, prefix = *p.length;
    const int total = prefix + N, share = ((total + SPLITS - 1) / SPLITS + 7) / 8 * 8;
    first = rank * share;
    count = total - first < share ? (total - first > 0 ? total - first : 0) : share;
    tiles = (count + 15) / 16;
    const u64 offset = (((u64)layer * KV + head / (H / KV)) * p.slots + first) * D;
    keys = p.keys + offset;
    values = p.values + offset;
  }

  static __device__ u16* k_shared() { return (u16*)(memory + ROWS_AT); }
  static __device__ u16* v_shared() { return k_shared() + KEYS * K_STRIDE; }
  __device__ int standing() const { return prefix - first < 0 ? 0 : (prefix - first < count ? prefix - first : count); }

  // What stands since prefill, and zeros behind the last key.
  __device__ void fetch_ahead() const {
#pragma unroll 1
    for (int i = threadIdx.x; i < standing() * (D / 8); i += THREADS) {
      const int row = i / (D / 8), column = i % (D / 8) * 8;
      copy16_async(k_shared() + row * K_STRIDE + column, keys + row * D + column);
      copy16_async(v_shared() + row * V_STRIDE + column, values + row * D + column);
    }
#pragma unroll 1
    for (int i = count * V_STRIDE + threadIdx.x; i < tiles * 16 * V_STRIDE; i += THREADS) v_shared()[i] = 0;
  }
};

// Scores, softmax and output of one share, into parts and stats.
__device__ __forceinline__ void attend(const Share& my, const Mail& mail) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  u16 *k_shared = Share::k_shared(), *v_shared = Share::v_shared();
  u16* q_shared = (u16*)(memory + SUMS_AT);             // (N, K_STRIDE)
  float* scores = (float*)(q_shared + N * K_STRIDE);    // (COLUMNS, S_STRIDE)
  u16* weights = (u16*)(scores + COLUMNS * S_STRIDE);   // (COLUMNS, P_STRIDE)
  const int kv = my.head / (H / KV);
  await<D / 16>(mail.q + ((N - 1) * H + my.head) * (D / 2), 4, mail.round);
#pragma unroll 1
  for (int i = threadIdx.x; i < N * (D / 4); i += THREADS) {
    const int token = i / (D / 4), column = i % (D / 4) * 4;
    uint4 v[1];
    read(mail.q + (token * H * D + my.head * D + column) / 2, 0, mail.round, v);
    *(uint2*)(q_shared + token * K_STRIDE + column) = make_uint2(v[0].x, v[0].z);
  }
#pragma unroll 1
  for (int i = my.standing() * (D / 4) + threadIdx.x; i < my.count * (D / 4); i += THREADS) {  // the suffix's keys and values
    const int row = i / (D / 4), column = i % (D / 4) * 4, token = my.first + row - my.prefix;
    uint4 k[1], v[1];
    read(mail.keys + ((token * KV + kv) * D + column) / 2, 0, mail.round, k);
    read(mail.values + ((token * KV + kv) * D + column) / 2, 0, mail.round, v);
    *(uint2*)(k_shared + row * K_STRIDE + column) = make_uint2(k[0].x, k[0].z);
    *(uint2*)(v_shared + row * V_STRIDE + column) = make_uint2(v[0].x, v[0].z);
  }
  wait_copies();
  sync();
#pragma unroll 1
  for (int tile = warp; tile < my.tiles; tile += WARPS) {  // scores^T = keys x queries^T
    float s[GROUPS][4] = {};
#pragma unroll 4
    for (int step = 0; step < D / 32; ++step) {
      const uint4 upper = *(const uint4*)(k_shared + (tile * 16 + g) * K_STRIDE + step * 32 + t * 8);
      const uint4 lower = *(const uint4*)(k_shared + (tile * 16 + 8 + g) * K_STRIDE + step * 32 + t * 8);
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        const int token = j * 8 + g < N ? j * 8 + g : N - 1;
        const uint4 b = *(const uint4*)(q_shared + token * K_STRIDE + step * 32 + t * 8);
        mma(s[j], upper.x, lower.x, upper.y, lower.y, b.x, b.y);
        mma(s[j], upper.z, lower.z, upper.w, lower.w, b.z, b.w);
      }
    }
#pragma unroll
    for (int j = 0; j < GROUPS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = tile * 16 + g + (i >> 1) * 8, token = j * 8 + 2 * t + (i & 1);
        scores[token * S_STRIDE + key] = key < my.count ? s[j][i] : MINUS_INFINITY;
      }
  }
  sync();
#pragma unroll 1
  for (int base = warp * 2; base < N; base += WARPS * 2) {  // half a warp a token
    constexpr int MOST = (KEYS + 15) / 16;
    const int token = base + (lane >> 4), half = lane & 15;
    float score[MOST], top = MINUS_INFINITY, sum = 0.0f;
#pragma unroll
    for (int k = 0; k < MOST; ++k) {
      score[k] = k < my.tiles ? scores[token * S_STRIDE + k * 16 + half] : MINUS_INFINITY;
      top = fmaxf(top, score[k]);
    }
#pragma unroll
    for (int offset = 8; offset; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
#pragma unroll
    for (int k = 0; k < MOST; ++k) {
      const float weight = score[k] == MINUS_INFINITY ? 0.0f : __expf(score[k] - top);
      weights[token * P_STRIDE + k * 16 + half] = narrow(weight);
      sum += weight;
    }
#pragma unroll
    for (int offset = 8; offset; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (half == 0 && token < N)
      tell2(mail.stats + (blockIdx.x * N + token) * 2, __float_as_uint(top), __float_as_uint(sum), mail.round);
  }
  sync();
#pragma unroll 1
  for (int tile = warp; tile < D / 16; tile += WARPS) {  // output^T = values^T x weights^T
    float o[GROUPS][4] = {};
#pragma unroll 4
    for (int step = 0; step < my.tiles; ++step) {
      u32 a0, a1, a2, a3;
      const u16* from = v_shared + (step * 16 + (lane >> 4) * 8 + (lane & 7)) * V_STRIDE + tile * 16 + (lane >> 3 & 1) * 8;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(a0), "=r"(a1), "=r"(a2), "=r"(a3)
                   : "r"(shared_address(from))
                   : "memory");
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        const u16* b = weights + (j * 8 + g) * P_STRIDE + step * 16 + 2 * t;
        mma(o[j], a0, a1, a2, a3, *(const u32*)b, *(const u32*)(b + 8));
      }
    }
#pragma unroll
    for (int j = 0; j < GROUPS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = j * 8 + 2 * t + (i & 1);
        if (token < N)
          tell(mail.parts + (blockIdx.x * N + token) * D + tile * 16 + g + (i >> 1) * 8, __float_as_uint(o[j][i]), mail.round);
      }
  }
}

// Add up what a head's CTAs found, each by how much it weighs. A CTA has a slice of the dims. SLICE lanes read a row of it,
// whole sectors at a time; THREADS / SLICE rows at once, which are PORTIONS of the CTAs for each token.
__device__ __forceinline__ void combine(const Share& my, const Mail& mail) {
  constexpr int DIMS = D / SPLITS, SLICE = DIMS / 2, PORTIONS = THREADS / SLICE / N < SPLITS ? THREADS / SLICE / N : SPLITS;
  constexpr int EACH = (SPLITS + PORTIONS - 1) / PORTIONS;
  static_assert(PORTIONS >= 1 && THREADS >= 16, "a token's slice for each thread");
  float* shares = (float*)(memory + SUMS_AT);        // (SPLITS, N), how much each CTA's part weighs
  float* sums = shares + (SPLITS * N + 3) / 4 * 4;   // (PORTIONS, N, DIMS)
  await<SPLITS>(mail.parts + (my.head * SPLITS * N + N - 1) * D + D - 2, N * D, mail.round);
  const int lane = threadIdx.x % SLICE, token = threadIdx.x / SLICE % N, portion = threadIdx.x / SLICE / N;
  uint4 piece[EACH];
  const bool reads = portion < PORTIONS;
  if (reads) {
    bool all;
    do {
      all = true;
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const int r = portion + k * PORTIONS < SPLITS ? portion + k * PORTIONS : SPLITS - 1;
        piece[k] = ask(mail.parts + ((my.head * SPLITS + r) * N + token) * D + my.rank * DIMS + lane * 2);
      }
#pragma unroll
      for (int k = 0; k < EACH; ++k) all &= answered(piece[k], mail.round);
    } while (!all);
  }
  __syncwarp();
#pragma unroll 1
  for (int i = threadIdx.x; i < (N * SPLITS + 31) / 32 * 32; i += THREADS) {  // SPLITS lanes a token
    const int of = i / SPLITS < N ? i / SPLITS : N - 1, r = i % SPLITS;
    uint4 v[1];
    read(mail.stats + ((my.head * SPLITS + r) * N + of) * 2, 0, mail.round, v);
    __syncwarp();
    const float mine = __uint_as_float(v[0].x);
    float top = mine;
#pragma unroll
    for (int offset = SPLITS / 2; offset; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const float weight = __expf(mine - top);
    float sum = weight * __uint_as_float(v[0].z);
#pragma unroll
    for (int offset = SPLITS / 2; offset; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (i / SPLITS < N) shares[r * N + of] = weight / sum;
  }
  sync();
  if (reads) {
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      if (portion + k * PORTIONS >= SPLITS) continue;
      const float share = shares[(portion + k * PORTIONS) * N + token];
      sum.x += share * __uint_as_float(piece[k].x), sum.y += share * __uint_as_float(piece[k].z);
    }
    *(float2*)(sums + (portion * N + token) * DIMS + lane * 2) = sum;
  }
  sync();
#pragma unroll 1
  for (int i = threadIdx.x; i < N * SLICE; i += THREADS) {
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int k = 0; k < PORTIONS; ++k) {
      const float2 part = *(const float2*)(sums + (k * N + i / SLICE) * DIMS + i % SLICE * 2);
      sum.x += part.x, sum.y += part.y;
    }
    tell(mail.attended + (i / SLICE * H * D + my.head * D + my.rank * DIMS) / 2 + i % SLICE, narrow2(sum.x, sum.y), mail.round);
  }
}

// ---------------------------------------------------------------- phases

// Where a thread's pair of a qkv tile goes: 8 dims of a head's first half, and their rotary partners in the second half.
struct HeadPair {
  int token = threadIdx.x / 8, row = threadIdx.x % 8;
  float cosine = 1.0f, sine = 0.0f;
  uint2* to;

  // Looks everything up before the product is there.
  __device__ HeadPair(const Arguments& p, const Mail& mail, int unit, int prefix) {
    if (threadIdx.x >= 8 * N) return;
    const int head = unit / (D / 16), dim = unit % (D / 16) * 8 + row, position = prefix + token;
    if (head < H + KV) cosine = p.cosines[position * (D / 2) + dim], sine = p.sines[position * (D / 2) + dim];
    to = head < H ? mail.q + (token * H + head) * (D / 2)
         : head < H + KV ? mail.keys + (token * KV + head - H) * (D / 2) : mail.values + (token * KV + head - H - KV) * (D / 2);
    to += dim / 2;
  }

  __device__ void store(u32 round) const {
    using P = Product<1, 1, W / 32>;
    if (warp_beyond(8 * N)) return;
    const int safe = token < N ? token : N - 1;
    const float a = P::sum(row, safe), b = P::sum(row + 8, safe);
    const float first = a * cosine - b * sine, second = b * cosine + a * sine;
    const float first_next = __shfl_down_sync(0xffffffffu, first, 1), second_next = __shfl_down_sync(0xffffffffu, second, 1);
    if (row % 2 || token >= N) return;
    tell(to, narrow2(first, first_next), round);
    tell(to + D / 4, narrow2(second, second_next), round);
  }
};

// Rows of a tile: 8 of gate, then the same 8 of up.
__device__ __forceinline__ void store_hidden(const Mail& mail, int unit) {
  using P = GateProduct;
  constexpr int OUT = GATE * 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < OUT / 2 * N; i += THREADS) {
    const int token = i % N, pair = i / N * 2, row = pair / 8 * 16 + pair % 8;
    const float first = gelu(P::sum(row, token)) * P::sum(row + 8, token);
    const float second = gelu(P::sum(row + 1, token)) * P::sum(row + 9, token);
    tell(mail.hidden + (token * F + unit * OUT + pair) / 2, narrow2(first, second), mail.round);
  }
}

// to = x + gate * (input @ weights^T), for `out` and `down`. Each CTA of a pair takes half of K, and in the end half the
// rows. Of the input, a CTA wrote WRITTEN columns. Input and `x` are of `round`, `to` is written in `to_round`.
template <int K, int WRITTEN>
__device__ __forceinline__ void project(Ring& ring, u32& parity, const uint2* input, u32 round, const uint2* x,
                                        const float* gate, uint2* to, u32 to_round) {
  using P = Product<1, 1, K / 64>;
  if (blockIdx.x >= PAIRED_UNITS) return;
  u16* rows = (u16*)(memory + ROWS_AT);
  float* exchange = (float*)(memory + EXCHANGE_AT);  // (8, N)
  u64* exchanged = Ring::arrived(2 * SLOTS);
  const int half = blockIdx.x & 1;
  const int row = threadIdx.x % 8, token = threadIdx.x / 8, column = blockIdx.x / 2 * 16 + half * 8 + row;
  const bool mine = token < N;
  const float factor = mine ? gate[column] : 0.0f;
  await<K / 2 / WRITTEN>(input + ((N - 1) * K + half * (K / 2)) / 2, WRITTEN / 2, round);
  constexpr int PAIRS = K / 8;  // of words, in a token's half
  constexpr int BLOCKS = (PAIRS + THREADS - 1) / THREADS, AT_ONCE = BLOCKS * N <= 24 ? BLOCKS : 1;  // as registers allow
#pragma unroll
  for (int first = 0; first < BLOCKS; first += AT_ONCE) {
    uint4 v[AT_ONCE][N];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int b = 0; b < AT_ONCE; ++b)
#pragma unroll
        for (int r = 0; r < N; ++r) {
          const int pair = (first + b) * THREADS + threadIdx.x;
          v[b][r] = ask(input + r * (K / 2) + (half * (K / 2) + (pair < PAIRS ? pair : PAIRS - 1) * 4) / 2);
        }
#pragma unroll
      for (int b = 0; b < AT_ONCE; ++b)
#pragma unroll
        for (int r = 0; r < N; ++r) all &= answered(v[b][r], round);
    } while (!all);
#pragma unroll
    for (int b = 0; b < AT_ONCE; ++b)
#pragma unroll
      for (int r = 0; r < N; ++r) {
        const int pair = (first + b) * THREADS + threadIdx.x;
        if (pair < PAIRS) *(uint2*)(rows + place<K / 64>(r, pair * 4)) = make_uint2(v[b][r].x, v[b][r].z);
      }
  }
  float before = 0.0f;
  if (mine) {
    uint4 v[1];
    read(x + (token * W + column) / 4 * 2, 0, round, v);
    const u32 pair = column & 2 ? v[0].z : v[0].x;
    before = column & 1 ? high(pair) : low(pair);
  }
  sync();
  P::multiply(ring);
  if (threadIdx.x == 0) expect(exchanged, 8 * N * 4);
  if (!warp_beyond(8 * N)) {
    const int safe = mine ? token : N - 1;
    if (mine) send(exchange + row * N + token, P::sum((half ^ 1) * 8 + row, token), exchanged, half ^ 1);
    const float here = P::sum(half * 8 + row, safe);
    wait(exchanged, parity);
    const float value = before + (here + exchange[row * N + safe]) * factor;
    const float next = __shfl_down_sync(0xffffffffu, value, 1);
    if (mine && row % 2 == 0) tell(to + (token * W + column) / 2, narrow2(value, next), to_round);
  }
  parity ^= 1;
}

// x_t (A) float32 -> a suffix row.
__device__ __forceinline__ void embed(const float* action, const float* weights, const float* bias, uint2* row, u32 round) {
#pragma unroll 1
  for (int i = threadIdx.x * 2; i < W; i += THREADS * 2) {
    float2 value = *(const float2*)(bias + i);
#pragma unroll 16
    for (int a = 0; a < A; ++a) {
      const float2 w = *(const float2*)(weights + a * W + i);
      value.x += action[a] * w.x, value.y += action[a] * w.y;
    }
    tell(row + i / 2, narrow2(value.x, value.y), round);
  }
}

// Final norm, velocity, Euler update and the next step's row, for the token of this CTA. `mail` is the next round's.
__device__ __forceinline__ void finish(const Arguments& p, const Mail& mail, int step) {
  __shared__ __align__(16) float normed[W];
  __shared__ float action[A], squares[WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, token = blockIdx.x;
  const float* modulation = p.modulation + ((u64)step * (2 * LAYERS + 1) + 2 * LAYERS) * 3 * W;
  float sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x * 4; i < W; i += THREADS * 4) {
    uint4 v[1];
    read(mail.x + (token * W + i) / 2, 0, mail.round, v);
    const float4 f = make_float4(low(v[0].x), high(v[0].x), low(v[0].z), high(v[0].z));
    *(float4*)(normed + i) = f;
    sum += f.x * f.x + f.y * f.y + f.z * f.z + f.w * f.w;
  }
  sum = warp_sum(sum);
  if (lane == 0) squares[warp] = sum;
  sync();
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += squares[w];
  const float factor = rsqrtf(sum / W + EPSILON);
#pragma unroll 4
  for (int i = threadIdx.x; i < W; i += THREADS) normed[i] = normed[i] * factor * (1.0f + modulation[i]) + modulation[W + i];
  sync();
  constexpr int EACH = (A + WARPS - 1) / WARPS;  // outputs of a warp
  float values[EACH] = {};
#pragma unroll 4
  for (int i = lane; i < W; i += 32)
#pragma unroll
    for (int k = 0; k < EACH; ++k) values[k] += normed[i] * p.out_weights[(warp + k * WARPS < A ? warp + k * WARPS : A - 1) * W + i];
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const float value = warp_sum(values[k]);
    const int a = warp + k * WARPS;
    if (lane == 0 && a < A) {
      action[a] = p.x_t[token * A + a] + value + p.out_bias[a];
      p.x_t[token * A + a] = action[a];
    }
  }
  sync();
  // A round of its own: the layer that ended wrote x in mail.round, and some may still be reading it.
  const Mail next(p.mail, mail.round + 1);
  if (step + 1 < p.steps) embed(action, p.in_weights, p.in_bias + (step + 1) * W, next.x + token * (W / 2), next.round);
}

__device__ __forceinline__ void compute(const Arguments& p) {
  Ring ring;
  u32 parity = 0, round = 1;
  if (blockIdx.x < N) {
    const Mail mail(p.mail, round);
    embed(p.x_t + blockIdx.x * A, p.in_weights, p.in_bias, mail.x + blockIdx.x * (W / 2), round);
  }
#pragma unroll 1
  for (int step = 0; step < p.steps; ++step) {
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; ++layer, ++round) {
      const float* modulation = p.modulation + ((u64)step * (2 * LAYERS + 1) + 2 * layer) * 3 * W;
      const Mail mail(p.mail, round), next(p.mail, round + 1);
      const Share my(p, layer);
      if (blockIdx.x < QKV_UNITS) Norm(modulation).apply(mail.x, round);
#pragma unroll 1
      for (int unit = blockIdx.x; unit < QKV_UNITS; unit += CTAS) {
        if (unit > blockIdx.x) sync();
        const HeadPair pair(p, mail, unit, my.prefix);
        Product<1, 1, W / 32>::multiply(ring);
        if (unit + CTAS >= QKV_UNITS && blockIdx.x < H * SPLITS) my.fetch_ahead();
        pair.store(round);
      }
      if (blockIdx.x < H * SPLITS) {
        if (blockIdx.x >= QKV_UNITS) my.fetch_ahead();
        sync();
        attend(my, mail);
        combine(my, mail);
      }
      sync();
      project<H * D, D / SPLITS>(ring, parity, mail.attended, round, mail.x, modulation + 2 * W, mail.middle, round);
      sync();
      if (blockIdx.x < GATE_UNITS) Norm(modulation + 3 * W).apply(mail.middle, round);
#pragma unroll 1
      for (int unit = blockIdx.x; unit < GATE_UNITS; unit += CTAS) {
        if (unit > blockIdx.x) sync();
        GateProduct::multiply(ring);
        store_hidden(mail, unit);
      }
      sync();
      project<F, GATE * 8>(ring, parity, mail.hidden, round, mail.middle, modulation + 5 * W, next.x, next.round);
      sync();
    }
    if (blockIdx.x < N) finish(p, Mail(p.mail, round), step);
    ++round;
    sync();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) denoise(const __grid_constant__ Arguments p) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < SLOTS; ++s) init(Ring::arrived(s), 1), init(Ring::consumed(s), WARPS);
    init(Ring::arrived(2 * SLOTS), 1);
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }
  // All threads of the pair: nobody sends to a neighbour whose barriers are not there.
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x >= THREADS) {
    if (threadIdx.x == THREADS) produce(p);
  } else {
    compute(p);
  }
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
