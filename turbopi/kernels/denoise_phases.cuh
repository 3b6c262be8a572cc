// Of denoise.cu: what a CTA does before and behind its products.

#include "denoise_attention.cuh"

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__host__ __device__ constexpr int power_of_two(int least) { return least <= 1 ? 1 : 2 * power_of_two((least + 1) / 2); }

// Sums over a warp of COUNT values, a power of two: lane l gets that of value l / (32 / COUNT). Lanes share the values out as
// they add them up, so that eight take nine shuffles, not forty.
template <int COUNT>
__device__ __forceinline__ float warp_sums(float (&v)[COUNT]) {
  int offset = 16;
#pragma unroll
  for (int half = COUNT / 2; half; half /= 2, offset /= 2) {
    const bool upper = threadIdx.x & offset;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? v[i + half] : v[i], given = upper ? v[i] : v[i + half];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, given, offset);
    }
  }
#pragma unroll
  for (; offset; offset /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], offset);
  return v[0];
}

__device__ __forceinline__ float gelu(float x) {  // tanh form
  return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// Store into the other CTA of the pair, and count the bytes on its barrier.
__device__ __forceinline__ void send(u32 to, float value, u32 barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
               "r"(__float_as_uint(value)), "r"(barrier)
               : "memory");
}

// Root-mean-square norm of x (N, W) with adaRMS scale and shift, as a product's input into shared memory. SPAN warps share a
// row, so that each has the same few columns of all its rows; a lane takes eight columns at once.
struct Norm {
  static constexpr int EIGHTS = (W / 8 + 31) / 32;  // of a row, for a lane
  static constexpr int SPAN = EIGHTS % 8 == 0 ? 8 : EIGHTS % 4 == 0 ? 4 : EIGHTS % 2 == 0 ? 2 : 1;
  static constexpr int MINE = EIGHTS / SPAN;                                      // of a lane's eights
  static constexpr int APART = WARPS / SPAN, ROUNDS = (N + APART - 1) / APART;  // rows at once; of a warp
  static_assert(WARPS % SPAN == 0, "whole rows at once");
  float inverse = 1.0f;
  float4 scale[2 * MINE], shift[2 * MINE];  // one and the scale

  static __device__ int column(int k) { return (((threadIdx.x >> 5) % SPAN * MINE + k) * 32 + (threadIdx.x & 31)) * 8; }

  // Fetches the modulation before the rows are there, and in fp8 what the input is multiplied by.
  __device__ Norm(const float* modulation, const float* factor) {
    if constexpr (FP8) inverse = *factor;
#pragma unroll
    for (int k = 0; k < MINE; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = column(k) < W ? column(k) + half * 4 : 0;
        const float4 plain = *(const float4*)(modulation + at);
        scale[2 * k + half] = make_float4(1.0f + plain.x, 1.0f + plain.y, 1.0f + plain.z, 1.0f + plain.w);
        shift[2 * k + half] = *(const float4*)(modulation + W + at);
        if constexpr (FP8) times(scale[2 * k + half], inverse), times(shift[2 * k + half], inverse);
      }
  }

  static __device__ void times(float4& v, float factor) { v.x *= factor, v.y *= factor, v.z *= factor, v.w *= factor; }

  static __device__ float square(u32 pair) { return low(pair) * low(pair) + high(pair) * high(pair); }

  __device__ u32 modulate(u32 pair, float f, float scale0, float scale1, float shift0, float shift1) const {
    const float first = low(pair) * f * scale0 + shift0, second = high(pair) * f * scale1 + shift1;
    return FP8 ? widen2(narrow2_e4m3(first, second)) : narrow2(first, second);
  }

  // The other warps do what `meanwhile` says while the first waits for x.
  template <class Work>
  __device__ void apply(const u32* x, Work meanwhile) const {
    static_assert(SPAN == 1 || ROUNDS * APART * SPAN * 32 * 4 <= EXCHANGE_AT - SUMS_AT, "room for every lane's squares");
    float* squares = (float*)(memory + SUMS_AT);  // (rows, SPAN, 32)
    u16* rows = (u16*)(memory + ROWS_AT);
    const int own = thread(), lane = own & 31, group = (own >> 5) / SPAN, part = (own >> 5) % SPAN;
    const auto column = [&](int k) { return ((own >> 5) % SPAN * MINE + k) * 32 * 8 + lane * 8; };
    u32 at[ROUNDS * MINE];
#pragma unroll
    for (int i = 0; i < ROUNDS * MINE; ++i) {
      const int row = group + i / MINE * APART, from = column(i % MINE);
      at[i] = settled((u32)((row < N ? row : N - 1) * (W / 2) + (from < W ? from : 0) / 2));
    }
    await<W / 8>([&](int cta) { return of_x(x, cta); }, meanwhile);
    uint4 v[ROUNDS * MINE];
    ask_all(v, x, at);
    insist(v, x, at);
    __syncwarp();
    constexpr int SUMS = power_of_two(ROUNDS);
    float f[ROUNDS], sums[SUMS];
#pragma unroll
    for (int r = 0; r < SUMS; ++r) {
      sums[r] = 0.0f;
#pragma unroll
      for (int k = 0; k < MINE; ++k)
        if (r < ROUNDS && column(k) < W) {
          const uint4 x = v[r * MINE + k];
          sums[r] += square(x.x) + square(x.y) + square(x.z) + square(x.w);
        }
    }
    const float total = warp_sums(sums);
    if constexpr (SPAN > 1) {
      if (lane % (32 / SUMS) == 0) squares[part * SUMS * APART + lane / (32 / SUMS) * APART + group] = total;
      sync();
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) {
        f[r] = squares[r * APART + group];
#pragma unroll
        for (int k = 1; k < SPAN; ++k) f[r] += squares[(k * SUMS + r) * APART + group];
      }
    } else {
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) f[r] = __shfl_sync(0xffffffffu, total, r * (32 / SUMS));
    }
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
    const int head = unit / (D / 16), tile = unit % (D / 16), dim = tile * 8 + row, position = prefix + token;
    if (head < H + KV) cosine = p.cosines[position * (D / 2) + dim], sine = p.sines[position * (D / 2) + dim];
    to = head < H ? mail.q + (token * H + head) * (D / 2)
         : head < H + KV ? mail.keys + (token * KV + head - H) * (D / 2) : mail.values + (token * KV + head - H - KV) * (D / 2);
    to += tile * 8 + row % 2 * 4 + row / 2;
  }

  __device__ void store() const {
    if (!mine) return;
    const int safe = token < N ? token : N - 1, unit = threadIdx.x / APART;
    const float a = All::sum(row, safe, unit) * scale, b = All::sum(row + 8, safe, unit) * partners_scale;
    const float first = a * cosine - b * sine, second = b * cosine + a * sine;
    // Even rows store two of the first half, odd ones two of the second: a token's words of a tile at once.
    const float other = __shfl_xor_sync(0xffffffffu, row % 2 ? first : second, 1);
    if (token < N) tell(to, row % 2 ? narrow2(other, second) : narrow2(first, other));
  }
};

// A gate_up unit behind its product. Rows of a tile: 8 of gate, then the same 8 of up.
struct Hidden {
  using P = GateProduct;
  static constexpr int OUT = GATE * 8, PAIRS = OUT / 2 * N, WORDS = OUT / PER_WORD;  // of a token
  static_assert(WORDS % 4 == 0, "whole vectors");
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
    u32* stage = (u32*)(memory + STAGE_AT);  // (N, WORDS), so that whole sectors are written
    if constexpr (FP8) {
      static_assert(PAIRS <= THREADS, "a pair a thread");
      const int i = threadIdx.x < PAIRS ? threadIdx.x : 0, at = row(column(i));
      if (!warp_beyond(PAIRS)) {
        const float first = gelu(P::sum(at, token(i)) * gate_scale[0]) * (P::sum(at + 8, token(i)) * up_scale[0]) * inverse;
        const float second = gelu(P::sum(at + 1, token(i)) * gate_scale[1]) * (P::sum(at + 9, token(i)) * up_scale[1]) * inverse;
        const u32 mine = narrow2_e4m3(first, second), next = __shfl_down_sync(0xffffffffu, mine, 1);
        if (threadIdx.x < PAIRS && i % 2 == 0) stage[token(i) * WORDS + column(i) / 4] = mine | next << 16;
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < PAIRS; i += THREADS) {
        const int token = i % N, pair = i / N * 2, at = row(pair);
        const float first = gelu(P::sum(at, token)) * P::sum(at + 8, token);
        const float second = gelu(P::sum(at + 1, token)) * P::sum(at + 9, token);
        stage[token * WORDS + pair / 2] = narrow2(first, second);
      }
    }
    sync();
#pragma unroll 1
    for (int i = threadIdx.x; i < N * WORDS / 4; i += THREADS)
      tell4(mail.hidden + (i / (WORDS / 4) * F + unit * OUT) / PER_WORD + i % (WORDS / 4) * 4,
            *(const uint4*)(stage + i * 4));
  }
};

// to = x + gate * (input @ weights^T), for `out` and `down`. Each CTA of a pair takes half of K, and in the end half of the
// rows. Of the input, a CTA wrote WRITTEN columns; `ahead` chunks of weights are allowed then. In fp8 gate * scale for gate.
template <int K, int WRITTEN, class Work>
__device__ __forceinline__ void project(Ring& ring, u32& parity, const u32* input, const u32* x, const float* gate,
                                        const float* scale, u32* to, Work meanwhile, const Pace& pace, int ahead) {
  constexpr int ITEMS = K / 2 / (4 * PER_WORD);
  using P = Product<1, 1, K / 64>;
  const u32 exchanged = Ring::arrived(2 * SLOTS);
  const int half = blockIdx.x & 1, row = threadIdx.x % 16, column = blockIdx.x / 2 * 16 + row;
  const int tokens = half ? N - HALF_N : HALF_N, local = threadIdx.x / 16, token = half * HALF_N + local;
  const float factor = FP8 ? gate[column] * scale[column] : gate[column];
  const u32* from = input + half * (K / 2 / PER_WORD);
  const u32* at_x = x + ((local < tokens ? token : 0) * W + column) / 2;
  u32 before = ask(at_x);  // written a phase or more ago
  static_assert(16 * COLUMNS <= THREADS, "a sum a thread");
  // A thread adds up one sum, neighbours those of neighbouring tokens: no bank twice. The CTA that finishes the token gets it.
  const int own = thread(), of = own / COLUMNS, whose = own % COLUMNS, target = whose >= HALF_N;
  const bool sums_up = own < 16 * COLUMNS && whose < N;
  const u32 sum_at = settled((u32)(SUMS_AT + (of % 16 * SUM_STRIDE + whose) * 4));
  const u32 mine_at = settled((u32)(EXCHANGE_AT + ((half * 16 + of % 16) * HALF_N + whose % HALF_N) * 4));
  const u32 sent_to = settled(there(shared_address(memory) + mine_at, target));
  const u32 counted_by = settled(there(exchanged, target));
  const int safe = local < tokens ? local : 0;
  const u32 found_at = settled((u32)(EXCHANGE_AT + (row * HALF_N + safe) * 4));
  const u32 told_at = settled((u32)(safe + half * HALF_N) * (W / 2) + column / 2);
  Fetch<N * ITEMS> fetch;
  fetch.prepare(from, [&](int i) { return i / ITEMS * (K / PER_WORD) + i % ITEMS * 4; },
                [&](int i) { return ROWS_AT + place<K / 64>(i / ITEMS, i % ITEMS * 4 * PER_WORD) * 2; });
  const u32* asked = from + blockIdx.x / 2 % N * (K / PER_WORD);  // see of_x
  await<K / 2 / WRITTEN>([&](int cta) { return asked + cta * (WRITTEN / PER_WORD); }, meanwhile);
  fetch.ask();
  fetch.wait();
#pragma unroll
  for (int r = 0; r < fetch.ROUNDS; ++r) put(fetch.to[r], fetch.v[r]);
  if (before == EMPTY) before = read(at_x);
  sync();
  pace.allow(ahead);
  P::multiply(ring);
  if (threadIdx.x == 0) expect(exchanged, 16 * tokens * 4);
  if (sums_up) {
    const float value = P::sum_from(sum_at);
    if (target == half) *(float*)(memory + mine_at) = value;
    else send(sent_to, value, counted_by);
  }
  sync();
  wait(exchanged, parity);
  parity ^= 1;
  if (warp_beyond(16 * tokens)) return;
  const float sum = *(const float*)(memory + found_at) + *(const float*)(memory + found_at + 16 * HALF_N * 4);
  const float value = (row % 2 ? high(before) : low(before)) + sum * factor;
  const float next = __shfl_down_sync(0xffffffffu, value, 1);
  if (local < tokens && row % 2 == 0) tell(to + told_at, narrow2(value, next));
}
