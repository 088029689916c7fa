// The scheduler of the emulation: fibers, barriers, exchanges within warps, and the launch of a grid.

#include "emulate.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <numeric>
#include <semaphore>
#include <thread>
#include <vector>

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

const Kernel* kernels = nullptr;

namespace {

#include "hopper.h"

constexpr std::size_t STACK = 64 << 10;
constexpr unsigned BLOCK_MAX = 1024;

#if defined(__x86_64__)
// Saves what a call must preserve and goes on where `to` was saved: a few nanoseconds, where swapcontext makes two
// system calls.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, .-simt_switch
)");

struct Context {
    void* top = nullptr;

    void start(unsigned char*, unsigned char* top_of_stack, void (*entry)()) {
        // As if `entry` had been about to be called: its address to return to, and six registers below it.
        void** frame = reinterpret_cast<void**>(top_of_stack) - 2;
        frame[0] = reinterpret_cast<void*>(entry);
        frame[1] = nullptr;
        std::memset(frame - 6, 0, 6 * sizeof(void*));
        top = frame - 6;
    }
    static void go(Context& from, Context& to) { simt_switch(&from.top, to.top); }
};
#else
struct Context {
    ucontext_t state;

    void start(unsigned char* stack, unsigned char* top_of_stack, void (*entry)()) {
        getcontext(&state);
        state.uc_stack.ss_sp = stack;
        state.uc_stack.ss_size = static_cast<std::size_t>(top_of_stack - stack);
        makecontext(&state, entry, 0);
    }
    static void go(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
};
#endif

/// A copy to shared memory that is under way.
struct Copy {
    void* to;
    const void* from;
    bool valid;
    unsigned group;
};

enum class Wait : unsigned char { None, Predecessor, Block, Warp, Barrier, Over };

struct Fiber {
    Context context;
    /// Copies nobody has waited for yet, and groups of them that are complete.
    std::vector<Copy> copies;
    unsigned groups;
    /// The barrier that it waits for.
    const void* barrier;
    /// Places in shared memory where it has stored sixteen bytes that it has not shown to products yet.
    std::vector<unsigned> stored;
    /// Whether it has waited for the kernel before.
    bool follows;
};

struct Warp {
    unsigned arrived;
    alignas(16) unsigned char slots[2][WARP * EXCHANGE];
    Multiplier multiplier;
};

/// One host thread's machine: it runs a block at a time.
struct Machine {
    unsigned char* stacks;
    std::vector<Fiber> fibers{BLOCK_MAX};
    /// Of each fiber, what is asked for at every turn, and so lies close together: what it waits for, at which line,
    /// and how many exchanges it has taken part in, whose places take turns.
    Wait waits[BLOCK_MAX];
    int lines[BLOCK_MAX];
    unsigned char exchanges[BLOCK_MAX];
    std::vector<Warp> warps{BLOCK_MAX / WARP};
    Context host;
    const Kernel* kernel = nullptr;
    void* const* args = nullptr;
    unsigned threads = 0, arrived = 0, current = 0, over = 0;
    /// Threads go on in an order that visits each once: steps of a length that has no divisor in common with their
    /// number.
    unsigned step = 0;
    /// Stacks that have been made accessible: each takes two of the memory maps that a process has.
    unsigned ready = 0;
    /// With how many of those that have arrived, and that met last, the predicate held.
    int holds = 0, held = 0;
    /// Returns when the kernel before has run, if it has not yet.
    std::function<void()> predecessor;
    char error[256] = "";
    /// What the launch asked for lies at the end of this, so that an access beyond it faults.
    unsigned char* shared_end;
    std::size_t shared = 0;
    /// Shared memory as products see it, by places: what boxes brought, and what threads have shown of their stores.
    std::vector<unsigned char> shown = std::vector<unsigned char>(SHARED_SPAN);
    std::map<const void*, BarrierState> barriers;
    std::vector<Box> boxes;
    /// What each group of four warps has asked for, which must be the same for all four.
    std::vector<std::vector<Asked>> asked{BLOCK_MAX / WARP / 4};
    unsigned long long chance = 0;
    /// How unlike in time things are in a block that has others copy for it: boxes come at once, instead of when nobody
    /// can go on without them; and one warp goes on only when no other can.
    bool early = false;
    unsigned slow_warp = ~0u;
    /// Whether no other warp can go on.
    bool slow_too = false;

    Machine() {
        shared_end = reserve_shared();
        void* memory = mmap(nullptr, BLOCK_MAX * (STACK + 4096), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                            -1, 0);
        if (memory == MAP_FAILED) std::abort();
        stacks = static_cast<unsigned char*>(memory);
    }
    ~Machine() { munmap(stacks, BLOCK_MAX * (STACK + 4096)); }

    unsigned char* stack(unsigned i) { return stacks + i * (STACK + 4096) + 4096; }
    /// Where a fiber's stack begins: not at the same place of a page for all, which would be the same few cache lines.
    unsigned char* top(unsigned i) { return stack(i) + STACK - i * 320 % 4096 / 16 * 16; }
    /// Lets the next thread that can go on be the current one. False if there is none.
    bool pass_on() {
        for (unsigned next = current, asked = 0; asked < threads; asked++) {
            next += next + step < threads ? step : step - threads;
            const bool slow = next / WARP == slow_warp;
            if (waits[next] != Wait::None || (slow && !slow_too)) continue;
            slow_too &= slow;
            current = next;
            threadIdx = {next, 0, 0};
            return true;
        }
        return false;
    }
    /// Leaves the current thread for the next, without a detour, and from one place for all: so the processor foresees
    /// where they go on, which is where they left. What nobody can go on without is the host's to do.
    [[gnu::noinline]] void yield() {
        Context& left = fibers[current].context;
        Context::go(left, !error[0] && pass_on() ? fibers[current].context : host);
    }
    bool run_block(unsigned long long order);
    bool let_follow();
    bool stuck();
    void end_phase(const void* barrier, BarrierState& state);
    bool deliver();
    bool all_is_over();
    /// Ends the block. This thread does not go on.
    [[gnu::format(printf, 2, 3)]] void fail(const char* format, ...) {
        int length = std::snprintf(error, sizeof error, "kernel %s: ", kernel->name);
        va_list args;
        va_start(args, format);
        std::vsnprintf(error + length, sizeof error - static_cast<std::size_t>(length), format, args);
        va_end(args);
        yield();
    }
};

/// This host thread's, made at its first launch. (A plain pointer: objects with constructors are checked at each use.)
thread_local Machine* machine = nullptr;

void entry() {
    Machine& m = *machine;
    m.kernel->run(*m.kernel, m.args);
    if (!m.fibers[m.current].follows) {
        std::snprintf(m.error, sizeof m.error, "kernel %s: a thread ends that has not waited for the kernel before",
                      m.kernel->name);
    }
    if (!m.fibers[m.current].copies.empty()) {
        std::snprintf(m.error, sizeof m.error, "kernel %s: a thread ends while copies to shared memory are under way",
                      m.kernel->name);
    }
    if (!m.warps[m.current / WARP].multiplier.products.empty()) {
        m.fail("a thread ends while products are under way");
    }
    if (!m.fibers[m.current].stored.empty()) m.fail("a thread ends that has not shown what it stored to products");
    m.waits[m.current] = Wait::Over;
    m.over++;
    m.yield();
}

/// Waits for the kernel before, if there is one and threads wait for it.
bool Machine::let_follow() {
    bool some = false;
    for (unsigned i = 0; predecessor && i < threads; i++) {
        if (waits[i] != Wait::Predecessor) continue;
        waits[i] = Wait::None;
        some = true;
    }
    if (some) std::exchange(predecessor, nullptr)();
    return some;
}

bool Machine::stuck() {
    const unsigned first = std::find_if(waits, waits + threads, [](Wait wait) { return wait != Wait::Over; }) - waits;
    const bool phase = waits[first] == Wait::Barrier;
    std::snprintf(error, sizeof error,
                  "kernel %s, block (%u, %u, %u): thread %u waits at line %d for %s (%u wait, %u have ended)",
                  kernel->name, blockIdx.x, blockIdx.y, blockIdx.z, first, lines[first],
                  phase ? "a phase that does not end" : "threads that do not come", threads - over, over);
    return false;
}

bool Machine::run_block(unsigned long long order) {
    arrived = 0;
    holds = 0;
    error[0] = '\0';
    // What stays inaccessible lies below each stack, where an overflow meets it.
    for (; ready < threads; ready++) {
        if (mprotect(stack(ready), STACK, PROT_READ | PROT_WRITE)) std::abort();
    }
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].context.start(stack(i), top(i), entry);
        waits[i] = Wait::None;
        exchanges[i] = 0;
        fibers[i].copies.clear();
        fibers[i].groups = 0;
        fibers[i].stored.clear();
        fibers[i].follows = false;
    }
    for (unsigned w = 0; w < (threads + WARP - 1) / WARP; w++) {
        warps[w].arrived = 0;
        warps[w].multiplier.reset();
    }
    for (auto& group : asked) group.clear();
    barriers.clear();
    boxes.clear();
    std::memset(shared_end - shared, 0xff, shared);
    std::fill(shown.end() - static_cast<std::ptrdiff_t>(shared), shown.end(), 0xff);
    chance = order;
    step = 1 + order % threads;
    while (std::gcd(step, threads) != 1) step++;
    step %= threads;
    current = order / threads % threads;
    over = 0;
    slow_too = false;
    for (;;) {
        if (pass_on()) Context::go(host, fibers[current].context);
        if (error[0]) return false;
        if (over == threads) break;
        // Nobody can go on: now at last the slow warp does, or a box arrives, or the kernel before is run.
        if (!slow_too && slow_warp != ~0u) {
            slow_too = true;
        } else if (!deliver() && !let_follow()) {
            return stuck();
        }
    }
    return all_is_over();
}

/// What is said if a kernel touches memory that is nobody's.
void on_fault(int signal, siginfo_t* info, void*) {
    const Kernel* kernel = machine ? machine->kernel : nullptr;
    if (kernel) {
        char text[256];
        int length = std::snprintf(text, sizeof text,
                                   "kernel %s, block (%u, %u, %u), thread %u: no allocation holds address %p\n",
                                   kernel->name, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, info->si_addr);
        if (length > 0 && write(2, text, static_cast<std::size_t>(length)) < 0) _exit(1);
    }
    struct sigaction fallback = {};
    fallback.sa_handler = SIG_DFL;
    sigaction(signal, &fallback, nullptr);
}

/// From now on, what touches memory that is nobody's is named.
void say_faults() {
    static const bool done = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        return !sigaction(SIGSEGV, &action, nullptr) && !sigaction(SIGBUS, &action, nullptr);
    }();
    if (!done) std::abort();
}

}  // namespace

void follow() {
    Machine& m = *machine;
    Fiber& self = m.fibers[m.current];
    if (self.follows) {
        std::snprintf(m.error, sizeof m.error, "kernel %s: a thread waits twice for the kernel before", m.kernel->name);
        return m.yield();
    }
    self.follows = true;
    if (!m.predecessor) return;
    m.waits[m.current] = Wait::Predecessor;
    m.lines[m.current] = 0;
    m.yield();
}

int meet_block(int line, bool predicate) {
    Machine& m = *machine;
    m.waits[m.current] = Wait::Block;
    m.lines[m.current] = line;
    m.holds += predicate;
    if (++m.arrived < m.threads) {
        m.yield();
        // Nobody meets anew before all have gone on from here.
        return m.held;
    }
    m.arrived = 0;
    m.held = std::exchange(m.holds, 0);
    for (unsigned i = 0; i < m.threads; i++) {
        if (m.lines[i] != line) {
            m.fail("threads meet at the barriers of lines %d and %d", line, m.lines[i]);
        }
        m.waits[i] = Wait::None;
    }
    return m.held;
}

unsigned char* slots() {
    Machine& m = *machine;
    // Whoever shows something for the next exchange has seen this one, but others may not have: two places take turns.
    return m.warps[m.current / WARP].slots[m.exchanges[m.current]++ % 2];
}

void meet_warp(unsigned mask, int line) {
    Machine& m = *machine;
    Warp& warp = m.warps[m.current / WARP];
    m.waits[m.current] = Wait::Warp;
    m.lines[m.current] = line;
    if (mask != ~0u) {
        std::snprintf(m.error, sizeof m.error, "kernel %s, line %d: only whole warps are emulated", m.kernel->name,
                      line);
        m.yield();
    }
    if (++warp.arrived < WARP) return m.yield();
    warp.arrived = 0;
    const unsigned first = m.current / WARP * WARP;
    for (unsigned lane = first; lane < first + WARP; lane++) {
        if (m.lines[lane] != line) m.fail("lanes of a warp meet at lines %d and %d", line, m.lines[lane]);
    }
    std::fill_n(m.waits + first, WARP, Wait::None);
}

void copy_later(void* to, const void* from, bool valid) {
    Machine& m = *machine;
    Fiber& self = m.fibers[m.current];
    if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % 16) {
        std::snprintf(m.error, sizeof m.error, "kernel %s: a copy to shared memory is not aligned", m.kernel->name);
        return m.yield();
    }
    // Not a number, in every type: whoever reads too early, or still reads what was here, shall see it.
    std::memset(to, 0xff, 16);
    self.copies.push_back({to, from, valid, self.groups});
}

void commit_copies() {
    Machine& m = *machine;
    m.fibers[m.current].groups++;
}

void wait_for_copies(unsigned latest) {
    Machine& m = *machine;
    Fiber& self = m.fibers[m.current];
    std::size_t over = 0;
    for (; over < self.copies.size() && self.copies[over].group + latest < self.groups; over++) {
        const Copy& copy = self.copies[over];
        if (copy.valid) {
            std::memcpy(copy.to, copy.from, 16);
        } else {
            std::memset(copy.to, 0, 16);
        }
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(over));
}

#include "hopper_instructions.h"

namespace {

const Kernel* find(const char* name) {
    for (const Kernel* kernel = kernels; kernel; kernel = kernel->next) {
        if (!std::strcmp(kernel->name, name)) return kernel;
    }
    return nullptr;
}

/// A grid to run.
struct Grid {
    const Kernel* kernel;
    dim3 size;
    unsigned threads, shared;
    void* const* args;

    bool is_possible() const {
        return kernel && threads > 0 && threads <= BLOCK_MAX && threads % WARP == 0 && shared <= SHARED_MAX;
    }
    unsigned long long blocks() const { return 1ull * size.x * size.y * size.z; }
    /// The next number of those that the order of blocks and threads hangs on.
    static void step(unsigned long long& seed) { seed = seed * 6364136223846793005ull + 1442695040888963407ull; }
    /// Runs a block. In one that is not the first, boxes and warps may be as unlike in time as they come; in the first,
    /// all is as late as it may be. Null, or what went wrong.
    const char* run(Machine& m, unsigned long long at, unsigned long long seed, bool any_time) const {
        m.kernel = kernel, m.args = args, m.threads = threads;
        // In sixteens, so that it does not begin where boxes may.
        m.shared = (shared + 15) / 16 * 16;
        any_time &= shared > 0;
        const unsigned whim = static_cast<unsigned>(seed >> 40), warps = threads / WARP;
        m.early = any_time && whim % 2;
        m.slow_warp = any_time && whim / 2 % (2 * warps) < warps ? whim / 2 % warps : ~0u;
        gridDim = size, blockDim = {threads, 1, 1};
        blockIdx = {static_cast<unsigned>(at % size.x), static_cast<unsigned>(at / size.x % size.y),
                    static_cast<unsigned>(at / size.x / size.y)};
        const bool right = m.run_block(seed >> 20);
        m.kernel = nullptr, m.predecessor = nullptr;
        return right ? nullptr : m.error;
    }
};

/// Starts a block before the kernel ahead of its own has run, as a device may: it goes on to where it waits for that,
/// in a thread of its own, where it has its own shared memory.
class Forerunner {
    std::binary_semaphore go{0}, held{0};
    Grid grid;
    struct alignas(128) Cell {
        unsigned char bytes[128];
    };
    std::vector<Cell> cells;
    std::vector<void*> args;
    const char* error;
    bool ends = false;
    std::thread thread{[this] { run(); }};

    void run() {
        Machine own;
        machine = &own;
        while (go.acquire(), !ends) {
            own.predecessor = [this] { held.release(), go.acquire(); };
            unsigned long long order = seed;
            Grid::step(order);
            error = grid.run(own, seed % grid.blocks(), order, false);
            is_held = false;
            held.release();
        }
    }

public:
    /// Of what grid a block was begun whose outcome nobody has asked for; 0 if there is none.
    unsigned long long seed = 0;
    /// Whether it waits.
    bool is_held = false;

    ~Forerunner() {
        ends = true;
        go.release();
        thread.join();
    }
    void begin(const Grid& of, unsigned long long with) {
        grid = of, seed = with, is_held = true;
        cells.clear(), args.clear();
        for (size_t i = 0; of.kernel->kinds[i]; i++) {
            const char kind = of.kernel->kinds[i];
            cells.push_back({});
            std::memcpy(&cells.back(), of.args[i], kind == 'm' ? 128 : kind == 'p' ? 8 : 4);
        }
        for (auto& cell : cells) args.push_back(&cell);
        grid.args = args.data();
        go.release(), held.acquire();
    }
    /// Runs the block to its end. Null, or what went wrong.
    const char* finish() {
        seed = 0;
        if (is_held) go.release(), held.acquire();
        return error;
    }
};

/// This host thread's: while one kernel is run, whose first block may have been begun, the next one's may be.
struct Forerunners {
    Forerunner* both[2] = {};

    /// That of the grid that is launched with this seed, or null.
    Forerunner* of(unsigned long long seed) {
        for (Forerunner* one : both) {
            if (one && one->seed == seed) return one;
        }
        return nullptr;
    }
    /// One that is free.
    Forerunner* free() {
        Forerunner*& one = both[0] && both[0]->seed ? both[1] : both[0];
        return one ? one : one = new Forerunner;
    }
    /// What was begun and will not be launched stays where it is: what it would touch may be gone.
    void leave() {
        for (Forerunner*& one : both) {
            if (one) one->seed = 0;
            if (one && one->is_held) one = nullptr;
        }
    }
    ~Forerunners() {
        leave();
        for (Forerunner* one : both) delete one;
    }
};
thread_local Forerunners forerunners;

}  // namespace
}  // namespace simt

/// Starts the first block of a grid that is launched after the next, with these arguments and this seed.
extern "C" void simt_begin(const char* name, const unsigned grid[3], unsigned threads, unsigned shared,
                           void* const* args, unsigned long long seed) {
    const simt::Grid next{simt::find(name), {grid[0], grid[1], grid[2]}, threads, shared, args};
    simt::say_faults();
    if (next.is_possible()) simt::forerunners.free()->begin(next, seed);
}

/// Forgets those that were started.
extern "C" void simt_leave() { simt::forerunners.leave(); }

/// The kinds of a kernel's arguments, a letter each; null if there is no such kernel.
extern "C" const char* simt_kinds(const char* name) {
    const simt::Kernel* kernel = simt::find(name);
    return kernel ? kernel->kinds : nullptr;
}

/// Describes a matrix of 16-bit elements to what copies boxes of it. Null, or what the driver would not take.
extern "C" const char* simt_map(unsigned long long start, unsigned long long rows, unsigned long long cols,
                                unsigned long long row_bytes, unsigned box_rows, unsigned box_cols,
                                std::uint64_t (*words)[16]) {
    const simt::Map map = {simt::Map::MAGIC, start, rows, cols, row_bytes, box_rows, box_cols};
    std::memset(*words, 0, sizeof *words);
    std::memcpy(*words, &map, sizeof map);
    return map.mistake();
}

/// Runs all blocks of a grid, with so many bytes of shared memory besides what kernels have by themselves. Null, or
/// what went wrong (good until this thread launches again).
extern "C" const char* simt_launch(const char* name, const unsigned grid[3], unsigned threads, unsigned shared,
                                   void* const* args, unsigned long long seed) {
    simt::say_faults();
    static thread_local simt::Machine machine;
    simt::machine = &machine;
    const simt::Grid all{simt::find(name), {grid[0], grid[1], grid[2]}, threads, shared, args};
    if (!all.is_possible()) return "no such kernel, no whole number of warps, or more shared memory than there is";
    const unsigned long long blocks = all.blocks();
    // Blocks in an order of their own too: none may wait for another.
    unsigned long long step = blocks > 1 ? 1 + seed % blocks : 1;
    while (std::gcd(step, blocks) != 1) step++;
    unsigned long long at = seed % blocks;
    simt::Forerunner* begun = simt::forerunners.of(seed);
    for (unsigned long long i = 0; i < blocks; i++, at = (at + step) % blocks) {
        simt::Grid::step(seed);
        if (const char* error = begun ? begun->finish() : all.run(machine, at, seed, i > 0)) return error;
        begun = nullptr;
    }
    return nullptr;
}

// The kernels themselves, the same text that nvcc compiles.
#include "../../cuda/hopper.cu"
#include "../../cuda/kernels.cu"
#include "faulty.cu"
#include "faulty_hopper.cu"
