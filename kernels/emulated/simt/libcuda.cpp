// A stand-in for libcuda: the part of its interface that device/src/device.rs and mover.rs use, over the emulation. It is
// for seeing, on a machine without a GPU, that the real driver's code makes the right calls (scripts/check-driver.sh),
// and that workers move each other's pages (tests/device_pages). What is enqueued runs when somebody waits for it and
// not before, each stream for itself: whoever does not wait for another stream's work reads what was there before.
// Large allocations can be opened by other processes. Modules are not looked at: the kernels are those compiled in
// here.
//
// Network adapters find device memory by its address, because it is host memory, as on devices they do where there is
// nvidia-peermem; of the file that stands for it no adapter's driver wants to know. STANDIN_LOG names a file to which
// calls that concern adapters are written, STANDIN_ADAPTERS=no has the device deny them its memory, and with
// STANDIN_DMA_BUF=no that file is not to be had.
//
// Into that file goes too what a worker should have done before it takes requests: memory that is allocated, and
// kernels that are launched without having been loaded; and events that take times. STANDIN_COPIES names another, which
// gets a line for each call for copies: how many it is for.
//
// STANDIN_MPS=yes has processes share the device by MPS, and with STANDIN_DEVICE=other it is another one than that of
// processes without; STANDIN_CAPABILITY is the first number of its compute capability, if not 9. STANDIN_HANGS names a
// file for as long as which exists the device hangs.

#include "emulate.cpp"

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include <fcntl.h>
#include <unistd.h>

namespace {

using Result = int;
using Pointer = unsigned long long;
constexpr Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500;
constexpr Result NOT_READY = 600;
constexpr Result ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801, CAPTURE_INVALIDATED = 901;

std::recursive_mutex everything;
std::string last_error = "stand-in libcuda";
/// Whether a call is to fail, as the environment has it: a recording that cannot be begun (begin), is spoilt amid it
/// (amid), or for which there is no room (instantiate, upload); copies in one call (batch); events and recordings that
/// are given back (destroy); or locked memory by the host's addresses, where a device has to know it (addresses).
bool is_refused(const char* what) {
    const char* refused = std::getenv("STANDIN_REFUSES");
    return refused && !std::strcmp(refused, what);
}

/// Whether nothing is computed, however long one waits.
bool hangs() {
    const char* file = std::getenv("STANDIN_HANGS");
    return file && !access(file, F_OK);
}
void wait_while_it_hangs() {
    while (hangs()) usleep(10'000);
}

/// The first failure of what was enqueued: it stays.
Result broken = SUCCESS;

struct Module;
struct Function {
    const simt::Kernel* kernel;
    const Module* module;
};
struct Module {
    std::deque<Function> functions;

    Function* add(const simt::Kernel* kernel) { return &functions.emplace_back(Function{kernel, this}); }
};

struct Call {
    const simt::Kernel* kernel;
    const Module* module;
    unsigned grid[3], threads, shared;
    std::vector<TensorMap> maps;
    std::vector<unsigned long long> cells;
};

/// Shared memory that kernels may be launched with, where somebody has asked for more than all get.
std::map<const simt::Kernel*, int> shared_max;
/// Kernels that are on the device.
std::set<const simt::Kernel*> loaded;

struct Stream {
    bool capturing = false;
    std::vector<Call> captured;
    std::deque<std::function<Result()>> waiting;
    /// What was run, and so the number of the first of `waiting`.
    unsigned long long run = 0;

    unsigned long long end() const { return run + waiting.size(); }
    Result run_until(unsigned long long number) {
        while (run < number && !waiting.empty() && !broken) {
            auto work = std::move(waiting.front());
            waiting.pop_front();
            run++;
            broken = work();
        }
        return broken;
    }
};

struct Event {
    Stream* stream = nullptr;
    unsigned long long number = 0;
    bool has_time = false;
};

std::set<Stream*> streams;
/// Recordings that can be launched: they hold functions of modules.
std::set<const std::vector<Call>*> recordings;
unsigned long long launches = 0;

/// The emulation has others too, with mistakes, for its own tests.
bool is_ours(const simt::Kernel* kernel) { return std::strncmp(kernel->name, "faulty_", 7) != 0; }

/// A kernel that does nothing, for who wants to see that this is noticed.
const char* const dead_kernel = std::getenv("ENGINE_STANDIN_DEAD_KERNEL");
/// A kernel that touches what is nobody's, after which a device does nothing more for the process.
const char* const faulty_kernel = std::getenv("ENGINE_STANDIN_FAULTY_KERNEL");

Result run(const Call& call) {
    if (dead_kernel && !std::strcmp(dead_kernel, call.kernel->name)) return SUCCESS;
    if (faulty_kernel && !std::strcmp(faulty_kernel, call.kernel->name)) return ILLEGAL_ADDRESS;
    std::vector<void*> args;
    for (const auto& map : call.maps) args.push_back(const_cast<TensorMap*>(&map));
    for (const auto& cell : call.cells) args.push_back(const_cast<unsigned long long*>(&cell));
    const unsigned long long seed = ++launches * 0x9e3779b97f4a7c15;
    const char* error = simt_launch(call.kernel->name, call.grid, call.threads, call.shared, args.data(), seed);
    if (!error) return SUCCESS;
    last_error = error;
    return LAUNCH_FAILED;
}

Result run_all() {
    for (Stream* stream : streams) {
        if (Result result = stream->run_until(stream->end())) return result;
    }
    return SUCCESS;
}

Result enqueue(Stream* stream, std::function<Result()> work) {
    if (stream->capturing) return INVALID_VALUE;
    stream->waiting.push_back(std::move(work));
    return broken;
}

Result copy(Pointer to, Pointer from, size_t bytes, Stream* stream) {
    return enqueue(stream, [=] {
        std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
        return SUCCESS;
    });
}

/// What can be opened by others has a file, which names it together with the process.
struct Handle {
    char magic[8];
    int process, file;
    unsigned long long bytes;
    char unused[40];
};
static_assert(sizeof(Handle) == 64);

struct Allocation {
    int file;
    size_t bytes;
};
struct Opened {
    Pointer start;
    size_t bytes, times;
};

/// From here on allocations have a file. (On devices too, what can be exported is larger than what is allocated.)
constexpr size_t EXPORTED_BYTES_MIN = 64 << 10;
std::map<Pointer, Allocation> allocations;
std::map<std::pair<int, int>, Opened> opened;
/// Host memory that is locked: where it starts, and how many bytes it is.
std::map<Pointer, size_t> locked;

thread_local void* current = nullptr;
int context;

bool is(const char* variable, const char* value) {
    const char* set = std::getenv(variable);
    return set && !std::strcmp(set, value);
}

/// Adds a line to the file that a variable names, if it does.
Result told(const char* variable, const char* line) {
    const char* path = std::getenv(variable);
    if (!path) return SUCCESS;
    FILE* log = std::fopen(path, "a");
    if (!log) return INVALID_VALUE;
    std::fprintf(log, "%s\n", line);
    return std::fclose(log) ? INVALID_VALUE : SUCCESS;
}
/// Tells a test what was called.
Result noted(const char* call) { return told("STANDIN_LOG", call); }
/// Tells a test of a call for so many copies.
void counted(size_t copies) { told("STANDIN_COPIES", std::to_string(copies).c_str()); }

/// The allocation that an address lies in.
std::map<Pointer, Allocation>::iterator allocation_of(Pointer address) {
    auto found = allocations.upper_bound(address);
    if (found == allocations.begin()) return allocations.end();
    --found;
    return address - found->first < found->second.bytes ? found : allocations.end();
}

/// Whether all of it is one thing that the device knows: memory of its own, or what is opened or locked.
bool is_known(Pointer start, size_t bytes) {
    const auto lies_in = [=](Pointer first, size_t length) {
        return start >= first && start - first <= length && bytes <= length - (start - first);
    };
    for (const auto& [first, allocation] : allocations)
        if (lies_in(first, allocation.bytes)) return true;
    for (const auto& [name, other] : opened)
        if (other.times && lies_in(other.start, other.bytes)) return true;
    for (const auto& [first, length] : locked)
        if (lies_in(first, length)) return !is_refused("addresses");
    return false;
}

}  // namespace

#define CALL(name, ...) \
    extern "C" __attribute__((visibility("default"))) Result name(__VA_ARGS__)
#define ALONE std::lock_guard<std::recursive_mutex> alone(everything)

CALL(cuInit, unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
CALL(cuDriverGetVersion, int* version) {
    const char* given = std::getenv("ENGINE_STANDIN_CUDA");
    return *version = given ? std::atoi(given) : 13000, SUCCESS;
}
CALL(cuGetErrorString, Result, const char** text) { return *text = last_error.c_str(), SUCCESS; }
CALL(cuGetErrorName, Result, const char** text) { return *text = "error", SUCCESS; }
CALL(cuDeviceGetCount, int* count) { return *count = 1, SUCCESS; }
CALL(cuDeviceGet, int* device, int ordinal) { return *device = ordinal, ordinal ? INVALID_VALUE : SUCCESS; }
CALL(cuDeviceGetName, char* name, int length, int) { return std::snprintf(name, length, "stand-in"), SUCCESS; }
CALL(cuDeviceGetUuid_v2, char* id, int) {
    return std::memcpy(id, is("STANDIN_DEVICE", "other") ? "the other device" : "the stand-in one", 16), SUCCESS;
}
CALL(cuDeviceCanAccessPeer, int* can, int, int) { return *can = 0, SUCCESS; }
CALL(cuDeviceGetAttribute, int* value, int attribute, int) {
    const int adapters = !is("STANDIN_ADAPTERS", "no");
    switch (attribute) {
    case 16:  // an H100's multiprocessors,
        return *value = 132, SUCCESS;
    case 75: {  // and its compute capability
        const char* major = std::getenv("STANDIN_CAPABILITY");
        return *value = major ? std::atoi(major) : 9, SUCCESS;
    }
    case 76:
        return *value = 0, SUCCESS;
    case 91:  // whether it knows locked memory by the host's addresses
        return *value = !is_refused("addresses"), SUCCESS;
    case 116:  // whether adapters find its memory by its address,
    case 124:  // and by a file
        return *value = adapters, SUCCESS;
    case 118:  // whether it orders what they write: no, but (117) it can be made to wait
        return *value = 0, SUCCESS;
    case 133:
        return *value = is("STANDIN_MPS", "yes"), SUCCESS;
    default:
        return *value = 1, SUCCESS;
    }
}
CALL(cuDevicePrimaryCtxRetain, void** made, int) { return *made = &context, SUCCESS; }
CALL(cuDevicePrimaryCtxRelease_v2, int) { return SUCCESS; }
CALL(cuCtxGetCurrent, void** made) { return *made = current, SUCCESS; }
CALL(cuCtxSetCurrent, void* made) { return current = made, SUCCESS; }
CALL(cuCtxSynchronize) {
    wait_while_it_hangs();
    ALONE;
    return run_all();
}
CALL(cuMemGetInfo_v2, size_t* free, size_t* total) { return *free = *total = size_t{1} << 34, SUCCESS; }

CALL(cuStreamCreate, Stream** made, unsigned) {
    ALONE;
    return streams.insert(*made = new Stream), SUCCESS;
}
CALL(cuStreamDestroy_v2, Stream* stream) {
    ALONE;
    stream->run_until(stream->end());
    streams.erase(stream);
    return delete stream, SUCCESS;
}
CALL(cuStreamSynchronize, Stream* stream) {
    wait_while_it_hangs();
    ALONE;
    return stream->capturing ? INVALID_VALUE : stream->run_until(stream->end());
}
CALL(cuEventCreate, Event** made, unsigned flags) {
    *made = new Event;
    // What a time costs is for those alone who measure.
    (*made)->has_time = !(flags & 2);
    return (*made)->has_time ? noted("event with a time") : SUCCESS;
}
CALL(cuEventRecord, Event* event, Stream* stream) {
    ALONE;
    if (stream->capturing) return INVALID_VALUE;
    event->stream = stream, event->number = stream->end();
    return broken;
}
CALL(cuEventSynchronize, Event* event) {
    wait_while_it_hangs();
    ALONE;
    return streams.count(event->stream) ? event->stream->run_until(event->number) : broken;
}
CALL(cuEventQuery, Event* event) {
    if (hangs()) return NOT_READY;
    ALONE;
    Stream* stream = event->stream;
    if (!streams.count(stream) || stream->run >= event->number) return broken;
    // Whoever looks again and again sees it pass.
    Result result = stream->run_until(stream->run + 1);
    return result ? result : NOT_READY;
}
CALL(cuEventElapsedTime, float* milliseconds, const Event* from, const Event* to) {
    return *milliseconds = 1.0f, from->has_time && to->has_time ? SUCCESS : INVALID_VALUE;
}
CALL(cuEventElapsedTime_v2, float* milliseconds, const Event* from, const Event* to) {
    return *milliseconds = 1.0f, from->has_time && to->has_time ? SUCCESS : INVALID_VALUE;
}
CALL(cuEventDestroy_v2, Event* event) { return delete event, is_refused("destroy") ? INVALID_VALUE : SUCCESS; }

CALL(cuStreamBeginCapture_v2, Stream* stream, int mode) {
    ALONE;
    if (stream->capturing || mode != 1 || is_refused("begin")) return INVALID_VALUE;
    return stream->capturing = true, SUCCESS;
}
CALL(cuStreamEndCapture, Stream* stream, std::vector<Call>** made) {
    ALONE;
    if (!stream->capturing) return INVALID_VALUE;
    stream->capturing = false;
    if (is_refused("amid")) return stream->captured.clear(), *made = nullptr, CAPTURE_INVALIDATED;
    *made = new std::vector<Call>(std::move(stream->captured));
    return stream->captured.clear(), SUCCESS;
}
CALL(cuGraphInstantiateWithFlags, std::vector<Call>** made, std::vector<Call>* graph, unsigned long long) {
    ALONE;
    if (is_refused("instantiate")) return OUT_OF_MEMORY;
    return recordings.insert(*made = new std::vector<Call>(*graph)), SUCCESS;
}
CALL(cuGraphUpload, std::vector<Call>*, Stream* stream) {
    ALONE;
    return stream->capturing || is_refused("upload") ? OUT_OF_MEMORY : SUCCESS;
}
CALL(cuGraphLaunch, std::vector<Call>* graph, Stream* stream) {
    ALONE;
    for (const Call& call : *graph) {
        if (Result result = enqueue(stream, [call] { return run(call); })) return result;
    }
    return SUCCESS;
}
CALL(cuGraphExecDestroy, std::vector<Call>* graph) {
    ALONE;
    recordings.erase(graph);
    return delete graph, is_refused("destroy") ? INVALID_VALUE : SUCCESS;
}
CALL(cuGraphDestroy, std::vector<Call>* graph) { return delete graph, SUCCESS; }

CALL(cuMemAlloc_v2, Pointer* made, size_t bytes) {
    ALONE;
    int file = -1;
    void* memory;
    if (bytes >= EXPORTED_BYTES_MIN) {
        file = memfd_create("device", MFD_CLOEXEC);
        if (file < 0 || ftruncate(file, static_cast<off_t>(bytes))) return OUT_OF_MEMORY;
        memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    } else {
        memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
        if (!memory) return OUT_OF_MEMORY;
    }
    // Not zeroed: whoever relies on that says so.
    std::memset(memory, 0xff, bytes);
    *made = reinterpret_cast<Pointer>(memory);
    return allocations[*made] = {file, bytes}, noted("allocated");
}
CALL(cuMemFree_v2, Pointer memory) {
    ALONE;
    auto found = allocations.find(memory);
    if (found == allocations.end()) return INVALID_VALUE;
    run_all();
    if (found->second.file < 0) {
        std::free(reinterpret_cast<void*>(memory));
    } else {
        munmap(reinterpret_cast<void*>(memory), found->second.bytes);
        close(found->second.file);
    }
    return allocations.erase(found), SUCCESS;
}
CALL(cuMemHostAlloc, void** made, size_t bytes, unsigned flags) {
    return *made = std::malloc(bytes), *made && !flags ? noted("allocated") : INVALID_VALUE;
}
CALL(cuMemFreeHost, void* memory) {
    ALONE;
    run_all();
    return std::free(memory), SUCCESS;
}
CALL(cuMemHostRegister_v2, void* memory, size_t bytes, unsigned flags) {
    ALONE;
    const Pointer start = reinterpret_cast<Pointer>(memory);
    if (!memory || !bytes || flags != 1 || start % 4096) return INVALID_VALUE;
    return locked[start] = bytes, SUCCESS;
}
CALL(cuMemHostUnregister, void* memory) {
    ALONE;
    return locked.erase(reinterpret_cast<Pointer>(memory)) ? SUCCESS : INVALID_VALUE;
}
CALL(cuMemsetD8Async, Pointer to, unsigned char value, size_t bytes, Stream* stream) {
    ALONE;
    return enqueue(stream, [=] { return std::memset(reinterpret_cast<void*>(to), value, bytes), SUCCESS; });
}
CALL(cuMemcpyHtoDAsync_v2, Pointer to, const void* from, size_t bytes, Stream* stream) {
    ALONE;
    counted(1);
    return copy(to, reinterpret_cast<Pointer>(from), bytes, stream);
}
CALL(cuMemcpyDtoHAsync_v2, void* to, Pointer from, size_t bytes, Stream* stream) {
    ALONE;
    counted(1);
    return copy(reinterpret_cast<Pointer>(to), from, bytes, stream);
}
CALL(cuMemcpyDtoDAsync_v2, Pointer to, Pointer from, size_t bytes, Stream* stream) {
    ALONE;
    counted(1);
    return copy(to, from, bytes, stream);
}

struct Location { int type, id; };
struct CopyAttributes { unsigned order; Location from, to; unsigned flags; };
CALL(cuMemcpyBatchAsync_v2, Pointer* to, Pointer* from, size_t* bytes, size_t count, CopyAttributes* attributes,
     size_t* first, size_t sets, Stream* stream) {
    ALONE;
    counted(count);
    if (is_refused("batch")) return NOT_SUPPORTED;
    if (!count || sets != 1 || *first || attributes->order != 1 || attributes->flags) return INVALID_VALUE;
    // In any order. Of addresses that lead nowhere one hears when it is too late.
    for (size_t at = count; at-- > 0;) {
        const bool is_copied = is_known(to[at], bytes[at]) && is_known(from[at], bytes[at]);
        const Result result = is_copied ? copy(to[at], from[at], bytes[at], stream)
                                        : enqueue(stream, [] { return ILLEGAL_ADDRESS; });
        if (result) return result;
    }
    return SUCCESS;
}

CALL(cuIpcGetMemHandle, Handle* made, Pointer memory) {
    ALONE;
    auto found = allocations.find(memory);
    if (found == allocations.end() || found->second.file < 0) return INVALID_VALUE;
    *made = {"standin", getpid(), found->second.file, found->second.bytes, {}};
    return SUCCESS;
}
CALL(cuIpcOpenMemHandle_v2, Pointer* made, Handle handle, unsigned flags) {
    ALONE;
    // As the driver: nobody opens what is its own.
    if (std::memcmp(handle.magic, "standin", 8) || handle.process == getpid() || flags != 1) return INVALID_VALUE;
    Opened& known = opened[{handle.process, handle.file}];
    if (!known.times) {
        char path[64];
        std::snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.process, handle.file);
        int file = open(path, O_RDWR | O_CLOEXEC);
        void* memory = file < 0 ? MAP_FAILED : mmap(nullptr, handle.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (file >= 0) close(file);
        if (memory == MAP_FAILED) return INVALID_VALUE;
        known = {reinterpret_cast<Pointer>(memory), handle.bytes, 0};
    }
    known.times++;
    return *made = known.start, SUCCESS;
}
CALL(cuIpcCloseMemHandle, Pointer start) {
    ALONE;
    for (auto& [name, known] : opened) {
        if (known.start != start || !known.times) continue;
        if (--known.times == 0) {
            run_all();
            munmap(reinterpret_cast<void*>(start), known.bytes);
            known.start = 0;
        }
        return SUCCESS;
    }
    return INVALID_VALUE;
}

CALL(cuMemGetAddressRange_v2, Pointer* start, size_t* bytes, Pointer address) {
    ALONE;
    auto found = allocation_of(address);
    if (found == allocations.end()) return INVALID_VALUE;
    return *start = found->first, *bytes = found->second.bytes, SUCCESS;
}
CALL(cuMemGetHandleForAddressRange, void* made, Pointer start, size_t bytes, int kind, unsigned long long flags) {
    ALONE;
    auto found = allocation_of(start);
    if (kind != 1 || flags || start % 4096 || bytes % 4096 || found == allocations.end()) return INVALID_VALUE;
    if (found->second.file < 0 || start + bytes > found->first + found->second.bytes) return INVALID_VALUE;
    if (is("STANDIN_DMA_BUF", "no")) return NOT_SUPPORTED;
    int file = fcntl(found->second.file, F_DUPFD_CLOEXEC, 0);
    if (file < 0) return INVALID_VALUE;
    return *static_cast<int*>(made) = file, noted("dma-buf");
}
CALL(cuPointerSetAttribute, const void* value, int attribute, Pointer memory) {
    ALONE;
    // That what the host is told is over is over for adapters too.
    if (attribute != 6 || *static_cast<const unsigned*>(value) != 1 || !allocations.count(memory)) return INVALID_VALUE;
    return noted("sync-memops");
}
CALL(cuFlushGPUDirectRDMAWrites, int target, int scope) {
    ALONE;
    if (target != 0 || scope != 100 || !current) return INVALID_VALUE;
    return broken ? broken : noted("flush");
}

CALL(cuModuleLoadData, Module** made, const void* image) {
    // What a fatbin begins with.
    unsigned magic;
    std::memcpy(&magic, image, sizeof magic);
    return magic == 0xba55ed50 ? *made = new Module, SUCCESS : INVALID_VALUE;
}
CALL(cuModuleUnload, Module* module) {
    ALONE;
    for (const auto* recording : recordings) {
        for (const Call& call : *recording) {
            if (call.module != module) continue;
            // Whoever drops something is told nothing, so that the program ends.
            std::fprintf(stderr, "stand-in libcuda: a recording holds kernels that are unloaded\n");
            std::abort();
        }
    }
    return delete module, SUCCESS;
}
// Both modules have all kernels.
CALL(cuModuleGetFunction, Function** made, Module* module, const char* name) {
    const simt::Kernel* kernel = simt::find(name);
    // As many calls do, it tells of what has failed before.
    return broken ? broken : kernel ? *made = module->add(kernel), SUCCESS : NOT_FOUND;
}
CALL(cuModuleGetFunctionCount, unsigned* count, void*) {
    *count = 0;
    for (auto kernel = simt::kernels; kernel; kernel = kernel->next) *count += is_ours(kernel);
    return SUCCESS;
}
CALL(cuModuleEnumerateFunctions, Function** made, unsigned count, Module* module) {
    for (auto kernel = simt::kernels; kernel && count; kernel = kernel->next) {
        if (is_ours(kernel)) *made++ = module->add(kernel), count--;
    }
    return SUCCESS;
}
CALL(cuFuncGetName, const char** name, const Function* function) {
    return *name = function->kernel->name, SUCCESS;
}
CALL(cuFuncLoad, const Function* function) {
    ALONE;
    return loaded.insert(function->kernel), SUCCESS;
}
CALL(cuFuncSetAttribute, const Function* function, int attribute, int value) {
    ALONE;
    if (attribute != 8 || value < 0 || value > static_cast<int>(simt::SHARED_MAX)) return INVALID_VALUE;
    return shared_max[function->kernel] = value, SUCCESS;
}
CALL(cuTensorMapEncodeTiled, TensorMap* made, int type, unsigned rank, void* start, const unsigned long long* sides,
     const unsigned long long* strides, const unsigned* box_sides, const unsigned* steps, int interleave, int swizzle,
     int, int fill) {
    if (!current) return INVALID_CONTEXT;
    // Matrices of 16-bit words in boxes whose rows are swizzled within 128 bytes, and zeros beyond them.
    if (type != 1 || rank != 2 || steps[0] != 1 || steps[1] != 1 || interleave || swizzle != 3 || fill) {
        return INVALID_VALUE;
    }
    if (reinterpret_cast<Pointer>(made) % alignof(TensorMap)) return INVALID_VALUE;
    const char* mistake = simt_map(reinterpret_cast<Pointer>(start), sides[1], sides[0], strides[0], box_sides[1],
                                   box_sides[0], &made->words);
    return mistake ? INVALID_VALUE : SUCCESS;
}

struct LaunchAttribute {
    int id;
    char padding[4];
    union {
        int allowed;
        char size[64];
    };
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    Stream* stream;
    const LaunchAttribute* attributes;
    unsigned count;
};
CALL(cuLaunchKernelEx, const LaunchConfig* config, const Function* function, void** args, void**) {
    ALONE;
    const auto [grid, block, shared, stream, attributes, count] = *config;
    if (block[1] != 1 || block[2] != 1) return INVALID_VALUE;
    const simt::Kernel* kernel = function->kernel;
    if (shared > 48 << 10 && (!shared_max.count(kernel) || shared_max[kernel] < static_cast<int>(shared))) {
        return INVALID_VALUE;
    }
    // It may start while the one before it still runs (6: programmatic stream serialization).
    if (count != 1 || attributes->id != 6 || attributes->allowed != 1) return INVALID_VALUE;
    if (loaded.insert(kernel).second) noted("loaded late");
    Call call{kernel, function->module, {grid[0], grid[1], grid[2]}, block[0], shared, {}, {}};
    for (size_t i = 0; kernel->kinds[i]; i++) {
        if (kernel->kinds[i] == 'm') {
            call.maps.push_back(*static_cast<const TensorMap*>(args[i]));
            continue;
        }
        // As the driver does: what the argument's pointer leads to, as wide as the kernel takes it.
        unsigned long long cell = 0;
        std::memcpy(&cell, args[i], kernel->kinds[i] == 'p' ? 8 : 4);
        call.cells.push_back(cell);
    }
    if (!stream->capturing) return enqueue(stream, [call] { return run(call); });
    if (is_refused("amid")) return CAPTURE_INVALIDATED;
    stream->captured.push_back(call);
    return SUCCESS;
}
