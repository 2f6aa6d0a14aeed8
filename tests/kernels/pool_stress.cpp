// The pool under a thread sanitizer: some thousand steps with threads that are away at the worst of times. Everything that
// steps write and read is plain memory, so that a unit done twice, too early or unseen is a data race as well.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <random>
#include <utility>
#include <vector>

void before_claims(int thread);
#define DSPARK_BEFORE_CLAIMS(thread) before_claims(thread)
#include "pool.h"

using namespace dspark;

namespace {

static_assert(noexcept(std::declval<Pool&>().run(std::declval<const Job&>())), "a part that throws leaves no job behind");

std::atomic<bool> hold{false}, held{false};  // worker 1, before it claims anything

void be_away(uint32_t chance) {
    if (chance % 64 == 0)
        std::this_thread::sleep_for(std::chrono::microseconds(chance / 64 % 400));  // beyond what others' patience lasts
    else if (chance % 4 == 0)
        std::this_thread::yield();
}

void must(bool holds, const char* what, int threads, int job, size_t step) {
    if (holds) return;
    std::fprintf(stderr, "%s: %d threads, job %d, step %zu\n", what, threads, job, step);
    std::exit(1);
}

void work_through(int threads, int jobs) {
    Pool pool(threads);
    std::mt19937 random(threads);
    for (int number = 0; number < jobs; number++) {
        struct Planned {
            int count, grain;
            std::vector<int> times;
            std::vector<uint64_t> values;
            uint64_t sum = 0;
        };
        std::vector<Planned> plan(random() % 12);
        std::vector<int> inside(threads, 0);  // scratch of each thread
        Job job;
        for (size_t i = 0; i < plan.size(); i++) {
            Planned& own = plan[i];
            own.count = static_cast<int>(random() % (random() % 2 ? 2 * threads + 2 : 200)), own.grain = 1 + random() % 3;
            own.times.assign(own.count, 0), own.values.assign(own.count, 0);
            const uint32_t chances = random();
            const auto part = [&plan, &inside, &own, i, chances, threads, number](int thread, int first, int last) {
                must(thread >= 0 && thread < threads && first % own.grain == 0 && first < last && last <= own.count &&
                         (last % own.grain == 0 || last == own.count), "no such unit", threads, number, i);
                must(inside[thread]++ == 0, "a thread is two", threads, number, i);
                be_away(chances * (first + 1));
                for (int u = first; u < last; u++) own.times[u]++, own.values[u] = (i ? plan[i - 1].sum : 1) * 31 + u;
                be_away(chances * (last + 7));
                inside[thread]--;
            };
            job.step(own.count, own.grain, part, [&own, chances] {
                be_away(chances / 3);
                for (uint64_t value : own.values) own.sum += value;
            });
        }
        pool.run(job);
        uint64_t before = 1;
        for (size_t i = 0; i < plan.size(); i++) {
            uint64_t sum = 0;
            for (int u = 0; u < plan[i].count; u++) {
                must(plan[i].times[u] == 1, "not once", threads, number, i);
                sum += before * 31 + u;
            }
            must(plan[i].sum == sum, "not seen", threads, number, i);
            before = sum;
        }
        if (random() % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(random() % 8));  // workers go to sleep
    }
}

// Jobs end while a worker that has claimed nothing is away for all of them.
void work_without_one(int threads) {
    Pool pool(threads);
    hold = true, held = false;
    for (int number = 0; number < 20; number++) {
        std::vector<int> times(8 * threads, 0);
        auto ended = std::async(std::launch::async, [&] {
            Job job;
            job.step(static_cast<int>(times.size()), 1, [&](int thread, int first, int last) {
                must(thread != 1, "nobody is held", threads, number, 0);
                while (!held) std::this_thread::yield();
                for (int u = first; u < last; u++) times[u]++;
            });
            pool.run(job);
        });
        must(ended.wait_for(std::chrono::seconds(20)) == std::future_status::ready, "waits for who is away", threads, number, 0);
        for (int done : times) must(done == 1, "not once", threads, number, 0);
    }
    hold = false;
}

}  // namespace

void before_claims(int thread) {
    if (thread != 1) return;
    while (hold) {
        held = true;
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
}

int main() {
    for (int threads : {1, 2, 3, 8}) work_through(threads, 250);
    for (int threads : {2, 3}) work_without_one(threads);
    std::puts("each unit once");
}
