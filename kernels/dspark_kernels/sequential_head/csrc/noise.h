// Philox 4x64-10 as numpy numbers it, and what is made of it; the contract is noise/reference.py.
// Plain C++ as well as CUDA: the host's compiler builds it for the tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DSPARK_ANYWHERE __host__ __device__ __forceinline__
#else
#define DSPARK_ANYWHERE inline
#endif

namespace dspark {

enum Purpose : uint64_t { ROUND = 0, TOKEN = 1, DRAFT = 2 };

DSPARK_ANYWHERE uint64_t high_half(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// Word `index` of the generator keyed (key, tag).
DSPARK_ANYWHERE uint64_t philox_word(uint64_t key, uint64_t tag, uint64_t index) {
    uint64_t c[4] = {index / 4 + 1, 0, 0, 0};
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
        const uint64_t high0 = high_half(0xD2E7470EE14C6C93ull, c[0]), low0 = 0xD2E7470EE14C6C93ull * c[0];
        const uint64_t high1 = high_half(0xCA5A826395121157ull, c[2]), low1 = 0xCA5A826395121157ull * c[2];
        c[0] = high1 ^ c[1] ^ key;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ tag;
        c[3] = low0;
        key += 0x9E3779B97F4A7C15ull;
        tag += 0xBB67AE8584CAA73Bull;
    }
    const uint64_t place = index & 3;  // no indexing at run time: the words stay in registers
    return place < 2 ? (place == 0 ? c[0] : c[1]) : (place == 2 ? c[2] : c[3]);
}

// A uniform in [0, 1) of a stream's position, of 53 bits.
DSPARK_ANYWHERE double uniform(uint64_t key, uint64_t position, Purpose purpose, uint64_t index) {
    return static_cast<double>(philox_word(key, (position << 8) | purpose, index) >> 11) * 0x1p-53;
}

// -log E with E ~ Exp(1): added to a logit it makes the argmax a draw from the softmax.
DSPARK_ANYWHERE float race_noise(uint64_t key, uint64_t position, Purpose purpose, uint64_t index) {
    const float u = fminf(fmaxf(static_cast<float>(uniform(key, position, purpose, index)), 0x1p-54f), 0x1.fffffep-1f);
    return -logf(-log1pf(-u));
}

// A score and its token as one number: the greater score, among equals the lower token. Never 0.
DSPARK_ANYWHERE uint64_t packed(float score, uint32_t token) {
    uint32_t bits;
#ifdef __CUDA_ARCH__
    bits = __float_as_uint(score);
#else
    std::memcpy(&bits, &score, sizeof bits);
#endif
    const uint32_t order = (bits >> 31) ? ~bits : (bits | 0x80000000u);
    return (static_cast<uint64_t>(order) << 32) | (0xFFFFFFFFu - token);
}

DSPARK_ANYWHERE uint32_t packed_token(uint64_t best) { return 0xFFFFFFFFu - static_cast<uint32_t>(best); }

}  // namespace dspark
