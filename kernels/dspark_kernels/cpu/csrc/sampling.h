// Drawing tokens: rows of scores become weights in place, exp((score - greatest)/temperature), not yet divided by their
// sum, and nothing where top-k, top-p or min-p leave a token out; a uniform in [0, 1) times the sum is looked up among them.
// A row's result depends on that row alone.
#pragma once

#include <algorithm>
#include <functional>
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

// Infinite where a score is no number, as by Best in matrix.h: nothing weighs anything then.
inline float greatest(const float* row, int count) {
    Floats most = Floats::all(-INFINITY), sum = Floats::zero();
    int i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {  // two at a time: each sum waits for the one before
        const Floats a = Floats::load(row + i), b = Floats::load(row + i + LANES);
        most = max(max(a, b), most), sum = sum + (a + b);
    }
    for (; i < count; i += LANES) {
        const Floats scores = load_some(row + i, count - i).keep(count - i, -INFINITY);
        most = max(scores, most), sum = sum + scores;
    }
    return std::isnan(sum_of(sum)) ? INFINITY : max_of(most);
}

// What a row's token is drawn by, as Python hands it over; temperature 0 takes the greatest.
struct Sampling {
    float temperature, top_p, min_p;  // 1 and 0: off
    int32_t top_k;                    // 0: off
};

// The k-th greatest of row[count] or something at most as great, with fewer than some hundred above it in all likelihood:
// the k-th greatest of the greatest of pieces.
inline float about_greatest(const float* row, int count, int k, std::vector<float>& room) {
    const int vectors = (count + LANES - 1) / LANES, wanted = std::max(64, k);
    const int piece = std::max(1, vectors / wanted);  // of so many vectors, lane by lane: 16 maxima
    room.clear();
    for (int v = 0; v < vectors; v += piece) {
        Floats most = Floats::all(-INFINITY);
        for (int i = v * LANES; i < std::min(count, (v + piece) * LANES); i += LANES)
            most = max(load_some(row + i, count - i).keep(count - i, -INFINITY), most);
        room.resize(room.size() + LANES);
        most.store(room.data() + room.size() - LANES);
    }
    if (static_cast<size_t>(k) > room.size()) return -INFINITY;
    std::nth_element(room.begin(), room.begin() + (k - 1), room.end(), std::greater<float>());
    return room[k - 1];
}

// Every number of row[count] that is at least `least`, in order.
inline void those_from(const float* row, int count, float least, std::vector<float>& to) {
    to.clear();
    for (int i = 0; i < count; i += LANES) {
        const Floats v = load_some(row + i, count - i).keep(count - i, -INFINITY);
        if (max_of(v) < least) continue;
        alignas(64) float lanes[LANES];
        v.store(lanes);
        for (const float x : lanes)
            if (x >= least) to.push_back(x);
    }
}

// The k-th greatest of row[count]; -∞ where everything is to be kept.
inline float kth_greatest(const float* row, int count, int k, std::vector<float>& room) {
    if (k <= 0 || k >= count) return -INFINITY;
    those_from(row, count, about_greatest(row, count, k, room), room);
    if (static_cast<size_t>(k) > room.size()) return -INFINITY;  // NaN among them: nothing weighs anything then
    std::nth_element(room.begin(), room.begin() + (k - 1), room.end(), std::greater<float>());
    return room[k - 1];
}

// Scores of row[first…last-1] that are at least `least` into weights, zero for the others, where exp would no longer be a
// normal number and for NaN; their sum. `first` is a multiple of 16.
inline double weigh(float* row, int first, int last, float most, float temperature, float least) {
    const Floats top = Floats::all(most), by = Floats::all(1.0f / temperature), low = Floats::all(-87.0f);
    const Floats below = Floats::all(least);
    double sum = 0;
    for (int i = first; i < last; i += LANES) {
        const int lanes = last - i;
        const Floats score = load_some(row + i, lanes);
        if (least > -INFINITY && max_of(score.keep(lanes, -INFINITY)) < least) {
            store_some(Floats::zero(), lanes, row + i);
            continue;
        }
        const Floats x = pick(below, score, Floats::all(-INFINITY), (score - top) * by);
        const Floats w = pick(x, low, exp(x), Floats::zero()).keep(lanes, 0.0f);
        sum += sum_of(w);
        store_some(w, lanes, row + i);
    }
    return sum;
}

// What top-p and min-p leave of weights row[count], whose greatest is 1: the others become nothing; the sum of the rest.
// Tokens of one weight stay or go together, as in `truncate` (drawing/reference.py).
inline double cut(float* row, int count, double total, const Sampling& s, std::vector<float>& room) {
    float least = s.min_p;
    if (s.top_p < 1.0f) {
        const double wanted = static_cast<double>(s.top_p) * total;
        // the nucleus is nearly always above a two hundredth of the greatest; where it is not, look further down
        for (float from = 1.0f / 256; from > 0.0f; from = from > 1e-30f ? from / 65536 : 0.0f) {
            those_from(row, count, from, room);
            double sum = 0;
            for (const float w : room) sum += w;
            if (sum < wanted) continue;
            std::sort(room.begin(), room.end(), std::greater<float>());
            sum = 0;
            for (const float w : room) {
                sum += w;
                if (sum < wanted) continue;
                least = std::max(least, w);
                break;
            }
            break;
        }
    }
    if (!(least > 0.0f)) return total;
    double sum = 0;
    const Floats bound = Floats::all(least);
    for (int i = 0; i < count; i += LANES) {
        const Floats w = load_some(row + i, count - i);
        const Floats kept = pick(bound, w, Floats::zero(), w).keep(count - i, 0.0f);
        sum += sum_of(kept);
        store_some(kept, count - i, row + i);
    }
    return sum;
}

// Scores of a whole row into the weights that it is drawn by; their sum.
inline double weigh_row(float* row, int count, const Sampling& s, std::vector<float>& room) {
    const float least = kth_greatest(row, count, s.top_k, room);
    return cut(row, count, weigh(row, 0, count, greatest(row, count), s.temperature, least), s, room);
}

// The first index at which the running sum of weights lies above `at`: one whose weight is positive. Where rounding has
// left `at` to the end, the last positive one; where no weight is (a row of NaN), -1.
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
        int32_t index = -1;
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

// Block verification of `length` drafts, at least one; what it does and why: Distributions.judge in models/distributions.py.
// p: a row more than drafts; tokens are p's indices of the drafts, indices are q's. Sets the bonus token, -1 where the row it
// is drawn from has none. Drafts behind such a row are not judged: nothing can follow it.
inline int judge(const Rows& p, const Rows& q, const int32_t* ids, const int32_t* tokens, const int32_t* indices,
                 int length, const double* accept, double uniform, int32_t* bonus) {
    for (int k = 0; k < length; k++)
        if (!(p.sums[k] > 0.0)) length = k;
    std::vector<double> share(length + 1, 1.0);
    for (int k = 0; k < length; k++) {
        const double likelier = share[k] * p.probability(k, tokens[k]) / q.probability(k, indices[k]);
        share[k + 1] = std::min(likelier, 1.0);  // NaN stays
    }
    if (!length || accept[length - 1] < share[length]) {
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
