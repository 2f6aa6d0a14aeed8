// Weight matrices as the kernels want them, and their product with quantised activations.
//
// w[n][k] = d·q + m with q unsigned, d and m shared by GROUP inputs of one output channel; of six bits d is shared by half
// a group. Where quants lie around zero m is -d·2^(bits-1) and takes no memory. GGUF's blocks keep their values to the bit,
// but for Q5_K, whose d and m are rounded to half precision.
//
// Layout: tiles of 16 output channels; in a tile, group after group:
//   the upper four bits: 4 x 64 bytes, chunk c with inputs 8c…8c+3 in the low nibbles and 8c+4…8c+7 in the high ones
//     (channel-major fours)
//   a fifth bit: 64 bytes, of inputs 4c…4c+3 the bits c;  two more: 2 x 64 bytes, of inputs 16h+4c…16h+4c+3 the bits 2c and
//     2c+1 of the h-th
//   bytes: 8 x 64 bytes instead of all these, chunk c with inputs 4c…4c+3
//   then 16 half-precision d, and where there are others 16 half-precision m
// GGUF's K blocks of 4 and 6 bits go as blocks of eight groups, which begin with 16 half-precision D (and M); a group ends
// with 16 bytes, its d in D (signed of six bits, of either half), and 16 more, its -m in M.
// So one product reads memory once, front to back. Source bytes are never kept beside it.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

namespace dspark {

constexpr int ROWS = 16;          // activations that one reading of the weights serves

// How weights are kept: the bits of a quant, _M with an m of its own, _K as GGUF's blocks with scales of scales (of six bits
// there is no other). Numbers are known to matrix.py.
enum Kind : int { FOUR = 0, FOUR_M = 1, FOUR_K = 2, FIVE = 3, FIVE_M = 4, SIX_K = 5, EIGHT = 6 };
constexpr int bits_of(Kind kind) { return kind == EIGHT ? 8 : kind == SIX_K ? 6 : kind >= FIVE ? 5 : 4; }
constexpr bool has_m(Kind kind) { return kind == FOUR_M || kind == FIVE_M || kind == FOUR_K; }
constexpr bool in_blocks(Kind kind) { return kind == FOUR_K || kind == SIX_K; }
constexpr float middle_of(Kind kind) { return static_cast<float>(1 << (bits_of(kind) - 1)); }
// How far up in their bytes quants are multiplied, and what one step of them is then: at the top all kinds have one middle.
#if defined(DSPARK_AVX2)
constexpr int up_of(Kind /*kind*/) { return 0; }  // products of pairs are added up in 16 bits
#else
constexpr int up_of(Kind kind) { return 8 - bits_of(kind); }
#endif
constexpr float step_of(Kind kind) { return 1.0f / static_cast<float>(1 << up_of(kind)); }
constexpr int block_groups(Kind kind) { return in_blocks(kind) ? 8 : 1; }
constexpr size_t head_bytes(Kind kind) { return !in_blocks(kind) ? 0 : kind == FOUR_K ? 64 : 32; }  // of a block
constexpr size_t scale_bytes(Kind kind) { return kind == FOUR_M || kind == FIVE_M ? 64 : 32; }      // of a group
constexpr size_t group_bytes_of(Kind kind) { return static_cast<size_t>(bits_of(kind)) * 16 * 32 / 8 + scale_bytes(kind); }
constexpr size_t block_bytes(Kind kind) { return head_bytes(kind) + block_groups(kind) * group_bytes_of(kind); }

// use(std::integral_constant<Kind, kind>()) for a kind that is known when it runs.
template <typename Use>
inline auto with_kind(Kind kind, Use use) {
    switch (kind) {
        case FOUR: return use(std::integral_constant<Kind, FOUR>());
        case FOUR_M: return use(std::integral_constant<Kind, FOUR_M>());
        case FOUR_K: return use(std::integral_constant<Kind, FOUR_K>());
        case FIVE: return use(std::integral_constant<Kind, FIVE>());
        case FIVE_M: return use(std::integral_constant<Kind, FIVE_M>());
        case SIX_K: return use(std::integral_constant<Kind, SIX_K>());
        default: return use(std::integral_constant<Kind, EIGHT>());
    }
}
// Bytes ahead, into the second level: each line, or for few rows on AMD the first of each APART bytes, from which the
// processor's own prefetching goes on. A line that is asked for takes a place in the queue that loads wait for too. One row
// from memory, one core of a Zen 4 that reads 31 to 33 GB/s: of 5 bits 23 GB/s with each line, 32 so; of 8 bits 22 and 30. Of
// more rows the processor's own does not see far enough past what they compute: eight of 8 bits come at 23 and at 12 (039).
constexpr size_t PREFETCH = 16384;
constexpr size_t APART = 256;
constexpr int few_rows(Kind kind) { return kind == EIGHT ? 4 : 2; }
inline const bool fetches_on = [] {
#if defined(__GNUC__) && defined(__x86_64__)
    return __builtin_cpu_is("amd") != 0;
#else
    return false;
#endif
}();

template <size_t BYTES>
inline void prefetch(const uint8_t* at, bool few) {  // past the end of everything it does nothing
#if defined(__GNUC__)
    const uintptr_t from = reinterpret_cast<uintptr_t>(at) + PREFETCH;
    const auto ask = [](uintptr_t line) { __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2); };
    if (few) {
        const uintptr_t first = (from + APART - 1) / APART * APART;
DSPARK_UNROLL(5)
        for (size_t i = 0; i < BYTES; i += APART) ask(first + i);
    } else {
DSPARK_UNROLL(20)
        for (size_t i = 0; i < BYTES; i += 64) ask(from + i);
    }
#endif
}

// What stands before it in the source is read first.
inline void in_order() {
#if defined(__GNUC__)
    __asm__ volatile("" ::: "memory");
#endif
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> allocate(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64 + 64;
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw std::bad_alloc();
    return Buffer<T>(static_cast<T*>(p));
}

template <typename T>
void make_room(Buffer<T>& buffer, size_t& size, size_t wanted) {
    if (wanted <= size) return;
    buffer = allocate<T>(wanted);
    size = wanted;
}

// Memory for weights, many matrices to a piece, in large pages where the system has them: a pass walks through all of
// it, and with pages of 4 KiB every 64th cache line would wait for a page walk. A piece goes with its last matrix.
struct Piece {
    static constexpr size_t PAGE = size_t{1} << 21, SIZE = 16 * PAGE;
    uint8_t* base;
    size_t size, used = 0;

    explicit Piece(size_t bytes) : size((std::max(bytes, SIZE) + PAGE - 1) / PAGE * PAGE) {
        base = static_cast<uint8_t*>(std::aligned_alloc(PAGE, size));
        if (!base) throw std::bad_alloc();
#if defined(__linux__)
        madvise(base, size, MADV_HUGEPAGE);
#endif
    }
    ~Piece() { std::free(base); }
    Piece(const Piece&) = delete;
    Piece& operator=(const Piece&) = delete;
};

struct Weights {
    std::shared_ptr<Piece> piece;
    uint8_t* at = nullptr;

    Weights() = default;
    explicit Weights(size_t bytes) {
        static std::mutex mutex;
        static std::weak_ptr<Piece> latest;
        const std::lock_guard<std::mutex> lock(mutex);
        bytes = (bytes + 63) / 64 * 64;
        piece = latest.lock();
        if (!piece || piece->size - piece->used < bytes) {
            piece = std::make_shared<Piece>(bytes);
            latest = piece;
        }
        at = piece->base + piece->used;
        piece->used += bytes;
        std::memset(at, 0, bytes);
    }
};

// 32 quants of one channel and their scales: d and m, or those of the block and this group's in them.
struct Quants {
    uint8_t q[GROUP];
    uint16_t d, m;
    uint8_t in_block[2];
};

struct Matrix {
    int outputs = 0, inputs = 0;
    Kind kind = FOUR_M;
    Weights data;

    int groups() const { return inputs / GROUP; }
    int tiles() const { return (outputs + LANES - 1) / LANES; }
    size_t tile_bytes() const { return block_bytes(kind) * (groups() / block_groups(kind)); }
    size_t bytes() const { return tile_bytes() * tiles(); }
    const uint8_t* tile(int t) const { return data.at + tile_bytes() * t; }

    Matrix() = default;
    Matrix(int outputs, int inputs, Kind kind) : outputs(outputs), inputs(inputs), kind(kind), data(bytes()) {}

    // A group of a tile's 16 channels.
    void put(int t, int group, const Quants* of) {
        with_kind(kind, [&](auto known) { put_as<known.value>(t, group, of); });
    }

    template <Kind KIND>
    void put_as(int t, int group, const Quants* of) {
        uint8_t* const at = data.at + place_of(t, group);
        std::memset(at, 0, group_bytes_of(KIND));
        for (int lane = 0; lane < LANES; lane++) {
            const uint8_t* const q = of[lane].q;
            uint8_t* const to = at + lane * 4;
            for (int c = 0; c < 8; c++) {
                for (int j = 0; j < 4; j++) {
                    const int x = q[4 * c + j];
                    if constexpr (KIND == EIGHT) {
                        to[64 * c + j] = static_cast<uint8_t>(x);
                        continue;
                    }
                    const int more = bits_of(KIND) - 4, below = x & ((1 << more) - 1);
                    to[64 * (c / 2) + j] = static_cast<uint8_t>(to[64 * (c / 2) + j] | x >> more << (c % 2 * 4));
                    if constexpr (bits_of(KIND) == 5) to[256 + j] = static_cast<uint8_t>(to[256 + j] | below << c);
                    if constexpr (bits_of(KIND) == 6) {
                        uint8_t& two = to[256 + c / 4 * 64 + j];
                        two = static_cast<uint8_t>(two | below << (c % 4 * 2));
                    }
                }
            }
        }
        uint8_t* const scales = at + group_bytes_of(KIND) - scale_bytes(KIND);
        uint16_t* halves = reinterpret_cast<uint16_t*>(scales);
        if constexpr (in_blocks(KIND)) {
            for (int lane = 0; lane < LANES; lane++)
                for (int i : {0, 1}) scales[i * LANES + lane] = of[lane].in_block[i];
            if (group % block_groups(KIND)) return;
            halves = reinterpret_cast<uint16_t*>(at - head_bytes(KIND));
        }
        for (int lane = 0; lane < LANES; lane++) {
            halves[lane] = of[lane].d;
            if constexpr (has_m(KIND)) halves[LANES + lane] = of[lane].m;
        }
    }

    Quants get(int channel, int group) const {
        const uint8_t* const at = data.at + place_of(channel / LANES, group);
        const int lane = channel % LANES;
        Quants out{};
        for (int k = 0; k < GROUP; k++) {
            const int c = k / 4, byte = lane * 4 + k % 4;
            if (kind == EIGHT) {
                out.q[k] = at[c * 64 + byte];
                continue;
            }
            int q = at[c / 2 * 64 + byte] >> (c % 2 * 4) & 15;
            if (bits_of(kind) == 5) q = q << 1 | (at[256 + byte] >> c & 1);
            if (bits_of(kind) == 6) q = q << 2 | (at[256 + c / 4 * 64 + byte] >> (c % 4 * 2) & 3);
            out.q[k] = static_cast<uint8_t>(q);
        }
        const uint8_t* const scales = at + group_bytes_of(kind) - scale_bytes(kind);
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(scales);
        if (in_blocks(kind)) {
            for (int i : {0, 1}) out.in_block[i] = scales[i * LANES + lane];
            halves = reinterpret_cast<const uint16_t*>(data.at + place_of(channel / LANES, group / 8 * 8) - head_bytes(kind));
        }
        out.d = halves[lane];
        if (has_m(kind)) out.m = halves[LANES + lane];
        return out;
    }

    // w[channel][…] in full precision.
    void row(int channel, float* out) const {
        for (int g = 0; g < groups(); g++, out += GROUP) {
            const Quants from = get(channel, g);
            float d[2] = {float_of(from.d), float_of(from.d)}, m = has_m(kind) ? float_of(from.m) : 0.0f;
            if (kind == FOUR_K) d[0] = d[1] = d[0] * from.in_block[0], m *= -static_cast<float>(from.in_block[1]);
            if (kind == SIX_K)
                for (int i : {0, 1}) d[i] *= static_cast<int8_t>(from.in_block[i]);
            for (int k = 0; k < GROUP; k++) {
                const float own = d[k / (GROUP / 2)];
                out[k] = own * static_cast<float>(from.q[k]) + (has_m(kind) ? m : -middle_of(kind) * own);
            }
        }
    }

   private:
    size_t place_of(int t, int group) const {
        const int block = block_groups(kind);
        return tile_bytes() * t + block_bytes(kind) * (group / block) + head_bytes(kind) + group_bytes_of(kind) * (group % block);
    }
};

// Activations: signed bytes and what `Rounded` says of them for each GROUP of a row. ROWS rows lie together, group after group, so that the product reads them front to back too, at offsets known to the compiler.
struct Quantised {
    struct Group {
        alignas(64) int8_t q[ROWS][GROUP];
        Rounded of[ROWS];
    };
    int groups = 0;
    size_t capacity = 0;
    Buffer<Group> data;

    void reserve(int rows, int inputs) {
        groups = inputs / GROUP;
        const size_t wanted = static_cast<size_t>((rows + ROWS - 1) / ROWS) * groups;
        if (wanted <= capacity) return;
        data = allocate<Group>(wanted);
        capacity = wanted;
        std::memset(static_cast<void*>(data.get()), 0, wanted * sizeof(Group));
    }
    const Group* rows_from(int first) const { return data.get() + static_cast<size_t>(first / ROWS) * groups; }

    // 32 floats of row r, group g.
    void put(int r, int g, const float* x) {
        Group& to = data.get()[static_cast<size_t>(r / ROWS) * groups + g];
        const int row = r % ROWS;
        const Floats a = Floats::load(x), b = Floats::load(x + LANES);
        const float most = max_of(max(abs(a), abs(b)));
        const Floats up = Floats::all(127.0f / most);
        const Floats qa = round(a * up), qb = round(b * up);
        const float first = sum_of(qa), second = sum_of(qb);
        if (!(most > 1e-30f) || first + second != first + second) {
            // nothing, too little for a scale to be a number, or not a number at all
            const float none = most <= 1e-30f ? 0.0f : NAN;
            std::memset(to.q[row], 0, GROUP);
            to.of[row] = {none, none, 0, {0, 0}};
            return;
        }
        store_bytes(qa, to.q[row]);
        store_bytes(qb, to.q[row] + LANES);
        const float scale = most / 127.0f;
        const int32_t halves[2] = {-MIDDLE * static_cast<int32_t>(first), -MIDDLE * static_cast<int32_t>(second)};
        to.of[row] = {scale, scale * (first + second), halves[0] + halves[1], {halves[0], halves[1]}};
    }
    // Groups 0…count-1 of x, each to the row and group that where(i) says.
    template <typename Where>
    void put_each(int count, const float* x, Where where) {
        int i = 0;
#if defined(DSPARK_AVX512)
        for (; i + 4 <= count; i += 4) {
            int8_t* q[4];
            Rounded* of[4];
            for (int j = 0; j < 4; j++) {
                const auto [r, g] = where(i + j);
                Group& to = data.get()[static_cast<size_t>(r / ROWS) * groups + g];
                q[j] = to.q[r % ROWS], of[j] = to.of + r % ROWS;
            }
            if (quantise_four(x + i * GROUP, q, of)) continue;
            for (int j = i; j < i + 4; j++) put_one(where(j), x + j * GROUP);
        }
#endif
        for (; i < count; i++) put_one(where(i), x + i * GROUP);
    }
    void put_row(int r, const float* x) {
        put_each(groups, x, [r](int g) { return std::pair(r, g); });
    }

   private:
    void put_one(std::pair<int, int> at, const float* x) { put(at.first, at.second, x); }
};

// What 16 channels' groups of a block have in common.
template <Kind KIND>
struct Head {
    Floats d = Floats::zero(), m = Floats::zero();

    // Where a block begins: reads its head and steps over it.
    void see(const uint8_t*& at, int group) {
        if constexpr (in_blocks(KIND)) {
            if (group % block_groups(KIND)) return;
            const uint16_t* const halves = reinterpret_cast<const uint16_t*>(at);
            d = Floats::load_half(halves) * Floats::all(step_of(KIND));
            if constexpr (has_m(KIND)) m = Floats::zero() - Floats::load_half(halves + LANES);
            at += head_bytes(KIND);
        }
    }
};

// A group's scales of 16 channels: d, of six bits those of both halves, and m where there is one.
template <Kind KIND>
struct Scales {
    static constexpr int PARTS = KIND == SIX_K ? 2 : 1;
    Floats d[PARTS], m;

    Scales(const uint8_t* group, const Head<KIND>& head) {
        const uint8_t* const at = group + group_bytes_of(KIND) - scale_bytes(KIND);
        const uint16_t* const halves = reinterpret_cast<const uint16_t*>(at);
        for (int i = 0; i < PARTS; i++) {
            if constexpr (in_blocks(KIND))
                d[i] = head.d * (has_m(KIND) ? Floats::load_bytes(at) : Floats::load_signed(at + i * LANES));
            else
                d[i] = Floats::load_half(halves) * Floats::all(step_of(KIND));
        }
        if constexpr (KIND == FOUR_K)
            m = head.m * Floats::load_bytes(at + LANES);
        else if constexpr (has_m(KIND))
            m = Floats::load_half(halves + LANES);
    }
    // What a part's dot products begin with: quants around zero are taken from their middle here, which costs nothing.
    static Ints begin(const Rounded& x, int part) {
        if constexpr (has_m(KIND))
            return no_ints();
        else
            return Ints::all((PARTS == 2 ? x.half[part] : x.start) >> (8 - bits_of(KIND) - up_of(KIND)));
    }
    // Those dot products onto the total of one row. Every path does these in this order, so they agree to the bit.
    Floats add(Ints dots, int part, const Rounded& x, Floats total) const {
        total = fma(Floats::from(dots), d[part] * Floats::all(x.scale), total);
        if constexpr (has_m(KIND)) total = fma(m, Floats::all(x.sum), total);
        return total;
    }
};

#if defined(DSPARK_AVX2)
// Chunks first…first+COUNT-1 of a group times R rows, sums of pairs.
template <Kind KIND, int R, int COUNT>
DSPARK_INLINE void dots_of(const uint8_t* at, const int8_t (*q)[GROUP], int first, Ints* dots) {
    constexpr int BELOW = bits_of(KIND) - 4;  // bits under the upper four
    __m256i low[R][2], high[R][2];
    if constexpr (KIND == EIGHT) {
        pair_sums<R, COUNT>([at](int c, int side) { return nibbles(at + 64 * c + 32 * side, 1); }, q, first, high);
        at = anew(at), q = anew(q);
        pair_sums<R, COUNT>([at](int c, int side) { return nibbles(at + 64 * c + 32 * side, 0); }, q, first, low);
    } else {
        pair_sums<R, COUNT>([at](int c, int side) { return nibbles(at + 64 * (c / 2) + 32 * side, c % 2); }, q, first, high);
        if constexpr (BELOW) {
            at = anew(at), q = anew(q);
            pair_sums<R, COUNT>(
                [at](int c, int side) {
                    constexpr int CHUNKS = 8 / BELOW;  // that share a byte
                    return some_bits(at + 256 + c / CHUNKS * 64 + 32 * side, c % CHUNKS * BELOW, (1 << BELOW) - 1);
                },
                q, first, low);
        }
    }
DSPARK_UNROLL(4)
    for (int r = 0; r < R; r++) {
        dots[r] = widened(high[r], 1 << BELOW);
        if constexpr (BELOW) dots[r] = dots[r] + widened(low[r], 1);
    }
}

// One group of a tile times R rows of x from `first` on, onto out[first…]. Of four rows, sums are half of all registers.
template <Kind KIND, int R>
DSPARK_INLINE void add_rows(const uint8_t* at, const Head<KIND>& head, const Quantised::Group& x, int first, Floats* out) {
    constexpr int PARTS = Scales<KIND>::PARTS;
    Ints dots[PARTS][R];
    for (int part = 0; part < PARTS; part++)
        dots_of<KIND, R, 8 / PARTS>(at, x.q + first, part * 8 / PARTS, dots[part]);
    const Scales<KIND> scales(at, head);
DSPARK_UNROLL(4)
    for (int r = 0; r < R; r++)
        for (int part = 0; part < PARTS; part++)
            out[first + r] =
                scales.add(dots[part][r] + Scales<KIND>::begin(x.of[first + r], part), part, x.of[first + r], out[first + r]);
}

// One tile of 16 channels times the first `rows` rows of x: out[r] gets 16 floats.
template <Kind KIND>
DSPARK_APART void tile_product(const uint8_t* at, int groups, const Quantised::Group* x, int rows, Floats* out) {
    constexpr size_t step = group_bytes_of(KIND);
    for (int r = 0; r < rows; r++) out[r] = Floats::zero();
    Head<KIND> head;
    const bool few = fetches_on && rows <= few_rows(KIND);
    for (int g = 0; g < groups; g++, at += step, x++) {
        prefetch<step>(at, few);
        head.see(at, g);
        int r = 0;
        for (; r + 4 <= rows; r += 4) add_rows<KIND, 4>(at, head, *x, r, out);
        switch (rows - r) {
            case 1: add_rows<KIND, 1>(at, head, *x, r, out); break;
            case 2: add_rows<KIND, 2>(at, head, *x, r, out); break;
            case 3: add_rows<KIND, 3>(at, head, *x, r, out); break;
        }
    }
}

// Tile t times rows first…first+rows-1 of x; `first` is a multiple of ROWS, rows at most ROWS.
template <Kind KIND>
inline void tile_rows(const Matrix& w, int t, const Quantised& x, int first, int rows, Floats* out) {
    tile_product<KIND>(w.tile(t), w.groups(), x.rows_from(first), rows, out);
}
#else
// The eight chunks of one group of a tile, a byte a weight, which is at the byte's top.
template <Kind KIND>
inline void unpack(const uint8_t* at, Bytes* chunk) {
    if constexpr (KIND == EIGHT) {
DSPARK_UNROLL(8)
        for (int c = 0; c < 8; c++) chunk[c] = Bytes::load(at + 64 * c);
    } else {
DSPARK_UNROLL(4)
        for (int c = 0; c < 4; c++) {
            const Bytes both = Bytes::load(at + 64 * c);
            chunk[2 * c] = both.low();
            chunk[2 * c + 1] = both.high();
        }
        if constexpr (bits_of(KIND) == 5) {
            const Bytes fifth = Bytes::load(at + 256);
            with_bits<8, 3>(chunk[0], fifth), with_bits<8, 2>(chunk[1], fifth);
            with_bits<8, 1>(chunk[2], fifth), with_bits<8, 0>(chunk[3], fifth);
            with_bits<8, -1>(chunk[4], fifth), with_bits<8, -2>(chunk[5], fifth);
            with_bits<8, -3>(chunk[6], fifth), with_bits<8, -4>(chunk[7], fifth);
        }
        if constexpr (bits_of(KIND) == 6) {
DSPARK_UNROLL(2)
            for (int h = 0; h < 2; h++) {
                const Bytes more = Bytes::load(at + 256 + 64 * h);
                with_bits<12, 2>(chunk[4 * h], more), with_bits<12, 0>(chunk[4 * h + 1], more);
                with_bits<12, -2>(chunk[4 * h + 2], more), with_bits<12, -4>(chunk[4 * h + 3], more);
            }
        }
    }
}

// Rows whose dot products are formed side by side, of M in pieces of one size: each is a chain of eight instructions that
// wait for one another, and a processor that is given one chain after the other does not look far enough ahead.
constexpr int side_by_side(int rows) {
    const int pieces = (rows + CHAINS - 1) / CHAINS;
    return (rows + pieces - 1) / pieces;
}

// One tile of 16 channels times the first M rows of x: out[r] gets 16 floats.
template <Kind KIND, int M>
DSPARK_APART void tile_product(const uint8_t* at, int groups, const Quantised::Group* x, Floats* out) {
    constexpr size_t step = group_bytes_of(KIND);
    constexpr int SOME = side_by_side(M), PARTS = Scales<KIND>::PARTS, CHUNKS = 8 / PARTS;
    Floats total[M];
DSPARK_UNROLL(16)
    for (int r = 0; r < M; r++) total[r] = Floats::zero();
    Head<KIND> head;
    const bool few = M <= few_rows(KIND) && fetches_on;
    for (int g = 0; g < groups; g++, at += step, x++) {
        prefetch<step>(at, few);
        head.see(at, g);
        Bytes chunk[8];
        unpack<KIND>(at, chunk);
        in_order();  // else GCC reads the scales among the first, and eight bits for one row come a tenth slower from memory
        const Scales<KIND> scales(at, head);
DSPARK_UNROLL(16)
        for (int first = 0; first < M; first += SOME) {
            Ints dots[PARTS][SOME];
DSPARK_UNROLL(8)
            for (int c = 0; c < 8; c++)
DSPARK_UNROLL(16)
                for (int i = 0; i < SOME; i++)
                    if (Ints& own = dots[c / CHUNKS][i]; first + i < M)
                        own = dot4(c % CHUNKS ? own : Scales<KIND>::begin(x->of[first + i], c / CHUNKS), chunk[c],
                                   x->q[first + i] + 4 * c);
DSPARK_UNROLL(16)
            for (int i = 0; i < SOME; i++)
                for (int part = 0; part < PARTS; part++)
                    if (const int r = first + i; r < M) total[r] = scales.add(dots[part][i], part, x->of[r], total[r]);
        }
    }
DSPARK_UNROLL(16)
    for (int r = 0; r < M; r++) out[r] = total[r];
}

#if defined(DSPARK_AMX)
// The same by the matrix unit: a group of 16 channels times M rows is one instruction, worth it from a few rows on.
template <Kind KIND, int M>
DSPARK_APART void tile_product_amx(const uint8_t* at, int groups, const Quantised::Group* x, Floats* out) {
    constexpr size_t step = group_bytes_of(KIND);
    constexpr int RING = 8, LOADED = 3, ADDED = 6;  // stages: so many groups apart, that none waits for the one before
    alignas(64) uint8_t weights[RING][8 * 64];
    alignas(64) int32_t dots[RING][M][LANES];
    use_matrix_unit(M);
    Floats total[M];
DSPARK_UNROLL(16)
    for (int r = 0; r < M; r++) total[r] = Floats::zero();
    Head<KIND> heads[RING];
    const uint8_t* places[RING];
    for (int i = 0; i < groups + ADDED; i++) {
        if (i < groups) {
            prefetch<step>(at, false);
            heads[i % RING] = heads[(i + RING - 1) % RING];
            heads[i % RING].see(at, i);
            places[i % RING] = at;
            Bytes chunk[8];
            unpack<KIND>(at, chunk);
DSPARK_UNROLL(8)
            for (int c = 0; c < 8; c++) chunk[c].store(weights[i % RING] + 64 * c);
            at += step;
        }
        const int j = i - LOADED;
        if (j >= 0 && j < groups) {
            if (j % 2)
                matrix_product<0>(weights[j % RING], x[j].q[0], dots[j % RING][0]);
            else
                matrix_product<1>(weights[j % RING], x[j].q[0], dots[j % RING][0]);
        }
        const int k = i - ADDED;
        if (k >= 0) {
            const Scales<KIND> scales(places[k % RING], heads[k % RING]);
DSPARK_UNROLL(16)
            for (int r = 0; r < M; r++)
                total[r] = scales.add(Ints::load(dots[k % RING][r]) + Scales<KIND>::begin(x[k].of[r], 0), 0, x[k].of[r], total[r]);
        }
    }
DSPARK_UNROLL(16)
    for (int r = 0; r < M; r++) out[r] = total[r];
}
#endif

template <Kind KIND, int M>
inline void tile_of(const uint8_t* at, int groups, const Quantised::Group* x, Floats* out) {
#if defined(DSPARK_AMX)
    if constexpr (M >= AMX_ROWS && KIND != SIX_K)  // an instruction sums over the whole group
        return tile_product_amx<KIND, M>(at, groups, x, out);
    else
#endif
        tile_product<KIND, M>(at, groups, x, out);
}

// Tile t times rows first…first+rows-1 of x; `first` is a multiple of ROWS, rows at most ROWS.
template <Kind KIND>
inline void tile_rows(const Matrix& w, int t, const Quantised& x, int first, int rows, Floats* out) {
    switch (rows) {
#define DSPARK_CASE(M) \
    case M: return tile_of<KIND, M>(w.tile(t), w.groups(), x.rows_from(first), out);
        DSPARK_CASE(1) DSPARK_CASE(2) DSPARK_CASE(3) DSPARK_CASE(4) DSPARK_CASE(5) DSPARK_CASE(6) DSPARK_CASE(7)
        DSPARK_CASE(8) DSPARK_CASE(9) DSPARK_CASE(10) DSPARK_CASE(11) DSPARK_CASE(12) DSPARK_CASE(13) DSPARK_CASE(14)
        DSPARK_CASE(15) DSPARK_CASE(16)
#undef DSPARK_CASE
    }
}
#endif

inline void tile_rows(const Matrix& w, int t, const Quantised& x, int first, int rows, Floats* out) {
    with_kind(w.kind, [&](auto kind) { tile_rows<kind.value>(w, t, x, first, rows, out); });
}

// Tile t of the product for rows 0…rows-1, at most ROWS at a time: use(row, 16 floats) for each.
template <typename Use>
inline void product(const Matrix& w, int t, const Quantised& x, int rows, Use use) {
    Floats out[ROWS];
    for (int first = 0; first < rows; first += ROWS) {
        const int some = rows - first < ROWS ? rows - first : ROWS;
        tile_rows(w, t, x, first, some, out);
        for (int r = 0; r < some; r++) use(first + r, out[r]);
    }
}

// The largest score of a row and where it stands, tile after tile: of equal ones the first. Indices are exact as floats
// up to 2^24.
struct Best {
    Floats score = Floats::all(-INFINITY), tile = Floats::zero(), sum = Floats::zero();

    void see(Floats scores, int t) {
        tile = pick(scores, score, Floats::all(static_cast<float>(t)), tile);
        score = max(scores, score);
        sum = sum + scores;  // NaN from the first one on that is, which max and pick pass over
    }
    // The best of all lanes, as a channel, unless `index` with `most` is better. Infinite where a score is no number (or
    // more than 1e33: sums may run over).
    void onto(float& most, int32_t& index) const {
        if (std::isnan(sum_of(sum))) most = INFINITY;
        alignas(64) float scores[LANES], tiles[LANES];
        score.store(scores);
        tile.store(tiles);
        for (int lane = 0; lane < LANES; lane++) {
            const int32_t channel = static_cast<int32_t>(tiles[lane]) * LANES + lane;
            if (scores[lane] > most || (scores[lane] == most && channel < index)) most = scores[lane], index = channel;
        }
    }
};

}  // namespace dspark
