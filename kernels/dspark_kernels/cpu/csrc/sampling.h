// Drawing tokens: rows of scores become weights in place, exp((score - greatest)/temperature), not yet divided by their
// sum; a uniform in [0, 1) times the sum is looked up among them. A row's result depends on that row alone.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace dspark {

inline Floats load_some(const float* from, int lanes) {  // the rest are zeros
    if (lanes >= LANES) return Floats::load(from);
    alignas(64) float some[LANES] = {};
    std::memcpy(some, from, sizeof(float) * lanes);
    return Floats::load(some);
}

inline void store_some(Floats v, int lanes, float* to) {
    if (lanes >= LANES) return v.store(to);
    alignas(64) float some[LANES];
    v.store(some);
    std::memcpy(to, some, sizeof(float) * lanes);
}

inline float greatest(const float* row, int count) {
    Floats most = Floats::all(-INFINITY);
    for (int i = 0; i < count; i += LANES) most = max(load_some(row + i, count - i).keep(count - i, -INFINITY), most);
    return max_of(most);
}

// Scores of row[first…last-1] into weights, zero where exp would no longer be a normal number and for NaN; their sum.
// `first` is a multiple of 16.
inline double weigh(float* row, int first, int last, float most, float temperature) {
    const Floats top = Floats::all(most), by = Floats::all(1.0f / temperature), low = Floats::all(-87.0f);
    double sum = 0;
    for (int i = first; i < last; i += LANES) {
        const int lanes = last - i;
        const Floats x = (load_some(row + i, lanes) - top) * by;
        const Floats w = pick(x, low, exp(x), Floats::zero()).keep(lanes, 0.0f);
        sum += sum_of(w);
        store_some(w, lanes, row + i);
    }
    return sum;
}

// The first index at which the running sum of weights lies above `at`: one whose weight is positive. Where rounding has
// left `at` to the end, the last positive one; where no weight is (a row of NaN), 0.
class Draw {
   public:
    explicit Draw(double at) : at_(at) {}

    // The weights of i…i+15, in order; whether it is one of them.
    bool see(int i, Floats weights) {
        const float here = sum_of(weights);
        if (!(here > 0.0f)) return false;
        first_ = i, last_ = weights, before_ = sum_;
        if (!(sum_ + here > at_)) {
            sum_ += here;
            return false;
        }
        return true;
    }
    int32_t index() const {
        alignas(64) float weight[LANES];
        last_.store(weight);
        double sum = before_;
        int32_t index = first_;
        for (int lane = 0; lane < LANES; lane++) {
            if (!(weight[lane] > 0.0f)) continue;
            index = first_ + lane;
            sum += weight[lane];
            if (sum > at_) break;
        }
        return index;
    }

   private:
    double at_, sum_ = 0, before_ = 0;  // of all that was seen, and of what came before `last_`
    int first_ = 0;
    Floats last_ = Floats::zero();
};

inline int32_t draw(const float* row, int count, double at) {
    Draw token(at);
    for (int i = 0; i < count && !token.see(i, load_some(row + i, count - i)); i += LANES) {}
    return token.index();
}

// max(share p - q, 0) of one row, as weights that add up to at most 1; q [drafts] stands at ids, ascending (null: all).
struct Rest {
    const float* p;  // weights [count]
    int count;
    float up;        // share / their sum
    const float* q;  // weights
    float q_up;      // 1 / their sum
    const int32_t* ids;
    int drafts;

    double sum() const {
        double sum = 0;
        each([&](int, Floats rest) { return sum += sum_of(rest), false; });
        return sum;
    }
    double taken() const {  // the sum of min(share p, q)
        double sum = 0;
        for (int i = 0; i < drafts; i += LANES) {
            const int lanes = std::min(LANES, drafts - i);
            alignas(64) float at[LANES] = {};
            for (int lane = 0; ids && lane < lanes; lane++) at[lane] = p[ids[i + lane]];
            const Floats own = ids ? Floats::load(at) : load_some(p + i, lanes);
            sum += sum_of(min(own * Floats::all(up), load_some(q + i, lanes) * Floats::all(q_up)));
        }
        return sum;
    }
    int32_t draw(double at) const {
        Draw token(at);
        each([&](int i, Floats rest) { return token.see(i, rest); });
        return token.index();
    }

   private:
    template <typename Use>  // use(i, 16 of them) until it says true
    void each(Use use) const {
        int next = 0;
        for (int i = 0; i < count; i += LANES) {
            alignas(64) float rest[LANES];
            (load_some(p + i, count - i) * Floats::all(up)).store(rest);
            if (ids) {
                for (; next < drafts && ids[next] < i + LANES; next++) {
                    float &at = rest[ids[next] - i], taken = q[next] * q_up;
                    at = at > taken ? at - taken : 0.0f;
                }
            } else {
                const Floats taken = load_some(q + i, count - i) * Floats::all(q_up);
                max(Floats::load(rest) - taken, Floats::zero()).store(rest);
            }
            if (use(i, Floats::load(rest))) return;
        }
    }
};

// A token of that rest; of p, whose weights add up to `total`, where rounding has left nothing of it.
inline int32_t draw_rest(const Rest& rest, double total, double uniform) {
    const double left = rest.sum();
    return left > 0 ? rest.draw(uniform * left) : draw(rest.p, rest.count, uniform * total);
}

// Rows of weights with their sums.
struct Rows {
    const float* weights;  // [rows, width]
    const double* sums;    // [rows]
    int width;

    const float* row(int k) const { return weights + static_cast<size_t>(k) * width; }
    double probability(int k, int32_t at) const { return row(k)[at] / sums[k]; }
};

// Block verification of `length` drafts, at least one; what it does and why: rejection() in spec/accept.py.
// p: a row more than drafts; tokens are p's indices of the drafts, indices are q's. Sets the bonus token.
inline int judge(const Rows& p, const Rows& q, const int32_t* ids, const int32_t* tokens, const int32_t* indices,
                 int length, const double* accept, double uniform, int32_t* bonus) {
    std::vector<double> share(length + 1, 1.0);
    for (int k = 0; k < length; k++) {
        const double likelier = share[k] * p.probability(k, tokens[k]) / q.probability(k, indices[k]);
        share[k + 1] = std::min(likelier, 1.0);  // NaN stays
    }
    if (accept[length - 1] < share[length]) {
        *bonus = draw(p.row(length), p.width, uniform * p.sums[length]);
        return length;
    }
    const auto rest = [&](int k) {
        const float up = static_cast<float>(share[k] / p.sums[k]), q_up = static_cast<float>(1.0 / q.sums[k]);
        return Rest{p.row(k), p.width, up, q.row(k), q_up, ids, q.width};
    };
    int accepted = length - 1;
    for (; accepted > 0; accepted--) {
        if (accept[accepted - 1] >= share[accepted]) continue;
        const double missing = share[accepted] - rest(accepted).taken();
        if (accept[accepted - 1] * (missing + 1.0 - share[accepted]) < missing) break;
    }
    *bonus = draw_rest(rest(accepted), p.sums[accepted], uniform);
    return accepted;
}

}  // namespace dspark
