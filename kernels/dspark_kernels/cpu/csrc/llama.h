// A Llama-like decoder over a ragged batch, whole layers at a time: norm and quantise, QKV with rotary and cache
// write, attention over what is there, output projection into the residual stream, gate·up with SiLU, down.
//
// Symbols: T rows of all streams, H hidden size, D head size, Hq query heads, Hk key heads, G = Hq / Hk.
// A row's result depends on that row and its own past alone, to the bit: see simd.h and matrix.h.
#pragma once

#include "attention.h"
#include "pool.h"

namespace dspark {

struct Layer {
    Matrix qkv, o, gate, up, down;
    Buffer<float> input_norm, post_norm, q_norm, k_norm;  // the last two: null where the family has none
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
        for (Own& own : own_) own.attention.reserve(s, longest);
        put_together(pass);
        pool.run([&](int thread) {
            Own& own = own_[thread];
            for (int l = 0; l < static_cast<int>(layers.size()); l++) {
                const Layer& layer = layers[l];
                const Cache cache = store.layer(l, s);
                normalise(x, layer.input_norm.get(), pass.rows, own.input);
                project(pool, thread, layer, cache, pass, own.input, 0, s.heads + 2 * s.kv_heads);
                pool.barrier();
                attend(pool, thread, cache, pass, own.attention);
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
        Attention attention;
    };
    struct Together {  // neighbouring rows of one stream
        int first, count;
    };
    std::vector<Own> own_;
    std::vector<Together> together_;
    Quantised aq_, hq_;
    Buffer<float> qkv_;
    size_t qkv_size_ = 0;

    static void reserve(Buffer<float>& buffer, size_t& size, size_t wanted) {
        if (wanted <= size) return;
        buffer = allocate<float>(wanted);
        size = wanted;
    }

    void put_together(const Pass& pass) {
        const int most = Attention::rows_at_once(shape);
        together_.clear();
        for (int r = 0; r < pass.rows; r++) {
            if (r && pass.first_slot[r] == pass.first_slot[r - 1] && together_.back().count < most)
                together_.back().count++;
            else
                together_.push_back({r, 1});
        }
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
                    if (is_key) write_key(s, cache, head - s.heads, pass.slot[r], x);
                    if (!is_query && !is_key) write_value(s, cache, head - s.heads - s.kv_heads, pass.slot[r], x);
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

    // By key head and what is attended to together, key head after key head.
    void attend(Pool& pool, int thread, const Cache& cache, const Pass& pass, Attention& attention) {
        const int together = static_cast<int>(together_.size());
        pool.each(thread, together * shape.kv_heads, 1, [&](int first, int last) {
            for (int item = first; item < last; item++) {
                const Together& rows = together_[item % together];
                attention.run(shape, cache, pass, rows.first, rows.count, item / together, qkv_.get(), aq_);
            }
        });
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
