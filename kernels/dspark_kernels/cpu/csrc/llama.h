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

// Keys and values of all token slots. Keys lie in tiles of 16 slots with the slot as the innermost index, so that 16
// scores are 16 lanes: [tiles][Hk][D][16]; values lie slot by slot: [slots][Hk][D]. Half precision.
struct Cache {
    uint16_t *keys, *values;  // of one layer
};

struct Store {
    uint16_t *keys, *values;
    int64_t slots;  // a multiple of 16
    Cache layer(int i, const Shape& s) const {
        const int64_t size = slots * s.kv_heads * s.head_size;
        return {keys + i * size, values + i * size};
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
        xq_.reserve(pass.rows, s.hidden);
        aq_.reserve(pass.rows, s.heads * s.head_size);
        hq_.reserve(pass.rows, s.inner);
        reserve(qkv_, qkv_size_, static_cast<size_t>(pass.rows) * s.qkv());
        const int longest = pass.rows ? *std::max_element(pass.visible, pass.visible + pass.rows) : 0;
        const int scores = (longest + LANES) / LANES * LANES * (s.heads / s.kv_heads);
        reserve(scores_, scores_size_, static_cast<size_t>(scores) * pool.size());
        pool.run([&](int thread) {
            const int threads = pool.size();
            float* own_scores = scores_.get() + static_cast<size_t>(scores) * thread;
            int first_row, last_row;
            share(pass.rows, 1, thread, threads, &first_row, &last_row);
            for (int l = 0; l < static_cast<int>(layers.size()); l++) {
                const Layer& layer = layers[l];
                const Cache cache = store.layer(l, s);
                normalise(x, layer.input_norm.get(), first_row, last_row);
                pool.barrier();
                project(layer, cache, pass, 0, s.heads + 2 * s.kv_heads, thread, threads);
                pool.barrier();
                attend(cache, pass, own_scores, thread, threads);
                pool.barrier();
                add_product(layer.o, aq_, pass.rows, x, thread, threads);
                pool.barrier();
                normalise(x, layer.post_norm.get(), first_row, last_row);
                pool.barrier();
                gate_up(layer, pass.rows, thread, threads);
                pool.barrier();
                add_product(layer.down, hq_, pass.rows, x, thread, threads);
                pool.barrier();
                for (int i = 0; i < taps; i++) {
                    if (tap_layers[i] != l) continue;
                    for (int r = first_row; r < last_row; r++)
                        std::memcpy(tap_out + (static_cast<size_t>(r) * taps + i) * s.hidden,
                                    x + static_cast<size_t>(r) * s.hidden, sizeof(float) * s.hidden);
                }
            }
        });
    }

    // Keys and values of `features` [T, H] (normed already), every layer, without attention: a drafter's context.
    void write_context(Pool& pool, const Pass& pass, const Store& store, const float* features) {
        const Shape& s = shape;
        xq_.reserve(pass.rows, s.hidden);
        reserve(qkv_, qkv_size_, static_cast<size_t>(pass.rows) * s.qkv());
        pool.run([&](int thread) {
            int first, last;
            share(pass.rows, 1, thread, pool.size(), &first, &last);
            for (int r = first; r < last; r++) xq_.put_row(r, features + static_cast<size_t>(r) * s.hidden);
            pool.barrier();
            for (int l = 0; l < static_cast<int>(layers.size()); l++)
                project(layers[l], store.layer(l, s), pass, s.heads, s.heads + 2 * s.kv_heads, thread, pool.size());
        });
    }

   private:
    Quantised xq_, aq_, hq_;
    Buffer<float> qkv_, scores_;
    size_t qkv_size_ = 0, scores_size_ = 0;

    static void reserve(Buffer<float>& buffer, size_t& size, size_t wanted) {
        if (wanted <= size) return;
        buffer = allocate<float>(wanted);
        size = wanted;
    }

    void normalise(const float* x, const float* weight, int first, int last) {
        float normed[16384];
        for (int r = first; r < last; r++) {
            rms_norm(x + static_cast<size_t>(r) * shape.hidden, weight, shape.hidden, shape.eps, normed);
            xq_.put_row(r, normed);
        }
    }

    // Heads first_head…last_head-1 of Q, K and V, counted through; a thread has whole heads, so that it can turn them.
    void project(const Layer& layer, const Cache& cache, const Pass& pass, int first_head, int last_head, int thread,
                 int threads) {
        const Shape& s = shape;
        const int tiles = s.head_size / LANES, width = s.qkv();
        int first, last;
        share(last_head - first_head, 1, thread, threads, &first, &last);
        for (int head = first_head + first; head < first_head + last; head++) {
            for (int t = head * tiles; t < (head + 1) * tiles; t++)
                product(layer.qkv, t, xq_, pass.rows,
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
        uint16_t* to = cache.keys + (tile * shape.kv_heads + head) * shape.head_size * LANES + lane;
        uint16_t half[LANES];
        for (int d = 0; d < shape.head_size; d += LANES) {
            Floats::load(x + d).store_half(half);
            for (int i = 0; i < LANES; i++) to[static_cast<int64_t>(d + i) * LANES] = half[i];
        }
    }

    void write_value(const Cache& cache, int head, int64_t slot, const float* x) const {
        uint16_t* to = cache.values + (slot * shape.kv_heads + head) * shape.head_size;
        for (int d = 0; d < shape.head_size; d += LANES) Floats::load(x + d).store_half(to + d);
    }

    // A thread has (row, key head) pairs: G query heads read the same keys and values.
    void attend(const Cache& cache, const Pass& pass, float* scores, int thread, int threads) {
        const Shape& s = shape;
        int first, last;
        share(pass.rows * s.kv_heads, 1, thread, threads, &first, &last);
        for (int item = first; item < last; item++) {
            const int r = item / s.kv_heads, head = item % s.kv_heads;
            switch (s.heads / s.kv_heads) {
                case 1: attend_one<1>(cache, pass, r, head, scores); break;
                case 2: attend_one<2>(cache, pass, r, head, scores); break;
                case 3: attend_one<3>(cache, pass, r, head, scores); break;
                case 4: attend_one<4>(cache, pass, r, head, scores); break;
                default: attend_any(cache, pass, r, head, scores); break;
            }
        }
    }

    template <int G>
    void attend_one(const Cache& cache, const Pass& pass, int r, int head, float* scores) {
        attend_heads<G>(cache, pass, r, head, head * G, scores);
    }
    void attend_any(const Cache& cache, const Pass& pass, int r, int head, float* scores) {
        const int group = shape.heads / shape.kv_heads;
        for (int g = 0; g < group; g++) attend_heads<1>(cache, pass, r, head, head * group + g, scores);
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
        for (int p = 0; p < seen; p += LANES) {
            const uint16_t* k = cache.keys + ((base + p) / LANES * s.kv_heads + head) * size * LANES;
            Floats score[G];
            for (int g = 0; g < G; g++) score[g] = Floats::zero();
            for (int d = 0; d < size; d++) {
                const Floats keys = Floats::load_half(k + d * LANES);
                for (int g = 0; g < G; g++) score[g] = fma(keys, Floats::all(q[g * size + d]), score[g]);
            }
            for (int g = 0; g < G; g++) {
                const Floats kept = (score[g] * scale).keep(seen - p, -INFINITY);
                most[g] = max(most[g], kept);
                kept.store(scores + g * stride + p);
            }
        }
        for (int g = 0; g < G; g++) {
            const Floats top = Floats::all(max_of(most[g]));
            for (int p = 0; p < seen; p += LANES) {
                const Floats e = exp(Floats::load(scores + g * stride + p) - top).keep(seen - p, 0.0f);
                total[g] = total[g] + e;
                e.store(scores + g * stride + p);
            }
        }
        float out[256 * G];
        for (int d = 0; d < size; d += 4 * LANES) {
            const int chunks = std::min(4, (size - d) / LANES);
            Floats sums[G][4];
            for (int g = 0; g < G; g++)
                for (int c = 0; c < 4; c++) sums[g][c] = Floats::zero();
            for (int p = 0; p < seen; p++) {
                const uint16_t* v = cache.values + ((base + p) * s.kv_heads + head) * size + d;
                if (chunks == 4) {
                    const Floats v0 = Floats::load_half(v), v1 = Floats::load_half(v + LANES);
                    const Floats v2 = Floats::load_half(v + 2 * LANES), v3 = Floats::load_half(v + 3 * LANES);
                    for (int g = 0; g < G; g++) {
                        const Floats weight = Floats::all(scores[g * stride + p]);
                        sums[g][0] = fma(v0, weight, sums[g][0]);
                        sums[g][1] = fma(v1, weight, sums[g][1]);
                        sums[g][2] = fma(v2, weight, sums[g][2]);
                        sums[g][3] = fma(v3, weight, sums[g][3]);
                    }
                } else {
                    for (int c = 0; c < chunks; c++) {
                        const Floats vc = Floats::load_half(v + c * LANES);
                        for (int g = 0; g < G; g++)
                            sums[g][c] = fma(vc, Floats::all(scores[g * stride + p]), sums[g][c]);
                    }
                }
            }
            for (int g = 0; g < G; g++) {
                const Floats share_of = Floats::all(1.0f / sum_of(total[g]));
                for (int c = 0; c < chunks; c++) (sums[g][c] * share_of).store(out + g * size + d + c * LANES);
            }
        }
        for (int i = 0; i < G * size; i += GROUP) aq_.put(r, (first_query * size + i) / GROUP, out + i);
    }

    void add_product(const Matrix& w, const Quantised& input, int rows, float* x, int thread, int threads) const {
        int first, last;
        share(w.tiles(), 1, thread, threads, &first, &last);
        for (int t = first; t < last; t++)
            product(w, t, input, rows, [&](int r, Floats v) {
                float* at = x + static_cast<size_t>(r) * shape.hidden + t * LANES;
                (Floats::load(at) + v).store(at);
            });
    }

    // silu(gate)·up, quantised for `down` where it arises: two tiles are one group.
    void gate_up(const Layer& layer, int rows, int thread, int threads) {
        int first, last;
        share(layer.gate.tiles(), GROUP / LANES, thread, threads, &first, &last);
        for (int t = first; t < last; t += GROUP / LANES) {
            for (int from = 0; from < rows; from += ROWS) {
                const int some = std::min(ROWS, rows - from);
                float inner[ROWS][GROUP];
                for (int half = 0; half < GROUP / LANES; half++) {
                    Floats gate[ROWS], up[ROWS];
                    tiles(layer.gate, t + half, xq_, from, some, gate);
                    tiles(layer.up, t + half, xq_, from, some, up);
                    for (int r = 0; r < some; r++) {
                        const Floats one = Floats::all(1.0f);
                        const Floats silu = gate[r] / (one + exp(Floats::zero() - gate[r]));
                        (silu * up[r]).store(inner[r] + half * LANES);
                    }
                }
                for (int r = 0; r < some; r++) hq_.put(from + r, t * LANES / GROUP, inner[r]);
            }
        }
    }

    static void tiles(const Matrix& w, int t, const Quantised& x, int first, int rows, Floats* out) {
        if (w.bits == 4)
            tile_rows<4>(w, t, x, first, rows, out);
        else
            tile_rows<8>(w, t, x, first, rows, out);
    }
};

}  // namespace dspark
