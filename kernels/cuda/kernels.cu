// All kernels, as one module: what nvcc and the emulation compile.

#include "attention.cu"
#include "linear.cu"
#include "rope.cu"
#include "rowwise.cu"
#include "sample.cu"
#include "skinny.cu"
