// What the machine can do at most, by the same threads and instructions as the kernels: what benches compare with.
#pragma once

#include <chrono>

#include "matrix.h"
#include "pool.h"

namespace dspark {

inline double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Bytes a second of reading `data` front to back, every thread its share.
inline double read_rate(Pool& pool, const float* data, size_t count) {
    std::vector<float> sums(static_cast<size_t>(pool.size()) * LANES);
    const double begun = seconds();
    Job job;
    job.step(pool.size(), 1, [&](int, int part, int last) {
        for (; part < last; part++) {
            const size_t step = 8 * LANES, blocks = count / step;
            const size_t begin = blocks * part / pool.size(), end = blocks * (part + 1) / pool.size();
            Floats sum[8];
            for (auto& s : sum) s = Floats::zero();
            for (size_t b = begin; b < end; b++)
                for (int i = 0; i < 8; i++) sum[i] = sum[i] + Floats::load(data + b * step + i * LANES);
            for (int i = 1; i < 8; i++) sum[0] = sum[0] + sum[i];
            sums[static_cast<size_t>(part) * LANES] = sum_of(sum[0]);
        }
    });
    pool.run(job);
    volatile float kept = sums[0];
    (void)kept;
    return static_cast<double>(count) * sizeof(float) / (seconds() - begun);
}

// Multiply-adds a second of the integer dot product, weights of four bits, with weights in registers. AVX-512: activations
// too. AVX2: they come from the first-level cache, and it is the sums of `add_rows`, with nothing to unpack.
inline double multiply_rate(Pool& pool, int rounds) {
    std::vector<float> sums(static_cast<size_t>(pool.size()) * LANES);
    alignas(64) uint8_t weights[64];
    for (int i = 0; i < 64; i++) weights[i] = static_cast<uint8_t>((7 * i + i / 32) % 16);
    double multiplied = 0;
    const double begun = seconds();
    Job job;
    job.step(pool.size(), 1, [&](int, int part, int last) {
        for (; part < last; part++) {
#if defined(DSPARK_AVX2)
            alignas(32) int8_t x[ROWS][GROUP];
            for (int r = 0; r < ROWS; r++)
                for (int k = 0; k < GROUP; k++) x[r][k] = static_cast<int8_t>(r * GROUP + k + part);
            __m256i w[2];  // of two values, or both halves would be one
            for (int side = 0; side < 2; side++) {
                w[side] = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + 32 * side));
                settled(w[side]);
            }
            Ints all = {_mm256_setzero_si256(), _mm256_setzero_si256()};
            for (int r = 0; r < rounds; r++) {
                __m256i pairs[4][2];
                pair_sums<4, 8>([&w](int, int side) { return w[side]; }, x + 4 * r % ROWS, 0, pairs);
                for (const auto& row : pairs) all = all + Ints{row[0], row[1]};
            }
            const Floats total = Floats::from(all);
            if (part == 0) multiplied = 4.0 * LANES * GROUP * rounds * pool.size();
#else
            const Bytes w = Bytes::load(weights);
            const int8_t x[4] = {1, -2, 3, static_cast<int8_t>(part)};
            Ints sum[12];
            for (auto& s : sum) s = no_ints();
            for (int r = 0; r < rounds; r++)
                for (int i = 0; i < 12; i++) sum[i] = dot4(sum[i], w, x);
            Floats total = Floats::zero();
            for (int i = 0; i < 12; i++) total = total + Floats::from(sum[i]);
            if (part == 0) multiplied = 12.0 * 64 * rounds * pool.size();
#endif
            sums[static_cast<size_t>(part) * LANES] = sum_of(total);
        }
    });
    pool.run(job);
    volatile float kept = sums[0];
    (void)kept;
    return multiplied / (seconds() - begun);
}

}  // namespace dspark
