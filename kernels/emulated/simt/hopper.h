// What the emulation keeps of barriers, boxes and products that are under way, and how the PTX ISA says that operands
// and results lie. (A part of emulate.cpp.)

/// Most shared memory that a block can ask for on compute capability 9.0.
constexpr std::size_t SHARED_MAX = 227 << 10;
/// Addresses of shared memory have 18 bits in a matrix descriptor.
constexpr std::size_t SHARED_SPAN = 256 << 10;

/// Where shared memory ends: at a multiple of its span, and at a page that nobody may touch.
unsigned char* reserve_shared() {
    void* memory = mmap(nullptr, 2 * SHARED_SPAN + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(memory) + SHARED_SPAN - 1;
    unsigned char* span = reinterpret_cast<unsigned char*>(start / SHARED_SPAN * SHARED_SPAN);
    if (mprotect(span, SHARED_SPAN, PROT_READ | PROT_WRITE)) std::abort();
    return span + SHARED_SPAN;
}

/// What lies in a barrier's place in memory, so that whoever writes there is found out.
constexpr std::uint64_t BARRIER_WORD = 0xba221e2ba221e200;

struct BarrierState {
    /// Arrivals of a phase, and those that this one lacks.
    unsigned arrivals, lacking;
    /// Bytes that were announced and have not come.
    long long bytes;
    unsigned phase;
    /// Who made it, and whether what copies boxes sees it.
    unsigned maker;
    bool shown;
};

/// What a tensor's map says here.
struct Map {
    std::uint64_t magic, start, rows, cols, row_bytes, box_rows, box_cols;

    static constexpr std::uint64_t MAGIC = 0x7e450b3a9;
    static Map of(const std::uint64_t (&words)[16]) {
        Map map;
        std::memcpy(&map, words, sizeof map);
        return map;
    }
    std::size_t bytes() const { return box_rows * box_cols * 2; }
    /// What the driver would refuse, or null.
    const char* mistake() const {
        if (start % 16) return "a matrix starts at a multiple of 16 bytes";
        if (!rows || !cols || rows >> 32 || cols >> 32) return "a matrix has 1 to 2^32 rows and columns";
        if (row_bytes % 16 || row_bytes >> 40 || row_bytes < 2 * cols) return "rows are multiples of 16 bytes apart";
        if (!box_rows || !box_cols || box_rows > 256 || box_cols > 256) return "a box has 1 to 256 rows and columns";
        if (box_cols * 2 % 16 || box_cols * 2 > 128) return "rows of a box are swizzled within 128 bytes, in sixteens";
        return nullptr;
    }
};

/// A box on its way to shared memory.
struct Box {
    Map map;
    unsigned char* to;
    int row, col;
    const void* barrier;
};

/// Where 128-byte swizzling puts what belongs at a place in shared memory: bits 4 to 6 of an address change with bits 7
/// to 9.
unsigned swizzled_place(unsigned place) { return place ^ (place >> 7 & 7) << 4; }

/// A product that a group of warps has asked for.
struct Asked {
    /// The first is not there if it is held in registers.
    std::uint64_t a, b;
    int count, line;
    /// Whether it adds to sums; whether the first operand is in registers, and the second one lies across.
    bool adds, is_held;

    bool operator==(const Asked& other) const {
        return a == other.a && b == other.b && count == other.count && line == other.line && adds == other.adds &&
               is_held == other.is_held;
    }
};

/// Registers of a lane that products read, and what was in them at the fence.
struct Held {
    const unsigned* registers;
    std::vector<unsigned> values;

    /// Whether these four are among them, and as they were.
    bool have(const unsigned* four) const {
        return four >= registers && four + 4 <= registers + values.size() &&
               !std::memcmp(four, values.data() + (four - registers), 16);
    }
};

/// A warp's part of it.
struct Product {
    Asked asked;
    float (*value)(std::uint16_t);
    /// Which of the accumulators of its warp it adds to.
    const float* key;
    unsigned group;
    /// Each lane's part of the first operand, if it is in registers: where, and what it was when it was asked for.
    const unsigned* registers[WARP];
    unsigned held[WARP][4];
};

/// Registers of a warp that products add to: where they are, and what is in them in truth.
struct Accumulators {
    float* sums[WARP];
    std::vector<float> values;
    int count, under_way;

    bool touched() const {
        for (const float* lane : sums) {
            for (int i = 0; i < count; i++) {
                if (bits_of(lane[i]) != ~0u) return true;
            }
        }
        return false;
    }
};

/// What a warp multiplies with the three others of its group.
struct Multiplier {
    std::vector<Product> products;
    std::map<const float*, Accumulators> accumulators;
    unsigned groups, lanes, asked;
    /// Whether a fence stands between what was done with registers and what comes.
    bool fenced;
    float* sums[WARP];
    const unsigned* registers[WARP];
    std::vector<Held> held[WARP];

    void reset() {
        for (auto& of_lane : held) of_lane.clear();
        products.clear();
        accumulators.clear();
        groups = lanes = asked = 0;
        fenced = false;
    }
};

/// Whether an operand begins where its swizzle's pattern does, as its descriptor has it ("base offset").
bool begins_with_pattern(std::uint64_t descriptor) {
    const unsigned start = static_cast<unsigned>(descriptor & 0x3fff) << 4, mode = descriptor >> 62;
    return mode == 0 || (start >> 7 & 7) == (descriptor >> 49 & 7);
}

/// Where element k of a row of an operand lies, from the PTX ISA: "Matrix Descriptor Format" and "Strides" of operands
/// whose rows are contiguous (K-major). Of the sixteen elements that a product takes, that is.
unsigned operand_place(std::uint64_t descriptor, unsigned row, unsigned k) {
    const auto field = [&](unsigned bit) { return static_cast<unsigned>(descriptor >> bit & 0x3fff) << 4; };
    const unsigned start = field(0), leading = field(16), stride = field(32);
    const unsigned base = descriptor >> 49 & 7, mode = descriptor >> 62;
    // Rows of a core matrix of eight, and what is swizzled in them: 128, 64 or 32 bytes.
    if (mode == 0) return start + row / 8 * stride + row % 8 * 16 + k / 8 * leading + k % 8 * 2;
    const unsigned width = 256 >> mode, place = start + row / 8 * stride + row % 8 * width + k * 2;
    return place ^ (((place >> 7) - base) & (width / 16 - 1)) << 4;
}

/// The same for an operand that lies across (MN-major): its rows are columns there, of which neighbours are contiguous.
/// Swizzled rows of 128, 64 or 32 bytes have so many of them; the next ones lie `leading` further on.
unsigned operand_place_across(std::uint64_t descriptor, unsigned row, unsigned k) {
    const auto field = [&](unsigned bit) { return static_cast<unsigned>(descriptor >> bit & 0x3fff) << 4; };
    const unsigned start = field(0), leading = field(16), stride = field(32);
    const unsigned base = descriptor >> 49 & 7, mode = descriptor >> 62;
    if (mode == 0) return start + row / 8 * stride + row % 8 * 2 + k / 8 * leading + k % 8 * 16;
    const unsigned width = 256 >> mode, place = start + row / (width / 2) * leading + row % (width / 2) * 2 +
                                                k / 8 * stride + k % 8 * width;
    return place ^ (((place >> 7) - base) & (width / 16 - 1)) << 4;
}
