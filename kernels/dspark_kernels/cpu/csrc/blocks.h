// GGUF's blocks (format facts: ggml's block_q4_0 … block_q6_K) as groups of 32 weights d·q + m with q unsigned. Of Q4_K and
// Q6_K d and m are the block's, and the group's own in them are bytes: see matrix.h.
#pragma once

#include "simd.h"

namespace dspark {

enum Source { F32 = 0, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

struct Layout {
    int groups, bytes;  // of a block
};
inline Layout layout_of(int type) {
    switch (type) {
        case Q4_0: return {1, 18};
        case Q4_1: return {1, 20};
        case Q5_0: return {1, 22};
        case Q5_1: return {1, 24};
        case Q8_0: return {1, 34};
        case Q4_K: return {8, 144};
        case Q5_K: return {8, 176};
        case Q6_K: return {8, 210};
        default: return {1, GROUP * static_cast<int>(sizeof(float))};
    }
}

struct Group {
    bool exact = true;  // quants; else 32 floats
    uint8_t q[GROUP];
    float d = 0.0f, m = 0.0f;
    uint8_t in_block[2] = {};
    float x[GROUP];
};

inline float half_at(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    return float_of(half);
}

// The 6-bit scale and minimum of one of the eight groups of a K block, packed into 12 bytes.
inline void k_scales(const uint8_t* s, int i, int* scale, int* least) {
    if (i < 4) {
        *scale = s[i] & 63;
        *least = s[i + 4] & 63;
    } else {
        *scale = (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
        *least = (s[i + 4] >> 4) | (s[i] >> 6) << 4;
    }
}

// use(i, group) for each group of one block.
template <typename Use>
void read_block(const uint8_t* block, int type, Use use) {
    Group g;
    switch (type) {
        case Q8_0:
            g.d = half_at(block);
            g.m = -128.0f * g.d;
            for (int k = 0; k < GROUP; k++) g.q[k] = static_cast<uint8_t>(block[2 + k] ^ 0x80);  // signed + 128
            return use(0, g);
        case Q4_0:
        case Q4_1:
        case Q5_0:
        case Q5_1: {
            const bool five = type == Q5_0 || type == Q5_1, with_least = type == Q4_1 || type == Q5_1;
            g.d = half_at(block);
            g.m = with_least ? half_at(block + 2) : (five ? -16.0f : -8.0f) * g.d;
            const uint8_t* at = block + (with_least ? 4 : 2);
            uint32_t fifth = 0;
            if (five) {
                std::memcpy(&fifth, at, 4);
                at += 4;
            }
            for (int k = 0; k < GROUP / 2; k++) {
                g.q[k] = static_cast<uint8_t>((at[k] & 15) | (fifth >> k & 1) << 4);
                g.q[k + GROUP / 2] = static_cast<uint8_t>(at[k] >> 4 | (fifth >> (k + GROUP / 2) & 1) << 4);
            }
            return use(0, g);
        }
        case Q4_K:
        case Q5_K: {
            const float d = half_at(block), least = half_at(block + 2);
            const uint8_t *scales = block + 4, *fifth = block + 16, *q = block + (type == Q5_K ? 48 : 16);
            for (int i = 0; i < 8; i++) {
                int scale, minimum;
                k_scales(scales, i, &scale, &minimum);
                if (type == Q4_K) {
                    g.d = d, g.m = least;
                    g.in_block[0] = static_cast<uint8_t>(scale), g.in_block[1] = static_cast<uint8_t>(minimum);
                } else {
                    g.d = d * static_cast<float>(scale), g.m = -least * static_cast<float>(minimum);
                }
                for (int k = 0; k < GROUP; k++) {
                    g.q[k] = static_cast<uint8_t>(q[i / 2 * GROUP + k] >> (i % 2 * 4) & 15);
                    if (type == Q5_K) g.q[k] = static_cast<uint8_t>(g.q[k] | (fifth[k] >> i & 1) << 4);
                }
                use(i, g);
            }
            return;
        }
        case Q6_K: {  // 16 weights to a scale
            g.d = half_at(block + 208);
            for (int i = 0; i < 8; i++) {
                const uint8_t *low = block + i / 4 * 64 + i % 2 * GROUP, *high = block + 128 + i / 4 * GROUP;
                for (int k = 0; k < GROUP; k++)
                    g.q[k] = static_cast<uint8_t>((low[k] >> (i % 4 / 2 * 4) & 15) | (high[k] >> (i % 4 * 2) & 3) << 4);
                std::memcpy(g.in_block, block + 192 + 2 * i, 2);
                use(i, g);
            }
            return;
        }
        default:
            g.exact = false;
            std::memcpy(g.x, block, sizeof(g.x));
            return use(0, g);
    }
}

}  // namespace dspark
