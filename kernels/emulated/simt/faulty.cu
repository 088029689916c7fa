// Kernels with the usual mistakes, to see that they are found.

#include "../../cuda/mma.cuh"

// Half of the threads never come to the barrier.
extern "C" __global__ void faulty_divergence(int* out) {
    follow();
    if (threadIdx.x < 16) __syncthreads();
    out[threadIdx.x] = 1;
}
REGISTER(faulty_divergence);

// Neighbours read what may not have been written yet.
extern "C" __global__ void faulty_race(int* out) {
    __shared__ int shared[64];
    follow();
    shared[threadIdx.x] = -1;
    __syncthreads();
    shared[threadIdx.x] = static_cast<int>(threadIdx.x);
    out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}
REGISTER(faulty_race);

// The last thread writes one beyond the end.
extern "C" __global__ void faulty_bound(int* out) {
    follow();
    out[threadIdx.x + 1] = 1;
}
REGISTER(faulty_bound);

// Lanes exchange at different places.
extern "C" __global__ void faulty_exchange(int* out) {
    follow();
    int value = static_cast<int>(threadIdx.x);
    if (value % 2) {
        value = __shfl_xor_sync(ALL_LANES, value, 1);
    } else {
        value = __shfl_xor_sync(ALL_LANES, value, 2);
    }
    out[threadIdx.x] = value;
}
REGISTER(faulty_exchange);

// Threads read what they have not waited for.
extern "C" __global__ void faulty_early(int* out) {
    follow();
    Chunk* const chunk = shared_chunks<64>() + threadIdx.x;
    copy_async(chunk, out + threadIdx.x % 16 * 4, true);
    commit_copies();
    const unsigned early = chunk->x;
    wait_for_copies<0>();
    __syncthreads();
    out[threadIdx.x] = static_cast<int>(early);
}
REGISTER(faulty_early);

// Nobody waits for the last copy.
extern "C" __global__ void faulty_unwaited(int* out) {
    follow();
    copy_async(shared_chunks<64>() + threadIdx.x, out, true);
    commit_copies();
    wait_for_copies<1>();
}
REGISTER(faulty_unwaited);

// A copy starts amid a chunk.
extern "C" __global__ void faulty_alignment(int* out) {
    follow();
    copy_async(shared_chunks<64>() + threadIdx.x, out + 1, true);
    commit_copies();
    wait_for_copies<0>();
}
REGISTER(faulty_alignment);

// Threads read what the kernel before may have yet to write, some of them to pass it on.
extern "C" __global__ void faulty_haste(int* out) {
    const int early = out[threadIdx.x];
    follow();
    out[threadIdx.x] = early + 1;
}
REGISTER(faulty_haste);

// Threads wait for the kernel before, or not.
extern "C" __global__ void faulty_independence(int* out) {
    if (threadIdx.x < 63) follow();
    out[threadIdx.x] = 1;
}
REGISTER(faulty_independence);
