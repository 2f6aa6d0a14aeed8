// The race of coupled verification. Every output position has an exponential E for every token, by counter
// (noise/reference.py); its token is the one with the least E/weight, the lower one of equals, which makes it a draw by the
// weights. What cannot win is passed over, and that only: E is at least its uniform u, and no u is below 2^-54.
#pragma once

#include <cmath>

#include "sampling.h"

namespace dspark {

// Of which position and token, as Python hands it over; position below 0: tokens are drawn by uniforms.
struct Noise {
    uint64_t seed;
    int64_t position;
};

class Philox {  // 4x64-10, keyed by a seed and an output position; word i of its stream is token i's
   public:
    explicit Philox(const Noise& of) {
        uint64_t seed = of.seed, tag = static_cast<uint64_t>(of.position) << 8 | TOKEN;
        for (int i = 0; i < ROUNDS; i++, seed += 0x9E3779B97F4A7C15u, tag += 0xBB67AE8584CAA73Bu) keys_[i] = seed, tags_[i] = tag;
    }

    // The words of four tokens, from 4·block on.
    void words(uint64_t block, uint64_t* out) const {
        uint64_t c[4] = {block + 1, 0, 0, 0};
DSPARK_UNROLL(10)
        for (int i = 0; i < ROUNDS; i++) {
            const auto a = static_cast<Wide>(M0) * c[0], b = static_cast<Wide>(M1) * c[2];
            c[0] = static_cast<uint64_t>(b >> 64) ^ c[1] ^ keys_[i], c[1] = static_cast<uint64_t>(b);
            c[2] = static_cast<uint64_t>(a >> 64) ^ c[3] ^ tags_[i], c[3] = static_cast<uint64_t>(a);
        }
        std::memcpy(out, c, sizeof(c));
    }

#if defined(DSPARK_AVX512)
    // Whether u ≤ weight·limit for one of 64 tokens from `first` on, by u's leading 24 bits: at times where it is not so.
    // AVX2 has no products of 64 bits; made of smaller ones they are no quicker than one after the other.
    bool may_win(int first, const Floats* weights, float limit) const {
        const __m512i next = _mm512_setr_epi64(1, 2, 3, 4, 5, 6, 7, 8);
        __m512i c[2][4];  // two at once: each waits for itself
        for (int j : {0, 1}) {
            c[j][0] = _mm512_add_epi64(next, _mm512_set1_epi64(first / 4 + 8 * j));
            c[j][1] = c[j][2] = c[j][3] = _mm512_setzero_si512();
        }
DSPARK_UNROLL(10)
        for (int i = 0; i < ROUNDS; i++) {
            const __m512i key = _mm512_set1_epi64(static_cast<int64_t>(keys_[i]));
            const __m512i tag = _mm512_set1_epi64(static_cast<int64_t>(tags_[i]));
DSPARK_UNROLL(2)
            for (int j = 0; j < 2; j++) {
                const __m512i a = c[j][0], b = c[j][2];
                c[j][0] = _mm512_ternarylogic_epi64(high_half<M1>(b), c[j][1], key, 0x96);
                c[j][1] = _mm512_mullo_epi64(b, _mm512_set1_epi64(static_cast<int64_t>(M1)));
                c[j][2] = _mm512_ternarylogic_epi64(high_half<M0>(a), c[j][3], tag, 0x96);
                c[j][3] = _mm512_mullo_epi64(a, _mm512_set1_epi64(static_cast<int64_t>(M0)));
            }
        }
        const Floats by = Floats::all(limit * 0x1p24f);
        const __m512i order = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
        const auto leading = [](__m512i two, __m512i more) {
            const __m256 low = _mm512_cvtepi64_ps(_mm512_srli_epi64(two, 40));
            return _mm512_insertf32x8(_mm512_castps256_ps512(low), _mm512_cvtepi64_ps(_mm512_srli_epi64(more, 40)), 1);
        };
        Floats most = Floats::all(-INFINITY);
        for (int j : {0, 1}) {
            const __m512 a = leading(c[j][0], c[j][1]), b = leading(c[j][2], c[j][3]);
            const Floats u{_mm512_permutex2var_ps(a, order, b)};
            const Floats more{_mm512_permutex2var_ps(a, _mm512_add_epi32(order, _mm512_set1_epi32(4)), b)};
            most = max(most, max(weights[2 * j] * by - u, weights[2 * j + 1] * by - more));
        }
        return max_of(most) >= 0.0f;
    }
#endif

   private:
    using Wide = unsigned __int128;
    static constexpr int ROUNDS = 10;
    static constexpr uint64_t TOKEN = 1;  // what the noise is for
    static constexpr uint64_t M0 = 0xD2E7470EE14C6C93u, M1 = 0xCA5A826395121157u;
    uint64_t keys_[ROUNDS], tags_[ROUNDS];

#if defined(DSPARK_AVX512)
    template <uint64_t M>
    static __m512i high_half(__m512i x) {
        const __m512i low = _mm512_set1_epi64(M & 0xffffffff), high = _mm512_set1_epi64(M >> 32);
        const __m512i up = _mm512_srli_epi64(x, 32);
        const __m512i one = _mm512_add_epi64(_mm512_mul_epu32(up, low), _mm512_srli_epi64(_mm512_mul_epu32(x, low), 32));
        const __m512i other = _mm512_add_epi64(_mm512_mul_epu32(x, high), _mm512_and_si512(one, _mm512_set1_epi64(0xffffffff)));
        const __m512i carried = _mm512_add_epi64(_mm512_srli_epi64(one, 32), _mm512_srli_epi64(other, 32));
        return _mm512_add_epi64(_mm512_mul_epu32(up, high), carried);
    }
#endif
};

// Who is ahead. The greatest of all weights is 1 and no E is as much as 37, so what is behind that never wins.
struct Leader {
    double ratio = 37.0;
    int32_t index = -1;

    void see(double theirs, int32_t at) {
        if (theirs < ratio || (theirs == ratio && at < index)) ratio = theirs, index = at;
    }
};

// The race among weights first…last-1 of a row, `first` a multiple of 16; token i's noise is ids[i]'s (null: i's). Whoever
// races the rest of the row sees who won (Leader::see), however it is shared out.
inline Leader race(const float* weights, int first, int last, const int32_t* ids, const Noise& noise) {
    constexpr int WIDE = 4;
    const Philox philox(noise);
    Leader best;
    uint64_t words[4];
    int64_t have = -1;
    for (int i = first; i < last; i += WIDE * LANES) {
        Floats own[WIDE];
        for (int k = 0; k < WIDE; k++)
            own[k] = i + k * LANES < last ? load_some(weights + i + k * LANES, last - i - k * LANES) : Floats::zero();
        const float most = max_of(max(max(own[0], own[1]), max(own[2], own[3])));
        const float limit = static_cast<float>(best.ratio) * (1.0f + 0x1p-20f);  // beyond all that rounding takes
        if (!(most > 0.0f) || most * limit < 0x1p-54f) continue;
#if defined(DSPARK_AVX512)
        if (!ids && !philox.may_win(i, own, limit)) continue;
#endif
        for (int at = i; at < std::min(i + WIDE * LANES, last); at++) {
            if (!(weights[at] > 0.0f)) continue;
            const int32_t token = ids ? ids[at] : at;
            if (token / 4 != have) philox.words(have = token / 4, words);
            const double u = std::max(static_cast<double>(words[token % 4] >> 11) * 0x1p-53, 0x1p-54);
            if (u <= weights[at] * static_cast<double>(limit)) best.see(-std::log1p(-u) / weights[at], at);
        }
    }
    return best;
}

}  // namespace dspark
