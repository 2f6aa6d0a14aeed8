// A Llama-like decoder over a ragged batch, whole layers at a time: norm and quantise, QKV with rotary and cache
// write, attention over what is there, output projection into the residual stream, gate·up with SiLU, down.
//
// Symbols: T rows of all streams, H hidden size, D head size, Hq query heads, Hk key heads, G = Hq / Hk.
// A row's result depends on that row and its own past alone, to the bit: see simd.h and matrix.h.
#pragma once

#include <algorithm>

#include "matrix.h"
#include "pool.h"

namespace dspark {

struct Shape {
    int hidden, heads, kv_heads, head_size, inner, positions;
    float eps;
    int qkv() const { return (heads + 2 * kv_heads) * head_size; }
};

struct Layer {
    Matrix qkv, o, gate, up, down;
    Buffer<float> input_norm, post_norm, q_norm, k_norm;  // the last two: null where the family has none
};

// Keys and values of all token slots, head by head, so that what attention reads for one head lies in one piece. Keys in
// tiles of 16 slots with the slot as the innermost index, so that 16 scores are 16 lanes: [Hk][tiles][D][16]; values slot
// by slot: [Hk][slots][D]. Half precision.
struct Cache {  // of one layer
    uint16_t *keys, *values;
    int64_t slots;  // a multiple of 16
};

struct Store {
    uint16_t *keys, *values;
    int64_t slots;
    Cache layer(int i, const Shape& s) const {
        const int64_t size = slots * s.kv_heads * s.head_size;
        return {keys + i * size, values + i * size, slots};
    }
};

// One pass. Row r stands at position[r], its keys and values go to slot[r], and it sees the first visible[r] slots
// from first_slot[r] on (those of its stream, itself among them).
struct Pass {
    int rows;
    const int32_t *position, *slot, *first_slot, *visible;
};

inline void rms_norm(const float* x, const float* weight, int size, float eps, float* out) {
    Floats squares = Floats::zero();
    for (int i = 0; i < size; i += LANES) {
        const Floats v = Floats::load(x + i);
        squares = fma(v, v, squares);
    }
    const Floats scale = Floats::all(1.0f / std::sqrt(sum_of(squares) / static_cast<float>(size) + eps));
    for (int i = 0; i < size; i += LANES) (Floats::load(x + i) * scale * Floats::load(weight + i)).store(out + i);
}

class Llama {
   public:
    Shape shape;
    std::vector<Layer> layers;
    Buffer<float> final_norm, cosine, sine;  // tables [positions][D/2]

    // Runs all layers over x [T, H], in place; taps [T, taps·H] are the outputs of the layers in `tap_layers`.
    void run(Pool& pool, const Pass& pass, const Store& store, float* x, const int32_t* tap_layers, int taps,
             float* tap_out) {
        const Shape& s = shape;
        own_.resize(pool.size());
        for (Own& own : own_) own.input.reserve(pass.rows, s.hidden);
        aq_.reserve(pass.rows, s.heads * s.head_size);
        hq_.reserve(pass.rows, s.inner);
        reserve(qkv_, qkv_size_, static_cast<size_t>(pass.rows) * s.qkv());
        const int longest = pass.rows ? *std::max_element(pass.visible, pass.visible + pass.rows) : 0;
        for (Own& own : own_)
            reserve(own.scores, own.scores_size, static_cast<size_t>(longest + LANES) * (s.heads / s.kv_heads));
        pool.run([&](int thread) {
            Own& own = own_[thread];
            for (int l = 0; l < static_cast<int>(layers.size()); l++) {
                const Layer& layer = layers[l];
                const Cache cache = store.layer(l, s);
                normalise(x, layer.input_norm.get(), pass.rows, own.input);
                project(pool, thread, layer, cache, pass, own.input, 0, s.heads + 2 * s.kv_heads);
                pool.barrier();
                attend(pool, thread, cache, pass, own.scores.get());
                pool.barrier();
                add_product(pool, thread, layer.o, aq_, pass.rows, x);
                pool.barrier();
                normalise(x, layer.post_norm.get(), pass.rows, own.input);
                gate_up(pool, thread, layer, own.input, pass.rows);
                pool.barrier();
                add_product(pool, thread, layer.down, hq_, pass.rows, x);
                pool.barrier();
                for (int i = 0; i < taps; i++) {
                    if (tap_layers[i] != l) continue;
                    int first, last;
                    share(pass.rows, 1, thread, pool.size(), &first, &last);
                    for (int r = first; r < last; r++)
                        std::memcpy(tap_out + (static_cast<size_t>(r) * taps + i) * s.hidden,
                                    x + static_cast<size_t>(r) * s.hidden, sizeof(float) * s.hidden);
                }
            }
        });
    }

    // Keys and values of `features` [T, H] (normed already), every layer, without attention: a drafter's context.
    void write_context(Pool& pool, const Pass& pass, const Store& store, const float* features) {
        const Shape& s = shape;
        own_.resize(pool.size());
        reserve(qkv_, qkv_size_, static_cast<size_t>(pass.rows) * s.qkv());
        pool.run([&](int thread) {
            Quantised& input = own_[thread].input;
            input.reserve(pass.rows, s.hidden);
            for (int r = 0; r < pass.rows; r++) input.put_row(r, features + static_cast<size_t>(r) * s.hidden);
            for (const Layer& layer : layers) {
                const Cache cache = store.layer(static_cast<int>(&layer - layers.data()), s);
                project(pool, thread, layer, cache, pass, input, s.heads, s.heads + 2 * s.kv_heads);
                pool.barrier();
            }
        });
    }

   private:
    struct Own {  // a thread's
        Quantised input;
        Buffer<float> scores;
        size_t scores_size = 0;
    };
    std::vector<Own> own_;
    Quantised aq_, hq_;
    Buffer<float> qkv_;
    size_t qkv_size_ = 0;

    static void reserve(Buffer<float>& buffer, size_t& size, size_t wanted) {
        if (wanted <= size) return;
        buffer = allocate<float>(wanted);
        size = wanted;
    }

    // Every thread norms and quantises all rows for itself: quicker than to wait for one another once more.
    void normalise(const float* x, const float* weight, int rows, Quantised& out) const {
        float normed[16384];
        for (int r = 0; r < rows; r++) {
            rms_norm(x + static_cast<size_t>(r) * shape.hidden, weight, shape.hidden, shape.eps, normed);
            out.put_row(r, normed);
        }
    }

    // Heads first_head…last_head-1 of Q, K and V, counted through; whoever takes one turns it too.
    void project(Pool& pool, int thread, const Layer& layer, const Cache& cache, const Pass& pass,
                 const Quantised& input, int first_head, int last_head) {
        const Shape& s = shape;
        const int tiles = s.head_size / LANES, width = s.qkv();
        pool.each(thread, last_head - first_head, 1, [&](int first, int last) {
            for (int head = first_head + first; head < first_head + last; head++) {
                for (int t = head * tiles; t < (head + 1) * tiles; t++)
                    product(layer.qkv, t, input, pass.rows,
                            [&](int r, Floats v) { v.store(qkv_.get() + static_cast<size_t>(r) * width + t * LANES); });
                const bool is_query = head < s.heads, is_key = !is_query && head < s.heads + s.kv_heads;
                const float* norm = is_query ? layer.q_norm.get() : is_key ? layer.k_norm.get() : nullptr;
                for (int r = 0; r < pass.rows; r++) {
                    float* x = qkv_.get() + static_cast<size_t>(r) * width + head * s.head_size;
                    if (norm) rms_norm(x, norm, s.head_size, s.eps, x);
                    if (is_query || is_key) turn(x, pass.position[r]);
                    if (is_key) write_key(cache, head - s.heads, pass.slot[r], x);
                    if (!is_query && !is_key) write_value(cache, head - s.heads - s.kv_heads, pass.slot[r], x);
                }
            }
        });
    }

    void turn(float* x, int position) const {
        const int half = shape.head_size / 2;
        const float* c = cosine.get() + static_cast<size_t>(position) * half;
        const float* n = sine.get() + static_cast<size_t>(position) * half;
        for (int i = 0; i < half; i += LANES) {
            const Floats a = Floats::load(x + i), b = Floats::load(x + half + i);
            const Floats cos = Floats::load(c + i), sin = Floats::load(n + i);
            fma(a, cos, Floats::zero() - b * sin).store(x + i);
            fma(b, cos, a * sin).store(x + half + i);
        }
    }

    void write_key(const Cache& cache, int head, int64_t slot, const float* x) const {
        const int64_t tile = slot / LANES, lane = slot % LANES;
        uint16_t* to = cache.keys + (cache.slots / LANES * head + tile) * shape.head_size * LANES + lane;
        uint16_t half[LANES];
        for (int d = 0; d < shape.head_size; d += LANES) {
            Floats::load(x + d).store_half(half);
            for (int i = 0; i < LANES; i++) to[static_cast<int64_t>(d + i) * LANES] = half[i];
        }
    }

    void write_value(const Cache& cache, int head, int64_t slot, const float* x) const {
        uint16_t* to = cache.values + (cache.slots * head + slot) * shape.head_size;
        for (int d = 0; d < shape.head_size; d += LANES) Floats::load(x + d).store_half(to + d);
    }

    // By key head and row: G query heads read the same keys and values, and so do the rows of a stream.
    void attend(Pool& pool, int thread, const Cache& cache, const Pass& pass, float* scores) {
        const Shape& s = shape;
        pool.each(thread, pass.rows * s.kv_heads, 1, [&](int first, int last) {
            for (int item = first; item < last; item++) {
                const int r = item % pass.rows, head = item / pass.rows;
                switch (s.heads / s.kv_heads) {
                    case 1: attend_one<1>(cache, pass, r, head, scores); break;
                    case 2: attend_one<2>(cache, pass, r, head, scores); break;
                    case 3: attend_one<3>(cache, pass, r, head, scores); break;
                    case 4: attend_one<4>(cache, pass, r, head, scores); break;
                    default: attend_any(cache, pass, r, head, scores); break;
                }
            }
        });
    }

    template <int G>
    void attend_one(const Cache& cache, const Pass& pass, int r, int head, float* scores) {
        attend_heads<G>(cache, pass, r, head, head * G, scores);
    }
    void attend_any(const Cache& cache, const Pass& pass, int r, int head, float* scores) {
        const int group = shape.heads / shape.kv_heads;
        for (int g = 0; g < group; g++) attend_heads<1>(cache, pass, r, head, head * group + g, scores);
    }

    // Scores of G queries and the keys of T tiles from p on; T tiles at once, because one sum alone waits for itself.
    template <int G, int T>
    void score_tiles(const uint16_t* keys, const float* q, Floats scale, int seen, int p, int stride, float* scores,
                     Floats* most) const {
        const int size = shape.head_size;
        const size_t step = static_cast<size_t>(size) * LANES;
        const uint16_t* k = keys + p / LANES * step;
        Floats score[T][G];
DSPARK_UNROLL(4)
        for (int t = 0; t < T; t++)
DSPARK_UNROLL(4)
            for (int g = 0; g < G; g++) score[t][g] = Floats::zero();
        for (int d = 0; d < size; d++) {
DSPARK_UNROLL(4)
            for (int t = 0; t < T; t++) {
                const Floats key = Floats::load_half(k + t * step + d * LANES);
DSPARK_UNROLL(4)
                for (int g = 0; g < G; g++) score[t][g] = fma(key, Floats::all(q[g * size + d]), score[t][g]);
            }
        }
        for (int t = 0; t < T; t++, p += LANES) {
            for (int g = 0; g < G; g++) {
                const Floats kept = (score[t][g] * scale).keep(seen - p, -INFINITY);
                most[g] = max(most[g], kept);
                kept.store(scores + g * stride + p);
            }
        }
    }

    // C·16 dimensions of the weighted values for G queries, divided by the sums of their weights.
    template <int G, int C>
    void weigh_values(const uint16_t* v, int seen, int stride, const float* weights, const Floats* total,
                      float* out) const {
        const size_t step = shape.head_size;
        Floats sums[G][C];
DSPARK_UNROLL(4)
        for (int g = 0; g < G; g++)
DSPARK_UNROLL(4)
            for (int c = 0; c < C; c++) sums[g][c] = Floats::zero();
        for (int p = 0; p < seen; p++, v += step) {
            Floats value[C];
DSPARK_UNROLL(4)
            for (int c = 0; c < C; c++) value[c] = Floats::load_half(v + c * LANES);
DSPARK_UNROLL(4)
            for (int g = 0; g < G; g++) {
                const Floats weight = Floats::all(weights[g * stride + p]);
DSPARK_UNROLL(4)
                for (int c = 0; c < C; c++) sums[g][c] = fma(value[c], weight, sums[g][c]);
            }
        }
        for (int g = 0; g < G; g++) {
            const Floats share_of = Floats::all(1.0f / sum_of(total[g]));
            for (int c = 0; c < C; c++) (sums[g][c] * share_of).store(out + g * shape.head_size + c * LANES);
        }
    }

    template <int G>
    void attend_heads(const Cache& cache, const Pass& pass, int r, int head, int first_query, float* scores) {
        const Shape& s = shape;
        const int size = s.head_size, seen = pass.visible[r];
        const int64_t base = pass.first_slot[r];  // extents begin at multiples of 16
        const float* q = qkv_.get() + static_cast<size_t>(r) * s.qkv() + first_query * size;
        const Floats scale = Floats::all(1.0f / std::sqrt(static_cast<float>(size)));
        const int stride = (seen + LANES - 1) / LANES * LANES;
        Floats most[G], total[G];
        for (int g = 0; g < G; g++) most[g] = Floats::all(-INFINITY), total[g] = Floats::zero();
        const uint16_t* k = cache.keys + (cache.slots * head + base) * size;
        int p = 0;
        for (; p + 4 * LANES <= stride; p += 4 * LANES) score_tiles<G, 4>(k, q, scale, seen, p, stride, scores, most);
        for (; p < stride; p += LANES) score_tiles<G, 1>(k, q, scale, seen, p, stride, scores, most);
        for (int g = 0; g < G; g++) {
            const Floats top = Floats::all(max_of(most[g]));
            for (int p = 0; p < seen; p += LANES) {
                const Floats e = exp(Floats::load(scores + g * stride + p) - top).keep(seen - p, 0.0f);
                total[g] = total[g] + e;
                e.store(scores + g * stride + p);
            }
        }
        float out[256 * G];
        const uint16_t* v = cache.values + (cache.slots * head + base) * size;
        int d = 0;
        for (; d + 4 * LANES <= size; d += 4 * LANES) weigh_values<G, 4>(v + d, seen, stride, scores, total, out + d);
        for (; d < size; d += LANES) weigh_values<G, 1>(v + d, seen, stride, scores, total, out + d);
        for (int i = 0; i < G * size; i += GROUP) aq_.put(r, (first_query * size + i) / GROUP, out + i);
    }

    void add_product(Pool& pool, int thread, const Matrix& w, const Quantised& input, int rows, float* x) const {
        pool.each(thread, w.tiles(), 1, [&](int first, int last) {
            for (int t = first; t < last; t++)
                product(w, t, input, rows, [&](int r, Floats v) {
                    float* at = x + static_cast<size_t>(r) * shape.hidden + t * LANES;
                    (Floats::load(at) + v).store(at);
                });
        });
    }

    // silu(gate)·up, quantised for `down` where it arises: two tiles are one group.
    void gate_up(Pool& pool, int thread, const Layer& layer, const Quantised& input, int rows) {
        pool.each(thread, layer.gate.tiles(), GROUP / LANES, [&](int first, int last) {
            for (int t = first; t < last; t += GROUP / LANES)
                for (int from = 0; from < rows; from += ROWS) gate_up_group(layer, t, input, from, std::min(ROWS, rows - from));
        });
    }

    void gate_up_group(const Layer& layer, int t, const Quantised& input, int from, int rows) {
        float inner[ROWS][GROUP];
        for (int half = 0; half < GROUP / LANES; half++) {
            Floats gate[ROWS], up[ROWS];
            tiles(layer.gate, t + half, input, from, rows, gate);
            tiles(layer.up, t + half, input, from, rows, up);
            for (int r = 0; r < rows; r++) {
                const Floats silu = gate[r] / (Floats::all(1.0f) + exp(Floats::zero() - gate[r]));
                (silu * up[r]).store(inner[r] + half * LANES);
            }
        }
        for (int r = 0; r < rows; r++) hq_.put(from + r, t * LANES / GROUP, inner[r]);
    }

    static void tiles(const Matrix& w, int t, const Quantised& x, int first, int rows, Floats* out) {
        if (w.bits == 4)
            tile_rows<4>(w, t, x, first, rows, out);
        else
            tile_rows<8>(w, t, x, first, rows, out);
    }
};

}  // namespace dspark
