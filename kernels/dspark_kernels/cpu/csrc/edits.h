// Changes to rows of scores by what comes before them: biases, penalties for tokens that were seen, stop tokens ruled out.
// What they are and in which order: Edits in edits.py. A row's result depends on that row and its own stream alone.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace dspark {

struct Edit {  // of one token
    int32_t token;
    float bias;
    int32_t times;  // that it was generated; 0: it is in the prompt alone, -1: in neither
};

struct Edits {  // of one stream, whose next row is the first of a block
    const Edit* entries;   // [count], each token once
    const int32_t* stops;  // [stop_count]
    int32_t count, stop_count;
    int32_t masked;  // rows from the first on in which stops are ruled out
    float frequency, presence, repetition;
};

// The rows of a block, one after the other.
class Prefix {
   public:
    Prefix(const Edits& edits, int rows) : edits_(edits) {
        entries_.reserve(edits.count + rows);  // threads cannot tell that memory has run out
        entries_.assign(edits.entries, edits.entries + edits.count);
    }
    // The next row, from scores as they came.
    void apply(float* row) {
        const float frequency = edits_.frequency, presence = edits_.presence, repetition = edits_.repetition;
        for (const Edit& edit : entries_) {
            float score = row[edit.token] + edit.bias;
            if (edit.times >= 0) score = score > 0.0f ? score / repetition : score * repetition;
            if (edit.times > 0) score -= frequency * static_cast<float>(edit.times) + presence;
            row[edit.token] = score;
        }
        for (int i = 0; row_ < edits_.masked && i < edits_.stop_count; i++) row[edits_.stops[i]] = -INFINITY;
        row_++;
    }
    // The token after it, which rows from here on see.
    void add(int32_t token) {
        for (Edit& edit : entries_) {
            if (edit.token != token) continue;
            edit.times = std::max(edit.times, 0) + 1;
            return;
        }
        entries_.push_back({token, 0.0f, 1});
    }

   private:
    Edits edits_;
    std::vector<Edit> entries_;
    int row_ = 0;
};

}  // namespace dspark
