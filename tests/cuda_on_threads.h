// Enough of CUDA to run a cooperative kernel on a CPU: a block is a process, so that its static variables are its
// shared memory; a thread is a thread; barriers and shuffles are real. Slow, and good for small sizes.
#pragma once

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define DSPARK_DYNAMIC_SHARED(name) alignas(128) static unsigned char name[232448]

using std::max;
using std::min;

struct Index {
    unsigned int x;
};
static thread_local Index threadIdx;
static Index blockIdx, gridDim;

struct float2 {
    float x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }

static pthread_barrier_t block_barrier, warp_barriers[32];

inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }
inline void __threadfence() { __sync_synchronize(); }

template <typename T>
T __shfl_xor_sync(unsigned int, T value, int step) {
    static T exchanged[32][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    exchanged[warp][lane] = value;
    pthread_barrier_wait(&warp_barriers[warp]);
    const T other = exchanged[warp][lane ^ step];
    pthread_barrier_wait(&warp_barriers[warp]);
    return other;
}

inline unsigned int atomicAdd(unsigned int* at, unsigned int n) { return __atomic_fetch_add(at, n, __ATOMIC_SEQ_CST); }
inline void atomicMax(unsigned long long* at, unsigned long long value) {
    unsigned long long seen = __atomic_load_n(at, __ATOMIC_SEQ_CST);
    while (seen < value && !__atomic_compare_exchange_n(at, &seen, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
}
template <typename T>
T __ldcg(const T* from) {
    return __atomic_load_n(from, __ATOMIC_SEQ_CST);
}

// Runs body() in `blocks` blocks of `threads` threads; what it writes must be memory that processes share. 0 if all
// blocks ended well.
template <typename Body>
int run_grid(int blocks, int threads, Body body) {
    std::vector<pid_t> children;
    gridDim.x = blocks;
    for (int block = 0; block < blocks; ++block) {
        const pid_t child = fork();
        if (child == 0) {
            blockIdx.x = block;
            pthread_barrier_init(&block_barrier, nullptr, threads);
            for (int warp = 0; warp < threads / 32; ++warp) pthread_barrier_init(&warp_barriers[warp], nullptr, 32);
            std::vector<std::thread> all;
            for (int t = 0; t < threads; ++t)
                all.emplace_back([=] {
                    threadIdx.x = t;
                    body();
                });
            for (std::thread& one : all) one.join();
            _exit(0);
        }
        children.push_back(child);
    }
    int failed = 0;
    for (const pid_t child : children) {
        int status = 0;
        waitpid(child, &status, 0);
        failed += status != 0;
    }
    return failed;
}
