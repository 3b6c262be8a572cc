// A place in a ring of SLOTS in shared memory, which one warp fills with operands and warpgroups empty; and what a wgmma calls
// the operands' format. For sources of products that define E4M3, SLOTS, SLOT_BYTES and BARRIERS_AT.

#if E4M3
#define KIND "k32.f32.e4m3.e4m3 "
#define AS_STORED "1, 1"
#else
#define KIND "k16.f32.bf16.bf16 "
#define AS_STORED "1, 1, 0, 0"
#endif

struct Ring {
  int slot = 0;
  u32 parity = 0;

  __device__ u32 data() const { return shared_address(memory) + slot * SLOT_BYTES; }
  __device__ u32 filled() const { return shared_address(memory) + BARRIERS_AT + slot * 16; }
  __device__ u32 emptied() const { return filled() + 8; }
  __device__ void advance() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
};
