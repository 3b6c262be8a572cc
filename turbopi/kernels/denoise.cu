// The whole denoise loop for one observation in one kernel that stays on the GPU: all layers, all steps (Hopper and later).
//
// With a dozen suffix rows a layer is latency, not arithmetic: five short phases, each of which needs all of the one before.
//   qkv        norm, queries, keys, values, rotary positions
//   attention  over the prefix's and the suffix's keys, split over CTAs and added up
//   out        attention's output product, gated residual
//   gate_up    norm, gate and up, GeGLU
//   down       MLP's output product, gated residual
// A CTA a multiprocessor takes the same share of the weights in every phase. What CTAs tell each other goes through global
// memory, into words that hold EMPTY until they are written: a reader asks again until none of its words is EMPTY. No
// barrier, and the answer to the question is the data. EMPTY is a NaN that no arithmetic makes.
//
// Rounds count layers, and words of four rounds in a row lie apart ("generations"). In round r a CTA makes those words of
// generation r + 2 EMPTY again that it writes, while it waits for something else. They hold round r - 2, which everybody has
// read: round r would not have begun otherwise. A fence follows, some phases later where it finds the stores done, before the
// CTA writes x of the next round, or anything if it never writes x; and nobody asks for round r + 2 who has not read that.
//
// A round trip to L2 is as long as a phase computes. So whatever does not depend on what a phase waits for is asked for
// before it waits, and once most of it is there everybody asks for all of it, then again for what was missing.
//
// Weights do not depend on any phase, so a producer warp copies them in the order of use through a ring in shared memory
// and never stops for a phase. They pass L2 as what goes first, so that the prefix's keys and values can stay. These, and a
// layer's modulation, are brought to L2 some phases before they are fetched.
//
// Products are computed transposed, weights x activations^T: 16 weight rows ("tile") are the M of m16n8k16, tokens its N.
// Weights are packed at load in the order in which lanes consume them (`pack` in denoise.py): 32 of K is a "step", 1 KB a
// tile. A "unit" is what a CTA computes at once: a tile, for `out` and `down` over half of K (a cluster of two CTAs shares
// the tile), for `gate_up` GATE tiles.
//
// In fp8 weights are E4M3 (`pack_e4m3`), and so are the inputs of products, rounded by whoever makes them: `attended` and
// `hidden` before they travel, norms on their way into shared memory. Hopper's mma.sync knows no E4M3; f16 holds every E4M3
// number, so that rows become f16 once, as they enter shared memory, and weights in the registers of who multiplies them.
//
// Launched in clusters of two CTAs. All CTAs must be on the GPU at once, for they wait for each other: nothing else that does so may run beside this kernel.
//
// Set by the compiler's command line: W expert width, H heads, KV key/value heads, D head size, F MLP width, N suffix rows,
// A action dims, LAYERS, GATE tiles of a gate_up unit, SPLITS of a head's keys and at most KEYS in each, CTAS, WARPS that
// compute, CHUNK KB that the ring moves at once, SLOTS for them, at most IN_FLIGHT of them being filled, FP8 whether products are of E4M3.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__host__ __device__ constexpr int at_least(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int up_to(int multiple, int a) { return (a + multiple - 1) / multiple * multiple; }

constexpr int THREADS = WARPS * 32;    // that compute; one more warp produces
constexpr int GROUPS = (N + 7) / 8;    // of 8 tokens, the N of one mma
constexpr int COLUMNS = GROUPS * 8;
constexpr int SUM_STRIDE = COLUMNS + 8 - COLUMNS % 16;  // floats; 8 or 24 modulo 32 spreads the sums over the banks
constexpr float EPSILON = 1e-6f;
constexpr u32 EMPTY = 0xffffffff;
constexpr int GENERATIONS = 4;
constexpr int TILE_BYTES = FP8 ? 512 : 1024;  // of a step
constexpr int CHUNK_TILES = CHUNK * 1024 / TILE_BYTES;
constexpr int PER_WORD = FP8 ? 4 : 2;         // values of a product's input

constexpr int QKV_UNITS = (H + 2 * KV) * D / 16, GATE_UNITS = F / 8 / GATE, PAIRED_UNITS = W / 16 * 2;
constexpr int GATE_WM = GATE > 1 ? 2 : 1;  // warps along a unit's tiles; the others share K
constexpr int DIMS = D / SPLITS;           // of a head, that a CTA adds up

constexpr int EVEN = up_to(2, N);  // tokens of an attention part, in pairs
constexpr int K_STRIDE = D + 32, V_STRIDE = D + 8, S_STRIDE = KEYS + 4, P_STRIDE = KEYS + 8;
constexpr int ROWS_BYTES = N * at_least(W, at_least(H * D / 2, F / 2)) * 2;
static_assert(N <= 16 && 8 * N <= THREADS, "an element a thread");
static_assert(H * SPLITS <= CTAS && PAIRED_UNITS <= CTAS && N <= CTAS, "a unit a CTA");
static_assert(F / 2 % (GATE * 8) == 0 && H * D / 2 % DIMS == 0, "a half of K is whole CTAs' writing");
static_assert(DIMS % 4 == 0 && W % 32 == 0 && H * D % 64 == 0 && F % 64 == 0, "whole words and steps");
constexpr int CACHE_BYTES = KEYS * (K_STRIDE + V_STRIDE) * 2, PIECES_BYTES = SPLITS * EVEN * DIMS * 4;
constexpr int SUM_ROWS = at_least(WARPS, WARPS / GATE_WM * GATE) * 16;
constexpr int SCORE_BYTES = N * K_STRIDE * 2 + COLUMNS * (S_STRIDE * 4 + P_STRIDE * 2);
// Shared memory: ring; rows of the phase, or keys and values, or pieces; partial sums, or queries and scores, or shares;
// a pair's exchange.
constexpr int ROWS_AT = SLOTS * CHUNK * 1024;
constexpr int SUMS_AT = ROWS_AT + up_to(128, at_least(ROWS_BYTES, at_least(CACHE_BYTES, PIECES_BYTES)));
constexpr int EXCHANGE_AT = SUMS_AT + up_to(128, at_least(SUM_ROWS * SUM_STRIDE * 4, at_least(SCORE_BYTES, SPLITS * N * 4)));
constexpr int BARRIERS_AT = EXCHANGE_AT + up_to(128, 2 * 8 * COLUMNS * 4);

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
  u32* mail;                    // (GENERATIONS, Mail::WORDS), EMPTY before
  const float* scales;          // fp8: (LAYERS, Scales::ROWS), of the sums
  const float* inverses;        // fp8: (LAYERS, 4), of the inputs
};

// What a layer's sums are multiplied by, rows as they are packed, and before that its inputs, before they are rounded.
struct Scales {
  static constexpr int QKV = (H + 2 * KV) * D, ROWS = QKV + 2 * F + 2 * W;
  const float *qkv, *out, *gate_up, *down, *inverse;

  __device__ Scales(const Arguments& p, int layer) {
    qkv = p.scales + (u64)layer * ROWS;
    out = qkv + QKV;
    gate_up = out + W;
    down = gate_up + 2 * F;
    inverse = p.inverses + layer * 4;
  }
};

// What CTAs tell each other in one round: two bf16 a word, or four E4M3 where they are a product's input; parts and stats
// one float. Four E4M3 are never EMPTY: they are rounded to numbers, or to the NaN 0x7f.
struct Mail {
  static constexpr int X = N * W / 2, Q = N * H * D / 2, NEW = N * KV * D / 2;
  static constexpr int ATTENDED = N * H * D / PER_WORD, HIDDEN = N * F / PER_WORD;
  static constexpr int PARTS_WORDS = H * SPLITS * EVEN * D, STATS = H * SPLITS * N * 2;
  static constexpr int WORDS = up_to(4, 2 * X + Q + ATTENDED + HIDDEN + 2 * NEW + PARTS_WORDS + STATS);
  u32 *x, *middle, *q, *attended, *hidden, *keys, *values, *parts, *stats;

  __device__ Mail(u32* base, u32 round) {
    x = base + (u64)(round % GENERATIONS) * WORDS;  // enters a layer
    middle = x + X;                                 // between attention and MLP
    q = middle + X;
    attended = q + Q;
    hidden = attended + ATTENDED;
    keys = hidden + HIDDEN;               // the suffix's
    values = keys + NEW;
    parts = values + NEW;                 // (H, SPLITS, D, EVEN)
    stats = parts + PARTS_WORDS;          // (H, SPLITS, N, {maximum, sum})
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

// To E4M3, saturated.
__device__ __forceinline__ u16 round2(float first, float second) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
}

// Two E4M3 to two f16, exact.
__device__ __forceinline__ u32 widen2(u16 pair) {
  u32 wide;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(wide) : "h"(pair));
  return wide;
}

// Eight E4M3 to eight f16.
__device__ __forceinline__ uint4 widen8(u32 first, u32 second) {
  return make_uint4(widen2((u16)first), widen2((u16)(first >> 16)), widen2((u16)second), widen2((u16)(second >> 16)));
}

// All warps that compute.
__device__ __forceinline__ void sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// Words, past the L1. Each arrives whole.
__device__ __forceinline__ u32 ask(const u32* word) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(word) : "memory");
  return v;
}

__device__ __forceinline__ uint4 ask4(const u32* words) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(words) : "memory");
  return v;
}

__device__ __forceinline__ uint2 ask2(const u32* words) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(words) : "memory");
  return v;
}

__device__ __forceinline__ bool complete(uint4 v) { return v.x != EMPTY && v.y != EMPTY && v.z != EMPTY && v.w != EMPTY; }

__device__ __forceinline__ void tell(u32* word, u32 data) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(data) : "memory");
}

__device__ __forceinline__ void tell2(u32* words, u32 first, u32 second) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(words), "r"(first), "r"(second) : "memory");
}

// What this CTA stored before its last barrier is seen before whatever it stores after the next one. One thread asks for all.
__device__ __forceinline__ void fence() {
  if (threadIdx.x == THREADS - 1) asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// One word, asked for until it is there.
__device__ __forceinline__ u32 read(const u32* word) {
  u32 v;
  do v = ask(word);
  while (v == EMPTY);
  return v;
}

// All warps go on when most of COUNT CTAs have written: one warp asks for a word of each, `stride` words apart. Many that ask
// at once would only slow down the answer. Who then reads the data asks again for what is missing, and is done a round trip
// sooner than if all had been waited for. The other warps do what `meanwhile` says.
template <int COUNT, class Work>
__device__ __forceinline__ void await(const u32* words, int stride, Work meanwhile) {
  constexpr int EACH = (COUNT + 31) / 32, ENOUGH = (COUNT * 3 + 3) / 4;
  if (threadIdx.x < 32) {
    int written;
    do {
      u32 v[EACH];
      written = 0;
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int cta = i * 32 + threadIdx.x;
        v[i] = ask(words + (cta < COUNT ? cta : COUNT - 1) * stride);
      }
#pragma unroll
      for (int i = 0; i < EACH; ++i) written += v[i] != EMPTY && (COUNT % 32 == 0 || i * 32 + threadIdx.x < COUNT);
    } while (__reduce_add_sync(0xffffffffu, written) < ENOUGH);
  } else {
    meanwhile();
  }
  sync();
}

// Four words at each of COUNT places, asked for again where they are not there. from(i) says where.
template <int COUNT, class From>
__device__ __forceinline__ void read4(uint4 (&v)[COUNT], From from) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) v[i] = ask4(from(i));
#pragma unroll 1
  for (;;) {
    u32 missing = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) missing |= (u32)!complete(v[i]) << i;
    if (!missing) break;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (missing >> i & 1) v[i] = ask4(from(i));
  }
}

// Reads `items` of four words, at most MOST, by all threads. from(i) says where item i stands, put(i, words) what becomes of
// it.
template <int MOST, class From, class Put>
__device__ __forceinline__ void gather(From from, Put put, int items = MOST) {
  constexpr int ROUNDS = (MOST + THREADS - 1) / THREADS;
  constexpr int BATCHES = (ROUNDS + 15) / 16, BATCH = (ROUNDS + BATCHES - 1) / BATCHES;  // as registers allow
#pragma unroll 1
  for (int first = threadIdx.x; first < items; first += BATCH * THREADS) {
    uint4 v[BATCH];
    read4(v, [&](int b) { return from(first + b * THREADS < items ? first + b * THREADS : first); });
#pragma unroll
    for (int b = 0; b < BATCH; ++b)
      if (first + b * THREADS < items) put(first + b * THREADS, v[b]);
  }
}

// Makes WORDS in a row EMPTY, a multiple of four, by all warps but the first.
template <int WORDS>
__device__ __forceinline__ void blank(u32* at) {
  static_assert(WORDS % 4 == 0, "whole vectors");
#pragma unroll
  for (int i = threadIdx.x - 32; i < WORDS / 4; i += THREADS - 32) *(uint4*)(at + i * 4) = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY);
}

// Makes rows of mail EMPTY, by all warps but the first; WORDS of each, one or a multiple of two.
template <int WORDS>
__device__ __forceinline__ void blank(u32* at, int rows, int stride) {
  constexpr int PAIRS = at_least(WORDS / 2, 1);
#pragma unroll 1
  for (int i = threadIdx.x - 32; i < rows * PAIRS; i += THREADS - 32) {
    u32* word = at + i / PAIRS * stride + i % PAIRS * 2;
    if constexpr (WORDS == 1) *word = EMPTY;
    else *(uint2*)word = make_uint2(EMPTY, EMPTY);
  }
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

__device__ __forceinline__ void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
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

// Keys that a CTA takes.
__device__ __forceinline__ int share_of(int prefix) { return ((prefix + N + SPLITS - 1) / SPLITS + 7) / 8 * 8; }

// ---------------------------------------------------------------- ring of weights

struct Ring {
  int slot = 0;
  u32 parity = 0;

  static __device__ u64* arrived(int slot) { return (u64*)(memory + BARRIERS_AT) + slot; }
  static __device__ u64* consumed(int slot) { return arrived(SLOTS + slot); }

  __device__ void advance() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }

  // By the producer: `tiles`, each of one step, from `source`, a chunk at a time, each when its slot is free and all but IN_FLIGHT - 1 of
  // the chunks before have arrived: more at once would queue up in the memory system, and what CTAs tell each other behind.
  __device__ void fill(const char* source, int tiles, Ring& oldest, int& started) {
    u64 first_to_go;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first_to_go));
#pragma unroll 1
    for (int done = 0; done < tiles; done += CHUNK_TILES) {
      const u32 bytes = TILE_BYTES * (tiles - done < CHUNK_TILES ? tiles - done : CHUNK_TILES);
      if (++started > IN_FLIGHT) {
        wait(arrived(oldest.slot), oldest.parity);
        oldest.advance();
      }
      wait(consumed(slot), parity ^ 1);
      expect(arrived(slot), bytes);
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                       shared_address(memory + slot * CHUNK * 1024)),
                   "l"(source + done * TILE_BYTES), "r"(bytes), "r"(shared_address(arrived(slot))), "l"(first_to_go)
                   : "memory");
      advance();
    }
  }
};

// This CTA's share of the prefix's keys and values of a layer to L2: readers of the same share divide it among themselves.
__device__ __forceinline__ void bring_cache(const Arguments& p, int layer) {
  if (blockIdx.x >= H * SPLITS) return;
  constexpr int READERS = H / KV;
  const int head = blockIdx.x / SPLITS, reader = head % READERS, first = blockIdx.x % SPLITS * share_of(*p.length);
  const int left = *p.length - first, most = share_of(*p.length), standing = left < 0 ? 0 : left < most ? left : most;
  const int from = standing * reader / READERS, bytes = (standing * (reader + 1) / READERS - from) * D * 2;
  if (bytes == 0) return;
  const u64 at = (((u64)layer * KV + head / READERS) * p.slots + first + from) * D;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p.keys + at), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p.values + at), "r"(bytes) : "memory");
}

// This CTA's lines of a layer's scales, shifts and gates to L2.
__device__ __forceinline__ void bring_modulation(const Arguments& p, int step, int layer) {
  const float* from = p.modulation + ((u64)step * (2 * LAYERS + 1) + 2 * layer) * 3 * W;
  for (int line = blockIdx.x; line < 6 * W / 32; line += CTAS) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + line * 32));
}

__device__ __forceinline__ void produce(const Arguments& p) {
  Ring ring, oldest;
  int started = 0;
#pragma unroll 1
  for (int step = 0; step < p.steps; ++step)
#pragma unroll 1
    for (u64 layer = 0; layer < LAYERS; ++layer) {
      constexpr int QKV = W / 32, OUT = H * D / 64, GATE_UP = GATE * W / 32, DOWN = F / 64;
      bring_modulation(p, step, layer);
      bring_cache(p, layer);
      for (int u = blockIdx.x; u < QKV_UNITS; u += CTAS)
        ring.fill(p.qkv + (layer * QKV_UNITS + u) * QKV * TILE_BYTES, QKV, oldest, started);
      for (int u = blockIdx.x; u < PAIRED_UNITS; u += CTAS)
        ring.fill(p.out + (layer * PAIRED_UNITS + u) * OUT * TILE_BYTES, OUT, oldest, started);
      for (int u = blockIdx.x; u < GATE_UNITS; u += CTAS)
        ring.fill(p.gate_up + (layer * GATE_UNITS + u) * GATE_UP * TILE_BYTES, GATE_UP, oldest, started);
      for (int u = blockIdx.x; u < PAIRED_UNITS; u += CTAS)
        ring.fill(p.down + (layer * PAIRED_UNITS + u) * DOWN * TILE_BYTES, DOWN, oldest, started);
    }
}

// ---------------------------------------------------------------- products

// Where rows of STEPS x 32 values hold column `column`, a multiple of 4, of a token. Where two rows would meet in the same
// banks, odd ones are shifted by half a period.
template <int STEPS>
__device__ __forceinline__ int place(int token, int column) {
  return token * STEPS * 32 + (STEPS % 2 ? column : column ^ (token & 1) << 5);
}

// Four words of a product's input. Of eight neighbours in fp8 four begin with the second half of theirs: no bank twice.
template <int STEPS>
__device__ __forceinline__ void put(u16* rows, int token, int column, uint4 v) {
  u16* at = rows + place<STEPS>(token, column);
  if constexpr (FP8) {
    const bool second = threadIdx.x & 4;
    *(uint4*)(at + second * 8) = second ? widen8(v.z, v.w) : widen8(v.x, v.y);
    *(uint4*)(at + !second * 8) = second ? widen8(v.x, v.y) : widen8(v.z, v.w);
  } else {
    *(uint4*)at = v;
  }
}

// One unit: TILES x 16 weight rows over STEPS x 32 of K, by WM warps along the tiles and the rest along K, times the rows
// in shared memory; or UNITS in a row at once, if the ring holds them. Leaves partial sums (UNITS, WK, TILES * 16, SUM_STRIDE)
// at SUMS_AT.
template <int TILES, int WM, int STEPS, int UNITS = 1>
struct Product {
  static constexpr int WK = WARPS / WM, MINE = TILES / WM, ROWS = TILES * 16;
  static constexpr int PER_CHUNK = CHUNK_TILES / TILES;                  // steps
  static constexpr int CHUNKS = (STEPS + PER_CHUNK - 1) / PER_CHUNK;     // of a unit
  static constexpr bool WHOLE = STEPS % PER_CHUNK == 0;
  // Chunks at a time, their steps, and of these each warp's.
  static constexpr int BATCH = UNITS > 1 ? CHUNKS : WHOLE && CHUNKS % 4 == 0 && SLOTS >= 4 ? 4 : WHOLE && CHUNKS % 2 == 0 ? 2 : 1;
  static constexpr int AT_ONCE = BATCH * PER_CHUNK, DEPTH = (AT_ONCE + WK - 1) / WK;
  static constexpr int UNROLLED = FP8 ? 4 : 8;  // as registers allow
  static_assert(WARPS % WM == 0 && TILES % WM == 0 && CHUNK_TILES % TILES == 0, "warps must divide the tiles, and tiles a chunk");
  static_assert(UNITS * WK * ROWS <= SUM_ROWS && UNITS * BATCH <= SLOTS, "room for the sums and the weights");

  static __device__ void multiply(Ring& ring) {
    const u16* rows = (const u16*)(memory + ROWS_AT);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int wm = warp % WM, wk = warp / WM;
    float total[UNITS][MINE][GROUPS][4] = {};
#pragma unroll 1
    for (int first = 0; first < STEPS; first += AT_ONCE) {
      Ring next = ring;
#pragma unroll
      for (int c = 0; c < UNITS * BATCH; ++c) {
        wait(Ring::arrived(next.slot), next.parity);
        next.advance();
      }
#pragma unroll UNROLLED
      for (int d = 0; d < DEPTH; ++d) {
        const int local = wk + d * WK, step = first + local;
        if ((AT_ONCE % WK && local >= AT_ONCE) || (!WHOLE && step >= STEPS)) continue;
        uint4 b[GROUPS];
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
          const int token = j * 8 + g < N ? j * 8 + g : N - 1;  // columns beyond N are computed and never read
          b[j] = *(const uint4*)(rows + place<STEPS>(token, step * 32 + t * 8));
        }
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
          const int slot = ring.slot + u * BATCH + (PER_CHUNK % WK ? local / PER_CHUNK : d * WK / PER_CHUNK);
          const char* chunk = memory + (slot < SLOTS ? slot : slot - SLOTS) * CHUNK * 1024;
          multiply_step((const uint4*)(chunk + (local % PER_CHUNK * TILES + wm * MINE) * TILE_BYTES) + lane, b, total[u]);
        }
      }
      __syncwarp();
#pragma unroll
      for (int c = 0; c < UNITS * BATCH; ++c) {
        if (lane == 0) arrive(Ring::consumed(ring.slot));
        ring.advance();
      }
    }
    float* sums = (float*)(memory + SUMS_AT);
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
      for (int m = 0; m < MINE; ++m)
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
          float* at = sums + ((u * WK + wk) * ROWS + (wm * MINE + m) * 16 + g) * SUM_STRIDE + j * 8 + 2 * t;
          *(float2*)at = make_float2(total[u][m][j][0], total[u][m][j][1]);
          *(float2*)(at + 8 * SUM_STRIDE) = make_float2(total[u][m][j][2], total[u][m][j][3]);
        }
    sync();
  }

  // A lane's part of a step: of the tiles of its warp, each times all tokens.
  static __device__ void multiply_step(const uint4* tile, const uint4 (&b)[GROUPS], float (&total)[MINE][GROUPS][4]) {
#pragma unroll
    for (int m = 0; m < MINE; ++m) {
      if constexpr (FP8) {
        const uint4 codes = tile[m * 32], head = widen8(codes.x, codes.y), tail = widen8(codes.z, codes.w);
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) mma_half(total[m][j], head.x, head.y, head.z, head.w, b[j].x, b[j].y);
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) mma_half(total[m][j], tail.x, tail.y, tail.z, tail.w, b[j].z, b[j].w);
      } else {
        const uint4 head = tile[m * 64], tail = tile[m * 64 + 32];
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) mma(total[m][j], head.x, head.y, head.z, head.w, b[j].x, b[j].y);
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) mma(total[m][j], tail.x, tail.y, tail.z, tail.w, b[j].z, b[j].w);
      }
    }
  }

  static __device__ float sum(int row, int token, int unit = 0) {
    const float* sums = (const float*)(memory + SUMS_AT);
    float value = 0.0f;
#pragma unroll
    for (int k = 0; k < WK; ++k) value += sums[((unit * WK + k) * ROWS + row) * SUM_STRIDE + token];
    return value;
  }
};

using GateProduct = Product<GATE, GATE_WM, W / 32>;

// ---------------------------------------------------------------- norm

// Root-mean-square norm of x (N, W) with adaRMS scale and shift, as a product's input into shared memory. SPAN warps share a
// row, so that each has the same few columns of all its rows; a lane takes eight columns at once.
struct Norm {
  static constexpr int EIGHTS = (W / 8 + 31) / 32;  // of a row, for a lane
  static constexpr int SPAN = EIGHTS % 8 == 0 ? 8 : EIGHTS % 4 == 0 ? 4 : EIGHTS % 2 == 0 ? 2 : 1;
  static constexpr int MINE = EIGHTS / SPAN;                                      // of a lane's eights
  static constexpr int APART = WARPS / SPAN, ROUNDS = (N + APART - 1) / APART;  // rows at once; of a warp
  static_assert(WARPS % SPAN == 0, "whole rows at once");
  float inverse = 1.0f;
  float4 scale[2 * MINE], shift[2 * MINE];

  static __device__ int column(int k) { return (((threadIdx.x >> 5) % SPAN * MINE + k) * 32 + (threadIdx.x & 31)) * 8; }

  // Fetches the modulation before the rows are there, and in fp8 what the input is multiplied by.
  __device__ Norm(const float* modulation, const float* factor) {
    if constexpr (FP8) inverse = *factor;
#pragma unroll
    for (int k = 0; k < MINE; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = column(k) < W ? column(k) + half * 4 : 0;
        scale[2 * k + half] = *(const float4*)(modulation + at);
        shift[2 * k + half] = *(const float4*)(modulation + W + at);
      }
  }

  static __device__ float square(u32 pair) { return low(pair) * low(pair) + high(pair) * high(pair); }

  __device__ u32 modulate(u32 pair, float f, float scale0, float scale1, float shift0, float shift1) const {
    const float first = low(pair) * f * (1.0f + scale0) + shift0, second = high(pair) * f * (1.0f + scale1) + shift1;
    return FP8 ? widen2(round2(first * inverse, second * inverse)) : narrow2(first, second);
  }

  // The other warps do what `meanwhile` says while the first waits for x.
  template <class Work>
  __device__ void apply(const u32* x, Work meanwhile) const {
    static_assert(SPAN == 1 || ROUNDS * APART * SPAN * 32 * 4 <= EXCHANGE_AT - SUMS_AT, "room for every lane's squares");
    float* squares = (float*)(memory + SUMS_AT);  // (rows, SPAN, 32)
    u16* rows = (u16*)(memory + ROWS_AT);
    const int lane = threadIdx.x & 31, group = (threadIdx.x >> 5) / SPAN, part = (threadIdx.x >> 5) % SPAN;
    // Each CTA wrote eight columns. Of which row one asks does not matter, only that not all ask the same part of L2.
    await<W / 8>(x + blockIdx.x % N * (W / 2), 4, meanwhile);
    uint4 v[ROUNDS * MINE];
    read4(v, [&](int i) {
      const int row = group + i / MINE * APART, at = column(i % MINE);
      return x + (row < N ? row : N - 1) * (W / 2) + (at < W ? at : 0) / 2;
    });
    __syncwarp();
    float f[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < MINE; ++k)
        if (column(k) < W) sum += square(v[r * MINE + k].x) + square(v[r * MINE + k].y) + square(v[r * MINE + k].z) + square(v[r * MINE + k].w);
      f[r] = sum;
    }
    if constexpr (SPAN > 1) {  // a row's lanes of all warps, in the order of its columns
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) squares[((group + r * APART) * SPAN + part) * 32 + lane] = f[r];
      sync();
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) {
        f[r] = 0.0f;
#pragma unroll
        for (int k = 0; k < SPAN; ++k) f[r] += squares[((group + r * APART) * SPAN + k) * 32 + lane];
      }
    }
#pragma unroll
    for (int offset = 16; offset; offset >>= 1)
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) f[r] += __shfl_xor_sync(0xffffffffu, f[r], offset);
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const int row = group + r * APART;
      f[r] = rsqrtf(f[r] / W + EPSILON);
#pragma unroll
      for (int k = 0; k < MINE; ++k) {
        if (column(k) >= W || row >= N) continue;
        const float4 a = scale[2 * k], b = scale[2 * k + 1], c = shift[2 * k], d = shift[2 * k + 1];
        *(uint4*)(rows + place<W / 32>(row, column(k))) =
            make_uint4(modulate(v[r * MINE + k].x, f[r], a.x, a.y, c.x, c.y), modulate(v[r * MINE + k].y, f[r], a.z, a.w, c.z, c.w),
                       modulate(v[r * MINE + k].z, f[r], b.x, b.y, d.x, d.y), modulate(v[r * MINE + k].w, f[r], b.z, b.w, d.z, d.w));
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
    const int total = prefix + N, share = share_of(prefix);
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

  // What stands since prefill, and zeros behind the last key. By all warps but the first, which asks for queries meanwhile.
  __device__ void fetch_ahead() const {
#pragma unroll 1
    for (int i = threadIdx.x - 32; i < standing() * (D / 8); i += THREADS - 32) {
      const int row = i / (D / 8), column = i % (D / 8) * 8;
      copy16_async(k_shared() + row * K_STRIDE + column, keys + row * D + column);
      copy16_async(v_shared() + row * V_STRIDE + column, values + row * D + column);
    }
#pragma unroll 1
    for (int i = count * V_STRIDE + threadIdx.x - 32; i < tiles * 16 * V_STRIDE; i += THREADS - 32) v_shared()[i] = 0;
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
  await<D / 16>(mail.q + ((N - 1) * H + my.head) * (D / 2), 4, [&] { my.fetch_ahead(); });
  // Queries, then the suffix's keys, then its values, all at once.
  constexpr int EIGHTS = D / 8, OF_Q = N * EIGHTS;
  const int standing = my.standing(), token = my.first + standing - my.prefix;
  const int fresh = (my.count - standing) * EIGHTS;
  gather<3 * OF_Q>(
      [&](int i) {
        if (i < OF_Q) return mail.q + (i / EIGHTS * H + my.head) * (D / 2) + i % EIGHTS * 4;
        const int n = i - OF_Q < fresh ? i - OF_Q : i - OF_Q - fresh;
        return (i - OF_Q < fresh ? mail.keys : mail.values) + ((token + n / EIGHTS) * KV + kv) * (D / 2) + n % EIGHTS * 4;
      },
      [&](int i, uint4 v) {
        const int n = i - OF_Q < fresh ? i - OF_Q : i - OF_Q - fresh;
        u16* to = i < OF_Q ? q_shared + i / EIGHTS * K_STRIDE + i % EIGHTS * 8
                  : i - OF_Q < fresh ? k_shared + (standing + n / EIGHTS) * K_STRIDE + n % EIGHTS * 8
                                     : v_shared + (standing + n / EIGHTS) * V_STRIDE + n % EIGHTS * 8;
        *(uint4*)to = v;
      },
      OF_Q + 2 * fresh);
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
    if (half == 0 && token < N) tell2(mail.stats + (blockIdx.x * N + token) * 2, __float_as_uint(top), __float_as_uint(sum));
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
    for (int j = 0; j < GROUPS; ++j) {
      if (j * 8 + 2 * t >= N) continue;
      u32* to = mail.parts + (blockIdx.x * D + tile * 16 + g) * EVEN + j * 8 + 2 * t;
      tell2(to, __float_as_uint(o[j][0]), __float_as_uint(o[j][1]));
      tell2(to + 8 * EVEN, __float_as_uint(o[j][2]), __float_as_uint(o[j][3]));
    }
  }
}

// Add up what a head's CTAs found, each by how much it weighs. A CTA has DIMS of the head's dims.
template <class Work>
__device__ __forceinline__ void combine(const Share& my, const Mail& mail, const Scales& scales, Work meanwhile) {
  const float inverse = FP8 ? scales.inverse[1] : 1.0f;
  float* shares = (float*)(memory + SUMS_AT);  // (SPLITS, N), how much each CTA's part weighs
  float* pieces = (float*)(memory + ROWS_AT);  // (SPLITS, DIMS, EVEN)
  constexpr int PART = D * EVEN, FOURS = DIMS * EVEN / 4;
  const u32* parts = mail.parts + my.head * SPLITS * PART + my.rank * DIMS * EVEN;
  await<SPLITS>(mail.parts + (my.head * SPLITS + 1) * PART - 1, PART, meanwhile);
  static_assert(N * SPLITS <= THREADS, "SPLITS lanes a token");
  const int i = threadIdx.x, of = i / SPLITS < N ? i / SPLITS : N - 1, r = i % SPLITS;
  const u32* stats = mail.stats + ((my.head * SPLITS + r) * N + of) * 2;
  const bool weighs = !warp_beyond(N * SPLITS);
  uint2 found = make_uint2(EMPTY, EMPTY);
  if (weighs) found = ask2(stats);  // with the parts, not after them
  gather<SPLITS * FOURS>([&](int i) { return parts + i / FOURS * PART + i % FOURS * 4; },
                         [&](int i, uint4 v) { *(uint4*)(pieces + i * 4) = v; });
  if (weighs) {
    while (found.x == EMPTY || found.y == EMPTY) found = ask2(stats);
    __syncwarp();
    const float mine = __uint_as_float(found.x);
    float top = mine;
#pragma unroll
    for (int offset = SPLITS / 2; offset; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const float weight = __expf(mine - top);
    float sum = weight * __uint_as_float(found.y);
#pragma unroll
    for (int offset = SPLITS / 2; offset; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (i / SPLITS < N) shares[r * N + of] = weight / sum;
  }
  sync();
#pragma unroll 1
  for (int i = threadIdx.x; i < N * DIMS / PER_WORD; i += THREADS) {
    const int token = i / (DIMS / PER_WORD), dim = i % (DIMS / PER_WORD) * PER_WORD;
    float2 sum[PER_WORD / 2] = {};
#pragma unroll
    for (int r = 0; r < SPLITS; ++r) {
      const float share = shares[r * N + token];
#pragma unroll
      for (int k = 0; k < PER_WORD / 2; ++k) {
        const float* piece = pieces + (r * DIMS + dim + k * 2) * EVEN + token;
        sum[k].x += share * piece[0], sum[k].y += share * piece[EVEN];
      }
    }
    u32 word;
    if constexpr (FP8)
      word = round2(sum[0].x * inverse, sum[0].y * inverse) | (u32)round2(sum[1].x * inverse, sum[1].y * inverse) << 16;
    else
      word = narrow2(sum[0].x, sum[0].y);
    tell(mail.attended + (token * H * D + my.head * D + my.rank * DIMS + dim) / PER_WORD, word);
  }
}

// ---------------------------------------------------------------- phases

// Where a thread's pair of a qkv tile goes: 8 dims of a head's first half, and their rotary partners in the second half. If
// the ring holds two units, they are computed at once, and each half of the threads has one.
struct HeadPair {
  static constexpr int UNITS = 2 * Product<1, 1, W / 32>::CHUNKS <= SLOTS ? 2 : 1, APART = THREADS / UNITS;
  using One = Product<1, 1, W / 32>;
  using All = Product<1, 1, W / 32, UNITS>;
  static_assert(8 * N <= APART, "an element a thread");
  int token = threadIdx.x % APART / 8, row = threadIdx.x % 8;
  bool mine = false;
  float cosine = 1.0f, sine = 0.0f, scale = 1.0f, partners_scale = 1.0f;
  u32* to;

  // Looks everything up before the product is there. `first` is the first unit, and `scales` are those of qkv.
  __device__ HeadPair(const Arguments& p, const Mail& mail, int first, int prefix, const float* scales) {
    const int unit = first + threadIdx.x / APART * CTAS;
    mine = threadIdx.x % APART < up_to(32, 8 * N) && unit < QKV_UNITS;
    if (!mine || token >= N) return;
    if constexpr (FP8) scale = scales[unit * 16 + row], partners_scale = scales[unit * 16 + 8 + row];
    const int head = unit / (D / 16), dim = unit % (D / 16) * 8 + row, position = prefix + token;
    if (head < H + KV) cosine = p.cosines[position * (D / 2) + dim], sine = p.sines[position * (D / 2) + dim];
    to = head < H ? mail.q + (token * H + head) * (D / 2)
         : head < H + KV ? mail.keys + (token * KV + head - H) * (D / 2) : mail.values + (token * KV + head - H - KV) * (D / 2);
    to += dim / 2;
  }

  __device__ void store() const {
    if (!mine) return;
    const int safe = token < N ? token : N - 1, unit = threadIdx.x / APART;
    const float a = All::sum(row, safe, unit) * scale, b = All::sum(row + 8, safe, unit) * partners_scale;
    const float first = a * cosine - b * sine, second = b * cosine + a * sine;
    const float first_next = __shfl_down_sync(0xffffffffu, first, 1), second_next = __shfl_down_sync(0xffffffffu, second, 1);
    if (row % 2 || token >= N) return;
    tell(to, narrow2(first, first_next));
    tell(to + D / 4, narrow2(second, second_next));
  }
};

// A gate_up unit behind its product. Rows of a tile: 8 of gate, then the same 8 of up.
struct Hidden {
  using P = GateProduct;
  static constexpr int OUT = GATE * 8, PAIRS = OUT / 2 * N;
  float gate_scale[2], up_scale[2], inverse;

  static __device__ int row(int column) { return column / 8 * 16 + column % 8; }

  // In fp8 a thread has two columns of a token, and two neighbours make a word.
  static __device__ int token(int i) { return i / 2 % N; }
  static __device__ int column(int i) { return i / (2 * N) * 4 + i % 2 * 2; }

  // Looks the scales up before the product is there.
  __device__ Hidden(const Scales& scales, int unit) {
    if constexpr (FP8) {
      inverse = scales.inverse[3];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = threadIdx.x;
        const float* scale = scales.gate_up + unit * GATE * 16 + (i < PAIRS ? row(column(i)) : 0) + e;
        gate_scale[e] = scale[0], up_scale[e] = scale[8];
      }
    }
  }

  __device__ void store(const Mail& mail, int unit) const {
    if constexpr (FP8) {
      static_assert(PAIRS <= THREADS, "a pair a thread");
      const int i = threadIdx.x < PAIRS ? threadIdx.x : 0, at = row(column(i));
      if (!warp_beyond(PAIRS)) {
        const float first = gelu(P::sum(at, token(i)) * gate_scale[0]) * (P::sum(at + 8, token(i)) * up_scale[0]) * inverse;
        const float second = gelu(P::sum(at + 1, token(i)) * gate_scale[1]) * (P::sum(at + 9, token(i)) * up_scale[1]) * inverse;
        const u32 mine = round2(first, second), next = __shfl_down_sync(0xffffffffu, mine, 1);
        if (threadIdx.x < PAIRS && i % 2 == 0)
          tell(mail.hidden + (token(i) * F + unit * OUT + column(i)) / 4, mine | next << 16);
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < PAIRS; i += THREADS) {
        const int token = i % N, pair = i / N * 2, at = row(pair);
        const float first = gelu(P::sum(at, token)) * P::sum(at + 8, token);
        const float second = gelu(P::sum(at + 1, token)) * P::sum(at + 9, token);
        tell(mail.hidden + (token * F + unit * OUT + pair) / 2, narrow2(first, second));
      }
    }
  }
};

// to = x + gate * (input @ weights^T), for `out` and `down`. Each CTA of a pair takes half of K, and in the end half of the
// rows. Of the input, a CTA wrote WRITTEN columns. In fp8 gate * scale for gate.
template <int K, int WRITTEN, class Work>
__device__ __forceinline__ void project(Ring& ring, u32& parity, const u32* input, const u32* x, const float* gate, const float* scale,
                                        u32* to, Work meanwhile) {
  constexpr int ITEMS = K / 2 / (4 * PER_WORD);
  using P = Product<1, 1, K / 64>;
  u16* rows = (u16*)(memory + ROWS_AT);
  float* exchange = (float*)(memory + EXCHANGE_AT);  // (2, 8, COLUMNS), from each CTA of the pair
  u64* exchanged = Ring::arrived(2 * SLOTS);
  const int half = blockIdx.x & 1, row = threadIdx.x % 8, token = threadIdx.x / 8, column = blockIdx.x * 8 + row;
  const float factor = FP8 ? gate[column] * scale[column] : gate[column];
  const u32* from = input + half * (K / 2 / PER_WORD);
  const u32* at_x = x + ((token < N ? token : 0) * W + column) / 2;
  u32 before = ask(at_x);  // written a phase or more ago
  await<K / 2 / WRITTEN>(from + blockIdx.x / 2 % N * (K / PER_WORD), WRITTEN / PER_WORD, meanwhile);  // see Norm
  gather<N * ITEMS>([&](int i) { return from + i / ITEMS * (K / PER_WORD) + i % ITEMS * 4; },
                    [&](int i, uint4 v) { put<K / 64>(rows, i / ITEMS, i % ITEMS * 4 * PER_WORD, v); });
  if (before == EMPTY) before = read(at_x);
  sync();
  P::multiply(ring);
  if (threadIdx.x == 0) expect(exchanged, 8 * N * 4);
#pragma unroll
  for (int i = threadIdx.x; i < 16 * COLUMNS; i += THREADS) {  // neighbours take neighbouring tokens: no bank twice
    const int of = i / COLUMNS, whose = i % COLUMNS;
    if (whose >= N) continue;
    float* at = exchange + (half * 8 + of % 8) * COLUMNS + whose;
    const float value = P::sum(of, whose);
    if (of / 8 == half) *at = value;
    else send(at, value, exchanged, half ^ 1);
  }
  sync();
  wait(exchanged, parity);
  parity ^= 1;
  if (warp_beyond(8 * N)) return;
  const int safe = token < N ? token : N - 1;
  const float sum = exchange[row * COLUMNS + safe] + exchange[(8 + row) * COLUMNS + safe];
  const float value = (row % 2 ? high(before) : low(before)) + sum * factor;
  const float next = __shfl_down_sync(0xffffffffu, value, 1);
  if (token < N && row % 2 == 0) tell(to + (token * W + column) / 2, narrow2(value, next));
}

// Makes EMPTY, in a generation that nobody reads, the attention parts that this CTA writes. By all warps but the first.
__device__ __forceinline__ void empty_parts(const Mail& old) {
  if (blockIdx.x < H * SPLITS) blank<EVEN * D>(old.parts + blockIdx.x * EVEN * D);
}

// And all else that it writes.
__device__ __forceinline__ void empty_rest(const Mail& old) {
  const int cta = blockIdx.x;
  if (cta < PAIRED_UNITS) {
    blank<4>(old.x + cta * 4, N, W / 2);
    blank<4>(old.middle + cta * 4, N, W / 2);
  }
#pragma unroll 1
  for (int unit = cta; unit < QKV_UNITS; unit += CTAS) {
    const int head = unit / (D / 16), at = unit % (D / 16) * 4;
    u32* to = head < H ? old.q + head * (D / 2) : head < H + KV ? old.keys + (head - H) * (D / 2) : old.values + (head - H - KV) * (D / 2);
    const int stride = (head < H ? H : KV) * (D / 2);
    blank<4>(to + at, N, stride);
    blank<4>(to + at + D / 4, N, stride);
  }
#pragma unroll 1
  for (int unit = cta; unit < GATE_UNITS; unit += CTAS)
    blank<GATE * 8 / PER_WORD>(old.hidden + unit * (GATE * 8 / PER_WORD), N, F / PER_WORD);
  if (cta < H * SPLITS) {
    blank<DIMS / PER_WORD>(old.attended + (cta / SPLITS * D + cta % SPLITS * DIMS) / PER_WORD, N, H * D / PER_WORD);
    blank<N * 2>(old.stats + cta * N * 2, 1, 0);
  }
}

// x_t (A) float32 -> a suffix row.
__device__ __forceinline__ void embed(const float* action, const float* weights, const float* bias, u32* row) {
#pragma unroll 1
  for (int i = threadIdx.x * 2; i < W; i += THREADS * 2) {
    float2 value = *(const float2*)(bias + i);
#pragma unroll 32
    for (int a = 0; a < A; ++a) {
      const float2 w = *(const float2*)(weights + a * W + i);
      value.x += action[a] * w.x, value.y += action[a] * w.y;
    }
    tell(row + i / 2, narrow2(value.x, value.y));
  }
}

// Brings `count` floats to L2, by all warps.
__device__ __forceinline__ void prefetch(const float* from, int count) {
#pragma unroll 4
  for (int i = threadIdx.x * 32; i < count; i += THREADS * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
}

// Final norm, velocity, Euler update and the next step's row, for the token of this CTA. Whatever does not depend on x is
// asked for before x is there.
__device__ __forceinline__ void finish(const Arguments& p, const u32* x, u32* next_x, int step) {
  float* normed = (float*)(memory + SUMS_AT);
  static_assert(W * 4 <= EXCHANGE_AT - SUMS_AT, "room for a row");
  __shared__ float action[A], squares[WARPS];
  constexpr int MINE = (W + THREADS - 1) / THREADS, EACH = (A + WARPS - 1) / WARPS;  // columns of a thread, outputs of a warp
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, token = blockIdx.x;
  const float* modulation = p.modulation + ((u64)step * (2 * LAYERS + 1) + 2 * LAYERS) * 3 * W;
  prefetch(p.out_weights, A * W);
  float scale[MINE], shift[MINE], before[EACH], bias[EACH];
#pragma unroll
  for (int k = 0; k < MINE; ++k) {
    const int i = threadIdx.x + k * THREADS < W ? threadIdx.x + k * THREADS : 0;
    scale[k] = modulation[i], shift[k] = modulation[W + i];
  }
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int a = warp + k * WARPS < A ? warp + k * WARPS : A - 1;
    before[k] = p.x_t[token * A + a], bias[k] = p.out_bias[a];
  }
  if (step + 1 < p.steps) prefetch(p.in_weights, A * W), prefetch(p.in_bias + (step + 1) * W, W);
  float sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x * 4; i < W; i += THREADS * 4) {
    const u32* words = x + (token * W + i) / 2;
    u32 first = ask(words), second = ask(words + 1);
    if (first == EMPTY) first = read(words);
    if (second == EMPTY) second = read(words + 1);
    const float4 f = make_float4(low(first), high(first), low(second), high(second));
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
#pragma unroll
  for (int k = 0; k < MINE; ++k) {
    const int i = threadIdx.x + k * THREADS;
    if (i < W) normed[i] = normed[i] * factor * (1.0f + scale[k]) + shift[k];
  }
  sync();
  float values[EACH] = {};
#pragma unroll 16
  for (int i = lane; i < W; i += 32)
#pragma unroll
    for (int k = 0; k < EACH; ++k) values[k] += normed[i] * p.out_weights[(warp + k * WARPS < A ? warp + k * WARPS : A - 1) * W + i];
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const float value = warp_sum(values[k]);
    const int a = warp + k * WARPS;
    if (lane == 0 && a < A) {
      action[a] = before[k] + value + bias[k];
      p.x_t[token * A + a] = action[a];
    }
  }
  sync();
  if (step + 1 < p.steps) embed(action, p.in_weights, p.in_bias + (step + 1) * W, next_x + token * (W / 2));
}

__device__ __forceinline__ void compute(const Arguments& p) {
  Ring ring;
  u32 parity = 0, round = 0;
  if (blockIdx.x < N) embed(p.x_t + blockIdx.x * A, p.in_weights, p.in_bias, Mail(p.mail, round).x + blockIdx.x * (W / 2));
#pragma unroll 1
  for (int step = 0; step < p.steps; ++step) {
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; ++layer, ++round) {
      const float* modulation = p.modulation + ((u64)step * (2 * LAYERS + 1) + 2 * layer) * 3 * W;
      const Mail mail(p.mail, round), next(p.mail, round + 1), old(p.mail, round + 2);
      const Share my(p, layer);
      const Scales scales(p, layer);
      const bool writes_x = blockIdx.x < PAIRED_UNITS, in_norm = writes_x && blockIdx.x < GATE_UNITS;
      if (!writes_x && threadIdx.x >= 32) empty_parts(old), empty_rest(old), __threadfence();
      HeadPair pair(p, mail, blockIdx.x, my.prefix, scales.qkv);
      if (blockIdx.x < QKV_UNITS) Norm(modulation, scales.inverse).apply(mail.x, [] {});
#pragma unroll 1
      for (int unit = blockIdx.x; unit < QKV_UNITS; unit += HeadPair::UNITS * CTAS) {
        if (unit > blockIdx.x) sync(), pair = HeadPair(p, mail, unit, my.prefix, scales.qkv);
        if (unit + (HeadPair::UNITS - 1) * CTAS < QKV_UNITS) HeadPair::All::multiply(ring);
        else HeadPair::One::multiply(ring);
        pair.store();
      }
      if (blockIdx.x < H * SPLITS) {
        sync();
        attend(my, mail);
        combine(my, mail, scales, [&] {
          if (writes_x) empty_parts(old);
        });
      }
      sync();
      if (blockIdx.x < PAIRED_UNITS)
        project<H * D, DIMS>(ring, parity, mail.attended, mail.x, modulation + 2 * W, scales.out, mail.middle,
                             [&] {
                               if (!in_norm) empty_rest(old);
                             });
      sync();
      if (blockIdx.x < GATE_UNITS)
        Norm(modulation + 3 * W, scales.inverse + 2).apply(mail.middle, [&] {
          if (in_norm) empty_rest(old);
        });
#pragma unroll 1
      for (int unit = blockIdx.x; unit < GATE_UNITS; unit += CTAS) {
        if (unit > blockIdx.x) sync();
        const Hidden hidden(scales, unit);
        GateProduct::multiply(ring);
        hidden.store(mail, unit);
      }
      sync();
      if (blockIdx.x < PAIRED_UNITS)
        project<F, GATE * 8>(ring, parity, mail.hidden, mail.middle, modulation + 5 * W, scales.down, next.x,
                             [] { fence(); });
      sync();
    }
    // A round of its own: the layer that ended wrote x of this round, and some may still be reading it.
    const u32* x = Mail(p.mail, round).x;
    if (blockIdx.x < N) finish(p, x, Mail(p.mail, round + 1).x, step);
    await<W / 8>(x + (N - 1) * W / 2, 4, [&] {
      const Mail old(p.mail, round + 2);
      empty_parts(old), empty_rest(old), __threadfence();
    });
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
