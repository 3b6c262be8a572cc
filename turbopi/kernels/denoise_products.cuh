// Of denoise.cu: the ring of weights, and products of weights and rows in shared memory.

#include "denoise_mail.cuh"

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ u16 narrow(float value) { return (u16)narrow2(value, 0.0f); }

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

// Chunks that the producer may have asked for by now.
__device__ __forceinline__ volatile int* allowed() { return (volatile int*)(memory + BARRIERS_AT + (2 * SLOTS + 1) * 8); }

struct Ring {
  int slot = 0;
  u32 parity = 0;

  static __device__ u32 arrived(int slot) { return shared_address(memory) + BARRIERS_AT + slot * 8; }
  static __device__ u32 consumed(int slot) { return arrived(SLOTS + slot); }

  __device__ void advance() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }

  // By the producer: `tiles`, each of one step, from `source`, a chunk at a time, each when its slot is free and all but
  // IN_FLIGHT - 1 of the chunks before have arrived: more at once would queue up in the memory system, and what CTAs tell
  // each other behind.
  __device__ void fill(const char* source, int tiles, Ring& oldest, int& started) {
    u64 first_to_go;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first_to_go));
#pragma unroll 1
    for (int done = 0; done < tiles; done += CHUNK_TILES) {
      const u32 bytes = TILE_BYTES * (tiles - done < CHUNK_TILES ? tiles - done : CHUNK_TILES);
      if constexpr (PACED)
        while (*allowed() <= started) __nanosleep(20);
      if (++started > IN_FLIGHT) {
        wait(arrived(oldest.slot), oldest.parity);
        oldest.advance();
      }
      wait(consumed(slot), parity ^ 1);
      expect(arrived(slot), bytes);
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                       shared_address(memory + slot * CHUNK * 1024)),
                   "l"(source + done * TILE_BYTES), "r"(bytes), "r"(arrived(slot)), "l"(first_to_go)
                   : "memory");
      advance();
    }
  }
};

// In fp8 the ring holds a layer of weights, which can travel while CTAs compute, not while they tell each other something: as
// a phase begins to compute it allows the producer a few chunks more. In bf16 the memory has no time to spare.
struct Pace {
  int qkv, out, gate_up, layer;  // chunks of this CTA
  int begun = 0;                 // of the layers before this one

  __device__ Pace() {
    qkv = chunks(QKV_UNITS, W / 32), out = chunks(PAIRED_UNITS, H * D / 64), gate_up = chunks(GATE_UNITS, GATE * W / 32);
    layer = qkv + out + gate_up + chunks(PAIRED_UNITS, F / 64);
  }

  static __device__ int chunks(int units, int tiles) {
    const int mine = (int)blockIdx.x < units ? (units - 1 - (int)blockIdx.x) / CTAS + 1 : 0;
    return mine * ((tiles + CHUNK_TILES - 1) / CHUNK_TILES);
  }

  // So many of this layer, counted on into the next.
  __device__ void allow(int ahead) const {
    if (PACED && threadIdx.x == 0) *allowed() = begun + ahead;
  }
};

// Where rows of STEPS x 32 values hold column `column`, a multiple of 4, of a token. Where two rows would meet in the same
// banks, odd ones are shifted by half a period.
template <int STEPS>
__device__ __forceinline__ int place(int token, int column) {
  return token * STEPS * 32 + (STEPS % 2 ? column : column ^ (token & 1) << 5);
}

// Four words of a product's input, `at` bytes into shared memory. Of eight neighbours in fp8 four begin with the second half
// of theirs: no bank twice.
__device__ __forceinline__ void put(u32 at, uint4 v) {
  if constexpr (FP8) {
    const bool second = threadIdx.x & 4;
    const u32 a = second ? v.z : v.x, b = second ? v.w : v.y, c = second ? v.x : v.z, d = second ? v.y : v.w;
    *(uint4*)(memory + (at ^ (threadIdx.x & 4) * 4)) = widen8(a, b);
    *(uint4*)(memory + (at ^ (threadIdx.x & 4) * 4 ^ 16)) = widen8(c, d);
  } else {
    *(uint4*)(memory + at) = v;
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
  static constexpr int UNROLLED = FP8 ? 4 : 8;
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
        release(Ring::consumed(ring.slot));
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

  // The sum whose first part stands `at` bytes into shared memory.
  static __device__ float sum_from(u32 at) {
    float value = 0.0f;
#pragma unroll
    for (int k = 0; k < WK; ++k) value += *(const float*)(memory + at + k * ROWS * SUM_STRIDE * 4);
    return value;
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
