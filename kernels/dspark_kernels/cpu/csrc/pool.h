// A few threads that work through a job together: steps, one after the other, each of them in units that do not depend on
// each other. Other programs want the cores too, and a thread that has lost its core is away for milliseconds, as long as a
// hundred steps. So nobody waits for threads, only for units:
//
// - A step is over when its units are done. Whoever does the last of them begins the next step. A thread that comes late
//   finds a later step, and there is nothing that it has to make up for.
// - A unit is claimed by whoever does it. Most units are meant for one thread each, in one piece, so that it reads memory
//   front to back and finds in its caches what it wrote a step before. Others take that piece if it has not been begun when
//   all else is done. So only a thread that loses its core in the middle of a piece or a unit holds others up.
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
    explicit Pool(int threads) : count_(threads < 1 ? 1 : threads), begun_(new Begun[count_]) {
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

    // All steps of a job, by this thread (0) and those workers that have a core; returns when all is done.
    void run(const Job& job) {
        steps_ = &job.steps_, at_ = 0;
        go_on(0);
        for (State now; !(now = state_.load(std::memory_order_acquire)).idle();) {
            take_part(0, now);
            wait_beyond(0, now);
        }
        leave_matrix_unit();
    }

   private:
    // Which step it is, counted through all jobs, whether none is under way, whether threads have pieces of their own in it,
    // and how many of its other units nobody has claimed. One word, so that a claim can only be one in the step that it is
    // meant for. (The count comes round after a day or so; a thread would have to be away for just so long.)
    struct State {
        uint64_t word = IDLE;

        static constexpr uint64_t IDLE = 1u << 31, PIECES = 1u << 30, LEFT = PIECES - 1;
        uint32_t step() const { return static_cast<uint32_t>(word >> 32); }
        bool idle() const { return word & IDLE; }
        bool pieces() const { return word & PIECES; }
        int left() const { return static_cast<int>(word & LEFT); }
    };
    struct alignas(64) Begun {  // a line of the cache of its own
        std::atomic<uint32_t> step{0};  // the last whose piece of this thread somebody has claimed
    };

    using Clock = std::chrono::steady_clock;
    static constexpr int RELIEF = 40;  // looks, a microsecond or less, before others' pieces are taken
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
            units_ = (step.count + step.grain - 1) / step.grain;
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
            own_ = units_ < 2 * count_ ? units_ / count_ : units_ * 3 / (4 * count_);
            now.word |= (own_ ? State::PIECES : 0) | static_cast<uint64_t>(units_ - own_ * count_);
            done_.store(0, std::memory_order_relaxed);
        }
        state_.store(now, std::memory_order_seq_cst);  // all that was written before is seen by who reads this
        wake();
    }

    // A thread's part of the step of that state, if it still is the one.
    void take_part(int thread, State of) {
        int done = of.pieces() ? piece(thread, of.step(), thread) : 0;
        for (State now = of; now.step() == of.step() && now.left();) {
            if (!state_.compare_exchange_strong(now, {now.word - 1}, std::memory_order_acq_rel)) continue;
            const Job::Step& step = (*steps_)[at_];
            const int unit = units_ - now.left();
            step.part(thread, unit * step.grain, std::min((unit + 1) * step.grain, step.count));
            done++, now.word--;  // as it is if nobody else has been there
        }
        count_done(thread, done);
    }

    // Pieces that have not been begun: their threads are away.
    void relieve(int thread, State of) {
        int done = 0;
        for (int other = 0; of.pieces() && other < count_; other++) {
            if (state_.load(std::memory_order_acquire).step() != of.step()) break;
            done += piece(thread, of.step(), other);
        }
        count_done(thread, done);
    }

    // Does a thread's piece of a step, unless somebody has claimed it. Returns the units done. A step is not over before all its
    // pieces are claimed: who comes late finds that step or a later one in `begun`, and so nothing to do.
    int piece(int thread, uint32_t of_step, int owner) {
        std::atomic<uint32_t>& begun = begun_[owner].step;
        uint32_t last = begun.load(std::memory_order_relaxed);
        if (static_cast<int32_t>(of_step - last) <= 0) return 0;
        if (!begun.compare_exchange_strong(last, of_step, std::memory_order_acq_rel)) return 0;
        const Job::Step& step = (*steps_)[at_];
        const int own = own_;
        step.part(thread, own * owner * step.grain, std::min(own * (owner + 1) * step.grain, step.count));
        return own;
    }

    // Until another step is under way than in that state.
    void wait_beyond(int thread, State seen) {
        Clock::time_point until;
        for (int i = 0; state_.load(std::memory_order_acquire).step() == seen.step(); i++) {
            if (i == RELIEF) {
                relieve(thread, seen);
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
    std::unique_ptr<Begun[]> begun_;
    std::vector<std::thread> workers_;
    alignas(64) std::atomic<State> state_{State()};
    std::atomic<bool> asleep_{false}, closing_{false};
    alignas(64) std::atomic<int> done_{0};  // units of the step
    // Of the step under way. Written by who begins it, read by who has claimed some of it.
    int units_ = 0, own_ = 0;  // units in all, and of each thread's piece
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
