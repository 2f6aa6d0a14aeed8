// A Llama-like decoder over a ragged batch, whole layers at a time: QKV with rotary and cache write, attention over what is
// there, output projection into the residual stream, gate·up with its activation, down. What families differ in, biases of
// Q, K and V, norms of queries and keys, norms behind attention and MLP (Gemma's sandwich), windows and rotary tables of
// some layers, is null or zero in a layer that has none of it.
//
// Norms before a product have no step of their own. Rounding to bytes does not see a row's scale, so whoever adds the last to
// 32 columns of the residual stream rounds them for the next product at once, before others ask for them, and keeps the sum
// of their squares; what they come to, the row's 1/rms, is multiplied onto that product's results.
//
// Symbols: T rows of all streams, H hidden size, D head size, Hq query heads, Hk key heads, G = Hq / Hk.
// A row's result depends on that row and its own past alone, to the bit: see simd.h and matrix.h.
#pragma once

#include "attention.h"
#include "pool.h"

namespace dspark {

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    Buffer<float> input_norm, post_norm;                    // before attention and MLP
    Buffer<float> q_norm, k_norm, bias, after_attention, after_mlp;  // bias [(Hq + 2·Hk)·D]; null where there is none
    int window = 0;                                         // positions that a row sees at most, itself among them; 0: all
    int rope = 0;                                           // which of the model's rotary embeddings
};

struct Rope {
    std::vector<double> frequencies;  // radians a position [D/2]
    float amplitude;                  // of cosine and sine
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
    std::vector<Rope> ropes;
    Buffer<float> final_norm;
    bool gelu = false;  // of the gate, by tanh; else SiLU

    // Runs all layers over x [T, H], in place; taps [T, taps·H] are the outputs of the layers in `tap_layers`.
    void run(Pool& pool, const Pass& pass, const Store& store, float* x, const int32_t* tap_layers, int taps,
             float* tap_out) {
        const Shape& s = shape;
        attention_.resize(pool.size());
        input_.reserve(pass.rows, s.hidden);
        aq_.reserve(pass.rows, s.heads * s.head_size);
        hq_.reserve(pass.rows, s.inner);
        make_room(qkv_, qkv_size_, static_cast<size_t>(pass.rows) * s.qkv());
        if (layers[0].after_attention || layers[0].after_mlp)
            make_room(branch_, branch_size_, static_cast<size_t>(pass.rows) * s.hidden);
        squares_.resize(static_cast<size_t>(pass.rows) * input_.groups);
        const int longest = pass.rows ? *std::max_element(pass.visible, pass.visible + pass.rows) : 0;
        norm_.resize(pass.rows);
        for (Attention& attention : attention_) attention.reserve(s, longest);
        put_together(pass);
        make_turns(pass);
        Job job;
        settle_all(job, pass.rows, x, layers[0].input_norm.get());
        for (int l = 0; l < static_cast<int>(layers.size()); l++) {
            const Layer& layer = layers[l];
            const Cache cache = store.layer(l, s);
            const bool last_layer = l + 1 == static_cast<int>(layers.size());
            project(job, layer, cache, pass, norm_.data(), 0, s.heads + 2 * s.kv_heads);
            attend(job, cache, pass, layer.window);
            add_product(pool, job, layer.o, aq_, pass.rows, x, layer.after_attention.get(), layer.post_norm.get());
            gate_up(job, layer, pass.rows);
            add_product(pool, job, layer.down, hq_, pass.rows, x, layer.after_mlp.get(),
                        last_layer ? nullptr : layers[l + 1].input_norm.get());
            for (int i = 0; i < taps; i++) {
                if (tap_layers[i] != l) continue;
                job.step(pass.rows, TAPS, [=](int, int first, int last) {
                    for (int r = first; r < last; r++)
                        std::memcpy(tap_out + (static_cast<size_t>(r) * taps + i) * shape.hidden,
                                    x + static_cast<size_t>(r) * shape.hidden, sizeof(float) * shape.hidden);
                });
            }
        }
        pool.run(job);
    }

    // Keys and values of `features` [T, H] (normed already), every layer, without attention: a drafter's context.
    void write_context(Pool& pool, const Pass& pass, const Store& store, const float* features) {
        const Shape& s = shape;
        input_.reserve(pass.rows, s.hidden);
        make_room(qkv_, qkv_size_, static_cast<size_t>(pass.rows) * s.qkv());
        make_turns(pass);
        Job job;
        job.step(pass.rows, pool.shares(pass.rows), [=](int, int first, int last) {
            for (int r = first; r < last; r++) input_.put_row(r, features + static_cast<size_t>(r) * shape.hidden);
        });
        for (const Layer& layer : layers) {
            const Cache cache = store.layer(static_cast<int>(&layer - layers.data()), s);
            project(job, layer, cache, pass, nullptr, s.heads, s.heads + 2 * s.kv_heads);
        }
        pool.run(job);
    }

   private:
    static constexpr int TAPS = 16;  // rows that are copied before another thread is of use

    struct Together {  // neighbouring rows of one stream
        int first, count;
    };
    std::vector<Attention> attention_;  // of each thread
    std::vector<Together> together_;
    Quantised input_, aq_, hq_;
    std::vector<float> squares_;  // [groups][rows] of the residual stream
    std::vector<float> norm_;  // what they come to: 1/rms of each row
    Buffer<float> turns_;  // [ropes][rows][D]: cosines and then sines of a row's position
    size_t turns_size_ = 0;
    Buffer<float> qkv_, branch_;  // branch: what attention or MLP add, before a norm of its own
    size_t qkv_size_ = 0, branch_size_ = 0;

    void put_together(const Pass& pass) {
        const int most = Attention::rows_at_once(shape);
        together_.clear();
        for (int r = 0, end; r < pass.rows; r = end) {
            for (end = r + 1; end < pass.rows && pass.first_slot[end] == pass.first_slot[r];) end++;
            const int parts = (end - r + most - 1) / most;  // of one size, that no thread has more to do than another
            for (int i = 0; i < parts; i++) {
                const int first = r + (end - r) * i / parts;
                together_.push_back({first, r + (end - r) * (i + 1) / parts - first});
            }
        }
    }

    // Once a pass, for all its layers and heads: a table of all positions would take megabytes.
    void make_turns(const Pass& pass) {
        const int half = shape.head_size / 2;
        make_room(turns_, turns_size_, ropes.size() * pass.rows * shape.head_size);
        float* to = turns_.get();
        for (const Rope& rope : ropes) {
            for (int r = 0; r < pass.rows; r++, to += shape.head_size) {
                for (int i = 0; i < half; i++) {
                    const double angle = pass.position[r] * rope.frequencies[i];
                    to[i] = static_cast<float>(rope.amplitude * std::cos(angle));
                    to[half + i] = static_cast<float>(rope.amplitude * std::sin(angle));
                }
            }
        }
    }

    // Columns of group g of x are what they are to be for now: rounded for the next product, under its norm's weight.
    void settle(const float* x, const float* weight, int rows, int g) {
        const Floats low = Floats::load(weight + g * GROUP), high = Floats::load(weight + g * GROUP + LANES);
        for (int from = 0; from < rows; from += ROWS) {
            const int some = std::min(ROWS, rows - from);
            alignas(64) float weighted[ROWS][GROUP];
            for (int r = 0; r < some; r++) {
                const float* at = x + static_cast<size_t>(from + r) * shape.hidden + g * GROUP;
                const Floats a = Floats::load(at), b = Floats::load(at + LANES);
                squares_[static_cast<size_t>(g) * rows + from + r] = sum_of(fma(a, a, b * b));
                (a * low).store(weighted[r]);
                (b * high).store(weighted[r] + LANES);
            }
            input_.put_each(some, weighted[0], [&](int r) { return std::pair(from + r, g); });
        }
    }

    void settle_all(Job& job, int rows, const float* x, const float* weight) {
        job.step(input_.groups, 1, [=](int, int first, int last) {
            for (int g = first; g < last; g++) settle(x, weight, rows, g);
        }, [=] { norm_rows(rows); });
    }

    // When all groups have settled.
    void norm_rows(int rows) {
        std::fill_n(norm_.begin(), rows, 0.0f);
        for (int g = 0; g < input_.groups; g++)
            for (int r = 0; r < rows; r++) norm_[r] += squares_[static_cast<size_t>(g) * rows + r];
        for (int r = 0; r < rows; r++)
            norm_[r] = 1.0f / std::sqrt(norm_[r] / static_cast<float>(shape.hidden) + shape.eps);
    }

    // Heads first_head…last_head-1 of Q, K and V, counted through; whoever takes one turns it too. norm: what to multiply
    // each row's by, or null.
    void project(Job& job, const Layer& layer, const Cache& cache, const Pass& pass, const float* norm, int first_head,
                 int last_head) {
        job.step(last_head - first_head, 1, [=, &layer, &pass](int, int first, int last) {
            const Shape& s = shape;
            const int tiles = s.head_size / LANES, width = s.qkv();
            for (int head = first_head + first; head < first_head + last; head++) {
                const bool is_query = head < s.heads, is_key = !is_query && head < s.heads + s.kv_heads;
                const Matrix& w = is_query ? layer.q : is_key ? layer.k : layer.v;
                const int before = is_query ? 0 : is_key ? s.heads : s.heads + s.kv_heads;  // heads of other matrices
                for (int t = head * tiles; t < (head + 1) * tiles; t++) {
                    const Floats more = layer.bias ? Floats::load(layer.bias.get() + t * LANES) : Floats::zero();
                    product(w, t - before * tiles, input_, pass.rows, [&](int r, Floats v) {
                        const Floats by = Floats::all(norm ? norm[r] : 1.0f);
                        fma(v, by, more).store(qkv_.get() + static_cast<size_t>(r) * width + t * LANES);
                    });
                }
                const float* own_norm = is_query ? layer.q_norm.get() : is_key ? layer.k_norm.get() : nullptr;
                for (int r = 0; r < pass.rows; r++) {
                    float* x = qkv_.get() + static_cast<size_t>(r) * width + head * s.head_size;
                    if (own_norm) rms_norm(x, own_norm, s.head_size, s.eps, x);
                    if (is_query || is_key) turn(x, turns_.get() + (static_cast<size_t>(layer.rope) * pass.rows + r) * s.head_size);
                    if (is_key) write_key(s, cache, head - s.heads, pass.slot[r], x);
                    if (!is_query && !is_key) write_value(s, cache, head - s.heads - s.kv_heads, pass.slot[r], x);
                }
            }
        });
    }

    void turn(float* x, const float* c) const {
        const int half = shape.head_size / 2;
        const float* n = c + half;
        for (int i = 0; i < half; i += LANES) {
            const Floats a = Floats::load(x + i), b = Floats::load(x + half + i);
            const Floats cos = Floats::load(c + i), sin = Floats::load(n + i);
            fma(a, cos, Floats::zero() - b * sin).store(x + i);
            fma(b, cos, a * sin).store(x + half + i);
        }
    }

    // By key head and what is attended to together, key head after key head.
    void attend(Job& job, const Cache& cache, const Pass& pass, int window) {
        const int together = static_cast<int>(together_.size());
        job.step(together * shape.kv_heads, 1, [=, &pass](int thread, int first, int last) {
            for (int item = first; item < last; item++) {
                const Together& rows = together_[item % together];
                attention_[thread].run(shape, cache, pass, window, rows.first, rows.count, item / together, qkv_.get(), aq_);
            }
        });
    }

    // x += w · input; after: the weight of the norm that this goes through before it is added, or null; next: of the norm that
    // x goes through then, or null.
    void add_product(const Pool& pool, Job& job, const Matrix& w, const Quantised& input, int rows, float* x,
                     const float* after, const float* next) {
        constexpr int grain = GROUP / LANES;
        if (after) return add_normed(pool, job, w, input, rows, x, after, next);
        job.step(w.tiles(), grain, [=, &w, &input](int, int first, int last) {
            for (int t = first; t < last; t++) {
                product(w, t, input, rows, [&](int r, Floats v) {
                    float* at = x + static_cast<size_t>(r) * shape.hidden + t * LANES;
                    (Floats::load(at) + v).store(at);
                });
                if (next && t % grain == grain - 1) settle(x, next, rows, t / grain);
            }
        }, [=] {
            if (next) norm_rows(rows);
        });
    }

    void add_normed(const Pool& pool, Job& job, const Matrix& w, const Quantised& input, int rows, float* x,
                    const float* after, const float* next) {
        const size_t hidden = shape.hidden;
        job.step(w.tiles(), 1, [=, &w, &input](int, int first, int last) {
            for (int t = first; t < last; t++)
                product(w, t, input, rows, [&](int r, Floats v) { v.store(branch_.get() + r * hidden + t * LANES); });
        });
        job.step(rows, pool.shares(rows), [=](int, int first, int last) {
            for (int r = first; r < last; r++) {
                float* const own = branch_.get() + r * hidden;
                rms_norm(own, after, shape.hidden, shape.eps, own);
                float* const to = x + r * hidden;
                for (size_t i = 0; i < hidden; i += LANES) (Floats::load(to + i) + Floats::load(own + i)).store(to + i);
            }
        });
        if (next) settle_all(job, rows, x, next);
    }

    // The gate's activation: x·σ(x), or GELU by tanh, which is x·σ(2·√(2/π)·(x + 0.044715·x³)).
    Floats activated(Floats x) const {
        const Floats one = Floats::all(1.0f);
        Floats by = Floats::zero() - x;
        if (gelu) by = by * fma(x * x, Floats::all(1.5957691216f * 0.044715f), Floats::all(1.5957691216f));
        return x / (one + exp(by));
    }

    // activated(gate)·up, quantised for `down` where it arises: two tiles are one group.
    void gate_up(Job& job, const Layer& layer, int rows) {
        job.step(layer.gate.tiles(), GROUP / LANES, [=, &layer](int, int first, int last) {
            for (int t = first; t < last; t += GROUP / LANES)
                for (int from = 0; from < rows; from += ROWS) gate_up_group(layer, t, from, std::min(ROWS, rows - from));
        });
    }

    void gate_up_group(const Layer& layer, int t, int from, int rows) {
        float inner[ROWS][GROUP];
        for (int half = 0; half < GROUP / LANES; half++) {
            Floats gate[ROWS], up[ROWS];
            tile_rows(layer.gate, t + half, input_, from, rows, gate);
            tile_rows(layer.up, t + half, input_, from, rows, up);
            for (int r = 0; r < rows; r++) {
                const Floats by = Floats::all(norm_[from + r]), x = gate[r] * by;
                (activated(x) * (up[r] * by)).store(inner[r] + half * LANES);
            }
        }
        hq_.put_each(rows, inner[0], [&](int r) { return std::pair(from + r, t * LANES / GROUP); });
    }
};

}  // namespace dspark
