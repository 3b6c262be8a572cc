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
// before it waits, and once most of it is there everybody asks for all of it, then again for what was missing. Addresses
// are reckoned before the wait as well (`Fetch`): with two warps a scheduler every instruction behind it is time.
//
// A layer runs through its code once, and code beyond the 128 KB of the instruction cache costs far more than what it does.
// So what nobody waits for is written once (`empty_rest`, the producer's loop), and loops are unrolled only where that pays.
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
// Launched in clusters of two CTAs. All CTAs must be on the GPU at once, for they wait for each other: nothing else that does
// so may run beside this kernel.
//
// Set by the compiler's command line: W expert width, H heads, KV key/value heads, D head size, F MLP width, N suffix rows,
// A action dims, LAYERS, GATE tiles of a gate_up unit, SPLITS of a head's keys and at most KEYS in each, CTAS, WARPS that
// compute, CHUNK KB that the ring moves at once, SLOTS for them, at most IN_FLIGHT of them being filled, FP8 whether products
// are of E4M3.
//
// denoise_mail.cuh: sizes, shared memory, mail. denoise_products.cuh: the ring, products. denoise_attention.cuh: attention.
// denoise_phases.cuh: norms, rotation, GeGLU, residuals.

#include "denoise_phases.cuh"

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
  for (int line = blockIdx.x; line < 6 * W / 32; line += CTAS)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + line * 32));
}

__device__ __forceinline__ void produce(const Arguments& p) {
  Ring ring, oldest;
  int started = 0;
#pragma unroll 1
  for (int step = 0; step < p.steps; ++step)
#pragma unroll 1
    for (u64 layer = 0; layer < LAYERS; ++layer) {
      bring_modulation(p, step, layer);
      bring_cache(p, layer);
#pragma unroll 1
      for (int k = 0; k < 4; ++k) {
        const char* from = k == 0 ? p.qkv : k == 1 ? p.out : k == 2 ? p.gate_up : p.down;
        const int units = k == 0 ? QKV_UNITS : k == 2 ? GATE_UNITS : PAIRED_UNITS;
        const int tiles = k == 0 ? W / 32 : k == 1 ? H * D / 64 : k == 2 ? GATE * W / 32 : F / 64;
#pragma unroll 1
        for (int u = blockIdx.x; u < units; u += CTAS)
          ring.fill(from + (layer * units + u) * tiles * TILE_BYTES, tiles, oldest, started);
      }
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
  // Columns of a thread, outputs of a warp.
  constexpr int MINE = (W + THREADS - 1) / THREADS, EACH = (A + WARPS - 1) / WARPS;
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
    for (int k = 0; k < EACH; ++k) {
      const int a = warp + k * WARPS < A ? warp + k * WARPS : A - 1;
      values[k] += normed[i] * p.out_weights[a * W + i];
    }
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
  Pace pace;
  u32 parity = 0, round = 0;
  if (blockIdx.x < N) embed(p.x_t + blockIdx.x * A, p.in_weights, p.in_bias, Mail(p.mail, round).x + blockIdx.x * (W / 2));
#pragma unroll 1
  for (int step = 0; step < p.steps; ++step) {
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; ++layer, ++round) {
      const float* modulation = p.modulation + ((u64)step * (2 * LAYERS + 1) + 2 * layer) * 3 * W;
      const Mail mail(p.mail, round), next(p.mail, round + 1);
      const Share my(p, layer);
      const Scales scales(p, layer);
      // Most CTAs empty old words while they wait for others, and let x of the next round stand behind that.
      const bool waits = blockIdx.x < PAIRED_UNITS && blockIdx.x < GATE_UNITS;
      if (!waits && threadIdx.x >= 32) empty_parts(p.mail, round + 2), empty_rest(p.mail, round + 2), __threadfence();
      HeadPair pair(p, mail, blockIdx.x, my.prefix, scales.qkv);
      if (blockIdx.x < QKV_UNITS) Norm(modulation, scales.inverse).apply(mail.x, [] {});
      pace.allow(pace.qkv + pace.out + pace.gate_up);
#pragma unroll 1
      for (int unit = blockIdx.x; unit < QKV_UNITS; unit += HeadPair::UNITS * CTAS) {
        if (unit > blockIdx.x) sync(), pair = HeadPair(p, mail, unit, my.prefix, scales.qkv);
        if (unit + (HeadPair::UNITS - 1) * CTAS < QKV_UNITS) HeadPair::All::multiply(ring);
        else HeadPair::One::multiply(ring);
        pair.store();
      }
      if (blockIdx.x < H * SPLITS) {
        sync();
        attend(my, mail, pace);
        combine(my, mail, scales, [&] {
          if (waits) empty_parts(p.mail, round + 2);
        });
      }
      pace.allow(pace.layer + pace.qkv);
      sync();
      if (blockIdx.x < PAIRED_UNITS)
        project<H * D, DIMS>(ring, parity, mail.attended, mail.x, modulation + 2 * W, scales.out, mail.middle, [] {}, pace,
                             pace.layer + pace.qkv);
      sync();
      if (blockIdx.x < GATE_UNITS)
        Norm(modulation + 3 * W, scales.inverse + 2).apply(mail.middle, [&] {
          if (waits) empty_rest(p.mail, round + 2);
        });
#pragma unroll 1
      for (int unit = blockIdx.x; unit < GATE_UNITS; unit += CTAS) {
        if (unit > blockIdx.x) sync();
        const Hidden hidden(scales, unit);
        pace.allow(pace.layer + pace.qkv + pace.out);
        GateProduct::multiply(ring);
        hidden.store(mail, unit);
      }
      const int down_ahead = pace.layer + pace.qkv + pace.out + pace.gate_up / 2;
      sync();
      if (blockIdx.x < PAIRED_UNITS)
        project<F, GATE * 8>(ring, parity, mail.hidden, mail.middle, modulation + 5 * W, scales.down, next.x,
                             [] { publish(); }, pace, down_ahead);
      pace.allow(down_ahead);
      pace.begun += pace.layer;
      sync();
    }
    // A round of its own: the layer that ended wrote x of this round, and some may still be reading it.
    const u32* x = Mail(p.mail, round).x;
    if (blockIdx.x < N) finish(p, x, Mail(p.mail, round + 1).x, step);
    await<W / 8>([&](int cta) { return of_x(x, cta); }, [&] {
      empty_parts(p.mail, round + 2), empty_rest(p.mail, round + 2), __threadfence();
    });
    ++round;
    sync();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) denoise(const __grid_constant__ Arguments p) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < SLOTS; ++s) init(Ring::arrived(s), 1), init(Ring::consumed(s), WARPS);
    init(Ring::arrived(2 * SLOTS), 1);
    *allowed() = SLOTS;
    show_barriers();
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
