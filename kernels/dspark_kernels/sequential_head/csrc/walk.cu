// The sequential head's walk over the whole vocabulary: one persistent launch for all gamma steps.
//
// W2 is what a step must read, [Vd, r], once for each of gamma steps. A block of threads owns a slice of its rows for
// the whole launch and keeps as many of them as fit in shared memory, brought there once: by one bulk copy on Hopper
// (sm_90a), by asynchronous 16-byte copies on sm_80 and later. The rest of the slice is read again at every step, from
// L2 where it fits. Between steps the grid agrees on x_k by an atomic maximum and waits at a barrier of its own, so it
// is launched cooperatively: all blocks are resident.
//
// The contract is reference.full_walk. Markov heads of type "vanilla", ranks of 32, 64, 128 or 256, bfloat16 weights.

#ifdef DSPARK_EMULATED  // the tests run this file on threads of a CPU: tests/cuda_on_threads.h
#include "cuda_on_threads.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#define DSPARK_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#include "noise.h"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int MOST_STREAMS = 8;
constexpr int GREEDY = 0, REJECTION = 1, COUPLED = 2;

}  // namespace

// Symbols: R streams, gamma block size, Vd draft vocabulary, r rank. Row-major, as the shapes say.
struct DsparkWalk {
    const float* base;               // [R, gamma, Vd] base logits
    const __nv_bfloat16* w1;         // [V, r]
    const __nv_bfloat16* w2;         // [Vd, r]
    const int64_t* draft_ids;        // [Vd] target ids; null where they are the indices
    const float* confidence_hidden;  // [R, gamma]; null without a confidence head
    const __nv_bfloat16* confidence_e;  // [r]; null where confidence does not look at e
    const int32_t* anchor;           // [R]
    const int32_t* mode;             // [R]
    const float* temperature;        // [R]
    const int64_t* seed;             // [R]
    const int64_t* round_key;        // [R]
    const int64_t* position;         // [R]
    float* scores;                   // [R, gamma, Vd], biased and divided by the temperature
    int32_t* tokens;                 // [R, gamma] draft vocabulary indices
    float* confidence;               // [R, gamma] logits
    unsigned long long* best;        // [gamma, R], zeroed before the launch
    unsigned int* arrived;           // [1], zeroed before the launch
    int streams, gamma, vocab, rank;
};

namespace {

__device__ __forceinline__ unsigned int load_acquire(const unsigned int* from) {
#ifdef DSPARK_EMULATED
    return __atomic_load_n(from, __ATOMIC_ACQUIRE);
#else
    unsigned int value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
#endif
}

__device__ __forceinline__ void arrive_and_wait(unsigned int* arrived, unsigned int goal) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(arrived, 1u);
        while (load_acquire(arrived) < goal) {
        }
    }
    __syncthreads();
}

// The first `rows` rows of the slice, into shared memory.
__device__ __forceinline__ void keep_slice(const __nv_bfloat16* from, __nv_bfloat16* to, int bytes) {
#if defined(DSPARK_EMULATED)
    for (int at = threadIdx.x * 16; at < bytes; at += THREADS * 16)
        std::memcpy(reinterpret_cast<char*>(to) + at, reinterpret_cast<const char*>(from) + at, 16);
    __syncthreads();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    __shared__ alignas(8) uint64_t landed;
    const unsigned int barrier = static_cast<unsigned int>(__cvta_generic_to_shared(&landed));
    const unsigned int target = static_cast<unsigned int>(__cvta_generic_to_shared(to));
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
        if (bytes > 0)
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                             target),
                         "l"(from), "r"(bytes), "r"(barrier)
                         : "memory");
    }
    __syncthreads();
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra WAIT;\n}" ::"r"(barrier)
        : "memory");
#else
    const unsigned int target = static_cast<unsigned int>(__cvta_generic_to_shared(to));
    for (int at = threadIdx.x * 16; at < bytes; at += THREADS * 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + at),
                     "l"(reinterpret_cast<const char*>(from) + at)
                     : "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
#endif
}

// LANES threads share a row of W2, eight inputs each: r = 8 * LANES.
template <int LANES>
__global__ void __launch_bounds__(THREADS, 1) walk(DsparkWalk w, int slice, int kept) {
    DSPARK_DYNAMIC_SHARED(memory);
    __nv_bfloat16* const rows = reinterpret_cast<__nv_bfloat16*>(memory);
    __shared__ float e[MOST_STREAMS][8 * LANES];
    __shared__ int64_t previous[MOST_STREAMS];
    __shared__ unsigned long long winner[WARPS];

    constexpr int RANK = 8 * LANES, GROUPS = 32 / LANES;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = min(static_cast<int>(blockIdx.x) * slice, w.vocab), last = min(first + slice, w.vocab);
    kept = min(kept, last - first);
    keep_slice(w.w2 + static_cast<int64_t>(first) * RANK, rows, kept * RANK * 2);
    if (threadIdx.x < w.streams) previous[threadIdx.x] = w.anchor[threadIdx.x];
    __syncthreads();

    for (int k = 0; k < w.gamma; ++k) {
        for (int i = threadIdx.x; i < w.streams * RANK; i += THREADS)
            e[i / RANK][i % RANK] = __bfloat162float(w.w1[previous[i / RANK] * RANK + i % RANK]);
        __syncthreads();
        if (blockIdx.x == 0 && w.confidence_hidden != nullptr && warp < w.streams) {
            float logit = 0.f;
            if (w.confidence_e != nullptr)
                for (int i = lane; i < RANK; i += 32) logit += e[warp][i] * __bfloat162float(w.confidence_e[i]);
            for (int step = 16; step > 0; step /= 2) logit += __shfl_xor_sync(~0u, logit, step);
            if (lane == 0) w.confidence[warp * w.gamma + k] = logit + w.confidence_hidden[warp * w.gamma + k];
        }
        for (int s = 0; s < w.streams; ++s) {
            const int mode = w.mode[s];
            const float temperature = mode == GREEDY ? 1.f : w.temperature[s];
            const uint64_t position = w.position[s], seed = w.seed[s], round_key = w.round_key[s];
            const int64_t slot = static_cast<int64_t>(s * w.gamma + k) * w.vocab;
            const float* mine = &e[s][(lane % LANES) * 8];
            float share[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) share[i] = mine[i];
            unsigned long long top = 0;
            for (int start = first + warp * 32; start < last; start += THREADS) {
                float bias = 0.f;  // of the row that this lane ends up with
#pragma unroll
                for (int i = 0; i < LANES; ++i) {
                    const int row = start + i * GROUPS + lane / LANES;
                    float sum = 0.f;
                    if (row < last) {
                        const __nv_bfloat16* from = row - first < kept
                                                        ? rows + static_cast<int64_t>(row - first) * RANK
                                                        : w.w2 + static_cast<int64_t>(row) * RANK;
                        const uint4 eight = *reinterpret_cast<const uint4*>(from + (lane % LANES) * 8);
                        const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&eight);
#pragma unroll
                        for (int p = 0; p < 4; ++p) {
                            const float2 two = __bfloat1622float2(pairs[p]);
                            sum = fmaf(two.x, share[2 * p], sum);
                            sum = fmaf(two.y, share[2 * p + 1], sum);
                        }
                    }
#pragma unroll
                    for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
                    if (lane % LANES == i) bias = sum;
                }
                const int row = start + (lane % LANES) * GROUPS + lane / LANES;
                if (row < last) {
                    const float score = (w.base[slot + row] + bias) / temperature;
                    w.scores[slot + row] = score;
                    float noise = 0.f;
                    if (mode == COUPLED) {
                        const uint64_t token = w.draft_ids == nullptr ? row : w.draft_ids[row];
                        noise = dspark::race_noise(seed, position + 1 + k, dspark::TOKEN, token);
                    } else if (mode == REJECTION) {
                        const uint64_t word = static_cast<uint64_t>(k) * w.vocab + row;
                        noise = dspark::race_noise(round_key, position, dspark::DRAFT, word);
                    }
                    top = max(top, static_cast<unsigned long long>(dspark::packed(score + noise, row)));
                }
            }
            for (int step = 16; step > 0; step /= 2) top = max(top, __shfl_xor_sync(~0u, top, step));
            if (lane == 0) winner[warp] = top;
            __syncthreads();
            if (threadIdx.x == 0) {
                for (int i = 1; i < WARPS; ++i) top = max(top, winner[i]);
                atomicMax(&w.best[k * w.streams + s], top);
            }
            __syncthreads();
        }
        arrive_and_wait(w.arrived, (k + 1) * gridDim.x);
        if (threadIdx.x < w.streams) {
            const unsigned long long best = __ldcg(&w.best[k * w.streams + threadIdx.x]);
            const int index = static_cast<int>(dspark::packed_token(best));
            previous[threadIdx.x] = w.draft_ids == nullptr ? index : w.draft_ids[index];
            if (blockIdx.x == 0) w.tokens[threadIdx.x * w.gamma + k] = index;
        }
        __syncthreads();
    }
}

#ifndef DSPARK_EMULATED
template <int LANES>
cudaError_t launch(const DsparkWalk& w, cudaStream_t stream) {
    int device = 0, multiprocessors = 0, shared = 0, own = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, walk<LANES>);
    if (error != cudaSuccess) return error;
    own = static_cast<int>(attributes.sharedSizeBytes);
    // one block a multiprocessor; slices of whole warps' rows
    const int slice = ((w.vocab + multiprocessors - 1) / multiprocessors + 31) / 32 * 32;
    const int blocks = (w.vocab + slice - 1) / slice;
    const int kept = min(slice, (shared - own) / (w.rank * 2));
    const size_t bytes = static_cast<size_t>(kept) * w.rank * 2;
    error = cudaFuncSetAttribute(walk<LANES>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
    error = cudaMemsetAsync(w.best, 0, sizeof(unsigned long long) * w.gamma * w.streams, stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(w.arrived, 0, sizeof(unsigned int), stream);
    if (error != cudaSuccess) return error;
    int slice_argument = slice, kept_argument = kept;
    void* arguments[] = {const_cast<DsparkWalk*>(&w), &slice_argument, &kept_argument};
    return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(walk<LANES>), dim3(blocks), dim3(THREADS), arguments,
                                       bytes, stream);
}

#endif

}  // namespace

#ifndef DSPARK_EMULATED
// 0, or the CUDA error; cudaErrorInvalidValue for sizes that it does not know. Safe to capture.
extern "C" int dspark_walk(const DsparkWalk* w, void* stream) {
    if (w->streams < 1 || w->streams > MOST_STREAMS || w->gamma < 1 || w->vocab < 1) return cudaErrorInvalidValue;
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    switch (w->rank) {
        case 32: return launch<4>(*w, on);
        case 64: return launch<8>(*w, on);
        case 128: return launch<16>(*w, on);
        case 256: return launch<32>(*w, on);
        default: return cudaErrorInvalidValue;
    }
}

extern "C" const char* dspark_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#endif
