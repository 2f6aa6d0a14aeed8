// A few threads that work on one thing together. They spin while a pass is under way, because its parts are shorter
// than a wake-up; after it they look on for some milliseconds, giving way to whoever wants the core, and then sleep, so
// that an idle service costs nothing.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
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

class Pool {
   public:
    explicit Pool(int threads) : count_(threads < 1 ? 1 : threads), pieces_(count_) {
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

    // job(thread) on every thread, this one included; returns when all are done.
    void run(const std::function<void(int)>& job) {
        start_over();
        if (count_ == 1) {
            job(0);
            return leave_matrix_unit();
        }
        job_ = &job;
        left_.store(count_ - 1, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            epoch_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        job(0);
        leave_matrix_unit();
        wait([this] { return left_.load(std::memory_order_acquire) == 0; });
    }

    // Inside a job, between two barriers: part(first, last) over 0…count-1 in multiples of `grain`, by all threads
    // together. Each has a piece of its own, which it reads front to back, every time three quarters of what is left of it;
    // who is done takes half of what is left of others' from their ends, so that nobody waits long for a thread that has
    // lost its core for a while.
    template <typename Part>
    void each(int thread, int count, int grain, Part part) {
        const int units = (count + grain - 1) / grain;
        for (int i = 0; i < count_; i++) {
            const int of = (thread + i) % count_, begin = units * of / count_, size = units * (of + 1) / count_ - begin;
            for (int first, last; pieces_[of].take(i == 0, size, &first, &last);)
                part((begin + first) * grain, std::min((begin + last) * grain, count));
        }
    }

    // Inside a job: nobody goes on before all have come here.
    void barrier() {
        if (count_ == 1) return start_over();
        const uint32_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(count_)) {
            arrived_.store(0, std::memory_order_relaxed);
            start_over();
            round_.store(round + 1, std::memory_order_release);
        } else {
            wait([this, round] { return round_.load(std::memory_order_acquire) != round; });
        }
    }

   private:
    // What is taken of a thread's piece: so many units from its front, in the upper half, and from its end. To take some
    // costs up to 0.2 µs, since what is being read has to arrive first.
    struct alignas(64) Piece {
        std::atomic<uint64_t> taken{0};

        bool take(bool own, int size, int* first, int* last) {
            const auto front = [](uint64_t taken) { return static_cast<int>(taken >> 32); };
            const auto end = [size](uint64_t taken) { return size - static_cast<int>(taken & UINT32_MAX); };
            uint64_t seen = taken.load(std::memory_order_relaxed);
            if (front(seen) >= end(seen)) return false;
            const int left = end(seen) - front(seen), some = own ? (3 * left + 3) / 4 : (left + 1) / 2;
            seen = taken.fetch_add(static_cast<uint64_t>(some) << (own ? 32 : 0), std::memory_order_relaxed);
            *first = own ? front(seen) : std::max(front(seen), end(seen) - some);
            *last = own ? std::min(front(seen) + some, end(seen)) : end(seen);
            return front(seen) < end(seen);
        }
    };
    void start_over() {
        for (Piece& piece : pieces_) piece.taken.store(0, std::memory_order_relaxed);
    }

    static constexpr int SPINS = 2000;  // some 50 µs; then whoever else wants the core has it between two looks
    static constexpr int YIELDS = 4000;  // such looks before a thread without work goes to sleep

    template <typename Ready>
    static void wait(Ready ready) {
        for (int i = 0; !ready(); i++) {
            if (i < SPINS)
                pause_briefly();
            else
                std::this_thread::yield();
        }
    }

    void close() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
            epoch_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    void work(int index) {
        uint32_t seen = 0;
        while (true) {
            for (int i = 0; i < SPINS + YIELDS && epoch_.load(std::memory_order_acquire) == seen; i++)
                i < SPINS ? pause_briefly() : std::this_thread::yield();
            if (epoch_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
            }
            seen = epoch_.load(std::memory_order_acquire);
            if (closing_) return;
            (*job_)(index);
            leave_matrix_unit();
            left_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int count_;
    std::vector<Piece> pieces_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* job_ = nullptr;
    std::atomic<uint32_t> epoch_{0}, round_{0}, arrived_{0};
    std::atomic<int> left_{0};
    bool closing_ = false;
};

// Tiles first…last-1 of `tiles` that are a thread's own, in multiples of `grain`: for parts that all take equally long.
inline void share(int tiles, int grain, int thread, int threads, int* first, int* last) {
    const int units = (tiles + grain - 1) / grain;
    *first = units * thread / threads * grain;
    *last = units * (thread + 1) / threads * grain;
    if (*last > tiles) *last = tiles;
}

}  // namespace dspark
