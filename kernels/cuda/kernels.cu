// All kernels, as one module: what nvcc and the emulation compile.

#include "attention.cu"
#include "gemm.cu"
#include "linear.cu"
#include "mma_check.cu"
#include "prefill_attention.cu"
#include "rope.cu"
#include "rowwise.cu"
#include "sample.cu"
#include "skinny.cu"
