// A stand-in for libcuda: the part of its interface that src/cuda/device.rs uses, over the emulation. It is for seeing,
// on a machine without a GPU, that the real driver's code makes the right calls (scripts/check-driver.sh). Everything
// runs at once, and modules are not looked at: the kernels are those compiled in here.

#include "emulate.cpp"

#include <mutex>
#include <string>

namespace {

using Result = int;
constexpr Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, LAUNCH_FAILED = 719;

std::recursive_mutex everything;
std::string last_error = "stand-in libcuda";

struct Call {
    const simt::Kernel* kernel;
    unsigned grid[3], threads;
    std::vector<unsigned long long> cells;
};

struct Stream {
    bool capturing = false;
    std::vector<Call> captured;
};

unsigned long long launches = 0;

Result run(const Call& call) {
    std::vector<void*> args;
    for (const auto& cell : call.cells) args.push_back(const_cast<unsigned long long*>(&cell));
    const unsigned long long seed = ++launches * 0x9e3779b97f4a7c15;
    const char* error = simt_launch(call.kernel->name, call.grid, call.threads, args.data(), seed);
    if (!error) return SUCCESS;
    last_error = error;
    return LAUNCH_FAILED;
}

thread_local void* current = nullptr;
int context;

}  // namespace

#define CALL(name, ...) \
    extern "C" __attribute__((visibility("default"))) Result name(__VA_ARGS__)
#define ALONE std::lock_guard<std::recursive_mutex> alone(everything)

CALL(cuInit, unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
CALL(cuGetErrorString, Result, const char** text) { return *text = last_error.c_str(), SUCCESS; }
CALL(cuGetErrorName, Result, const char** text) { return *text = "error", SUCCESS; }
CALL(cuDeviceGetCount, int* count) { return *count = 1, SUCCESS; }
CALL(cuDeviceGet, int* device, int ordinal) { return *device = ordinal, ordinal ? INVALID_VALUE : SUCCESS; }
CALL(cuDeviceGetName, char* name, int length, int) { return std::snprintf(name, length, "stand-in"), SUCCESS; }
CALL(cuDeviceGetAttribute, int* value, int, int) { return *value = 1, SUCCESS; }
CALL(cuDevicePrimaryCtxRetain, void** made, int) { return *made = &context, SUCCESS; }
CALL(cuDevicePrimaryCtxRelease_v2, int) { return SUCCESS; }
CALL(cuCtxGetCurrent, void** made) { return *made = current, SUCCESS; }
CALL(cuCtxSetCurrent, void* made) { return current = made, SUCCESS; }
CALL(cuCtxSynchronize) { return SUCCESS; }
CALL(cuMemGetInfo_v2, size_t* free, size_t* total) { return *free = *total = size_t{1} << 34, SUCCESS; }

CALL(cuStreamCreate, Stream** made, unsigned) { return *made = new Stream, SUCCESS; }
CALL(cuStreamDestroy_v2, Stream* stream) { return delete stream, SUCCESS; }
CALL(cuStreamSynchronize, Stream* stream) { return stream->capturing ? INVALID_VALUE : SUCCESS; }
CALL(cuEventCreate, int** made, unsigned) { return *made = new int, SUCCESS; }
CALL(cuEventRecord, int*, Stream* stream) { return stream->capturing ? INVALID_VALUE : SUCCESS; }
CALL(cuEventSynchronize, int*) { return SUCCESS; }
CALL(cuEventElapsedTime, float* milliseconds, int*, int*) { return *milliseconds = 1.0f, SUCCESS; }
CALL(cuEventElapsedTime_v2, float* milliseconds, int*, int*) { return *milliseconds = 1.0f, SUCCESS; }
CALL(cuEventDestroy_v2, int* event) { return delete event, SUCCESS; }

CALL(cuStreamBeginCapture_v2, Stream* stream, int mode) {
    if (stream->capturing || mode != 1) return INVALID_VALUE;
    return stream->capturing = true, SUCCESS;
}
CALL(cuStreamEndCapture, Stream* stream, std::vector<Call>** made) {
    if (!stream->capturing) return INVALID_VALUE;
    *made = new std::vector<Call>(std::move(stream->captured));
    stream->captured.clear();
    return stream->capturing = false, SUCCESS;
}
CALL(cuGraphInstantiateWithFlags, std::vector<Call>** made, std::vector<Call>* graph, unsigned long long) {
    return *made = new std::vector<Call>(*graph), SUCCESS;
}
CALL(cuGraphLaunch, std::vector<Call>* graph, Stream*) {
    ALONE;
    for (const Call& call : *graph) {
        if (Result result = run(call)) return result;
    }
    return SUCCESS;
}
CALL(cuGraphExecDestroy, std::vector<Call>* graph) { return delete graph, SUCCESS; }
CALL(cuGraphDestroy, std::vector<Call>* graph) { return delete graph, SUCCESS; }

CALL(cuMemAlloc_v2, unsigned long long* made, size_t bytes) {
    // Not zeroed: whoever relies on that says so.
    void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!memory) return OUT_OF_MEMORY;
    std::memset(memory, 0xff, bytes);
    return *made = reinterpret_cast<unsigned long long>(memory), SUCCESS;
}
CALL(cuMemFree_v2, unsigned long long memory) { return std::free(reinterpret_cast<void*>(memory)), SUCCESS; }
CALL(cuMemHostAlloc, void** made, size_t bytes, unsigned flags) {
    return *made = std::malloc(bytes), *made && !flags ? SUCCESS : INVALID_VALUE;
}
CALL(cuMemFreeHost, void* memory) { return std::free(memory), SUCCESS; }
CALL(cuMemsetD8Async, unsigned long long to, unsigned char value, size_t bytes, Stream*) {
    return std::memset(reinterpret_cast<void*>(to), value, bytes), SUCCESS;
}
CALL(cuMemcpyHtoDAsync_v2, unsigned long long to, const void* from, size_t bytes, Stream* stream) {
    return std::memcpy(reinterpret_cast<void*>(to), from, bytes), stream->capturing ? INVALID_VALUE : SUCCESS;
}
CALL(cuMemcpyDtoHAsync_v2, void* to, unsigned long long from, size_t bytes, Stream* stream) {
    return std::memcpy(to, reinterpret_cast<const void*>(from), bytes), stream->capturing ? INVALID_VALUE : SUCCESS;
}

CALL(cuModuleLoadData, void** made, const void* image) {
    // What a fatbin begins with.
    unsigned magic;
    std::memcpy(&magic, image, sizeof magic);
    return *made = const_cast<void*>(image), magic == 0xba55ed50 ? SUCCESS : INVALID_VALUE;
}
CALL(cuModuleUnload, void*) { return SUCCESS; }
CALL(cuModuleGetFunction, const simt::Kernel** made, void*, const char* name) {
    return *made = simt::find(name), *made ? SUCCESS : NOT_FOUND;
}
CALL(cuLaunchKernel, const simt::Kernel* kernel, unsigned x, unsigned y, unsigned z, unsigned threads,
     unsigned threads_y, unsigned threads_z, unsigned shared, Stream* stream, void** args, void**) {
    ALONE;
    if (threads_y != 1 || threads_z != 1 || shared) return INVALID_VALUE;
    Call call{kernel, {x, y, z}, threads, {}};
    for (size_t i = 0; kernel->kinds[i]; i++) {
        // As the driver does: what the argument's pointer leads to, as wide as the kernel takes it.
        unsigned long long cell = 0;
        std::memcpy(&cell, args[i], kernel->kinds[i] == 'p' ? 8 : 4);
        call.cells.push_back(cell);
    }
    if (!stream->capturing) return run(call);
    stream->captured.push_back(call);
    return SUCCESS;
}
