/* Preloaded before torch, this makes MKL take the code path of an Intel CPU on any x86-64 CPU. The golden records
   were made on an Intel CPU; with the same GEMM kernels the reference meets them bit for bit (docs/parity.md). */
int mkl_serv_intel_cpu_true(void) { return 1; }
int mkl_serv_intel_cpu(void) { return 1; }
