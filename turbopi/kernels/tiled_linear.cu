// out = activation(norm(x) W^T + bias) + residual by Hopper's warpgroup instructions: one tile a CTA, all at once. Operands
// in bfloat16, or in E4M3 with a scale of each row of W; out in bfloat16, or from E4M3 in E4M3.
//
// For products that are over in ten microseconds, where too few and too large tiles are what takes the time. A tile is
// TOKENS rows of x by COLUMNS rows of W, any multiple of 8, so that there are nearly as many tiles as multiprocessors.
//
// x may be the stream in front of a LayerNorm: W (x - mean) * rstd is (W x - mean * sums of W's rows) * rstd, so the norm
// happens behind the product. Its moments come from whoever made x, by tiles of columns: their sums, and the squared
// distances from their own means, which add up to those of the row without cancellation. Not in E4M3: there x is normed
// before it is rounded.
//
// Set in front of this file: K; N rows of W; E4M3, whether both operands are; GROUPS of 64 rows of x; COLUMNS; SLOTS; SPLITS;
// BIAS, RESIDUAL and GELU, 0 or 1; NARROW, whether out is E4M3; NORMED, by how many tiles of moments x is to be normed, or 0;
// MOMENTS, whether those of out are wanted; REGISTERS, OPERANDS and INPUTS, the lists of a wgmma.

#include "linear_tiles.cuh"

static_assert(!MOMENTS || N % COLUMNS == 0, "moments are of whole tiles");
static_assert(!NORMED || (!E4M3 && SPLITS == 1 && K % (NORMED ? NORMED : 1) == 0), "the norm is taken where sums are whole");
static_assert(!NARROW || (E4M3 && !RESIDUAL && !MOMENTS), "a stream is not kept in E4M3");
constexpr float EPSILON = 1e-6f;

struct Arguments {
  alignas(64) u64 tokens[16];  // tensor maps
  alignas(64) u64 weights[16];
  const u16* bias;
  const u16* residual;
  char* out;
  const float* factors;        // of each row of W: its sum, if NORMED; its scale, in E4M3
  const float2* moments_of_x;  // (rows, NORMED)
  float2* moments;             // (rows, N / COLUMNS)
  int rows, residual_stride, out_stride;
  float inverse;  // of out, if NARROW
};

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

// The same for E4M3, by an instruction that is not exact enough for bfloat16, and times twice `half`.
__device__ __forceinline__ float rough_gelu(float x, float half) {
  float tanh;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(x * fmaf(x * x, 0.035677408f, 0.79788456f)));
  return fmaf(x * half, tanh, x * half);
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
constexpr bool SCALED = NORMED || E4M3;

#if NARROW
typedef char Out;
#else
typedef u16 Out;
#endif

struct Epilogue {
  int column, columns;  // this lane's first, and how many there are from there to N
  int row, rows;        // likewise
  float2 vector[PIECES] = {};
  u32 residual[2][RESIDUAL ? EIGHTS : 1];
  float2 found[2][parts(NORMED, 4) + 1];  // moments of this lane's rows: of every fourth tile
  float scale[2], shift[2];               // by rstd, and -mean * rstd times a sum of weights

  // Factors and the bias, which no kernel writes, are asked for.
  __device__ __forceinline__ Epilogue(const Arguments& p, const Work& work) {
    const int lane = threadIdx.x % 32;
    column = work.column + lane % 4 * 2, columns = N - column;
    row = work.token + threadIdx.x / 32 * 16 + lane / 4, rows = p.rows - row;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int at = threadIdx.x + i * CONSUMERS;
      const u32 from = at < COLUMNS && work.column + at < N ? work.column + at : 0;
      if (SCALED) vector[i].x = __ldg(p.factors + from);
      if (BIAS) vector[i].y = __uint_as_float((u32)__ldg(p.bias + from) << 16);
    }
  }

  // They came while products were summed up; a lane needs those of other lanes. By all that multiply.
  __device__ __forceinline__ void share() const {
    if (!SCALED && !BIAS) return;
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

  // As bfloat16, or E4M3 in the lower half.
  __device__ __forceinline__ u32 finished(float first, float second, int j, int h, float inverse) const {
    if (SCALED || BIAS) {
      const float4 v = *(const float4*)(vectors() + 8 * j + threadIdx.x % 4 * 2);
      if (NORMED) {
        first = fmaf(first, scale[h], fmaf(v.x, shift[h], v.y)), second = fmaf(second, scale[h], fmaf(v.z, shift[h], v.w));
      } else {
        first = SCALED ? fmaf(first, v.x, v.y) : first + v.y, second = SCALED ? fmaf(second, v.z, v.w) : second + v.w;
      }
    }
    if (NARROW) {
      first = GELU ? rough_gelu(first, 0.5f * inverse) : first * inverse;
      second = GELU ? rough_gelu(second, 0.5f * inverse) : second * inverse;
      return narrow2_e4m3(first, second);
    }
    if (GELU) gelu(first, second);
    if (RESIDUAL) add_pair(first, second, residual[h][j]);
    return narrow2(first, second);
  }
};

// ---------------------------------------------------------------- stores

__device__ __forceinline__ void store_if(bool exists, void* to, u32 pair) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"((int)exists), "l"(to), "r"(pair)
               : "memory");
}

__device__ __forceinline__ void store_if(bool exists, void* to, u32 pair, u32 next) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v2.b32 [%1], {%2, %3};\n}" ::"r"((int)exists), "l"(to),
               "r"(pair), "r"(next)
               : "memory");
}

__device__ __forceinline__ u32 halves(u32 a, u32 b, u32 which) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(which));
  return d;
}

// E4M3, two in the lower half of each. The four lanes of a row exchange, so that each has one of four times eight columns.
__device__ __forceinline__ void store_narrow(char* line, const u32 (&pairs)[EIGHTS], const Epilogue& e, int h) {
  const int t = threadIdx.x % 4;
  const bool odd = t % 2, high = t / 2;
  line -= 2 * t;  // of the row's first lane
#pragma unroll
  for (int j = 0; j < EIGHTS; j += 4) {
    u32 four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = j + i < EIGHTS ? pairs[j + i] : 0;
    // Eights 0 and 2 for an even lane, 1 and 3 for an odd one.
    const u32 mine = odd ? halves(four[1], four[3], 0x5410) : halves(four[0], four[2], 0x5410);
    const u32 got = __shfl_xor_sync(~0u, odd ? halves(four[0], four[2], 0x5410) : halves(four[1], four[3], 0x5410), 1);
    const u32 low = odd ? got : mine, above = odd ? mine : got;
    // Of the first of its two eights, and of the second, four columns each.
    const u32 first = halves(low, above, 0x5410), second = halves(low, above, 0x7632);
    const u32 other = __shfl_xor_sync(~0u, high ? first : second, 2);
    const int eight = j + odd + 2 * high;
    const bool exists = 8 * h < e.rows && eight < EIGHTS && 8 * eight < e.columns;
    store_if(exists, line + 8 * eight, high ? other : first, high ? second : other);
  }
}

__device__ __forceinline__ void store(const Arguments& p, const Work& work, const Epilogue& e, const float (&d)[COLUMNS / 2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    Out* const line = (Out*)p.out + (u64)(e.row + 8 * h) * p.out_stride + e.column;
    u32 row[EIGHTS];
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) row[j] = e.finished(d[4 * j + 2 * h], d[4 * j + 2 * h + 1], j, h, p.inverse);
#if NARROW
    store_narrow(line, row, e, h);
#else
    // Lanes 2 i and 2 i + 1 exchange, so that each has four neighbours: the even one of eight columns, the odd one of the next.
    const bool odd = threadIdx.x % 2;
#pragma unroll
    for (int j = 0; j + 1 < EIGHTS; j += 2) {
      const u32 got = __shfl_xor_sync(~0u, odd ? row[j] : row[j + 1], 1);
      store_if(8 * h < e.rows && 8 * (j + odd) < e.columns, line + 8 * j + (odd ? 6 : 0), odd ? got : row[j],
               odd ? row[j + 1] : got);
    }
    if (EIGHTS % 2)
      store_if(8 * h < e.rows && 8 * (EIGHTS - 1) < e.columns, line + 8 * (EIGHTS - 1), row[EIGHTS - 1]);
#endif
    if (MOMENTS) {
      const float2 found = moments_of<4>(row);
      if (8 * h < e.rows && threadIdx.x % 4 == 0)
        p.moments[(u64)(e.row + 8 * h) * (N / COLUMNS) + work.column / COLUMNS] = found;
    }
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
    if (threadIdx.x == CONSUMERS) produce(p.tokens, p.weights, work);
    if (SPLITS > 1) all_here();
  }
}
