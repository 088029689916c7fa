// What the instructions of cuda/hopper.cuh do. (A part of emulate.cpp.)

unsigned char* shared_start() { return machine->shared_end - machine->shared; }

unsigned shared_place(const void* pointer) {
    // What is not in there (variables of kernels, which have addresses of their own) has a place too.
    return static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(pointer) % SHARED_SPAN);
}

namespace {

/// Shared memory at a place, if so many bytes of it were asked for.
unsigned char* shared_at(Machine& m, unsigned place, std::size_t bytes) {
    if (place + bytes > SHARED_SPAN || place < SHARED_SPAN - m.shared) return nullptr;
    return m.shared_end - SHARED_SPAN + place;
}

BarrierState& barrier_of(Machine& m, std::uint64_t* barrier) {
    auto found = m.barriers.find(barrier);
    if (found == m.barriers.end()) m.fail("thread %u uses a barrier that nobody has made yet", m.current);
    if (*barrier != BARRIER_WORD) m.fail("a barrier was written over");
    return found->second;
}

/// Copies what has been on its way.
void arrive_box(Machine& m, const Box& box) {
    const Map& map = box.map;
    const unsigned place = shared_place(box.to);
    for (unsigned i = 0; i < map.box_rows * map.box_cols; i++) {
        const long long row = box.row + static_cast<long long>(i / map.box_cols);
        const long long col = box.col + static_cast<long long>(i % map.box_cols);
        const bool inside = row >= 0 && col >= 0 && row < static_cast<long long>(map.rows) &&
                            col < static_cast<long long>(map.cols);
        std::uint16_t value = 0;
        if (inside) std::memcpy(&value, reinterpret_cast<const char*>(map.start) + row * map.row_bytes + col * 2, 2);
        const unsigned to = swizzled_place(place + 2 * i);
        std::memcpy(shared_at(m, to, 2), &value, 2);
        std::memcpy(&m.shown[to], &value, 2);
    }
}

/// One warp's part of a product: 16 rows of a, which are its lanes', and all of b.
void multiply(Machine& m, unsigned warp, const Product& product, Accumulators& to) {
    const unsigned columns = static_cast<unsigned>(product.asked.count) * 2;
    const auto element = [&](unsigned place) {
        if (!shared_at(m, place, 2)) {
            m.fail("the product of line %d reads beyond the shared memory that was asked for", product.asked.line);
        }
        std::uint16_t bits;
        std::memcpy(&bits, &m.shown[place], 2);
        return product.value(bits);
    };
    const Asked& asked = product.asked;
    const auto element_of_b = [&](unsigned column, unsigned k) {
        return element(asked.is_held ? operand_place_across(asked.b, column, k) : operand_place(asked.b, column, k));
    };
    const auto element_of_a = [&](unsigned row, unsigned k) {
        if (!asked.is_held) return element(operand_place(asked.a, warp % 4 * 16 + row, k));
        const unsigned both = product.held[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8];
        return product.value(static_cast<std::uint16_t>(both >> 16 * (k % 2)));
    };
    static thread_local float b[16][256];
    for (unsigned column = 0; column < columns; column++) {
        for (unsigned k = 0; k < 16; k++) b[k][column] = element_of_b(column, k);
    }
    for (unsigned row = 0; row < 16; row++) {
        float a[16], sums[256];
        for (unsigned k = 0; k < 16; k++) a[k] = element_of_a(row, k);
        // Where the columns of this row are: "Register Fragments for wgmma.mma_async.m64nNk16".
        const auto held = [&](unsigned column) -> float& {
            const unsigned lane = row % 8 * 4 + column % 8 / 2, i = column / 8 * 4 + row / 8 * 2 + column % 2;
            return to.values[lane * static_cast<unsigned>(to.count) + i];
        };
        for (unsigned column = 0; column < columns; column++) sums[column] = asked.adds ? held(column) : 0.0f;
        for (unsigned k = 0; k < 16; k++) {
            for (unsigned column = 0; column < columns; column++) {
                sums[column] = std::fma(a[k], b[k][column], sums[column]);
            }
        }
        for (unsigned column = 0; column < columns; column++) held(column) = sums[column];
    }
}

/// The warp at hand, once all its lanes have come: true for one of them, before the others go on.
bool whole_warp(Multiplier& multiplier, int line) {
    multiplier.lanes++;
    meet_warp(~0u, line);
    if (multiplier.lanes != WARP) return false;
    multiplier.lanes = 0;
    return true;
}

}  // namespace

/// Whether all that the block began has ended.
bool Machine::all_is_over() {
    const char* left = boxes.empty() ? nullptr : "boxes are under way";
    for (unsigned w = 0; w < threads / WARP; w++) {
        if (warps[w].multiplier.asked != asked[w / 4].size()) left = "a warp has left the others to multiply alone";
    }
    if (left) std::snprintf(error, sizeof error, "kernel %s: a block ends, and %s", kernel->name, left);
    return !left;
}

void Machine::end_phase(const void* barrier, BarrierState& state) {
    if (state.lacking || state.bytes) return;
    state.phase++;
    state.lacking = state.arrivals;
    for (unsigned i = 0; i < threads; i++) {
        if (waits[i] == Wait::Barrier && fibers[i].barrier == barrier) waits[i] = Wait::None;
    }
}

bool Machine::deliver() {
    if (boxes.empty()) return false;
    chance = chance * 6364136223846793005ull + 1442695040888963407ull;
    const auto at = boxes.begin() + static_cast<std::ptrdiff_t>((chance >> 33) % boxes.size());
    const Box box = *at;
    boxes.erase(at);
    arrive_box(*this, box);
    BarrierState& state = barriers.at(box.barrier);
    state.bytes -= static_cast<long long>(box.map.bytes());
    end_phase(box.barrier, state);
    return true;
}

void make_barrier(std::uint64_t* barrier, unsigned arrivals) {
    Machine& m = *machine;
    if (arrivals == 0 || arrivals >= 1u << 20) m.fail("a barrier is for 1 to 2^20 - 1 arrivals");
    *barrier = BARRIER_WORD;
    m.barriers[barrier] = {arrivals, arrivals, 0, 0, m.current, false};
}

void show_barriers() {
    for (auto& [barrier, state] : machine->barriers) state.shown |= state.maker == machine->current;
}

void arrive(std::uint64_t* barrier, unsigned bytes) {
    Machine& m = *machine;
    BarrierState& state = barrier_of(m, barrier);
    if (state.lacking == 0) m.fail("thread %u arrives at a phase that has all its arrivals", m.current);
    if (bytes >= 1u << 20) m.fail("a phase is for less than 2^20 bytes");
    state.lacking--;
    state.bytes += bytes;
    m.end_phase(barrier, state);
}

void wait_for(std::uint64_t* barrier, unsigned parity, int line) {
    Machine& m = *machine;
    Fiber& self = m.fibers[m.current];
    if (parity > 1) m.fail("a parity is 0 or 1");
    while (barrier_of(m, barrier).phase % 2 == parity) {
        m.waits[m.current] = Wait::Barrier;
        m.lines[m.current] = line;
        self.barrier = barrier;
        m.yield();
    }
}

void copy_box(void* to, const std::uint64_t (&words)[16], int row, int col, std::uint64_t* barrier) {
    Machine& m = *machine;
    const Map map = Map::of(words);
    if (map.magic != Map::MAGIC || map.mistake()) m.fail("what is passed for a tensor's map is none");
    const unsigned place = shared_place(to);
    if (place % 128 || shared_at(m, place, map.bytes()) != to) {
        m.fail("a box goes to where it cannot be: not at a multiple of 128 bytes, or beyond what was asked for");
    }
    if (!barrier_of(m, barrier).shown) m.fail("a box is to arrive at a barrier that was not shown to what copies it");
    // Not a number: whoever reads too early, or still reads what was here, shall see it.
    std::memset(to, 0xff, map.bytes());
    std::memset(&m.shown[place], 0xff, map.bytes());
    m.boxes.push_back({map, static_cast<unsigned char*>(to), row, col, barrier});
    if (m.early) m.deliver();
}

void store_operand(void* to, const uint4& bytes) {
    Machine& m = *machine;
    const unsigned place = shared_place(to);
    if (place % 16 || shared_at(m, place, 16) != to) m.fail("a part of an operand goes to where it cannot be");
    std::memcpy(to, &bytes, 16);
    m.fibers[m.current].stored.push_back(place);
}

void show_operands() {
    Machine& m = *machine;
    for (unsigned place : std::exchange(m.fibers[m.current].stored, {})) {
        std::memcpy(&m.shown[place], shared_at(m, place, 16), 16);
    }
}

void hold(const unsigned* registers, int count) {
    Machine& m = *machine;
    std::vector<Held>& all = m.warps[m.current / WARP].multiplier.held[lane()];
    const auto is_here = [&](const Held& held) { return held.registers == registers; };
    all.erase(std::remove_if(all.begin(), all.end(), is_here), all.end());
    all.push_back({registers, {registers, registers + count}});
}

void begin_products(int line) {
    Machine& m = *machine;
    Multiplier& multiplier = m.warps[m.current / WARP].multiplier;
    if (whole_warp(multiplier, line)) multiplier.fenced = true;
}

namespace {

/// Asks for a product, once all lanes of this warp have.
void multiply_later(float* sums, const unsigned* registers, const Asked& asked, float (*value)(std::uint16_t)) {
    Machine& m = *machine;
    const unsigned warp = m.current / WARP;
    Multiplier& multiplier = m.warps[warp].multiplier;
    multiplier.sums[lane()] = sums;
    multiplier.registers[lane()] = registers;
    if (!whole_warp(multiplier, asked.line)) return;
    if ((!asked.is_held && !begins_with_pattern(asked.a)) || !begins_with_pattern(asked.b)) {
        m.fail("an operand of line %d does not begin where its swizzle does", asked.line);
    }
    std::vector<Asked>& others = m.asked[warp / 4];
    if (multiplier.asked == others.size()) others.push_back(asked);
    if (!(others[multiplier.asked++] == asked)) {
        m.fail("the four warps of a group multiply different things, at line %d", asked.line);
    }
    Product product = {asked, value, multiplier.sums[0], multiplier.groups, {}, {}};
    for (unsigned lane = 0; asked.is_held && lane < WARP; lane++) {
        const unsigned* four = product.registers[lane] = multiplier.registers[lane];
        bool is_known = multiplier.fenced;
        const auto has = [&](const Held& held) { return held.have(four); };
        is_known &= std::any_of(multiplier.held[lane].begin(), multiplier.held[lane].end(), has);
        if (!is_known) m.fail("no fence stands between registers and the product of line %d", asked.line);
        std::memcpy(product.held[lane], four, 16);
    }
    auto found = multiplier.accumulators.find(product.key);
    if (found == multiplier.accumulators.end()) {
        if (!multiplier.fenced) m.fail("no fence stands before the product of line %d", asked.line);
        Accumulators fresh = {};
        fresh.count = asked.count;
        std::memcpy(fresh.sums, multiplier.sums, sizeof fresh.sums);
        for (float* lane : fresh.sums) {
            fresh.values.insert(fresh.values.end(), lane, lane + asked.count);
            std::memset(lane, 0xff, sizeof(float) * static_cast<std::size_t>(asked.count));
        }
        found = multiplier.accumulators.emplace(product.key, std::move(fresh)).first;
    } else if (found->second.count != asked.count || found->second.touched()) {
        m.fail("sums are touched, or read otherwise, while products add to them (line %d)", asked.line);
    }
    found->second.under_way++;
    multiplier.products.push_back(product);
}

}  // namespace

void multiply_boxes(float* sums, int count, bool adds, std::uint64_t a, std::uint64_t b, float (*value)(std::uint16_t),
                    int line) {
    multiply_later(sums, nullptr, {a, b, count, line, adds, false}, value);
}

void multiply_held(float* sums, int count, const unsigned* a, std::uint64_t b, float (*value)(std::uint16_t),
                   int line) {
    multiply_later(sums, a, {0, b, count, line, true, true}, value);
}

void commit_products(int line) {
    Machine& m = *machine;
    Multiplier& multiplier = m.warps[m.current / WARP].multiplier;
    if (whole_warp(multiplier, line)) multiplier.groups++;
}

void wait_for_products(unsigned latest, int line) {
    Machine& m = *machine;
    const unsigned warp = m.current / WARP;
    Multiplier& multiplier = m.warps[warp].multiplier;
    if (!whole_warp(multiplier, line)) return;
    std::size_t over = 0;
    for (; over < multiplier.products.size(); over++) {
        const Product& product = multiplier.products[over];
        if (product.group + latest >= multiplier.groups) break;
        for (unsigned lane = 0; product.asked.is_held && lane < WARP; lane++) {
            if (std::memcmp(product.registers[lane], product.held[lane], 16)) {
                m.fail("registers are touched while the product of line %d reads them", product.asked.line);
            }
        }
        Accumulators& to = multiplier.accumulators.at(product.key);
        multiply(m, warp, product, to);
        if (--to.under_way) continue;
        if (to.touched()) m.fail("sums are touched while products add to them (until line %d)", line);
        for (unsigned lane = 0; lane < WARP; lane++) {
            const auto from = to.values.begin() + static_cast<std::ptrdiff_t>(lane) * to.count;
            std::copy(from, from + to.count, to.sums[lane]);
        }
        multiplier.accumulators.erase(product.key);
    }
    multiplier.products.erase(multiplier.products.begin(),
                              multiplier.products.begin() + static_cast<std::ptrdiff_t>(over));
    // Registers may be used from here on, before what is multiplied next.
    multiplier.fenced = false;
}
