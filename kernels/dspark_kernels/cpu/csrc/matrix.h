// Weight matrices as the kernels want them, and their product with quantised activations.
//
// w[n][k] = d·q + m with q unsigned, d and m shared by GROUP inputs of one output channel. Every supported source fits:
// Q4_1 as it is; Q4_0 with m = -8d; Q8_0 with q + 128 and m = -128d.
//
// Layout: tiles of 16 output channels; in a tile, group after group:
//   4 bits: 4 x 64 bytes, chunk c with inputs 8c…8c+3 in low nibbles and 8c+4…8c+7 in high ones   (channel-major fours)
//   8 bits: 8 x 64 bytes, chunk c with inputs 4c…4c+3
//   then 16 half-precision d, 16 half-precision m
// so one product reads memory once, front to back. Source bytes are never kept beside it.
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
constexpr size_t PREFETCH = 16384;  // bytes ahead, into the second level: the processor's own stops at every page

template <size_t BYTES>
inline void prefetch(const uint8_t* at, size_t ahead) {  // past the end of everything it does nothing
#if defined(__GNUC__)
    const uintptr_t from = reinterpret_cast<uintptr_t>(at) + ahead;
DSPARK_UNROLL(20)
    for (size_t i = 0; i < BYTES; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(from + i), 0, 2);
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

struct Matrix {
    int outputs = 0, inputs = 0, bits = 0;
    Weights data;

    int groups() const { return inputs / GROUP; }
    int tiles() const { return (outputs + LANES - 1) / LANES; }
    size_t group_bytes() const { return static_cast<size_t>(bits) * LANES * GROUP / 8 + 4 * LANES; }
    size_t tile_bytes() const { return group_bytes() * groups(); }
    size_t bytes() const { return tile_bytes() * tiles(); }
    const uint8_t* tile(int t) const { return data.at + tile_bytes() * t; }

    Matrix() = default;
    Matrix(int outputs, int inputs, int bits) : outputs(outputs), inputs(inputs), bits(bits), data(bytes()) {}

    // One channel's group: 32 unsigned quants and its half-precision d and m.
    void put(int channel, int group, const uint8_t* q, uint16_t d, uint16_t m) {
        uint8_t* at = data.at + tile_bytes() * (channel / LANES) + group_bytes() * group;
        const int lane = channel % LANES;
        for (int k = 0; k < GROUP; k++) {
            if (bits == 8) {
                at[k / 4 * 64 + lane * 4 + k % 4] = q[k];
            } else {
                uint8_t& pair = at[k / 8 * 64 + lane * 4 + k % 4];
                const int shift = k % 8 / 4 * 4;
                pair = static_cast<uint8_t>((pair & ~(15 << shift)) | q[k] << shift);
            }
        }
        uint16_t* scales = reinterpret_cast<uint16_t*>(at + group_bytes() - 4 * LANES);
        scales[lane] = d;
        scales[LANES + lane] = m;
    }

    // w[channel][…] in full precision.
    void row(int channel, float* out) const {
        const int lane = channel % LANES;
        for (int g = 0; g < groups(); g++) {
            const uint8_t* at = tile(channel / LANES) + group_bytes() * g;
            const uint16_t* scales = reinterpret_cast<const uint16_t*>(at + group_bytes() - 4 * LANES);
            alignas(64) float d[LANES], m[LANES];
            Floats::load_half(scales).store(d);
            Floats::load_half(scales + LANES).store(m);
            for (int k = 0; k < GROUP; k++) {
                const int q = bits == 8 ? at[k / 4 * 64 + lane * 4 + k % 4]
                                        : at[k / 8 * 64 + lane * 4 + k % 4] >> (k % 8 / 4 * 4) & 15;
                out[g * GROUP + k] = d[lane] * static_cast<float>(q) + m[lane];
            }
        }
    }
};

// Activations: signed bytes with a scale for each GROUP of a row, and each group's sum, for the weights' m. ROWS rows lie
// together, group after group, so that the product reads them front to back too, at offsets known to the compiler.
struct Quantised {
    struct Group {
        alignas(64) int8_t q[ROWS][GROUP];
        float scale[ROWS], sum[ROWS];
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
        if (!(most > 1e-30f)) {  // nothing, too little for a scale to be a number, or not a number at all
            std::memset(to.q[row], 0, GROUP);
            to.scale[row] = to.sum[row] = most == most ? 0.0f : most;
            return;
        }
        const Floats up = Floats::all(127.0f / most);
        const Floats qa = round(a * up), qb = round(b * up);
        store_bytes(qa, to.q[row]);
        store_bytes(qb, to.q[row] + LANES);
        to.scale[row] = most / 127.0f;
        to.sum[row] = to.scale[row] * sum_of(qa + qb);
    }
    // Groups 0…count-1 of x, each to the row and group that where(i) says.
    template <typename Where>
    void put_each(int count, const float* x, Where where) {
        int i = 0;
#if defined(DSPARK_AVX512)
        for (; i + 4 <= count; i += 4) {
            int8_t* q[4];
            float *scale[4], *sum[4];
            for (int j = 0; j < 4; j++) {
                const auto [r, g] = where(i + j);
                Group& to = data.get()[static_cast<size_t>(r / ROWS) * groups + g];
                q[j] = to.q[r % ROWS], scale[j] = to.scale + r % ROWS, sum[j] = to.sum + r % ROWS;
            }
            if (quantise_four(x + i * GROUP, q, scale, sum)) continue;
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

// Integer dot products of a group onto the total of one row. Every path does these in this order, so they agree to the bit.
inline Floats add_group(Ints dots, Floats d, Floats m, const Quantised::Group& x, int r, Floats total) {
    total = fma(Floats::from(dots), d * Floats::all(x.scale[r]), total);
    return fma(m, Floats::all(x.sum[r]), total);
}

#if defined(DSPARK_AVX2)
// One group of a tile times R rows of x from `first` on, onto out[first…]. Of four rows, sums are half of all registers.
template <int BITS, int R>
DSPARK_INLINE void add_rows(const uint8_t* at, const Quantised::Group& x, int first, Floats* out) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(at + BITS * LANES * GROUP / 8);
    const int8_t(*q)[GROUP] = x.q + first;
    __m256i low[R][2], high[R][2];
    if constexpr (BITS == 4) {
        pair_sums<R>([at](int c, int side) { return nibbles(at + 64 * (c / 2) + 32 * side, c % 2); }, q, low);
    } else {  // a byte goes as two nibbles
        pair_sums<R>([at](int c, int side) { return nibbles(at + 64 * c + 32 * side, 0); }, q, low);
        at = anew(at), q = anew(q);
        pair_sums<R>([at](int c, int side) { return nibbles(at + 64 * c + 32 * side, 1); }, q, high);
    }
    const Floats d = Floats::load_half(scales), m = Floats::load_half(scales + LANES);
DSPARK_UNROLL(4)
    for (int r = 0; r < R; r++) {
        Ints dots = widened(low[r], 1);
        if constexpr (BITS == 8) dots = dots + widened(high[r], 16);
        out[first + r] = add_group(dots, d, m, x, first + r, out[first + r]);
    }
}

// One tile of 16 channels times the first `rows` rows of x: out[r] gets 16 floats.
template <int BITS>
DSPARK_APART void tile_product(const uint8_t* at, int groups, const Quantised::Group* x, int rows, Floats* out) {
    constexpr size_t step = BITS * LANES * GROUP / 8 + 4 * LANES;
    for (int r = 0; r < rows; r++) out[r] = Floats::zero();
    for (int g = 0; g < groups; g++, at += step, x++) {
        prefetch<step>(at, PREFETCH);
        int r = 0;
        for (; r + 4 <= rows; r += 4) add_rows<BITS, 4>(at, *x, r, out);
        switch (rows - r) {
            case 1: add_rows<BITS, 1>(at, *x, r, out); break;
            case 2: add_rows<BITS, 2>(at, *x, r, out); break;
            case 3: add_rows<BITS, 3>(at, *x, r, out); break;
        }
    }
}

// Tile t times rows first…first+rows-1 of x; `first` is a multiple of ROWS, rows at most ROWS.
template <int BITS>
inline void tile_rows(const Matrix& w, int t, const Quantised& x, int first, int rows, Floats* out) {
    tile_product<BITS>(w.tile(t), w.groups(), x.rows_from(first), rows, out);
}
#else
// The eight chunks of one group of a tile, a byte a weight.
template <int BITS>
inline void unpack(const uint8_t* at, Bytes* chunk) {
    if constexpr (BITS == 8) {
DSPARK_UNROLL(8)
        for (int c = 0; c < 8; c++) chunk[c] = Bytes::load(at + 64 * c);
    } else {
DSPARK_UNROLL(4)
        for (int c = 0; c < 4; c++) {
            const Bytes both = Bytes::load(at + 64 * c);
            chunk[2 * c] = both.low();
            chunk[2 * c + 1] = both.high();
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
template <int BITS, int M>
DSPARK_APART void tile_product(const uint8_t* at, int groups, const Quantised::Group* x, Floats* out) {
    constexpr size_t step = BITS * LANES * GROUP / 8 + 4 * LANES;
    constexpr int SOME = side_by_side(M);
    Floats total[M];
DSPARK_UNROLL(16)
    for (int r = 0; r < M; r++) total[r] = Floats::zero();
    for (int g = 0; g < groups; g++, at += step, x++) {
        prefetch<step>(at, PREFETCH);
        Bytes chunk[8];
        unpack<BITS>(at, chunk);
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(at + step - 4 * LANES);
        const Floats d = Floats::load_half(scales), m = Floats::load_half(scales + LANES);
DSPARK_UNROLL(16)
        for (int first = 0; first < M; first += SOME) {
            Ints dots[SOME];
DSPARK_UNROLL(8)
            for (int c = 0; c < 8; c++)
DSPARK_UNROLL(16)
                for (int i = 0; i < SOME; i++)
                    if (first + i < M) dots[i] = dot4(c ? dots[i] : no_ints(), chunk[c], x->q[first + i] + 4 * c);
DSPARK_UNROLL(16)
            for (int i = 0; i < SOME; i++)
                if (const int r = first + i; r < M) total[r] = add_group(dots[i], d, m, *x, r, total[r]);
        }
    }
DSPARK_UNROLL(16)
    for (int r = 0; r < M; r++) out[r] = total[r];
}

#if defined(DSPARK_AMX)
// The same by the matrix unit: a group of 16 channels times M rows is one instruction, worth it from a few rows on.
template <int BITS, int M>
DSPARK_APART void tile_product_amx(const uint8_t* at, int groups, const Quantised::Group* x, Floats* out) {
    constexpr size_t step = BITS * LANES * GROUP / 8 + 4 * LANES;
    constexpr int RING = 8, LOADED = 3, ADDED = 6;  // stages: so many groups apart, that none waits for the one before
    alignas(64) uint8_t weights[RING][8 * 64];
    alignas(64) int32_t dots[RING][M][LANES];
    use_matrix_unit(M);
    Floats total[M];
DSPARK_UNROLL(16)
    for (int r = 0; r < M; r++) total[r] = Floats::zero();
    for (int i = 0; i < groups + ADDED; i++) {
        if (i < groups) {
            prefetch<step>(at, PREFETCH);
            Bytes chunk[8];
            unpack<BITS>(at, chunk);
DSPARK_UNROLL(8)
            for (int c = 0; c < 8; c++) chunk[c].store(weights[i % RING] + 64 * c);
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
            const uint16_t* scales = reinterpret_cast<const uint16_t*>(at - ADDED * step + step - 4 * LANES);
            const Floats d = Floats::load_half(scales), m = Floats::load_half(scales + LANES);
DSPARK_UNROLL(16)
            for (int r = 0; r < M; r++)
                total[r] = add_group(Ints{_mm512_load_si512(dots[k % RING][r])}, d, m, x[k], r, total[r]);
        }
        at += step;
    }
DSPARK_UNROLL(16)
    for (int r = 0; r < M; r++) out[r] = total[r];
}
#endif

template <int BITS, int M>
inline void tile_of(const uint8_t* at, int groups, const Quantised::Group* x, Floats* out) {
#if defined(DSPARK_AMX)
    if constexpr (M >= AMX_ROWS) return tile_product_amx<BITS, M>(at, groups, x, out);
#endif
    tile_product<BITS, M>(at, groups, x, out);
}

// Tile t times rows first…first+rows-1 of x; `first` is a multiple of ROWS, rows at most ROWS.
template <int BITS>
inline void tile_rows(const Matrix& w, int t, const Quantised& x, int first, int rows, Floats* out) {
    switch (rows) {
#define DSPARK_CASE(M) \
    case M: return tile_of<BITS, M>(w.tile(t), w.groups(), x.rows_from(first), out);
        DSPARK_CASE(1) DSPARK_CASE(2) DSPARK_CASE(3) DSPARK_CASE(4) DSPARK_CASE(5) DSPARK_CASE(6) DSPARK_CASE(7)
        DSPARK_CASE(8) DSPARK_CASE(9) DSPARK_CASE(10) DSPARK_CASE(11) DSPARK_CASE(12) DSPARK_CASE(13) DSPARK_CASE(14)
        DSPARK_CASE(15) DSPARK_CASE(16)
#undef DSPARK_CASE
    }
}
#endif

// Tile t of the product for rows 0…rows-1, at most ROWS at a time: use(row, 16 floats) for each.
template <typename Use>
inline void product(const Matrix& w, int t, const Quantised& x, int rows, Use use) {
    Floats out[ROWS];
    for (int first = 0; first < rows; first += ROWS) {
        const int some = rows - first < ROWS ? rows - first : ROWS;
        if (w.bits == 4)
            tile_rows<4>(w, t, x, first, some, out);
        else
            tile_rows<8>(w, t, x, first, some, out);
        for (int r = 0; r < some; r++) use(first + r, out[r]);
    }
}

// The largest score of a row and where it stands, tile after tile: of equal ones the first. Indices are exact as floats
// up to 2^24.
struct Best {
    Floats score = Floats::all(-INFINITY), tile = Floats::zero();

    void see(Floats scores, int t) {
        tile = pick(scores, score, Floats::all(static_cast<float>(t)), tile);
        score = max(scores, score);
    }
    // The best of all lanes, as a channel, unless `index` with `most` is better.
    void onto(float& most, int32_t& index) const {
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
