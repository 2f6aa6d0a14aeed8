// What Python sees: plain C, by ctypes. Handles are made and freed in pairs. Calls return a handle or true; null or
// false means that memory or threads ran out, or (dspark_refused) that rows do not stand where they could, and dspark_error
// has the words. The caller has checked shapes: pointers are trusted here.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "blocks.h"
#include "edits.h"
#include "llama.h"
#include "measure.h"
#include "race.h"

using namespace dspark;

namespace {

// What was asked for cannot be: the caller's error.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

thread_local std::string last_error;
thread_local bool last_refused = false;  // the error is the caller's

template <typename F>
auto guarded(F f) -> decltype(f()) {
    try {
        last_error.clear();
        last_refused = false;
        return f();
    } catch (const Refused& error) {
        last_error = error.what();
        last_refused = true;
        return {};
    } catch (const std::exception& error) {
        last_error = error.what();
        return {};
    }
}

Buffer<float> copy(const float* from, size_t count) {
    if (!from) return nullptr;
    auto to = allocate<float>(count);
    std::memcpy(to.get(), from, count * sizeof(float));
    return to;
}

struct Found {  // the largest score that a thread has seen for one row
    float score = -INFINITY;
    int32_t index = INT32_MAX;

    void see(const Found& other) {  // of equal ones the first
        if (other.score > score || (other.score == score && other.index < index)) *this = other;
    }
    // -1 where there is none: everything is ruled out, nothing is a number, or sums have run over.
    int32_t token() const { return std::isfinite(score) ? index : -1; }
};

struct Context {  // a pool, and room for what products need
    Quantised input;
    std::vector<Found> found;  // [threads, rows]
    std::vector<double> sums;  // [parts, rows], of weights; there are as many parts of a row as threads
    std::vector<Leader> ahead;  // likewise, of races
    std::vector<float> least;  // of each row, the score from which on tokens count
    std::vector<std::vector<float>> rooms;  // of each thread
    Buffer<Best> best;         // [threads, rows]
    size_t best_size = 0;
    std::vector<int32_t> position, slot, first_slot, visible, from;  // of a pass's rows
    Buffer<float> hidden;
    size_t hidden_size = 0;
    Pool pool;  // the last: its threads end first
    explicit Context(int threads) : rooms(std::max(1, threads)), pool(threads) {}

    // Before a job begins: memory that runs out within one cannot be told.
    void reserve_rooms(int width) {
        for (auto& room : rooms) room.reserve(width + LANES);
    }
    void reserve_best(int rows) {
        const size_t wanted = static_cast<size_t>(pool.size()) * rows;
        if (wanted <= best_size) return;
        best = allocate<Best>(wanted);
        best_size = wanted;
    }
};

constexpr int TILES = 16;  // of a large product that a thread takes at a time

float dot(const float* a, const float* b, int size) {  // size: a multiple of 16
    Floats sum = Floats::zero();
    for (int i = 0; i < size; i += LANES) sum = fma(Floats::load(a + i), Floats::load(b + i), sum);
    return sum_of(sum);
}

// Quants of x by w = d·q + m, and what they lose: the sum of squares.
float round_group(const float* x, float scale, float least, float most, uint8_t* q) {
    const float up = scale != 0.0f ? 1.0f / scale : 0.0f;
    float lost = 0.0f;
    for (int k = 0; k < GROUP; k++) {
        const float n = std::min(most, std::max(0.0f, std::nearbyint((x[k] - least) * up)));
        const float off = scale * n + least - x[k];
        lost += off * off;
        q[k] = static_cast<uint8_t>(n);
    }
    return lost;
}

constexpr uint16_t NO_NUMBER = 0x7e00;  // a half; the scale of weights that are none, or too large to be rounded

// Floats to quants around zero. Of 8 bits so that the largest fits; of fewer the scale that loses least.
uint16_t quantise_around_zero(const float* x, Kind kind, uint8_t* best) {
    const float middle = middle_of(kind);
    const float most = std::max(-*std::min_element(x, x + GROUP), *std::max_element(x, x + GROUP));
    uint8_t q[GROUP];
    float least = INFINITY;
    uint16_t best_d = NO_NUMBER;
    std::fill_n(best, GROUP, static_cast<uint8_t>(middle));
    const auto attempt = [&](float d) {
        const uint16_t half = half_of(d);
        const float scale = float_of(half), lost = round_group(x, scale, -middle * scale, 2 * middle - 1, q);
        if (!(lost < least)) return;
        least = lost, best_d = half;
        std::copy_n(q, GROUP, best);
    };
    if (kind == EIGHT) return attempt(most / 127.0f), best_d;
    const float furthest = *std::max_element(x, x + GROUP) == most ? most : -most;  // goes to the longer end, quant 0
    for (int i = -6; i <= 6; i++) attempt(furthest / (-middle + 0.1f * static_cast<float>(i)));
    return best_d;
}

// Floats to quants with m of its own, between ends that lose least: those of the group, or somewhat closer together, each
// moved once to where least squares would have it for the quants that it gives.
void quantise_between(const float* x, Kind kind, Quants& to) {
    const float most = 2 * middle_of(kind) - 1;
    const float low = *std::min_element(x, x + GROUP), high = *std::max_element(x, x + GROUP);
    uint8_t q[GROUP];
    float least = INFINITY;
    to.d = NO_NUMBER, to.m = half_of(low);
    std::fill_n(to.q, GROUP, uint8_t{0});
    const auto attempt = [&](float d, float m) {
        const uint16_t half_d = half_of(d), half_m = half_of(m);
        const float lost = round_group(x, float_of(half_d), float_of(half_m), most, q);
        if (!(lost < least)) return;
        least = lost, to.d = half_d, to.m = half_m;
        std::copy_n(q, GROUP, to.q);
    };
    for (const float part : {1.0f, 0.92f, 0.84f, 0.76f}) {
        const float d = part * (high - low) / most, m = low + (1.0f - part) * (high - low) / 2.0f;
        attempt(d, m);
        float n = 0.0f, nn = 0.0f, xs = 0.0f, nx = 0.0f;
        for (int k = 0; k < GROUP; k++) {
            const float v = q[k];
            n += v, nn += v * v, xs += x[k], nx += v * x[k];
        }
        const float spread = GROUP * nn - n * n;
        if (!(spread > 0.0f)) continue;
        const float fitted = (GROUP * nx - n * xs) / spread;
        if (fitted > 0.0f) attempt(fitted, (xs - fitted * n) / GROUP);
    }
}

Quants quantise_group(Kind kind, const float* x) {
    Quants to{};
    if (has_m(kind))
        quantise_between(x, kind, to);
    else
        to.d = quantise_around_zero(x, kind, to.q);
    return to;
}

// Of what was found for a row by all; the first of equal ones.
Found found_of(const Context& context, int row, int rows, int parts) {
    Found most;
    for (int part = 0; part < parts; part++) {
        const Found& theirs = context.found[static_cast<size_t>(part) * rows + row];
        if (theirs.score > most.score || (theirs.score == most.score && theirs.index < most.index)) most = theirs;
    }
    return most;
}

// out [rows, stride] = x [rows, inputs] · Wᵀ; stride ≥ outputs. best [rows]: each row's argmax, -1 where there is none. Either
// may be null.
void multiply(Context* context, const Matrix& w, const float* x, int rows, float* out, int stride, int32_t* best) {
    Pool& pool = context->pool;
    context->input.reserve(rows, w.inputs);
    if (best) context->reserve_best(rows);
    if (best) context->found.assign(static_cast<size_t>(pool.size()) * rows, Found());
    Job job;
    job.step(rows, pool.shares(rows), [&](int, int first, int last) {
        for (int r = first; r < last; r++) context->input.put_row(r, x + static_cast<size_t>(r) * w.inputs);
    });
    job.step(w.tiles(), TILES, [&](int thread, int first, int last) {
        Best* const own = best ? context->best.get() + static_cast<size_t>(thread) * rows : nullptr;
        for (int r = 0; best && r < rows; r++) own[r] = Best();
        for (int t = first; t < last; t++) {
            const int lanes = std::min(LANES, w.outputs - t * LANES);
            product(w, t, context->input, rows, [&](int r, Floats v) {
                if (best) own[r].see(v.keep(lanes, -INFINITY), t);
                if (out) store_some(v, lanes, out + static_cast<size_t>(r) * stride + t * LANES);
            });
        }
        for (int r = 0; best && r < rows; r++) {  // tiles come in any order, but of equal scores the first counts
            Found& found = context->found[static_cast<size_t>(thread) * rows + r];
            own[r].onto(found.score, found.index);
        }
    });
    pool.run(job);
    for (int r = 0; best && r < rows; r++) best[r] = found_of(*context, r, rows, pool.size()).token();
}

// Who won a row's race, which was run in parts; -1 where no weight is.
int32_t winner(const std::vector<Leader>& ahead, int row, int rows, int parts) {
    Leader best;
    for (int part = 0; part < parts; part++) {
        const Leader& theirs = ahead[static_cast<size_t>(part) * rows + row];
        if (theirs.index >= 0) best.see(theirs.ratio, theirs.index);
    }
    return best.index;
}

// A drafter's sequential and confidence head, and its vocabulary. Without a sequential head (w2 null) there is no bias,
// without confidence (null) no logit.
struct Heads {
    const Matrix* w2;
    const uint16_t* w1;
    const float* confidence;
    const int32_t* draft_ids;  // ascending; null: all
    int32_t rank, vocabulary, hidden_size, with_markov;
    int32_t w1_of_drafts;  // w1 has rows of the draft vocabulary only; other tokens' are zero
    float confidence_bias;

    // W1's row of a token; null: zeros. index: among the draft vocabulary where that is known, or -1.
    const uint16_t* row_of(int32_t token, int32_t index) const {
        if (token < 0) return nullptr;  // the slot before has none
        if (!w1_of_drafts || !draft_ids) return w1 + static_cast<size_t>(token) * rank;
        if (index < 0) {
            const int32_t* at = std::lower_bound(draft_ids, draft_ids + vocabulary, token);
            if (at == draft_ids + vocabulary || *at != token) return nullptr;
            index = static_cast<int32_t>(at - draft_ids);
        }
        return w1 + static_cast<size_t>(index) * rank;
    }
};

struct Drafts {  // of R streams and γ slots
    int32_t *tokens, *indices;  // target ids, and draft vocabulary
    double* totals;             // sums of weights, where sampled
    float* logits;              // of confidence
};

// The largest of a whole row: which piece it is in, and then where there.
Found best_of(const float* row, int count) {
    constexpr int PIECE = 256 * LANES;
    float most = -INFINITY;
    int at = 0;
    for (int from = 0; from < count; from += PIECE) {
        const float here = greatest(row + from, std::min(PIECE, count - from));
        if (here > most) most = here, at = from;
    }
    Best best;
    for (int i = at; i < std::min(at + PIECE, count); i += LANES)
        best.see(load_some(row + i, count - i).keep(count - i, -INFINITY), i / LANES);
    Found found;
    best.onto(found.score, found.index);
    return found;
}

// Of each stream; empty where nothing is edited.
std::vector<std::optional<Prefix>> prefixes_of(const Edits* const* edits, int streams, int rows) {
    std::vector<std::optional<Prefix>> prefixes(edits ? streams : 0);
    for (size_t r = 0; r < prefixes.size(); r++)
        if (edits[r]) prefixes[r].emplace(*edits[r], rows);
    return prefixes;
}

// The sequential head for R streams at once: token k of stream r is drawn from base [R, γ, Vd] plus W2·W1[token k-1];
// its confidence logit is w·[h; W1[token k-1]] + b. Temperature 0 (sampling null: everybody's) takes the greatest. Else base
// becomes weights where it stands, and `uniforms` [R, γ] draws among them, or a race does that begins at noise [R] (null:
// nobody's), the first slot's position. Scores are edited before anything is drawn by them: edits [R], of the draft
// vocabulary; null for those of streams that are as they come, or altogether. Token and index are -1 where there is none:
// what later slots draw is worth nothing then.
void walk(Context* context, const Heads& heads, float* base, const float* hidden, int streams, int gamma,
          const int32_t* anchors, const Sampling* sampling, const double* uniforms, const Noise* noise,
          const Edits* const* edits, const Drafts& to) {
    const int parts = context->pool.size(), vocabulary = heads.vocabulary, rank = heads.rank;  // parts of each row
    const int tiles = (vocabulary + LANES - 1) / LANES, shares = context->pool.shares(streams);
    const Matrix* const w2 = heads.w2;
    const auto scores = [&](int r, int k) { return base + (static_cast<size_t>(r) * gamma + k) * vocabulary; };
    const auto sampled = [&](int r) { return sampling && sampling[r].temperature > 0.0f; };
    const auto raced = [&](int r) { return noise && sampled(r) && noise[r].position >= 0; };
    bool any_sampled = false, any_top_k = false, any_raced = false;
    for (int r = 0; r < streams; r++)
        any_sampled |= sampled(r), any_top_k |= sampled(r) && sampling[r].top_k > 0, any_raced |= raced(r);
    auto prefixes = prefixes_of(edits, streams, gamma);
    const auto edited = [&](int r) { return edits && edits[r]; };
    context->least.assign(streams, -INFINITY);
    if (any_sampled) context->reserve_rooms(vocabulary);
    if (w2) context->input.reserve(streams, rank);
    context->found.resize(static_cast<size_t>(parts) * streams);
    context->sums.resize(context->found.size());
    context->ahead.resize(context->found.size());

    const auto begin = [&](int k, int r) {
        alignas(64) float e[4096];
        const float* h = hidden + static_cast<size_t>(r * gamma + k) * heads.hidden_size;
        if (heads.w1) {
            const int before = r * gamma + k - 1;
            const uint16_t* row = k ? heads.row_of(to.tokens[before], to.indices[before]) : heads.row_of(anchors[r], -1);
            for (int i = 0; i < rank; i += LANES) (row ? Floats::load_half(row + i) : Floats::zero()).store(e + i);
        }
        if (w2) context->input.put_row(r, e);
        if (heads.confidence) {
            float logit = heads.confidence_bias + dot(h, heads.confidence, heads.hidden_size);
            if (heads.with_markov) logit += dot(e, heads.confidence + heads.hidden_size, rank);
            to.logits[r * gamma + k] = logit;
        }
    };
    const auto score = [&](int k, int part) {
        Found* const found = context->found.data() + static_cast<size_t>(part) * streams;
        int first, last;
        share(tiles, part, parts, &first, &last);
        for (int from = 0; from < streams; from += ROWS) {
            const int some = std::min(ROWS, streams - from);
            Best best[ROWS];
            for (int t = first; t < last; t++) {
                Floats bias[ROWS];
                for (int r = 0; r < some; r++) bias[r] = Floats::zero();
                if (w2) tile_rows(*w2, t, context->input, from, some, bias);
                const int lanes = std::min(LANES, vocabulary - t * LANES);
                for (int r = 0; r < some; r++) {
                    float* at = scores(from + r, k) + t * LANES;
                    const Floats score = load_some(at, lanes) + bias[r];
                    if (w2 && (sampled(from + r) || edited(from + r))) store_some(score, lanes, at);
                    best[r].see(score.keep(lanes, -INFINITY), t);
                }
            }
            for (int r = 0; r < some; r++) {
                found[from + r] = Found();
                best[r].onto(found[from + r].score, found[from + r].index);
            }
        }
    };
    const auto edit = [&](int k, int r) {
        if (!edited(r)) return;
        prefixes[r]->apply(scores(r, k));
        for (int part = 1; part < parts; part++) context->found[static_cast<size_t>(part) * streams + r] = Found();
        context->found[r] = best_of(scores(r, k), vocabulary);
    };
    const auto limit = [&](int k, int r, int thread) {
        if (sampled(r))
            context->least[r] = kth_greatest(scores(r, k), vocabulary, sampling[r].top_k, context->rooms[thread]);
    };
    const auto weigh_part = [&](int k, int part) {
        int first, last;
        share(tiles, part, parts, &first, &last);
        for (int r = 0; r < streams; r++)
            if (sampled(r))
                context->sums[static_cast<size_t>(part) * streams + r] =
                    weigh(scores(r, k), first * LANES, std::min(last * LANES, vocabulary),
                          found_of(*context, r, streams, parts).score, sampling[r].temperature, context->least[r]);
    };
    const auto cut_row = [&](int k, int r, int thread) {
        if (!sampled(r)) return;
        double total = 0;
        for (int part = 0; part < parts; part++) total += context->sums[static_cast<size_t>(part) * streams + r];
        to.totals[r * gamma + k] = cut(scores(r, k), vocabulary, total, sampling[r], context->rooms[thread]);
    };
    const auto race_part = [&](int k, int part) {
        int first, last;
        share(tiles, part, parts, &first, &last);
        for (int r = 0; r < streams; r++)
            if (raced(r))
                context->ahead[static_cast<size_t>(part) * streams + r] =
                    race(scores(r, k), first * LANES, std::min(last * LANES, vocabulary), heads.draft_ids,
                         {noise[r].seed, noise[r].position + k});
    };
    const auto decide = [&](int k, int r) {
        const int at = r * gamma + k;
        int32_t index = found_of(*context, r, streams, parts).token();
        if (raced(r))
            index = winner(context->ahead, r, streams, parts);
        else if (sampled(r))
            index = draw(scores(r, k), vocabulary, uniforms[at] * to.totals[at]);
        if (edited(r) && index >= 0) prefixes[r]->add(index);
        to.indices[at] = index;
        to.tokens[at] = heads.draft_ids && index >= 0 ? heads.draft_ids[index] : index;
    };

    Job job;
    const auto by_row = [&](auto part) {
        job.step(streams, shares, [part](int thread, int first, int last) {
            for (int r = first; r < last; r++) part(r, thread);
        });
    };
    const auto by_part = [&](auto part) {
        job.step(parts, 1, [part](int, int first, int last) {
            for (int i = first; i < last; i++) part(i);
        });
    };
    by_row([&](int r, int) { begin(0, r); });
    for (int k = 0; k < gamma; k++) {
        by_part([&, k](int part) { score(k, part); });
        if (edits) by_row([&, k](int r, int) { edit(k, r); });
        if (any_top_k) by_row([&, k](int r, int thread) { limit(k, r, thread); });
        if (any_sampled) by_part([&, k](int part) { weigh_part(k, part); });
        if (any_raced) {
            by_row([&, k](int r, int thread) { cut_row(k, r, thread); });
            by_part([&, k](int part) { race_part(k, part); });
        }
        by_row([&, k](int r, int thread) {
            if (!any_raced) cut_row(k, r, thread);
            decide(k, r);
            if (k + 1 < gamma) begin(k + 1, r);
        });
    }
    context->pool.run(job);
}

// What rows of a pass read and write goes by where they stand.
void check(const Shape& s, const Pass& pass, int64_t slots, int ring) {
    const auto outside = [](const char* what, int64_t limit) {
        throw Refused(std::string(what) + " outside 0 … " + std::to_string(limit - 1));
    };
    for (int r = 0; r < pass.rows; r++) {
        if (pass.position[r] < 0 || pass.position[r] >= s.positions) outside("positions", s.positions);
        if (pass.slot[r] < 0 || pass.slot[r] >= slots) outside("slots", slots);
        if (!pass.first_slot) continue;
        const int from = pass.from ? pass.from[r] : 0;
        if (from < 0 || pass.visible[r] <= from || pass.first_slot[r] < 0) throw Refused("rows that see nothing");
        if (pass.first_slot[r] % LANES) throw Refused("a stream that begins within a tile of 16");
        if (ring && pass.visible[r] - from > ring) throw Refused("rows see more than a ring of " + std::to_string(ring));
        const int64_t last = ring ? std::min(pass.visible[r], ring) : pass.visible[r];
        if (pass.first_slot[r] + last > slots) outside("rows see slots", slots);
    }
}

// Neighbouring rows of each stream; where [streams, 3]: its first slot, its first row's position, its rows. A row sees what
// comes before it and itself; or, as rows of a draft block, all rows of its stream and of what is before them `window`
// positions (0: all). Of a store with a ring the first slot is the ring's.
Pass lay_out(Context* context, int streams, const int32_t* where, bool causal, int window, int ring) {
    Context& c = *context;
    for (auto* list : {&c.position, &c.slot, &c.first_slot, &c.visible, &c.from}) list->clear();
    for (int i = 0; i < streams; i++, where += 3) {
        for (int r = 0; r < where[2]; r++) {
            const int position = where[1] + r;
            c.position.push_back(position);
            c.slot.push_back(where[0] + (ring ? position % ring : position));
            c.first_slot.push_back(where[0]);
            c.visible.push_back(where[1] + (causal ? r + 1 : where[2]));
            c.from.push_back(window ? std::max(0, where[1] - window) : 0);
        }
    }
    return {static_cast<int>(c.position.size()), c.position.data(), c.slot.data(), c.first_slot.data(), c.visible.data(),
            c.from.data()};
}

// A table of rows that stay in their file, an embedding of which a pass reads few: blocks of a GGUF type from `offset` on.
// The descriptor is ours: the file may be renamed or deleted; of one that is cut short rows are refused.
struct FileTable {
    int file, type;
    int64_t offset;
    size_t row_bytes;

    FileTable(int fd, int64_t offset, int inputs, int type)
        : file(fcntl(fd, F_DUPFD_CLOEXEC, 0)), type(type), offset(offset) {
        if (file < 0) throw std::runtime_error(std::string("a descriptor cannot be had twice: ") + std::strerror(errno));
        const Layout layout = layout_of(type);
        row_bytes = static_cast<size_t>(inputs / GROUP / layout.groups) * layout.bytes;
    }
    ~FileTable() { close(file); }
    FileTable(const FileTable&) = delete;
    FileTable& operator=(const FileTable&) = delete;

    void row(int index, float* out) const {
        std::vector<uint8_t> bytes(row_bytes);
        const int64_t from = offset + index * static_cast<int64_t>(row_bytes);
        for (size_t done = 0; done < row_bytes;) {
            const ssize_t got = pread(file, bytes.data() + done, row_bytes - done, from + static_cast<int64_t>(done));
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) throw Refused("the model file was cut short or cannot be read any more");
            done += static_cast<size_t>(got);
        }
        const Layout layout = layout_of(type);
        for (size_t at = 0; at < row_bytes; at += layout.bytes, out += layout.groups * GROUP)
            read_block(bytes.data() + at, type, [&](int i, const Group& g) { floats_of(g, type, out + i * GROUP); });
    }
};

struct Table {  // an embedding: packed, or in its file
    int outputs, inputs;
    const Matrix* packed;
    std::unique_ptr<FileTable> filed;

    void row(int index, float* out) const { filed ? filed->row(index, out) : packed->row(index, out); }
};

void rows_of(const Table& m, float scale, const int32_t* ids, int count, float* out) {
    for (int i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= m.outputs)
            throw Refused("channels outside 0 … " + std::to_string(m.outputs - 1));
        float* const row = out + static_cast<size_t>(i) * m.inputs;
        m.row(ids[i], row);
        for (int k = 0; scale != 1.0f && k < m.inputs; k++) row[k] *= scale;
    }
}

// x [rows, hidden] through all layers, then the final norm, both in place. tap_layers: -1 is x as it comes.
void forward(Context* context, Llama* model, const Pass& pass, const Store& store, float* x, const int32_t* tap_layers,
             int taps, float* tap_out) {
    const Shape& s = model->shape;
    check(s, pass, store.slots, store.ring);
    for (int i = 0; i < taps; i++)
        for (int r = 0; r < (tap_layers[i] < 0 ? pass.rows : 0); r++)
            std::memcpy(tap_out + (static_cast<size_t>(r) * taps + i) * s.hidden, x + static_cast<size_t>(r) * s.hidden,
                        sizeof(float) * s.hidden);
    model->run(context->pool, pass, store, x, tap_layers, taps, tap_out);
    for (int r = 0; r < pass.rows; r++) {
        float* at = x + static_cast<size_t>(r) * s.hidden;
        rms_norm(at, model->final_norm.get(), s.hidden, s.eps, at);
    }
}

float* hidden_of(Context* context, int rows, int hidden) {
    make_room(context->hidden, context->hidden_size, static_cast<size_t>(rows) * hidden);
    return context->hidden.get();
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

const char* dspark_isa() { return ISA; }
const char* dspark_error() { return last_error.c_str(); }
bool dspark_refused() { return last_refused; }  // what was asked cannot be, whatever memory there is

Context* dspark_context(int threads) {
    return guarded([&] {
        if (!allow_matrix_unit()) throw std::runtime_error("the system does not allow the use of AMX");
        return new Context(threads);
    });
}
void dspark_free_context(Context* context) { delete context; }

// --- matrices ---

Matrix* dspark_matrix(int outputs, int inputs, int kind) {
    return guarded([&] { return new Matrix(outputs, inputs, static_cast<Kind>(kind)); });
}
void dspark_free_matrix(Matrix* m) { delete m; }
int64_t dspark_matrix_bytes(const Matrix* m) { return static_cast<int64_t>(m->bytes()); }

// The matrix from rows of `source`, channel i from row i, or rows[i].
bool dspark_pack(Context* context, Matrix* to, const int32_t* rows, const void* source, int type) {
    return guarded([&] {
        const int groups = to->groups();
        const Layout layout = layout_of(type);
        Job job;
        job.step(to->tiles(), 1, [&](int, int from, int until) {
            Quants block[8][LANES];  // of the groups of a block, all channels of a tile
            for (int t = from; t < until; t++) {
                const int lanes = std::min(LANES, to->outputs - t * LANES);
                std::memset(static_cast<void*>(block), 0, sizeof(block));
                for (int g = 0; g < groups; g += layout.groups) {
                    for (int lane = 0; lane < lanes; lane++) {
                        const size_t row = rows ? rows[t * LANES + lane] : t * LANES + lane;
                        const size_t at = (row * (groups / layout.groups) + g / layout.groups) * layout.bytes;
                        read_block(static_cast<const uint8_t*>(source) + at, type, [&](int i, const Group& group) {
                            Quants& own = block[i][lane];
                            if (!group.exact) {
                                own = quantise_group(to->kind, group.x);
                                return;
                            }
                            std::memcpy(own.q, group.q, GROUP);
                            std::memcpy(own.in_block, group.in_block, 2);
                            own.d = half_of(group.d), own.m = half_of(group.m);
                        });
                    }
                    for (int i = 0; i < layout.groups; i++) to->put(t, g + i, block[i]);
                }
            }
        });
        context->pool.run(job);
        return true;
    });
}

// Channels of one matrix as the channels of another of the same width and kind: no rounding.
void dspark_take(const Matrix* from, const int32_t* rows, int count, Matrix* to) {
    for (int t = 0; t < to->tiles(); t++) {
        for (int g = 0; g < from->groups(); g++) {
            Quants of[LANES] = {};
            for (int lane = 0; lane < std::min(LANES, count - t * LANES); lane++) of[lane] = from->get(rows[t * LANES + lane], g);
            to->put(t, g, of);
        }
    }
}

// An embedding: of a matrix, which must outlive it, or rows [outputs, inputs] of GGUF's blocks in a file.
Table* dspark_table(const Matrix* packed) {
    return guarded([&] { return new Table{packed->outputs, packed->inputs, packed, nullptr}; });
}
Table* dspark_file_table(int outputs, int inputs, int type, int file, int64_t offset) {
    return guarded([&] {
        return new Table{outputs, inputs, nullptr, std::make_unique<FileTable>(file, offset, inputs, type)};
    });
}
void dspark_free_table(Table* table) { delete table; }
bool dspark_table_rows(const Table* table, const int32_t* rows, int count, float* out) {
    return guarded([&] { return rows_of(*table, 1.0f, rows, count, out), true; });
}

// Rows as floats [count, inputs].
void dspark_rows(const Matrix* m, const int32_t* rows, int count, float* out) {
    for (int i = 0; i < count; i++) m->row(rows[i], out + static_cast<size_t>(i) * m->inputs);
}

// See multiply.
bool dspark_product(Context* context, const Matrix* w, const float* x, int rows, float* out, int stride, int32_t* best) {
    return guarded([&] { return multiply(context, *w, x, rows, out, stride, best), true; });
}

// --- models ---

// frequencies [ropes][D/2] and amplitudes [ropes]: of each rotary embedding.
Llama* dspark_llama(int hidden, int heads, int kv_heads, int head_size, int inner, int positions, float eps,
                    float score_scale, bool gelu, const float* final_norm, const double* frequencies,
                    const float* amplitudes, int ropes) {
    return guarded([&] {
        auto model = std::make_unique<Llama>();
        model->shape = {hidden, heads, kv_heads, head_size, inner, positions, eps, score_scale};
        model->gelu = gelu;
        model->final_norm = copy(final_norm, hidden);
        for (int i = 0; i < ropes; i++, frequencies += head_size / 2)
            model->ropes.push_back({std::vector<double>(frequencies, frequencies + head_size / 2), amplitudes[i]});
        return model.release();
    });
}
void dspark_free_llama(Llama* model) { delete model; }

// matrices: q, k, v, o, gate, up, down, which become the model's: their handles are not to be used or freed any more.
// vectors: input_norm, post_norm, q_norm, k_norm, bias, after_attention, after_mlp; from the third on null where there is none.
bool dspark_add_layer(Llama* model, Matrix* const* matrices, const float* const* vectors, int window, int rope) {
    return guarded([&] {
        const Shape& s = model->shape;
        Layer layer;
        Matrix* const places[] = {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down};
        for (Matrix* const place : places) {
            *place = std::move(**matrices);
            delete *matrices++;
        }
        layer.input_norm = copy(vectors[0], s.hidden);
        layer.post_norm = copy(vectors[1], s.hidden);
        layer.q_norm = copy(vectors[2], s.head_size);
        layer.k_norm = copy(vectors[3], s.head_size);
        layer.bias = copy(vectors[4], s.qkv());
        layer.after_attention = copy(vectors[5], s.hidden);
        layer.after_mlp = copy(vectors[6], s.hidden);
        layer.window = window, layer.rope = rope;
        model->layers.push_back(std::move(layer));
        return true;
    });
}

// See forward. from: see Pass.
bool dspark_forward(Context* context, Llama* model, int rows, float* x, const int32_t* position, const int32_t* slot,
                    const int32_t* first_slot, const int32_t* visible, const int32_t* from, uint16_t* keys, uint16_t* values,
                    int64_t slots, int ring, const int32_t* tap_layers, int taps, float* tap_out) {
    return guarded([&] {
        const Pass pass{rows, position, slot, first_slot, visible, from};
        forward(context, model, pass, Store{keys, values, slots, ring}, x, tap_layers, taps, tap_out);
        return true;
    });
}

// A whole pass of R streams, each row seeing what comes before it: embeddings of `ids`, layers, and of `count` rows (wanted:
// which; null: of all) logits [count, V], or best [count], their argmax. where [R, 3]: see lay_out.
bool dspark_run(Context* context, Llama* model, const Table* embedding, float embedding_scale, const Matrix* lm_head,
                int streams, const int32_t* where, const int32_t* ids, uint16_t* keys, uint16_t* values, int64_t slots,
                int ring, const int32_t* tap_layers, int taps, float* tap_out, const int32_t* wanted, int count, float* logits,
                int32_t* best) {
    return guarded([&] {
        const int hidden = model->shape.hidden;
        const Pass pass = lay_out(context, streams, where, true, 0, ring);
        for (int i = 0; wanted && i < count; i++)
            if (wanted[i] < 0 || wanted[i] >= pass.rows) throw Refused("logits of rows that are not there");
        float* x = hidden_of(context, pass.rows + (wanted ? count : 0), hidden);
        rows_of(*embedding, embedding_scale, ids, pass.rows, x);
        forward(context, model, pass, Store{keys, values, slots, ring}, x, tap_layers, taps, tap_out);
        if (wanted) {
            float* const chosen = x + static_cast<size_t>(pass.rows) * hidden;
            for (int i = 0; i < count; i++)
                std::memcpy(chosen + static_cast<size_t>(i) * hidden, x + static_cast<size_t>(wanted[i]) * hidden,
                            sizeof(float) * hidden);
            x = chosen;
        }
        if (count > 0) multiply(context, *lm_head, x, count, logits, lm_head->outputs, best);
        return true;
    });
}

// A drafter's context: taps [rows, fc.inputs] → fc → norm → keys and values of every layer.
bool dspark_append_context(Context* context, Llama* model, const Matrix* fc, const float* norm, int rows,
                           const float* taps, const int32_t* position, const int32_t* slot, uint16_t* keys,
                           uint16_t* values, int64_t slots, int ring) {
    return guarded([&] {
        const Shape& s = model->shape;
        const Pass pass{rows, position, slot, nullptr, nullptr, nullptr};
        check(s, pass, slots, ring);
        float* const features = hidden_of(context, rows, s.hidden);
        multiply(context, *fc, taps, rows, features, s.hidden, nullptr);
        for (int r = 0; r < rows; r++) {
            float* at = features + static_cast<size_t>(r) * s.hidden;
            rms_norm(at, norm, s.hidden, s.eps, at);
        }
        model->write_context(context->pool, pass, Store{keys, values, slots, ring}, features);
        return true;
    });
}

// See walk.
bool dspark_walk(Context* context, const Heads* heads, float* base, const float* hidden, int streams, int gamma,
                 const int32_t* anchors, const Sampling* sampling, const double* uniforms, const Noise* noise,
                 const Edits* const* edits, int32_t* tokens, int32_t* indices, double* totals, float* logits) {
    return guarded([&] {
        walk(context, *heads, base, hidden, streams, gamma, anchors, sampling, uniforms, noise, edits,
             Drafts{tokens, indices, totals, logits});
        return true;
    });
}

// Blocks of γ drafts for R streams: anchor and masks through the drafter's layers, LM head [R, γ, Vd] and walk. where
// [R, 3], window: see lay_out, with γ rows each.
bool dspark_draft(Context* context, Llama* model, const Table* embedding, float embedding_scale, const Matrix* lm_head,
                  const Heads* heads, int mask, int streams, int gamma, const int32_t* where, int window,
                  const int32_t* anchors, uint16_t* keys, uint16_t* values, int64_t slots, int ring, float* base,
                  const Sampling* sampling, const double* uniforms, const Noise* noise, const Edits* const* edits,
                  int32_t* tokens, int32_t* indices, double* totals, float* logits) {
    return guarded([&] {
        const Pass pass = lay_out(context, streams, where, false, window, ring);
        float* const x = hidden_of(context, pass.rows, model->shape.hidden);
        const size_t width = embedding->inputs;
        for (int r = 0; r < streams; r++) rows_of(*embedding, embedding_scale, anchors + r, 1, x + r * gamma * width);
        for (int row = 0, first = 0; row < pass.rows; row++) {  // the mask's row is read once
            if (row % gamma == 0) continue;
            float* const to = x + row * width;
            if (first)
                std::memcpy(to, x + first * width, sizeof(float) * width);
            else
                rows_of(*embedding, embedding_scale, &mask, 1, to), first = row;
        }
        forward(context, model, pass, Store{keys, values, slots, ring}, x, nullptr, 0, nullptr);
        multiply(context, *lm_head, x, pass.rows, base, lm_head->outputs, nullptr);
        walk(context, *heads, base, x, streams, gamma, anchors, sampling, uniforms, noise, edits,
             Drafts{tokens, indices, totals, logits});
        return true;
    });
}

// The greatest of each of `rows` [count] of scores, the first of equal ones; -1 where there is none.
bool dspark_best(Context* context, const float* scores, int width, const int32_t* rows, int count, int32_t* best) {
    return guarded([&] {
        Job job;
        job.step(count, 1, [&](int, int first, int last) {
            for (int i = first; i < last; i++) {
                best[i] = best_of(scores + static_cast<size_t>(rows[i]) * width, width).token();
            }
        });
        context->pool.run(job);
        return true;
    });
}

// Scores edited where they stand: of each block, rows `first` … `first` + `length` [blocks], the drafts between them in
// `drafts`, block after block.
bool dspark_edit(Context* context, float* scores, int width, int blocks, const int32_t* first, const int32_t* length,
                 const int32_t* drafts, const Edits* const* edits) {
    return guarded([&] {
        std::vector<int> before(blocks, 0);
        int longest = 0;
        for (int b = 0; b < blocks; b++) {
            if (b) before[b] = before[b - 1] + length[b - 1];
            longest = std::max(longest, length[b]);
        }
        auto prefixes = prefixes_of(edits, blocks, longest);
        Job job;
        job.step(blocks, 1, [&](int, int from, int until) {
            for (int b = from; b < until; b++) {
                for (int j = 0; j <= length[b]; j++) {
                    prefixes[b]->apply(scores + static_cast<size_t>(first[b] + j) * width);
                    if (j < length[b]) prefixes[b]->add(drafts[before[b] + j]);
                }
            }
        });
        context->pool.run(job);
        return true;
    });
}

// Scores [rows, width] to weights where they stand, by each row's sampling, temperature > 0; totals [rows]: their sums.
bool dspark_weigh(Context* context, float* scores, int rows, int width, const Sampling* sampling, double* totals) {
    return guarded([&] {
        context->reserve_rooms(width);
        Job job;
        job.step(rows, 1, [&](int thread, int first, int last) {
            for (int r = first; r < last; r++)
                totals[r] = weigh_row(scores + static_cast<size_t>(r) * width, width, sampling[r], context->rooms[thread]);
        });
        context->pool.run(job);
        return true;
    });
}

// Each of `count` rows of scores [·, width] to weights where it stands, by its sampling, temperature > 0, and the token that
// wins its race there: tokens [count], -1 where there is none.
bool dspark_race(Context* context, float* scores, int width, const int32_t* rows, int count, const Sampling* sampling,
                 const Noise* noise, int32_t* tokens) {
    return guarded([&] {
        const int parts = context->pool.size(), tiles = (width + LANES - 1) / LANES;  // parts of each row
        const auto row = [&](int i) { return scores + static_cast<size_t>(rows[i]) * width; };
        context->reserve_rooms(width);
        context->ahead.resize(static_cast<size_t>(parts) * count);
        Job job;
        job.step(count, 1, [&](int thread, int first, int last) {
            for (int i = first; i < last; i++) weigh_row(row(i), width, sampling[i], context->rooms[thread]);
        });
        job.step(parts, 1, [&](int, int some, int until) {
            for (int part = some; part < until; part++) {
                int first, last;
                share(tiles, part, parts, &first, &last);
                for (int i = 0; i < count; i++)
                    context->ahead[static_cast<size_t>(part) * count + i] =
                        race(row(i), first * LANES, std::min(last * LANES, width), nullptr, noise[i]);
            }
        });
        context->pool.run(job);
        for (int i = 0; i < count; i++) tokens[i] = winner(context->ahead, i, count, parts);
        return true;
    });
}

// A token of weights [width] with their sum, by a uniform in [0, 1); -1 where no weight is.
int32_t dspark_draw(const float* weights, int width, double total, double uniform) {
    return draw(weights, width, uniform * total);
}

// A token of max(share p - q, 0); of p where rounding has left nothing of that. p: weights [width] with their sum;
// q [drafts]: probabilities of the tokens `ids`, ascending (null: all).
int32_t dspark_draw_rest(const float* weights, int width, double total, double share, const float* q,
                         const int32_t* ids, int drafts, double uniform) {
    return draw_rest(Rest{weights, width, static_cast<float>(share / total), q, 1.0f, ids, drafts}, total, uniform);
}

// The sum of min(share p, q).
double dspark_overlap(const float* weights, int width, double total, double share, const float* q, const int32_t* ids,
                      int drafts) {
    return Rest{weights, width, static_cast<float>(share / total), q, 1.0f, ids, drafts}.taken();
}

// How many of `length` drafts stand, at least one of them given, and the bonus token; -1 where memory ran out. p: weights [length+1, width] with their sums; q
// [length, drafts] with theirs, of the tokens `ids`, ascending (null: all).
int dspark_judge(const float* p, const double* p_totals, int width, const float* q, const double* q_totals, int drafts,
                 const int32_t* ids, const int32_t* tokens, const int32_t* indices, int length, const double* accept,
                 double uniform, int32_t* bonus) {
    try {
        return judge({p, p_totals, width}, {q, q_totals, drafts}, ids, tokens, indices, length, accept, uniform, bonus);
    } catch (const std::exception& error) {
        last_error = error.what();
        return -1;
    }
}

// --- what the machine can do ---

double dspark_read_rate(Context* context, const float* data, int64_t count) {
    return read_rate(context->pool, data, static_cast<size_t>(count));
}
double dspark_multiply_rate(Context* context, int rounds) { return multiply_rate(context->pool, rounds); }

#pragma GCC visibility pop
}  // extern "C"
