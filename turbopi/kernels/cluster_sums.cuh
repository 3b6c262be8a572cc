// What the CTAs of a cluster send one another: each has sums of the same rows over keys of its own, and finishes the rows of
// some warps. For sources that define ROWS and PARTS, Sums and Stats, and where things are in shared memory (prefix_attention.cu).

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return PARTS > 1 ? rank : 0;
}

// This CTA's queries and first keys are used up; until those of all are. Nothing was written that others read.
__device__ __forceinline__ void say_done() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void all_done() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Which 64 rows a warpgroup has: the first one, which is ahead, those that another CTA finishes.
__device__ __forceinline__ int half(int group) { return PARTS > 1 && cluster_rank() == 0 ? 1 - group : group; }

__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 sums_arrived(int own) { return shared_address(memory) + ARRIVALS_AT + own * 8; }

__device__ __forceinline__ void init_arrivals() {
  for (int i = 0; i < OWN; ++i) init(sums_arrived(i), 1);
}

// Behind that.
__device__ __forceinline__ void expect_sums() {
  for (int i = 0; i < OWN; ++i) expect(sums_arrived(i), (PARTS - 1) * (SENT_BYTES + STATS_BYTES));
}

__device__ __forceinline__ int owner(int warp) { return warp / OWN; }

__device__ __forceinline__ bool sends(int warp) { return PARTS > 1 && owner(warp) != cluster_rank(); }

// Where what CTA `sender` has of warp `warp`'s rows goes in their owner's shared memory: its place among what is received.
__device__ __forceinline__ int place(int warp, int sender) {
  return warp % OWN * (PARTS - 1) + (sender < owner(warp) ? sender : sender - 1);
}

// To the CTA that finishes this warp's rows, by all its lanes; it arrives at the barrier there.
__device__ __forceinline__ void put(u32 to, u32 barrier, float a, float b, float c, float d) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(a),
               "f"(b), "f"(c), "f"(d), "r"(barrier)
               : "memory");
}

// A block of its sums.
__device__ __forceinline__ void send(const float (&d)[COLUMNS / 2], int block, int warp) {
  const u32 to = there(shared_address(memory) + place(warp, cluster_rank()) * SENT_BYTES + threadIdx.x % 32 * 16, owner(warp));
  const u32 barrier = there(sums_arrived(warp % OWN), owner(warp));
#pragma unroll
  for (int j = 0; j < EIGHTS; ++j)
    put(to + (block * EIGHTS + j) * 512, barrier, d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
}

// Maxima and masses.
__device__ __forceinline__ void send_stats(const Stats& stats, int warp) {
  const u32 at = shared_address(memory) + STATS_AT + place(warp, cluster_rank()) * STATS_BYTES + threadIdx.x % 32 * 16;
  const u32 barrier = there(sums_arrived(warp % OWN), owner(warp));
  put(there(at, owner(warp)), barrier, stats.best[0], stats.best[1], stats.mass[0], stats.mass[1]);
}

__device__ __forceinline__ float4 received(u32 address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// All parts' sums of this warp's rows, divided by their mass. Always in the same order.
__device__ __forceinline__ void combine(Sums& sums, const Stats& own, int warp) {
  const u32 base = shared_address(memory) + threadIdx.x % 32 * 16;
  u32 done = PARTS == 1;
  while (!done)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(sums_arrived(warp % OWN))
                 : "memory");
  float best[2][PARTS], mass[2][PARTS], share[2][PARTS];
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    float4 stats = {own.best[0], own.best[1], own.mass[0], own.mass[1]};
    if (i > 0) stats = received(base + STATS_AT + (warp % OWN * (PARTS - 1) + i - 1) * STATS_BYTES);
    best[0][i] = stats.x, best[1][i] = stats.y, mass[0][i] = stats.z, mass[1][i] = stats.w;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float highest = -1e30f, whole = 0.0f;
#pragma unroll
    for (int i = 0; i < PARTS; ++i) highest = fmaxf(highest, best[h][i]);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) share[h][i] = power(best[h][i] - highest), whole += mass[h][i] * share[h][i];
#pragma unroll
    for (int i = 0; i < PARTS; ++i) share[h][i] *= whole > 0.0f ? 1.0f / whole : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    float* const d = sums[j / EIGHTS] + j % EIGHTS * 4;
    d[0] *= share[0][0], d[1] *= share[0][0], d[2] *= share[1][0], d[3] *= share[1][0];
#pragma unroll
    for (int i = 1; i < PARTS; ++i) {
      const float4 more = received(base + (warp % OWN * (PARTS - 1) + i - 1) * SENT_BYTES + j * 512);
      d[0] += more.x * share[0][i], d[1] += more.y * share[0][i], d[2] += more.z * share[1][i], d[3] += more.w * share[1][i];
    }
  }
}
