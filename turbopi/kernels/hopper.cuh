// What kernels on Hopper's own instructions share: barriers in shared memory, copies that arrive at them, and how a wgmma is
// told of its operands.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

constexpr int GROUP = 128;  // threads of a warpgroup

extern __shared__ __align__(1024) char memory[];

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  u64 address;
  asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(pointer));
  return (u32)address;
}

// Where `address` of this CTA is in CTA `rank` of the cluster.
__device__ __forceinline__ u32 there(u32 address, u32 rank) {
  u32 found;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(address), "r"(rank));
  return found;
}

__device__ __forceinline__ void init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Behind the last `init`, before anybody is let near.
__device__ __forceinline__ void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive; the barrier opens when as many bytes have also been copied.
__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
}

// One arrival of each warp.
__device__ __forceinline__ void release(u32 barrier) {
  if (threadIdx.x % 32 == 0) arrive(barrier);
}

// Until the kernel in front has ended and its results can be read. Nothing if this one was not launched early.
__device__ __forceinline__ void after_the_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may start, if it was launched early, wherever there is room.
__device__ __forceinline__ void let_go() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// A box of a matrix at a column and a row.
__device__ __forceinline__ void copy_box(const u64* map, u32 to, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same, kept in L2 as `policy` says.
__device__ __forceinline__ void copy_box(const u64* map, u32 to, int column, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// Of a tensor map, before it is used.
__device__ __forceinline__ void prefetch(const u64* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Of rows of 128 bytes, swizzled, groups of 8 rows `below` bytes apart. Where columns of the product run along the rows,
// pieces lie `beside` bytes apart. In units of 16 bytes, so that + 2 is the next 32 bytes of the rows.
__device__ __forceinline__ u64 descriptor(u32 address, u32 beside = 16, u32 below = 1024) {
  return (u64)(address >> 4) | (u64)(beside >> 4) << 16 | (u64)(below >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Of what was committed, all but the last `PENDING` are done.
template <int PENDING>
__device__ __forceinline__ void drain() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Commit what was multiplied, and wait.
template <int PENDING>
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  drain<PENDING>();
}

// For the compiler: these registers are not written later than here, nor read before.
template <int COUNT>
__device__ __forceinline__ void written(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void written(u32 (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Two floats as bfloat16, the first in the lower half.
__device__ __forceinline__ u32 narrow2(float first, float second) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Two floats as E4M3, saturated.
__device__ __forceinline__ u16 narrow2_e4m3(float first, float second) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
}
