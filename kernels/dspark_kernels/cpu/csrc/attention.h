// Attention over what each row of a ragged batch sees, and the keys and values it reads.
//
// Symbols: D head size, Hq query heads, Hk key heads, G = Hq / Hk query heads to a key head.
//
// Two forms. With a matrix unit that multiplies bfloat16: up to 16 queries at once, those of the query heads that share a
// key head and of neighbouring rows of one stream. Without: a row and key head at a time in half precision. Either way
// scores are written out whole before the softmax, sums go over slots in order, and a row's result does not depend on
// which rows it is computed with.
#pragma once

#include <algorithm>

#include "matrix.h"

namespace dspark {

struct Shape {
    int hidden, heads, kv_heads, head_size, inner, positions;
    float eps, score_scale;  // the latter: of query · key
    int qkv() const { return (heads + 2 * kv_heads) * head_size; }
    int group() const { return heads / kv_heads; }
};

// Keys and values of all token slots, two bytes each, head by head, so that what attention reads for one head lies in one
// piece. Keys in tiles of 16 slots with the slot as the innermost index, so that 16 scores are 16 lanes: [Hk][tiles][D][16];
// values slot by slot: [Hk][slots][D]. For the matrix unit pairs of what is summed over lie together: [Hk][tiles][D/2][16][2]
// and [Hk][slots/2][D][2].
//
// A store with a ring keeps a stream's latest positions only: position i lies at its first slot + i mod ring.
struct Cache {  // of one layer
    uint16_t *keys, *values;
    int64_t slots;  // a multiple of 16
    int ring;       // a multiple of RING_GRAIN, or 0

    // use(p, until, slot) for positions first…last-1 in pieces that lie together, each from `slot` on.
    template <typename Use>
    void pieces(int64_t base, int first, int last, Use use) const {
        if (!ring) return use(first, last, base + first);
        for (int p = first, until; p < last; p = until) {
            until = std::min(last, (p / ring + 1) * ring);
            use(p, until, base + p % ring);
        }
    }
    uint16_t* keys_from(const Shape& s, int head, int64_t slot) const {  // the tile of `slot`
        return keys + (slots / LANES * head + slot / LANES) * s.head_size * LANES;
    }
};

constexpr int RING_GRAIN = 64;  // what the attention of any instruction set takes in one piece

struct Store {
    uint16_t *keys, *values;
    int64_t slots;
    int ring;
    Cache layer(int i, const Shape& s) const {
        const int64_t size = slots * s.kv_heads * s.head_size;
        return {keys + i * size, values + i * size, slots, ring};
    }
};

// One pass. Row r stands at position[r], its keys and values go to slot[r], and it sees positions from[r] (null: 0) to
// visible[r]-1 of its stream, itself among them, which begins at first_slot[r], a multiple of 16.
struct Pass {
    int rows;
    const int32_t *position, *slot, *first_slot, *visible, *from;

    // The first position that row r sees in a layer with that window (0: none).
    int begin(int r, int window) const {
        return std::max(from ? from[r] : 0, window ? visible[r] - window : 0);
    }
};

#if defined(DSPARK_AMX)

inline void write_key(const Shape& s, const Cache& cache, int head, int64_t slot, const float* x) {
    uint16_t* to = cache.keys_from(s, head, slot) + slot % LANES * 2;
    alignas(64) uint32_t pairs[LANES];
    for (int d = 0; d < s.head_size; d += 2 * LANES, to += 2 * LANES * LANES) {
        store_bfloat(Floats::load(x + d), Floats::load(x + d + LANES), pairs);
        for (int i = 0; i < LANES; i++) std::memcpy(to + i * 2 * LANES, pairs + i, 4);
    }
}

inline void write_value(const Shape& s, const Cache& cache, int head, int64_t slot, const float* x) {
    uint16_t* to = cache.values + (cache.slots * head + slot / 2 * 2) * s.head_size;
    for (int d = 0; d < s.head_size; d += LANES) store_bfloat_every_second(Floats::load(x + d), to + 2 * d, slot % 2);
}

class Attention {  // of one thread
   public:
    static int rows_at_once(const Shape& s) { return std::max(1, QUERIES / s.group()); }

    void reserve(const Shape& s, int longest) {
        stride_ = (longest + BLOCK - 1) / BLOCK * BLOCK + LANES;  // no power of two: rows would share lines of the cache
        const size_t wanted = static_cast<size_t>(QUERIES) * stride_;
        make_room(scores_, size_, wanted);
        if (s.head_size <= head_size_) return;
        queries_ = allocate<uint16_t>(static_cast<size_t>(QUERIES) * s.head_size);
        tail_ = allocate<uint16_t>(static_cast<size_t>(BLOCK) * s.head_size);
        sums_ = allocate<float>(static_cast<size_t>(QUERIES) * s.head_size);
        head_size_ = s.head_size;
    }

    // Rows first…first+rows-1, all of one stream, and the queries of one key head: quantised, into `out`.
    void run(const Shape& s, const Cache& cache, const Pass& pass, int window, int first, int rows, int head,
             const float* qkv, Quantised& out) {
        const int group = s.group();
        for (int g = 0; g < group; g += QUERIES)
            run_queries(s, cache, pass, window, first, rows, head, head * group + g, std::min(QUERIES, group - g), qkv, out);
    }

   private:
    static constexpr int QUERIES = 16;  // rows of a tile
    static constexpr int BLOCK = 32;    // slots that one instruction sums over

    Buffer<float> scores_, sums_;
    Buffer<uint16_t> queries_, tail_;
    size_t size_ = 0;
    int stride_ = 0, head_size_ = 0;

    void run_queries(const Shape& s, const Cache& cache, const Pass& pass, int window, int first, int rows, int head,
                     int first_query, int heads, const float* qkv, Quantised& out) {
        const int size = s.head_size, count = rows * heads;
        const int64_t base = pass.first_slot[first];
        int longest = 0, first_seen = pass.begin(first, window);
        for (int r = first; r < first + rows; r++) first_seen = std::min(first_seen, pass.begin(r, window));
        const int begin = first_seen / BLOCK * BLOCK;  // what is before a row's own beginning weighs nothing
        for (int i = 0; i < count; i++) {
            const float* q = qkv + static_cast<size_t>(first + i / heads) * s.qkv() + (first_query + i % heads) * size;
            for (int d = 0; d < size; d += 2 * LANES)
                store_bfloat(Floats::load(q + d), Floats::load(q + d + LANES), queries_.get() + i * size + d);
            longest = std::max(longest, pass.visible[first + i / heads]);
        }
        use_matrix_unit_for_attention(count);
        score(s, cache, head, base, begin, longest);
        Floats share_of[QUERIES];
        for (int i = 0; i < count; i++) {
            const int r = first + i / heads;
            share_of[i] = weigh(scores_.get() + static_cast<size_t>(i) * stride_, pass.begin(r, window) - begin,
                                pass.visible[r] - begin, longest - begin, s.score_scale);
        }
        sum_values(s, cache, head, base, begin, first_seen, longest);
        if (rows > 1 && !all_finite(sums_.get(), static_cast<size_t>(count) * size)) {
            // what a row does not see counts nothing, but nothing times no number is no number: each for itself
            for (int r = first; r < first + rows; r++)
                run_queries(s, cache, pass, window, r, 1, head, first_query, heads, qkv, out);
            return;
        }
        for (int i = 0; i < count; i++)
            for (float* at = sums_.get() + i * size; at < sums_.get() + (i + 1) * size; at += LANES)
                (Floats::load(at) * share_of[i]).store(at);
        const int groups = size / GROUP;  // of a head
        out.put_each(count * groups, sums_.get(), [&](int k) {
            const int i = k / groups;
            return std::pair(first + i / heads, (first_query + i % heads) * groups + k % groups);
        });
    }

    static bool all_finite(const float* x, size_t count) {
        Floats nothing = Floats::zero();  // 0 · x is 0 where x is a number
        for (size_t i = 0; i < count; i += LANES) nothing = fma(Floats::load(x + i), Floats::zero(), nothing);
        return sum_of(nothing) == 0.0f;
    }

    // scores [queries][stride] of positions begin…longest-1, whole tiles of 16: query · key.
    void score(const Shape& s, const Cache& cache, int head, int64_t base, int begin, int longest) const {
        const int size = s.head_size;
        const size_t tile = static_cast<size_t>(size) * LANES;
        cache.pieces(base, begin, longest, [&](int p, int until, int64_t slot) {
            const uint16_t* keys = cache.keys_from(s, head, slot);
            for (; p < until; p += 4 * LANES, keys += 4 * tile) {
                const int tiles = std::min(4, (until - p + LANES - 1) / LANES);
                clear_tiles();
                for (int d = 0; d < size; d += BLOCK)
                    multiply_tiles(queries_.get() + d, size * 2, keys + d * LANES, tile, 64, tiles);
                store_tiles(scores_.get() + (p - begin), LANES, stride_ * 4, tiles);
            }
        });
    }

    // One query's scores become weights, exp(score - greatest), in bfloat16 where they stand; those of positions that it does
    // not see, before `from` and from `seen` to the end of the block, are nothing. What to divide by, as its inverse.
    static Floats weigh(float* scores, int from, int seen, int longest, float scale) {
        const int ahead = (from + BLOCK - 1) / BLOCK * BLOCK, whole = std::max(ahead, seen / BLOCK * BLOCK);
        Floats most[2] = {Floats::all(-INFINITY), Floats::all(-INFINITY)}, total[2] = {Floats::zero(), Floats::zero()};
        const auto look = [&](int p, int last) {
            for (; p < last; p += LANES)
                most[0] = max(most[0], Floats::load(scores + p).keep(seen - p, -INFINITY).drop(from - p, -INFINITY));
        };
        look(from / LANES * LANES, std::min(ahead, seen));
        for (int p = ahead; p + BLOCK <= whole; p += BLOCK) {
            most[0] = max(most[0], Floats::load(scores + p));
            most[1] = max(most[1], Floats::load(scores + p + LANES));
        }
        look(whole, seen);
        const Floats top = Floats::all(max_of(max(most[0], most[1]))), by = Floats::all(scale * 1.44269504f);
        uint16_t* weights = reinterpret_cast<uint16_t*>(scores);  // behind what is read: two bytes a slot instead of four
        const auto weigh_block = [&](int p, int before, int left) {
            Floats part[2];
            for (int i : {0, 1}) {
                part[i] = power_for_weights((Floats::load(scores + p + i * LANES) - top) * by);
                part[i] = part[i].keep(left - i * LANES, 0.0f).drop(before - i * LANES, 0.0f);
                total[i] = total[i] + part[i];
            }
            store_bfloat(part[0], part[1], weights + p);
        };
        for (int p = 0; p < std::min(ahead, longest); p += BLOCK) weigh_block(p, from - p, seen - p);
        for (int p = ahead; p < whole; p += BLOCK) weigh_block(p, 0, BLOCK);
        for (int p = whole; p < longest; p += BLOCK) weigh_block(p, 0, seen - p);
        return Floats::all(1.0f / sum_of(total[0] + total[1]));
    }

    // sums [queries][D] of weight · value. The first block may begin before what is seen, the last may reach beyond it, and
    // even beyond the extent: what stands there is not a number for all we know, so these are read from a copy.
    void sum_values(const Shape& s, const Cache& cache, int head, int64_t base, int begin, int first_seen, int longest) const {
        const uint16_t* weights = reinterpret_cast<const uint16_t*>(scores_.get());
        const int size = s.head_size;
        for (int d = 0; d < size; d += 4 * LANES) {
            const int tiles = std::min(4, (size - d) / LANES);
            clear_tiles();
            cache.pieces(base, begin, longest, [&](int p, int until, int64_t slot) {
                const uint16_t* from = cache.values + (cache.slots * head + slot) * size;
                for (; p < until; p += BLOCK, from += static_cast<size_t>(BLOCK) * size) {
                    const bool part = p < first_seen || p + BLOCK > until;
                    if (part) copy_part(from, size, first_seen - p, std::min(BLOCK, until - p));
                    multiply_tiles(weights + (p - begin), stride_ * 4, (part ? tail_.get() : from) + 2 * d, 2 * LANES,
                                   size * 4, tiles);
                }
            });
            store_tiles(sums_.get() + d, LANES, size * 4, tiles);
        }
    }

    // A block's first `slots` slots without the `before` first ones; nothing else.
    void copy_part(const uint16_t* from, int size, int before, int slots) const {
        uint16_t* to = tail_.get();
        std::memset(to, 0, sizeof(uint16_t) * BLOCK * size);
        std::memcpy(to, from, sizeof(uint16_t) * (slots / 2 * 2) * size);
        if (slots % 2)
            for (int d = 0; d < size; d++) to[(slots - 1) * size + 2 * d] = from[(slots - 1) * size + 2 * d];
        for (int i = 0; i < before; i++)
            for (int d = 0; d < size; d++) to[i / 2 * 2 * size + 2 * d + i % 2] = 0;
    }
};

#else

inline void write_key(const Shape& s, const Cache& cache, int head, int64_t slot, const float* x) {
    uint16_t* to = cache.keys_from(s, head, slot) + slot % LANES;
    uint16_t half[LANES];
    for (int d = 0; d < s.head_size; d += LANES) {
        Floats::load(x + d).store_half(half);
        for (int i = 0; i < LANES; i++) to[static_cast<int64_t>(d + i) * LANES] = half[i];
    }
}

inline void write_value(const Shape& s, const Cache& cache, int head, int64_t slot, const float* x) {
    uint16_t* to = cache.values + (cache.slots * head + slot) * s.head_size;
    for (int d = 0; d < s.head_size; d += LANES) Floats::load(x + d).store_half(to + d);
}

class Attention {  // of one thread
   public:
    static int rows_at_once(const Shape&) { return 1; }

    void reserve(const Shape& s, int longest) {
        make_room(scores_, size_, static_cast<size_t>(longest + 2 * LANES) * std::min(4, s.group()));
    }

    // Row `first` and the queries of one key head, up to four at a time: quantised, into `out`.
    void run(const Shape& s, const Cache& cache, const Pass& pass, int window, int first, int /*rows*/, int head,
             const float* qkv, Quantised& out) {
        for (int g = 0; g < s.group(); g += 4) {
            const int query = head * s.group() + g;
            switch (std::min(4, s.group() - g)) {
                case 1: attend<1>(s, cache, pass, window, first, head, query, qkv, out); break;
                case 2: attend<2>(s, cache, pass, window, first, head, query, qkv, out); break;
                case 3: attend<3>(s, cache, pass, window, first, head, query, qkv, out); break;
                default: attend<4>(s, cache, pass, window, first, head, query, qkv, out);
            }
        }
    }

   private:
    Buffer<float> scores_;
    size_t size_ = 0;

    // Scores of G queries and the T tiles k of keys, of positions p on; T tiles at once, because one sum alone waits for
    // itself. Those before `begin` and from `seen` on are not seen. scores: where those of position p go.
    template <int G, int T>
    static void score_tiles(const uint16_t* k, const float* q, int size, Floats scale, int begin, int seen, int p, int stride,
                            float* scores, Floats* most) {
        const size_t step = static_cast<size_t>(size) * LANES;
        Floats score[T][G];
DSPARK_UNROLL(4)
        for (int t = 0; t < T; t++)
DSPARK_UNROLL(4)
            for (int g = 0; g < G; g++) score[t][g] = Floats::zero();
        for (int d = 0; d < size; d++) add_outer<T, G>(k + d * LANES, step, q + d, size, score);
        for (int t = 0; t < T; t++, p += LANES) {
            for (int g = 0; g < G; g++) {
                const Floats kept = (score[t][g] * scale).keep(seen - p, -INFINITY).drop(begin - p, -INFINITY);
                most[g] = max(most[g], kept);
                kept.store(scores + g * stride + t * LANES);
            }
        }
    }

    // C·16 dimensions, from d on, of the weighted values of positions begin…seen-1 for G queries, divided by the sums of their
    // weights; weights: that of position begin.
    template <int G, int C>
    static void weigh_values(const Cache& cache, int64_t base, int head, int d, int size, int begin, int seen, int stride,
                             const float* weights, const Floats* total, float* out) {
        Floats sums[C][G];
DSPARK_UNROLL(4)
        for (int c = 0; c < C; c++)
DSPARK_UNROLL(4)
            for (int g = 0; g < G; g++) sums[c][g] = Floats::zero();
        cache.pieces(base, begin, seen, [&](int p, int until, int64_t slot) {
            const uint16_t* v = cache.values + (cache.slots * head + slot) * size + d;
            for (; p < until; p++, v += size) add_outer<C, G>(v, LANES, weights + (p - begin), stride, sums);
        });
        for (int g = 0; g < G; g++) {
            const Floats share_of = Floats::all(1.0f / sum_of(total[g]));
            for (int c = 0; c < C; c++) (sums[c][g] * share_of).store(out + g * size + d + c * LANES);
        }
    }

    template <int G>
    void attend(const Shape& s, const Cache& cache, const Pass& pass, int window, int r, int head, int first_query,
                const float* qkv, Quantised& to) const {
        const int size = s.head_size, seen = pass.visible[r], begin = pass.begin(r, window);
        const int first = begin / LANES * LANES, last = (seen + LANES - 1) / LANES * LANES, stride = last - first;
        const int64_t base = pass.first_slot[r];
        const float* q = qkv + static_cast<size_t>(r) * s.qkv() + first_query * size;
        const Floats scale = Floats::all(s.score_scale);
        float* const scores = scores_.get();
        Floats most[G], total[G];
        for (int g = 0; g < G; g++) most[g] = Floats::all(-INFINITY), total[g] = Floats::zero();
        constexpr int some = sums_at_once(G);
        const size_t tile = static_cast<size_t>(size) * LANES;
        cache.pieces(base, first, last, [&](int p, int until, int64_t slot) {
            const uint16_t* k = cache.keys_from(s, head, slot);
            for (; p + some * LANES <= until; p += some * LANES, k += some * tile)
                score_tiles<G, some>(k, q, size, scale, begin, seen, p, stride, scores + (p - first), most);
            for (; p < until; p += LANES, k += tile)
                score_tiles<G, 1>(k, q, size, scale, begin, seen, p, stride, scores + (p - first), most);
        });
        for (int g = 0; g < G; g++) {
            const Floats top = Floats::all(max_of(most[g]));
            for (int p = first; p < seen; p += LANES) {
                float* const at = scores + g * stride + (p - first);
                const Floats e = exp(Floats::load(at) - top).keep(seen - p, 0.0f).drop(begin - p, 0.0f);
                total[g] = total[g] + e;
                e.store(at);
            }
        }
        float out[256 * G];
        int d = 0;
        for (; d + some * LANES <= size; d += some * LANES)
            weigh_values<G, some>(cache, base, head, d, size, begin, seen, stride, scores + (begin - first), total, out);
        for (; d < size; d += LANES)
            weigh_values<G, 1>(cache, base, head, d, size, begin, seen, stride, scores + (begin - first), total, out);
        to.put_each(G * size / GROUP, out, [&](int i) { return std::pair(r, first_query * size / GROUP + i); });
    }
};

#endif

}  // namespace dspark
