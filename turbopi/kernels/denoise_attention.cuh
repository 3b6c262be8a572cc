// Of denoise.cu: attention of a CTA's share of a head's keys, and the adding up of shares.

#include "denoise_products.cuh"

__device__ __forceinline__ void copy16_async(const void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Whether this thread's whole warp lies beyond the first `threads`.
__device__ __forceinline__ bool warp_beyond(int threads) { return (threadIdx.x & ~31) >= threads; }

// Keys that a CTA takes.
__device__ __forceinline__ int share_of(int prefix) { return ((prefix + N + SPLITS - 1) / SPLITS + 7) / 8 * 8; }

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

// What a share's attention keeps in shared memory beside its keys and values: (N, K_STRIDE), (COLUMNS, S_STRIDE) and
// (COLUMNS, P_STRIDE).
__device__ __forceinline__ u16* q_shared() { return (u16*)(memory + SUMS_AT); }
__device__ __forceinline__ float* scores_shared() { return (float*)(q_shared() + N * K_STRIDE); }
__device__ __forceinline__ u16* weights_shared() { return (u16*)(scores_shared() + COLUMNS * S_STRIDE); }

// A layer's queries, and the suffix's keys and values of this share: all asked for at once, then put down.
__device__ __forceinline__ void gather(const Share& my, const Mail& mail) {
  const int kv = my.head / (H / KV);
  // Of a tile eight dims, then their partners.
  constexpr int EIGHTS = D / 8;
  const auto column = [](int e) { return e % 2 * (D / 2) + e / 2 * 8; };
  const int standing = my.standing(), token = my.first + standing - my.prefix, fresh = (my.count - standing) * EIGHTS;
  Fetch<N * EIGHTS> queries;
  queries.prepare(mail.q, [&](int i) { return (i / EIGHTS * H + my.head) * (D / 2) + i % EIGHTS * 4; },
                  [&](int i) { return SUMS_AT + (i / EIGHTS * K_STRIDE + column(i % EIGHTS)) * 2; });
  Fetch<2 * N * EIGHTS> others;
  if (fresh)
    others.prepare(
        mail.keys,
        [&](int i) {
          const int n = i < fresh ? i : i - fresh;
          return (i < fresh ? 0 : Mail::NEW) + ((token + n / EIGHTS) * KV + kv) * (D / 2) + n % EIGHTS * 4;
        },
        [&](int i) {
          const int n = i < fresh ? i : i - fresh, row = standing + n / EIGHTS;
          return ROWS_AT + ((i < fresh ? row * K_STRIDE : KEYS * K_STRIDE + row * V_STRIDE) + column(n % EIGHTS)) * 2;
        },
        2 * fresh);
  await<D / 16>([&](int tile) { return mail.q + ((N - 1) * H + my.head) * (D / 2) + tile * 8; },
                [&] { my.fetch_ahead(); });
  queries.ask();
  if (fresh) others.ask();
  queries.wait();
#pragma unroll
  for (int r = 0; r < queries.ROUNDS; ++r) *(uint4*)(memory + queries.to[r]) = queries.v[r];
  if (fresh) {
    others.wait();
#pragma unroll
    for (int r = 0; r < others.ROUNDS; ++r) *(uint4*)(memory + others.to[r]) = others.v[r];
  }
  wait_copies();
}

// scores^T = keys x queries^T, a warp sixteen keys of eight tokens at a time.
__device__ __forceinline__ void score(const Share& my) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int item = warp; item < my.tiles * GROUPS; item += WARPS) {
    const int tile = item / GROUPS, first = item % GROUPS * 8, of = first + g < N ? first + g : N - 1;
    const u16* upper = Share::k_shared() + (tile * 16 + g) * K_STRIDE + t * 8;
    const u16* query = q_shared() + of * K_STRIDE + t * 8;
    constexpr int STEPS = D / 32, BATCH = STEPS % 4 ? 1 : 4;
    float s[4] = {};
#pragma unroll 1
    for (int step = 0; step < STEPS; step += BATCH) {
      uint4 u[BATCH], l[BATCH], b[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        u[i] = *(const uint4*)(upper + (step + i) * 32), l[i] = *(const uint4*)(upper + 8 * K_STRIDE + (step + i) * 32);
        b[i] = *(const uint4*)(query + (step + i) * 32);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        mma(s, u[i].x, l[i].x, u[i].y, l[i].y, b[i].x, b[i].y);
        mma(s, u[i].z, l[i].z, u[i].w, l[i].w, b[i].z, b[i].w);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = tile * 16 + g + (i >> 1) * 8, token = first + 2 * t + (i & 1);
      scores_shared()[token * S_STRIDE + key] = key < my.count ? s[i] : MINUS_INFINITY;
    }
  }
}

// Weights of each token's keys, half a warp a token; the largest score and the sum of weights into stats.
__device__ __forceinline__ void soften(const Share& my, const Mail& mail) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const float* scores = scores_shared();
  u16* weights = weights_shared();
#pragma unroll 1
  for (int base = warp * 2; base < N; base += WARPS * 2) {
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
      tell2(mail.stats + (blockIdx.x * N + token) * 2, __float_as_uint(top), __float_as_uint(sum));
  }
}

// output^T = values^T x weights^T, a warp sixteen dims at a time or twice sixteen, into parts.
__device__ __forceinline__ void add_values(const Share& my, const Mail& mail) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const u16 *v_shared = Share::v_shared(), *weights = weights_shared();
  constexpr int AT_ONCE = D / 16 > WARPS ? 2 : 1;  // tiles of dims of a warp
#pragma unroll 1
  for (int tile = warp; tile < D / 16; tile += AT_ONCE * WARPS) {
    float o[AT_ONCE][GROUPS][4] = {};
#pragma unroll 4
    for (int step = 0; step < my.tiles; ++step) {
      u32 a[AT_ONCE][4];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const int column = (tile + k * WARPS < D / 16 ? tile + k * WARPS : tile) * 16 + (lane >> 3 & 1) * 8;
        const u16* from = v_shared + (step * 16 + (lane >> 4) * 8 + (lane & 7)) * V_STRIDE + column;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a[k][0]), "=r"(a[k][1]), "=r"(a[k][2]), "=r"(a[k][3])
                     : "r"(shared_address(from))
                     : "memory");
      }
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        const u16* from = weights + (j * 8 + g) * P_STRIDE + step * 16 + 2 * t;
        const u32 b0 = *(const u32*)from, b1 = *(const u32*)(from + 8);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) mma(o[k][j], a[k][0], a[k][1], a[k][2], a[k][3], b0, b1);
      }
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k)
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        const int wide = Mail::wide(j), dims = tile + k * WARPS;
        if (j * 8 + 2 * t >= N || dims >= D / 16) continue;
        u32* to = mail.parts + (blockIdx.x * EVEN + j * 8) * D + (dims * 16 + g) * wide + 2 * t;
        tell2(to, __float_as_uint(o[k][j][0]), __float_as_uint(o[k][j][1]));
        tell2(to + 8 * wide, __float_as_uint(o[k][j][2]), __float_as_uint(o[k][j][3]));
      }
  }
}

// Scores, softmax and output of one share, into parts and stats.
__device__ __forceinline__ void attend(const Share& my, const Mail& mail, const Pace& pace) {
  gather(my, mail);
  sync();
  pace.allow(pace.layer + pace.qkv);
  score(my);
  sync();
  soften(my, mail);
  sync();
  add_values(my, mail);
}

// How much a CTA's part of a token weighs among its head's, from what was `found` in stats: SPLITS lanes a token, of
// which those that are there write.
__device__ __forceinline__ void weigh(uint2 found, bool there, float& share) {
  const float mine = __uint_as_float(found.x);
  float top = mine;
#pragma unroll
  for (int offset = SPLITS / 2; offset; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
  const float weight = __expf(mine - top);
  float sum = weight * __uint_as_float(found.y);
#pragma unroll
  for (int offset = SPLITS / 2; offset; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (there) share = weight / sum;
}

// The head's output in this CTA's dims: its (SPLITS, DIMS, EVEN) pieces by their (SPLITS, N) shares.
__device__ __forceinline__ void add_pieces(const Share& my, const Mail& mail, const float* pieces, const float* shares,
                                           float inverse) {
  constexpr int PAIRS = DIMS / 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < up_to(32, N * PAIRS); i += THREADS) {
    const int token = i / PAIRS < N ? i / PAIRS : N - 1, dim = i % PAIRS * 2;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int r = 0; r < SPLITS; ++r) {
      const float share = shares[r * N + token];
      const float* piece = pieces + (r * DIMS + dim) * EVEN + token;
      sum.x += share * piece[0], sum.y += share * piece[EVEN];
    }
    u32 word = FP8 ? narrow2_e4m3(sum.x * inverse, sum.y * inverse) : narrow2(sum.x, sum.y);
    if constexpr (FP8) word |= __shfl_down_sync(0xffffffffu, word, 1) << 16;
    if (i < N * PAIRS && (!FP8 || i % 2 == 0))
      tell(mail.attended + (token * H * D + my.head * D + my.rank * DIMS + dim) / PER_WORD, word);
  }
}

// Add up what a head's CTAs found, each by how much it weighs. A CTA has DIMS of the head's dims.
template <class Work>
__device__ __forceinline__ void combine(const Share& my, const Mail& mail, const Scales& scales, Work meanwhile) {
  const float inverse = FP8 ? scales.inverse[1] : 1.0f;
  float* shares = (float*)(memory + SUMS_AT);  // (SPLITS, N), how much each CTA's part weighs
  float* pieces = (float*)(memory + ROWS_AT);  // (SPLITS, DIMS, EVEN)
  constexpr int PART = D * EVEN, FOURS = DIMS * EVEN / 4;
  // Tokens of a row in either group, fours of all rows of the first.
  constexpr int WIDE = Mail::wide(0), NARROW = EVEN - WIDE, OF_WIDE = DIMS * WIDE / 4;
  Fetch<SPLITS * FOURS> fetch;
  fetch.prepare(
      mail.parts + my.head * SPLITS * PART,
      [&](int i) {
        const int n = i % FOURS;
        const int in_part = n < OF_WIDE ? my.rank * DIMS * WIDE + n * 4 : D * WIDE + my.rank * DIMS * NARROW + (n - OF_WIDE) * 4;
        return i / FOURS * PART + in_part;
      },
      [&](int i) {
        // Of two pairs of tokens the first; the second follows, or is the first of the next dim.
        const int n = i % FOURS, pair = (n < OF_WIDE ? n : n - OF_WIDE) * 2;
        const int half = n < OF_WIDE ? WIDE / 2 : at_least(NARROW / 2, 1);
        const auto piece = [&](int pair) { return pair / half * EVEN + (n < OF_WIDE ? 0 : WIDE) + pair % half * 2; };
        return (ROWS_AT + (i / FOURS * DIMS * EVEN + piece(pair)) * 4) | (piece(pair + 1) - piece(pair)) * 4 << 24;
      });
  await<SPLITS>([&](int split) { return mail.parts + (my.head * SPLITS + split + 1) * PART - 1; }, meanwhile);
  static_assert(N * SPLITS <= THREADS, "SPLITS lanes a token");
  const int i = threadIdx.x, of = i / SPLITS < N ? i / SPLITS : N - 1, r = i % SPLITS;
  const u32* stats = mail.stats + ((my.head * SPLITS + r) * N + of) * 2;
  const bool weighs = !warp_beyond(N * SPLITS);
  uint2 found = make_uint2(EMPTY, EMPTY);
  if (weighs) found = ask2(stats);  // with the parts, not after them
  fetch.ask();
  fetch.wait();
#pragma unroll
  for (int r = 0; r < fetch.ROUNDS; ++r) {
    char* piece = memory + (fetch.to[r] & 0xffffff);
    *(uint2*)piece = make_uint2(fetch.v[r].x, fetch.v[r].y);
    *(uint2*)(piece + (fetch.to[r] >> 24)) = make_uint2(fetch.v[r].z, fetch.v[r].w);
  }
  if (weighs) {
    while (found.x == EMPTY || found.y == EMPTY) found = ask2(stats);
    __syncwarp();
    weigh(found, i / SPLITS < N, shares[r * N + of]);
  }
  sync();
  add_pieces(my, mail, pieces, shares, inverse);
}
