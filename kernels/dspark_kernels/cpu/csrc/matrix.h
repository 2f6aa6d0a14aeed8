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
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

namespace dspark {

constexpr int ROWS = 16;  // activations that one reading of the weights serves

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

// Activations: signed bytes with a scale for each GROUP of a row, and each group's sum, for the weights' m.
struct Quantised {
    int inputs = 0, capacity = 0;
    Buffer<int8_t> q;
    Buffer<float> scale, sum;

    void reserve(int rows, int width) {
        inputs = width;
        if (rows * width <= capacity) return;
        capacity = rows * width;
        q = allocate<int8_t>(capacity);
        scale = allocate<float>(capacity / GROUP);
        sum = allocate<float>(capacity / GROUP);
    }
    const int8_t* row(int r) const { return q.get() + static_cast<size_t>(r) * inputs; }

    // 32 floats of row r, group g.
    void put(int r, int g, const float* x) {
        const Floats a = Floats::load(x), b = Floats::load(x + LANES);
        const float most = max_of(max(abs(a), abs(b)));
        const size_t at = static_cast<size_t>(r) * (inputs / GROUP) + g;
        int8_t* to = q.get() + static_cast<size_t>(r) * inputs + g * GROUP;
        if (!(most > 1e-30f)) {  // nothing, too little for a scale to be a number, or not a number at all
            std::memset(to, 0, GROUP);
            scale[at] = sum[at] = most == most ? 0.0f : most;
            return;
        }
        const Floats up = Floats::all(127.0f / most);
        const Floats qa = round(a * up), qb = round(b * up);
        store_bytes(qa, to);
        store_bytes(qb, to + LANES);
        scale[at] = most / 127.0f;
        sum[at] = scale[at] * sum_of(qa + qb);
    }
    void put_row(int r, const float* x) {
        for (int g = 0; g < inputs / GROUP; g++) put(r, g, x + g * GROUP);
    }
};

// One tile of 16 channels times M rows from `first` on: out[r] gets 16 floats for row first + r.
template <int BITS, int M>
inline void tile_product(const Matrix& w, int t, const Quantised& x, int first, Floats* out) {
    const int groups = w.groups();
    const size_t step = w.group_bytes();
    const uint8_t* at = w.tile(t);
    const int8_t* q[M];
    const float *scale[M], *sum[M];
    Floats total[M];
    for (int r = 0; r < M; r++) {
        q[r] = x.row(first + r);
        scale[r] = x.scale.get() + static_cast<size_t>(first + r) * groups;
        sum[r] = x.sum.get() + static_cast<size_t>(first + r) * groups;
        total[r] = Floats::zero();
    }
    for (int g = 0; g < groups; g++, at += step) {
        Bytes chunk[8];
        if constexpr (BITS == 8) {
            for (int c = 0; c < 8; c++) chunk[c] = Bytes::load(at + 64 * c);
        } else {
            for (int c = 0; c < 4; c++) {
                const Bytes both = Bytes::load(at + 64 * c);
                chunk[2 * c] = both.low();
                chunk[2 * c + 1] = both.high();
            }
        }
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(at + step - 4 * LANES);
        const Floats d = Floats::load_half(scales), m = Floats::load_half(scales + LANES);
        for (int r = 0; r < M; r++) {
            Ints dot = no_ints();
            for (int c = 0; c < 8; c++) dot = dot4<BITS>(dot, chunk[c], q[r] + g * GROUP + 4 * c);
            total[r] = fma(Floats::from(dot), d * Floats::all(scale[r][g]), total[r]);
            total[r] = fma(m, Floats::all(sum[r][g]), total[r]);
        }
    }
    for (int r = 0; r < M; r++) out[r] = total[r];
}

template <int BITS>
inline void tile_rows(const Matrix& w, int t, const Quantised& x, int first, int rows, Floats* out) {
    switch (rows) {
#define DSPARK_CASE(M) \
    case M: return tile_product<BITS, M>(w, t, x, first, out);
        DSPARK_CASE(1) DSPARK_CASE(2) DSPARK_CASE(3) DSPARK_CASE(4) DSPARK_CASE(5) DSPARK_CASE(6) DSPARK_CASE(7)
        DSPARK_CASE(8) DSPARK_CASE(9) DSPARK_CASE(10) DSPARK_CASE(11) DSPARK_CASE(12) DSPARK_CASE(13) DSPARK_CASE(14)
        DSPARK_CASE(15)
#undef DSPARK_CASE
        default: return tile_product<BITS, ROWS>(w, t, x, first, out);
    }
}

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

}  // namespace dspark
