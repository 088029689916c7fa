// All kernels for compute capability 9.0 alone, as one module beside that of kernels.cu.

#include "hopper_attention.cu"
#include "hopper_check.cu"
#include "hopper_gemm.cu"
