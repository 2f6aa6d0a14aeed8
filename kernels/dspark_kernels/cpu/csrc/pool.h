// A few threads that work through a job together: steps, one after the other, each of them in units that do not depend on
// each other. Other programs want the cores too, and a thread that has lost its core is away for milliseconds, as long as a
// hundred steps. So nobody waits for threads, only for units:
//
// - A step is over when its units are done. Whoever does the last of them begins the next step. A thread that comes late
//   finds a later step, and there is nothing that it has to make up for.
// - A unit is claimed by whoever does it. Each thread has a piece of its own, which it reads front to back, every time three
//   quarters of what is left of it; so it finds in its caches what it wrote a step before. Who is done takes half of what is
//   left of others' pieces, from their ends, and those that nobody has begun a little later. So only a thread that loses its
//   core in the middle of what it has claimed holds others up.
// - A thread that does not hold anything is nowhere: the caller's job may end, and its memory go, while others are away.
//
// Who waits looks on for some microseconds, because steps are shorter than a wake-up. After that it sleeps and leaves its core
// to the thread that it waits for. It does not yield: Linux puts who yields behind the others by a whole time slice.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "simd.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#ifndef DSPARK_BEFORE_CLAIMS
#define DSPARK_BEFORE_CLAIMS(thread)  // where a test holds threads
#endif

namespace dspark {

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#endif
}

class Job {
   public:
    using Part = std::function<void(int thread, int first, int last)>;
    using Then = std::function<void()>;

    // One more step: part(thread, first, last) over 0…count-1 in multiples of `grain`, in any order; then `then`, once. Which
    // thread does what is chance: a result may not depend on it.
    void step(int count, int grain, Part part, Then then = nullptr) {
        steps_.push_back({count, grain, std::move(part), std::move(then)});
    }

   private:
    friend class Pool;
    struct Step {
        int count, grain;
        Part part;
        Then then;
    };
    std::vector<Step> steps_;
};

class Pool {
   public:
    explicit Pool(int threads) : count_(threads < 1 ? 1 : threads), pieces_(new Piece[count_]) {
        try {
            for (int i = 1; i < count_; i++) workers_.emplace_back([this, i] { work(i); });
        } catch (...) {  // no more threads to be had: those that are there must not outlive us
            close();
            throw;
        }
    }
    ~Pool() { close(); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return count_; }

    // The grain by which `count` make one unit for each thread.
    int shares(int count) const { return std::max(1, (count + count_ - 1) / count_); }

    // All steps of a job, by this thread (0) and those workers that have a core; returns when all is done. A part that throws
    // ends the program, on whichever thread: the job may not go while others work on it.
    void run(const Job& job) noexcept {
        steps_ = &job.steps_, at_ = 0;
        go_on(0);
        for (State now; !(now = state_.load(std::memory_order_acquire)).idle();) {
            take_part(0, now);
            wait_beyond(0, now);
        }
        leave_matrix_unit();
    }

   private:
    // Which step it is, counted through all jobs, and whether none is under way.
    struct State {
        uint64_t word = IDLE;

        static constexpr uint64_t IDLE = 1;
        uint32_t step() const { return static_cast<uint32_t>(word >> 32); }
        bool idle() const { return word & IDLE; }
    };
    // What nobody has claimed of a thread's units of a step: from the front, in the second 16 bits, to the end, in the last.
    // One word with the step, so that a claim can only be one in the step that it is meant for. (The count comes round after a
    // day or so; a thread would have to be away for just so long.) To claim costs up to 0.2 µs, since what is being read has to
    // arrive first.
    struct alignas(64) Piece {
        static constexpr int LARGEST = UINT16_MAX;
        std::atomic<uint64_t> word{0};

        void begin(uint32_t step, int size) {
            word.store(static_cast<uint64_t>(step) << 32 | static_cast<uint64_t>(size), std::memory_order_relaxed);
        }
        bool claim(uint32_t step, bool own, bool begun, int* first, int* last) {
            uint64_t seen = word.load(std::memory_order_relaxed);
            while (true) {
                const int front = seen >> 16 & LARGEST, end = seen & LARGEST, left = end - front;
                if (static_cast<uint32_t>(seen >> 32) != step || left <= 0 || (begun && !front)) return false;
                const int some = own ? (3 * left + 3) / 4 : (left + 1) / 2;
                const uint64_t now = own ? seen + (static_cast<uint64_t>(some) << 16) : seen - static_cast<uint64_t>(some);
                if (!word.compare_exchange_weak(seen, now, std::memory_order_acq_rel, std::memory_order_relaxed)) continue;
                *first = own ? front : end - some;
                *last = *first + some;
                return true;
            }
        }
    };

    using Clock = std::chrono::steady_clock;
    static constexpr int RELIEF = 40;  // looks, 0.3 to 2 µs, before pieces are taken that others have not begun
    static constexpr auto UNITS = std::chrono::microseconds(25);  // that a thread looks on for others' units before it sleeps
    static constexpr auto JOBS = std::chrono::microseconds(200);  // likewise for another job

    // That a thread has done so many units. Until then they hold the step, and with it the job and the fields below: whoever
    // reads those has claimed a unit after the step began, and whoever writes them has seen all units counted.
    void count_done(int thread, int done) {
        if (!done) return;
        const int units = units_;  // by the next line the step may be over
        if (done_.fetch_add(done, std::memory_order_acq_rel) + done < units) return;
        const Job::Step& step = (*steps_)[at_++];
        if (step.then) step.then();
        go_on(thread);
    }

    // Begins the next step. By one thread alone: the caller, or who has ended the step before.
    void go_on(int thread) {
        const State before = state_.load(std::memory_order_relaxed);
        for (; at_ < steps_->size(); at_++) {
            const Job::Step& step = (*steps_)[at_];
            grain_ = step.grain * (1 + step.count / step.grain / Piece::LARGEST);
            units_ = (step.count + grain_ - 1) / grain_;
            if (units_ > 1 && count_ > 1) break;
            if (units_) step.part(thread, 0, step.count);  // no help is needed, or there is none
            if (step.then) step.then();
        }
        State now;
        now.word = static_cast<uint64_t>(before.step() + 1) << 32;
        if (at_ == steps_->size()) {
            if (before.idle()) return;  // nobody has been told of this job
            now.word |= State::IDLE;
        } else {
            for (int i = 0; i < count_; i++) pieces_[i].begin(now.step(), begin_of(i + 1) - begin_of(i));
            done_.store(0, std::memory_order_relaxed);
        }
        state_.store(now, std::memory_order_seq_cst);  // all that was written before is seen by who reads this
        wake();
    }

    int begin_of(int piece) const { return static_cast<int>(static_cast<int64_t>(units_) * piece / count_); }

    // A thread's part of the step of that state, if it still is the one, and of what others are behind with; or, if not
    // only what others have ``begun``, of what nobody does either.
    void take_part(int thread, State of, bool begun = true) {
        DSPARK_BEFORE_CLAIMS(thread);
        int done = 0, first, last;
        for (int i = 0; i < count_; i++) {
            const int owner = (thread + i) % count_;
            while (pieces_[owner].claim(of.step(), i == 0, i != 0 && begun, &first, &last)) {
                const Job::Step& step = (*steps_)[at_];
                const int from = begin_of(owner);
                step.part(thread, (from + first) * grain_, std::min((from + last) * grain_, step.count));
                done += last - first;
            }
        }
        count_done(thread, done);
    }

    // Until another step is under way than in that state.
    void wait_beyond(int thread, State seen) {
        Clock::time_point until;
        for (int i = 0; state_.load(std::memory_order_acquire).step() == seen.step(); i++) {
            if (i == RELIEF) {
                take_part(thread, seen, false);
                until = Clock::now() + (seen.idle() ? JOBS : UNITS);
            } else if (i > RELIEF && i % 64 == 0 && Clock::now() > until) {
                leave_matrix_unit();
                sleep(seen);
            }
            pause_briefly();
        }
    }

    // The flag is set before the state is read, and the state before the flag: one of both sees the other's.
    void sleep(State seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            asleep_.store(true, std::memory_order_seq_cst);
            if (state_.load(std::memory_order_seq_cst).step() != seen.step()) return;
            wake_.wait(lock);
        }
    }
    void wake() {
        if (!asleep_.load(std::memory_order_seq_cst)) return;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            asleep_.store(false, std::memory_order_relaxed);
        }
        wake_.notify_all();
    }

    void close() {
        closing_.store(true, std::memory_order_relaxed);
        State now = state_.load(std::memory_order_relaxed);
        now.word += uint64_t{1} << 32;
        state_.store(now, std::memory_order_seq_cst);
        wake();
        for (auto& worker : workers_) worker.join();
    }

    void work(int index) {
        for (State seen; true;) {
            wait_beyond(index, seen);
            seen = state_.load(std::memory_order_acquire);
            if (closing_.load(std::memory_order_relaxed)) return;
            if (!seen.idle()) take_part(index, seen);
        }
    }

    const int count_;
    std::unique_ptr<Piece[]> pieces_;
    std::vector<std::thread> workers_;
    alignas(64) std::atomic<State> state_{State()};
    std::atomic<bool> asleep_{false}, closing_{false};
    alignas(64) std::atomic<int> done_{0};  // units of the step
    // Of the step under way. Written by who begins it, read by who has claimed some of it.
    int units_ = 0, grain_ = 1;
    size_t at_ = 0;
    const std::vector<Job::Step>* steps_ = nullptr;
    std::mutex mutex_;
    std::condition_variable wake_;
};

// Tiles first…last-1 of `tiles` that are part `i` of so many.
inline void share(int tiles, int i, int parts, int* first, int* last) {
    *first = tiles * i / parts;
    *last = tiles * (i + 1) / parts;
}

}  // namespace dspark
