// Of denoise.cu: sizes, what lies where in shared memory, and what CTAs tell each other through global memory.

#include "hopper.cuh"

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
constexpr bool PACED = FP8;                   // see Pace

constexpr int QKV_UNITS = (H + 2 * KV) * D / 16, GATE_UNITS = F / 8 / GATE, PAIRED_UNITS = W / 16 * 2;
constexpr int GATE_WM = GATE > 1 ? 2 : 1;  // warps along a unit's tiles; the others share K
constexpr int DIMS = D / SPLITS;           // of a head, that a CTA adds up

constexpr int HALF_N = (N + 1) / 2;  // tokens that the first CTA of a pair finishes in `out` and `down`
constexpr int EVEN = up_to(2, N);    // tokens of an attention part, in pairs
constexpr int K_STRIDE = D + 32, V_STRIDE = D + 8, S_STRIDE = KEYS + 4, P_STRIDE = KEYS + 8;
constexpr int ROWS_BYTES = N * at_least(W, at_least(H * D / 2, F / 2)) * 2;
static_assert(N <= 16 && 8 * N <= THREADS, "an element a thread");
static_assert(H * SPLITS <= CTAS && PAIRED_UNITS <= CTAS && N <= CTAS, "a unit a CTA");
static_assert(F / 2 % (GATE * 8) == 0 && H * D / 2 % DIMS == 0, "a half of K is whole CTAs' writing");
static_assert(DIMS % 4 == 0 && W % 32 == 0 && H * D % 64 == 0 && F % 64 == 0, "whole words and steps");
constexpr int CACHE_BYTES = KEYS * (K_STRIDE + V_STRIDE) * 2, PIECES_BYTES = SPLITS * EVEN * DIMS * 4;
constexpr int SUM_ROWS = at_least(2 * WARPS, WARPS / GATE_WM * GATE) * 16;
constexpr int SCORE_BYTES = N * K_STRIDE * 2 + COLUMNS * (S_STRIDE * 4 + P_STRIDE * 2);
// Shared memory: ring; rows of the phase, or keys and values, or pieces; partial sums, or queries and scores, or shares;
// a pair's exchange; a unit's words of `hidden`; barriers.
constexpr int ROWS_AT = SLOTS * CHUNK * 1024;
constexpr int SUMS_AT = ROWS_AT + up_to(128, at_least(ROWS_BYTES, at_least(CACHE_BYTES, PIECES_BYTES)));
constexpr int EXCHANGE_AT = SUMS_AT + up_to(128, at_least(SUM_ROWS * SUM_STRIDE * 4, at_least(SCORE_BYTES, SPLITS * N * 4)));
constexpr int STAGE_AT = EXCHANGE_AT + up_to(128, 2 * 8 * COLUMNS * 4);
constexpr int BARRIERS_AT = STAGE_AT + up_to(128, GATE * 8 / PER_WORD * N * 4);

#define MINUS_INFINITY __int_as_float(0xff800000)

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
// one float. Four E4M3 are never EMPTY: they are rounded to numbers, or to the NaN 0x7f. All lies so that what a CTA writes
// fills sectors of 32 bytes: of queries, keys and values eight dims of a head's first half and then their partners.
struct Mail {
  static constexpr int X = N * W / 2, Q = N * H * D / 2, NEW = N * KV * D / 2;
  static constexpr int ATTENDED = N * H * D / PER_WORD, HIDDEN = N * F / PER_WORD;
  static constexpr int PARTS_WORDS = H * SPLITS * EVEN * D, STATS = H * SPLITS * N * 2;
  static constexpr int WORDS = up_to(4, 2 * X + HIDDEN + Q + ATTENDED + 2 * NEW + PARTS_WORDS + STATS);
  // Tokens of a group of eight.
  __host__ __device__ static constexpr int wide(int group) { return GROUPS == 1 ? EVEN : group ? EVEN - 8 : 8; }
  u32 *x, *middle, *q, *attended, *hidden, *keys, *values, *parts, *stats;

  __device__ Mail(u32* base, u32 round) {
    x = base + (u64)(round % GENERATIONS) * WORDS;  // enters a layer
    middle = x + X;              // between attention and MLP
    q = middle + X;
    attended = q + Q;
    hidden = attended + ATTENDED;
    keys = hidden + HIDDEN;      // the suffix's
    values = keys + NEW;
    parts = values + NEW;        // (H, SPLITS, {D, eight tokens}, {D, the others})
    stats = parts + PARTS_WORDS; // (H, SPLITS, N, {maximum, sum})
  }
};

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
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(words)
               : "memory");
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

__device__ __forceinline__ void tell4(u32* words, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(words), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void tell2(u32* words, u32 first, u32 second) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(words), "r"(first), "r"(second) : "memory");
}

// What this CTA stored before its last barrier is seen before whatever it stores after the next one. One thread asks for all.
__device__ __forceinline__ void publish() {
  if (threadIdx.x == THREADS - 1) asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// One word, asked for until it is there.
__device__ __forceinline__ u32 read(const u32* word) {
  u32 v;
  do v = ask(word);
  while (v == EMPTY);
  return v;
}

// All warps go on when most of COUNT CTAs have written: one warp asks for a word of each, at place(cta). Many that ask
// at once would only slow down the answer. Who then reads the data asks again for what is missing, and is done a round trip
// sooner than if all had been waited for. The other warps do what `meanwhile` says.
template <int COUNT, class Place, class Work>
__device__ __forceinline__ void await(Place place, Work meanwhile) {
  constexpr int EACH = (COUNT + 31) / 32, ENOUGH = (COUNT * 3 + 3) / 4;
  if (threadIdx.x < 32) {
    int written;
    do {
      u32 v[EACH];
      written = 0;
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int cta = i * 32 + threadIdx.x;
        v[i] = ask(place(cta < COUNT ? cta : COUNT - 1));
      }
#pragma unroll
      for (int i = 0; i < EACH; ++i) written += v[i] != EMPTY && (COUNT % 32 == 0 || i * 32 + threadIdx.x < COUNT);
    } while (__reduce_add_sync(0xffffffffu, written) < ENOUGH);
  } else {
    meanwhile();
  }
  sync();
}

// The first word that a CTA writes of one of its rows of x. Which of its rows does not matter, only that not all ask the same
// part of L2.
__device__ __forceinline__ const u32* of_x(const u32* x, int cta) {
  const int rows = cta % 2 ? N - HALF_N : HALF_N, row = rows ? (cta % 2) * HALF_N + blockIdx.x % at_least(rows, 1) : 0;
  return x + row * (W / 2) + cta / 2 * 8;
}

// This thread, as the compiler has not seen it before: what is reckoned from it is not kept over a whole layer.
__device__ __forceinline__ int thread() {
  int t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  __builtin_assume(t >= 0 && t < THREADS);
  return t;
}

// Reckoned here, before whatever is waited for next, not where it is used.
__device__ __forceinline__ u32 settled(u32 at) {
  asm volatile("" : "+r"(at));
  return at;
}

// Four words at each of COUNT places, asked for.
template <int COUNT>
__device__ __forceinline__ void ask_all(uint4 (&v)[COUNT], const u32* base, const u32 (&at)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) v[i] = ask4(base + at[i]);
}

// Asked for again where they are not there.
template <int COUNT>
__device__ __forceinline__ void insist(uint4 (&v)[COUNT], const u32* base, const u32 (&at)[COUNT]) {
  for (;;) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) all &= complete(v[i]);
    if (all) break;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (!complete(v[i])) v[i] = ask4(base + at[i]);
  }
}

// `items` of four words, read by all threads: where each of a thread's stands, and where it goes in shared memory, in bytes.
template <int ITEMS>
struct Fetch {
  static constexpr int ROUNDS = (ITEMS + THREADS - 1) / THREADS;
  static_assert(ROUNDS <= 16, "as registers allow");
  const u32* base;
  u32 at[ROUNDS], to[ROUNDS];
  uint4 v[ROUNDS];

  // from(i) and into(i) say where item i stands and goes. A thread without an item repeats another.
  template <class From, class Into>
  __device__ __forceinline__ void prepare(const u32* words, From from, Into into, int items = ITEMS) {
    base = words;
    const int own = thread();
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      int i = r * THREADS + own;
      if ((ITEMS % THREADS || items != ITEMS) && i >= items) i = own < items ? own : 0;
      at[r] = settled((u32)from(i)), to[r] = settled((u32)into(i));
    }
  }
  __device__ __forceinline__ void ask() { ask_all(v, base, at); }
  __device__ __forceinline__ void wait() { insist(v, base, at); }
};

// Makes WORDS in a row EMPTY, a multiple of four, by all warps but the first.
template <int WORDS>
__device__ __forceinline__ void blank(u32* at) {
  static_assert(WORDS % 4 == 0, "whole vectors");
#pragma unroll
  for (int i = threadIdx.x - 32; i < WORDS / 4; i += THREADS - 32)
    *(uint4*)(at + i * 4) = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY);
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

// Makes EMPTY, in a generation that nobody reads, the attention parts that this CTA writes. By all warps but the first.
__device__ __noinline__ void empty_parts(u32* mail, u32 round) {
  const Mail old(mail, round);
  if (blockIdx.x < H * SPLITS) blank<EVEN * D>(old.parts + blockIdx.x * EVEN * D);
}

// And all else that it writes.
__device__ __noinline__ void empty_rest(u32* mail, u32 round) {
  const Mail old(mail, round);
  const int cta = blockIdx.x;
  if (cta < PAIRED_UNITS) {
    const int first = cta % 2 * HALF_N, rows = cta % 2 ? N - HALF_N : HALF_N, at = first * (W / 2) + cta / 2 * 8;
    blank<8>(old.x + at, rows, W / 2);
    blank<8>(old.middle + at, rows, W / 2);
  }
#pragma unroll 1
  for (int unit = cta; unit < QKV_UNITS; unit += CTAS) {
    const int head = unit / (D / 16), at = unit % (D / 16) * 8;
    u32* to = head < H ? old.q + head * (D / 2)
              : head < H + KV ? old.keys + (head - H) * (D / 2) : old.values + (head - H - KV) * (D / 2);
    const int stride = (head < H ? H : KV) * (D / 2);
    blank<8>(to + at, N, stride);
  }
#pragma unroll 1
  for (int unit = cta; unit < GATE_UNITS; unit += CTAS)
    blank<GATE * 8 / PER_WORD>(old.hidden + unit * (GATE * 8 / PER_WORD), N, F / PER_WORD);
  if (cta < H * SPLITS) {
    blank<DIMS / PER_WORD>(old.attended + (cta / SPLITS * D + cta % SPLITS * DIMS) / PER_WORD, N, H * D / PER_WORD);
    blank<N * 2>(old.stats + cta * N * 2, 1, 0);
  }
}
