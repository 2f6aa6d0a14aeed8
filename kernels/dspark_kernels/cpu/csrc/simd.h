// Sixteen lanes of float or int32 and what the kernels do with them, for three instruction sets; the fourth, AMX, is
// AVX-512 with a matrix unit. Which one is compiled is decided by the compiler's flags, which library is loaded at run
// time (build.py).
//
// Every path adds in the same order for every batch, so a row's result never depends on its neighbours. Paths differ
// from each other in the last bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define DSPARK_AVX512 1
#include <immintrin.h>
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define DSPARK_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define DSPARK_AVX2 1
#include <immintrin.h>
#endif

// Loops over lanes' worth of registers: the compiler leaves them in memory unless told. Without registers for 16 lanes
// there is nothing to gain, and compiling would take minutes.
#define DSPARK_PRAGMA(text) _Pragma(#text)
#if defined(DSPARK_AVX512) || defined(DSPARK_AVX2)
#define DSPARK_UNROLL(times) DSPARK_PRAGMA(GCC unroll times)
#else
#define DSPARK_UNROLL(times)
#endif

#if defined(__GNUC__)
#define DSPARK_APART __attribute__((noinline))
#define DSPARK_INLINE inline __attribute__((always_inline))
#else
#define DSPARK_APART
#define DSPARK_INLINE inline
#endif

namespace dspark {

constexpr int LANES = 16;
constexpr int GROUP = 32;  // weights that share a scale, and activations that do
constexpr int MIDDLE = 128;  // of a byte

// What GROUP activations have beside their signed bytes q: a scale, scale·Σq, and -MIDDLE·Σq, of all and of either half.
struct Rounded {
    float scale, sum;
    int32_t start, half[2];
};

#if defined(DSPARK_AVX512)

#if defined(DSPARK_AMX)
constexpr const char* ISA = "amx";
#else
constexpr const char* ISA = "avx512-vnni";
#endif
constexpr int CHAINS = 8;  // of dot products at once, as registers allow: see matrix.h
constexpr int sums_at_once(int /*heads*/) { return 4; }  // of 16 floats to so many query heads, the same: see attention.h

struct Ints {
    __m512i v;
    static Ints all(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
};

struct Floats {
    __m512 v;

    static Floats zero() { return {_mm512_setzero_ps()}; }
    static Floats all(float x) { return {_mm512_set1_ps(x)}; }
    static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Floats load_half(const uint16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static Floats load_bytes(const uint8_t* p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    }
    static Floats load_signed(const uint8_t* p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    }
    static Floats from(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store_half(uint16_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    // lanes from `count` on become `other`
    Floats keep(int count, float other) const {
        if (count >= LANES) return *this;
        const __mmask16 kept = static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1u);
        return {_mm512_mask_mov_ps(_mm512_set1_ps(other), kept, v)};
    }
    // lanes before `count` become `other`
    Floats drop(int count, float other) const {
        if (count <= 0) return *this;
        const __mmask16 dropped = static_cast<__mmask16>((1u << (count > LANES ? LANES : count)) - 1u);
        return {_mm512_mask_mov_ps(v, dropped, _mm512_set1_ps(other))};
    }
};

// lanes of x where a > b, else of y
inline Floats pick(Floats a, Floats b, Floats x, Floats y) {
    return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), x.v)};
}
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats power_of_two(Floats n) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v)}; }
inline void store_bytes(Floats a, int8_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

// 64 unsigned weight bytes: lane n holds 4 consecutive inputs of output channel n.
struct Bytes {
    __m512i v;
    static Bytes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
    void store(uint8_t* p) const { _mm512_store_si512(p, v); }
    // nibbles, as the high ones
    Bytes low() const { return {_mm512_and_si512(_mm512_slli_epi16(v, 4), _mm512_set1_epi8(-16))}; }
    Bytes high() const { return {_mm512_and_si512(v, _mm512_set1_epi8(-16))}; }
};

// The bits MASK of `more`, each byte shifted up (SHIFT below 0: down), set in w.
template <int MASK, int SHIFT>
inline void with_bits(Bytes& w, Bytes more) {
    __m512i v = more.v;
    if constexpr (SHIFT > 0) v = _mm512_slli_epi16(v, SHIFT);
    if constexpr (SHIFT < 0) v = _mm512_srli_epi16(v, -SHIFT);
    w.v = _mm512_ternarylogic_epi64(w.v, v, _mm512_set1_epi8(MASK), 0xf8);  // w | (v & mask)
}

inline Ints no_ints() { return {_mm512_setzero_si512()}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
// sum + Σ_j weight[lane][j]·x[j]; x: 4 signed bytes
inline Ints dot4(Ints sum, Bytes w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return {_mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(four))};
}

#if defined(DSPARK_AMX)

constexpr int AMX_ROWS = 8;  // below it the vector unit is as fast

// The operating system's leave to use the matrix unit, once a process (Linux: arch_prctl ARCH_REQ_XCOMP_PERM of XTILEDATA).
inline bool allow_matrix_unit() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Compilers do not know that tiles, and how they are cut, are read from memory: what was written has to be there.
inline void written(const void* at) { __asm__ volatile("" ::"r"(at) : "memory"); }

inline thread_local int matrix_unit_use = 0;  // how its tiles are cut now: 0 not at all

struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int count, int bytes) {
        rows[tile] = static_cast<uint8_t>(count);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};
static_assert(sizeof(TileShapes) == 64, "as the processor wants it");

// Tiles for products of `rows` activations: 0, 1 int32 [rows][16]; 2, 3 activations [rows][32]; 4, 5 weights [8][16·4].
inline void use_matrix_unit(int rows) {
    if (matrix_unit_use == rows) return;
    TileShapes shapes;
    for (int tile : {0, 1}) shapes.set(tile, rows, 64);
    for (int tile : {2, 3}) shapes.set(tile, rows, GROUP);
    for (int tile : {4, 5}) shapes.set(tile, GROUP / 4, 64);
    written(&shapes);
    _tile_loadconfig(&shapes);
    written(&shapes);
    matrix_unit_use = rows;
}

// Tiles for attention by `queries`: 0 to 3 floats [queries][16]; 4 bfloat16 [queries][32]; 5, 6 bfloat16 [16][16·2].
inline void use_matrix_unit_for_attention(int queries) {
    if (matrix_unit_use == -queries) return;
    TileShapes shapes;
    for (int tile : {0, 1, 2, 3, 4}) shapes.set(tile, queries, 64);
    for (int tile : {5, 6}) shapes.set(tile, 16, 64);
    written(&shapes);
    _tile_loadconfig(&shapes);
    written(&shapes);
    matrix_unit_use = -queries;
}

// Gives its 8 KiB of state back: the system saves and restores them with the thread otherwise.
inline void leave_matrix_unit() {
    if (!matrix_unit_use) return;
    _tile_release();
    matrix_unit_use = 0;
}

// out [rows][16] = x [rows][32] signed by weights [8 chunks][16 channels][4] unsigned; WHICH of two independent sets.
template <int WHICH>
inline void matrix_product(const uint8_t* weights, const int8_t* x, int32_t* out) {
    written(weights);
    if constexpr (WHICH == 0) {
        _tile_zero(0);
        _tile_loadd(4, weights, 64);
        _tile_loadd(2, x, GROUP);
        _tile_dpbsud(0, 2, 4);
        _tile_stored(0, out, 64);
    } else {
        _tile_zero(1);
        _tile_loadd(5, weights, 64);
        _tile_loadd(3, x, GROUP);
        _tile_dpbsud(1, 3, 5);
        _tile_stored(1, out, 64);
    }
}

// Attention's tiles 0 to 3 become nothing.
inline void clear_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
// The first `tiles` of them get a [queries][32] · b [16][16·2] more, bfloat16, b's tiles `apart` elements from one another.
// Strides are bytes from row to row.
inline void multiply_tiles(const uint16_t* a, size_t a_stride, const uint16_t* b, size_t apart, size_t b_stride, int tiles) {
    written(a);
    _tile_loadd(4, a, a_stride);
    _tile_loadd(5, b, b_stride);
    _tile_dpbf16ps(0, 4, 5);
    if (tiles < 2) return;
    _tile_loadd(6, b + apart, b_stride);
    _tile_dpbf16ps(1, 4, 6);
    if (tiles < 3) return;
    _tile_loadd(5, b + 2 * apart, b_stride);
    _tile_dpbf16ps(2, 4, 5);
    if (tiles < 4) return;
    _tile_loadd(6, b + 3 * apart, b_stride);
    _tile_dpbf16ps(3, 4, 6);
}
// The first `tiles` of them written out, `apart` floats from one another.
inline void store_tiles(float* out, size_t apart, size_t stride, int tiles) {
    _tile_stored(0, out, stride);
    if (tiles > 1) _tile_stored(1, out + apart, stride);
    if (tiles > 2) _tile_stored(2, out + 2 * apart, stride);
    if (tiles > 3) _tile_stored(3, out + 3 * apart, stride);
}

// 2^y for y ≤ 0, to 3e-6 of itself: more than a weight in bfloat16 keeps. 2^floor(y) by the exponent, the rest by a polynomial
// that is 1 at 0.
inline Floats power_for_weights(Floats y) {
    const Floats most = max(Floats::all(-126.0f), y);  // what is no number stays none
    const Floats r{_mm512_reduce_ps(most.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
    Floats p = fma(r, Floats::all(1.342668806e-2f), Floats::all(5.224246566e-2f));
    p = fma(p, r, Floats::all(2.412802108e-1f));
    p = fma(p, r, Floats::all(6.930448436e-1f));
    p = fma(p, r, Floats::all(1.0f));
    return {_mm512_scalef_ps(p.v, most.v)};
}

// a's lanes and then b's, to the nearest bfloat16
inline void store_bfloat(Floats a, Floats b, void* to) {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
}
// a's lanes to every second element from `to` on, or from the one after it: the others stay
inline void store_bfloat_every_second(Floats a, uint16_t* to, bool after) {
    const __m512i wide = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
    _mm512_mask_storeu_epi16(to, after ? 0xaaaaaaaa : 0x55555555, after ? _mm512_slli_epi32(wide, 16) : wide);
}

#endif

#elif defined(DSPARK_AVX2)

constexpr const char* ISA = "avx2";
constexpr int sums_at_once(int heads) { return heads > 3 ? 1 : 2; }

struct Ints {
    __m256i lo, hi;
    static Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
};

struct Floats {
    __m256 lo, hi;

    static Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Floats load_half(const uint16_t* p) {
        const __m128i* q = reinterpret_cast<const __m128i*>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
    }
    static Floats load_bytes(const uint8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
    }
    static Floats load_signed(const uint8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
    }
    static Floats from(Ints x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
    void store(float* p) const {
        _mm256_storeu_ps(p, lo);
        _mm256_storeu_ps(p + 8, hi);
    }
    void store_half(uint16_t* p) const {
        __m128i* q = reinterpret_cast<__m128i*>(p);
        _mm_storeu_si128(q, _mm256_cvtps_ph(lo, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(q + 1, _mm256_cvtps_ph(hi, _MM_FROUND_TO_NEAREST_INT));
    }
    Floats keep(int count, float other) const {
        if (count >= LANES) return *this;
        alignas(32) float x[LANES];
        store(x);
        for (int i = count < 0 ? 0 : count; i < LANES; i++) x[i] = other;
        return load(x);
    }
    Floats drop(int count, float other) const {
        if (count <= 0) return *this;
        alignas(32) float x[LANES];
        store(x);
        for (int i = 0; i < count && i < LANES; i++) x[i] = other;
        return load(x);
    }
};

inline Floats pick(Floats a, Floats b, Floats x, Floats y) {
    return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
            _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Floats abs(Floats a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Floats round(Floats a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline Floats power_of_two(Floats n) {
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i lo = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.lo), bias), 23);
    const __m256i hi = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.hi), bias), 23);
    return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)};
}
inline void store_bytes(Floats a, int8_t* p) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline __m256 load_half_of(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// Four signed bytes for every channel.
inline __m256i four_of(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

// The low nibbles of 32 bytes, or the high ones.
inline __m256i nibbles(const uint8_t* at, int high) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm256_and_si256(high ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
}

// Bits of 32 bytes from `shift` on, as many as the mask has.
inline __m256i some_bits(const uint8_t* at, int shift, char mask) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm256_and_si256(_mm256_srli_epi16(bytes, shift), _mm256_set1_epi8(mask));
}

// Statements without an instruction, about what the compiler may assume. The value is there from here on: GCC moves
// additions to where their sum is used, and there are no registers for all that would wait for them. The pointer may
// point elsewhere: else GCC keeps what was read from it, for want of registers in memory.
inline void settled(__m256i& value) { __asm__("" : "+x"(value)); }
template <typename T>
inline const T* anew(const T* pointer) {
    __asm__("" : "+r"(pointer));
    return pointer;
}

// Sums of pairs of products of nibbles and R rows' signed bytes, over COUNT of the eight chunks of a group: 8 · 2 · 15 · 128
// fits 16 bits. chunk(c, side): four nibbles of each of eight channels, the lower eight or the upper.
template <int R, int COUNT, typename Chunk>
DSPARK_INLINE void pair_sums(Chunk chunk, const int8_t (*x)[GROUP], int first, __m256i (*sums)[2]) {
DSPARK_UNROLL(8)
    for (int c = 0; c < COUNT; c++) {
        const __m256i w[2] = {chunk(first + c, 0), chunk(first + c, 1)};
DSPARK_UNROLL(4)
        for (int r = 0; r < R; r++) {
            const __m256i four = four_of(x[r] + 4 * (first + c));
DSPARK_UNROLL(2)
            for (int side = 0; side < 2; side++) {
                const __m256i pairs = _mm256_maddubs_epi16(w[side], four);
                sums[r][side] = c ? _mm256_add_epi16(sums[r][side], pairs) : pairs;
                settled(sums[r][side]);
            }
        }
    }
}

// Neighbouring sums of 16 channels put together, times a number.
inline Ints widened(const __m256i* sums, short by) {
    const __m256i each = _mm256_set1_epi16(by);
    return {_mm256_madd_epi16(sums[0], each), _mm256_madd_epi16(sums[1], each)};
}
inline Ints no_ints() { return Ints::all(0); }
inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }

#else

constexpr const char* ISA = "portable";
constexpr int CHAINS = 1;
constexpr int sums_at_once(int /*heads*/) { return 4; }

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    } else {  // zero and subnormals: mantissa · 2^-24, exact
        const float x = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &x, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline uint16_t float_to_half(float x) {  // to nearest, ties to even, as the hardware does
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (rest < 0x38800000u) {  // subnormal: a multiple of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &rest, 4);
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(magnitude * 16777216.0f)));
    }
    const uint32_t odd = (rest >> 13) & 1u;
    return static_cast<uint16_t>(sign | ((rest + 0xfffu + odd - 0x38000000u) >> 13));
}

struct Ints {
    int32_t v[LANES];
    static Ints all(int32_t x) {
        Ints out;
        for (int32_t& v : out.v) v = x;
        return out;
    }
};

struct Floats {
    float v[LANES];

    template <typename F>
    static Floats make(F f) {
        Floats out;
        for (int i = 0; i < LANES; i++) out.v[i] = f(i);
        return out;
    }
    static Floats zero() { return all(0.0f); }
    static Floats all(float x) {
        return make([=](int) { return x; });
    }
    static Floats load(const float* p) {
        return make([=](int i) { return p[i]; });
    }
    static Floats load_half(const uint16_t* p) {
        return make([=](int i) { return half_to_float(p[i]); });
    }
    static Floats load_bytes(const uint8_t* p) {
        return make([=](int i) { return static_cast<float>(p[i]); });
    }
    static Floats load_signed(const uint8_t* p) {
        return make([=](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
    }
    static Floats from(Ints x) {
        return make([&](int i) { return static_cast<float>(x.v[i]); });
    }
    void store(float* p) const {
        for (int i = 0; i < LANES; i++) p[i] = v[i];
    }
    void store_half(uint16_t* p) const {
        for (int i = 0; i < LANES; i++) p[i] = float_to_half(v[i]);
    }
    Floats keep(int count, float other) const {
        return make([&](int i) { return i < count ? v[i] : other; });
    }
    Floats drop(int count, float other) const {
        return make([&](int i) { return i < count ? other : v[i]; });
    }
};

#define DSPARK_EACH(expression) Floats::make([&](int i) { return (expression); })
inline Floats pick(const Floats& a, const Floats& b, const Floats& x, const Floats& y) {
    return DSPARK_EACH(a.v[i] > b.v[i] ? x.v[i] : y.v[i]);
}
inline Floats operator+(const Floats& a, const Floats& b) { return DSPARK_EACH(a.v[i] + b.v[i]); }
inline Floats operator-(const Floats& a, const Floats& b) { return DSPARK_EACH(a.v[i] - b.v[i]); }
inline Floats operator*(const Floats& a, const Floats& b) { return DSPARK_EACH(a.v[i] * b.v[i]); }
inline Floats operator/(const Floats& a, const Floats& b) { return DSPARK_EACH(a.v[i] / b.v[i]); }
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) { return DSPARK_EACH(a.v[i] * b.v[i] + c.v[i]); }
inline Floats max(const Floats& a, const Floats& b) { return DSPARK_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Floats min(const Floats& a, const Floats& b) { return DSPARK_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Floats abs(const Floats& a) { return DSPARK_EACH(std::fabs(a.v[i])); }
inline Floats round(const Floats& a) { return DSPARK_EACH(std::nearbyint(a.v[i])); }
inline Floats power_of_two(const Floats& n) { return DSPARK_EACH(std::ldexp(1.0f, static_cast<int>(n.v[i]))); }
#undef DSPARK_EACH
inline void store_bytes(const Floats& a, int8_t* p) {
    for (int i = 0; i < LANES; i++) p[i] = static_cast<int8_t>(std::nearbyint(a.v[i]));
}

struct Bytes {
    uint8_t v[64];
    static Bytes load(const uint8_t* p) {
        Bytes out;
        std::memcpy(out.v, p, 64);
        return out;
    }
    // nibbles, as the high ones
    Bytes low() const {
        Bytes out;
        for (int i = 0; i < 64; i++) out.v[i] = static_cast<uint8_t>(v[i] << 4);
        return out;
    }
    Bytes high() const {
        Bytes out;
        for (int i = 0; i < 64; i++) out.v[i] = v[i] & 0xf0;
        return out;
    }
};

template <int MASK, int SHIFT>
inline void with_bits(Bytes& w, const Bytes& more) {
    for (int i = 0; i < 64; i++)
        w.v[i] = static_cast<uint8_t>(w.v[i] | ((SHIFT > 0 ? more.v[i] << SHIFT : more.v[i] >> -SHIFT) & MASK));
}

inline Ints no_ints() { return {}; }
inline Ints dot4(Ints sum, const Bytes& w, const int8_t* x) {
    for (int lane = 0; lane < LANES; lane++)
        for (int j = 0; j < 4; j++) sum.v[lane] += static_cast<int32_t>(w.v[4 * lane + j]) * x[j];
    return sum;
}

#endif

#if !defined(DSPARK_AMX)
inline bool allow_matrix_unit() { return true; }
inline void leave_matrix_unit() {}
#endif

// Lanes folded in halves, 8 + 8, 4 + 4, …: the same order on every path.
#if defined(DSPARK_AVX512) || defined(DSPARK_AVX2)
template <typename Fold>
inline float fold(__m256 eight, Fold two) {
    __m128 four = two(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = two(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(two(four, _mm_shuffle_ps(four, four, 1)));
}
#if defined(DSPARK_AVX512)
inline __m256 low_half(Floats a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high_half(Floats a) { return _mm512_extractf32x8_ps(a.v, 1); }
#else
inline __m256 low_half(Floats a) { return a.lo; }
inline __m256 high_half(Floats a) { return a.hi; }
#endif
inline float sum_of(Floats a) {
    const auto add = [](__m128 x, __m128 y) { return _mm_add_ps(x, y); };
    return fold(_mm256_add_ps(low_half(a), high_half(a)), add);
}
inline float max_of(Floats a) {
    const auto most = [](__m128 x, __m128 y) { return _mm_max_ps(x, y); };
    return fold(_mm256_max_ps(low_half(a), high_half(a)), most);
}
#else
inline float sum_of(Floats a) {
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) a.v[i] += a.v[i + width];
    return a.v[0];
}
inline float max_of(Floats a) {
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
    return a.v[0];
}
#endif

#if defined(DSPARK_AVX512)

// Lanes 0 to 3: all lanes of x[0], …, x[3] put together by `two`.
template <typename Two>
inline __m128 fold_four(const __m512* x, Two two) {
    const __m512 ab = two(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const __m512 cd = two(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512 all = two(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m512 half = two(all, _mm512_shuffle_f32x4(all, all, 0x4e));
    return _mm512_castps512_ps128(two(half, _mm512_shuffle_f32x4(half, half, 0x11)));
}

// Four times 32 floats in signed bytes with a scale each, as `Quantised::put` does one, to the bit, at less than half the
// cost. q, of: where each goes. False, and nothing done, where one of them is nothing, endless or no number.
inline bool quantise_four(const float* x, int8_t* const* q, Rounded* const* of) {
    __m512 v[8], most[4];
    __mmask16 unordered = 0;
DSPARK_UNROLL(4)
    for (int i = 0; i < 4; i++) {
        v[2 * i] = _mm512_loadu_ps(x + 32 * i);
        v[2 * i + 1] = _mm512_loadu_ps(x + 32 * i + 16);
        unordered |= _mm512_cmp_ps_mask(v[2 * i], v[2 * i + 1], _CMP_UNORD_Q);
        most[i] = _mm512_max_ps(_mm512_abs_ps(v[2 * i]), _mm512_abs_ps(v[2 * i + 1]));
    }
    const __m128 top = fold_four(most, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
    const __mmask8 usable =
        _mm_cmp_ps_mask(top, _mm_set1_ps(1e-30f), _CMP_GT_OQ) & _mm_cmp_ps_mask(top, _mm_set1_ps(INFINITY), _CMP_LT_OQ);
    if (unordered || (usable & 15) != 15) return false;
    alignas(16) float up[4], down[4], sums[4];
    alignas(16) int32_t halves[2][4];
    _mm_store_ps(up, _mm_div_ps(_mm_set1_ps(127.0f), top));
    const __m128 scales = _mm_div_ps(top, _mm_set1_ps(127.0f));
    _mm_store_ps(down, scales);
    __m512i n[8];
    __m512 firsts[4], seconds[4];
DSPARK_UNROLL(4)
    for (int i = 0; i < 4; i++) {
        n[2 * i] = _mm512_cvtps_epi32(_mm512_mul_ps(v[2 * i], _mm512_set1_ps(up[i])));
        n[2 * i + 1] = _mm512_cvtps_epi32(_mm512_mul_ps(v[2 * i + 1], _mm512_set1_ps(up[i])));
        firsts[i] = _mm512_castsi512_ps(n[2 * i]), seconds[i] = _mm512_castsi512_ps(n[2 * i + 1]);
    }
    const auto add = [](__m512 a, __m512 b) {
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    };
    const __m128i first = _mm_castps_si128(fold_four(firsts, add)), second = _mm_castps_si128(fold_four(seconds, add));
    _mm_store_ps(sums, _mm_mul_ps(scales, _mm_cvtepi32_ps(_mm_add_epi32(first, second))));
    _mm_store_si128(reinterpret_cast<__m128i*>(halves[0]), _mm_mullo_epi32(first, _mm_set1_epi32(-MIDDLE)));
    _mm_store_si128(reinterpret_cast<__m128i*>(halves[1]), _mm_mullo_epi32(second, _mm_set1_epi32(-MIDDLE)));
    // fours of both halves of two groups, lane by lane of 128 bits: set in order again
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
DSPARK_UNROLL(2)
    for (int i = 0; i < 4; i += 2) {
        const __m512i words = _mm512_packs_epi32(n[2 * i], n[2 * i + 1]);
        const __m512i more = _mm512_packs_epi32(n[2 * i + 2], n[2 * i + 3]);
        const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words, more));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q[i]), _mm512_castsi512_si256(bytes));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q[i + 1]), _mm512_extracti64x4_epi64(bytes, 1));
    }
    for (int i = 0; i < 4; i++) *of[i] = {down[i], sums[i], halves[0][i] + halves[1][i], {halves[0][i], halves[1][i]}};
    return true;
}

#endif

// V vectors of 16 in half precision, `apart` from one to the next, times each of G numbers, `stride` from one to the next,
// onto sums[v][g].
template <int V, int G>
DSPARK_INLINE void add_outer(const uint16_t* vectors, size_t apart, const float* numbers, size_t stride, Floats (*sums)[G]) {
    Floats by[G];
DSPARK_UNROLL(4)
    for (int g = 0; g < G; g++) by[g] = Floats::all(numbers[g * stride]);
DSPARK_UNROLL(4)
    for (int v = 0; v < V; v++) {
#if defined(DSPARK_AVX2)  // eight at a time: twelve sums, three numbers and one vector are sixteen registers
DSPARK_UNROLL(2)
        for (int side = 0; side < 2; side++) {
            const __m256 x = load_half_of(vectors + v * apart + 8 * side);
DSPARK_UNROLL(4)
            for (int g = 0; g < G; g++) {
                __m256& sum = side ? sums[v][g].hi : sums[v][g].lo;
                sum = _mm256_fmadd_ps(x, by[g].lo, sum);
            }
        }
#else
        const Floats x = Floats::load_half(vectors + v * apart);
DSPARK_UNROLL(4)
        for (int g = 0; g < G; g++) sums[v][g] = fma(x, by[g], sums[v][g]);
#endif
    }
}

// One number to half precision and back.
inline uint16_t half_of(float x) {
#if defined(DSPARK_AVX512) || defined(DSPARK_AVX2)
    return static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT), 0));
#else
    return float_to_half(x);
#endif
}
inline float float_of(uint16_t half) {
#if defined(DSPARK_AVX512) || defined(DSPARK_AVX2)
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
#else
    return half_to_float(half);
#endif
}

// e^x to about 2 units in the last place: 2^n·e^r, r in ±ln2/2 by a polynomial of degree 6. Below -87 it stays at e^-87.
inline Floats exp(Floats x) {
    const Floats low = Floats::all(-87.0f);
    const Floats clamped = max(min(x, Floats::all(88.0f)), low);
    const Floats n = round(clamped * Floats::all(1.44269504f));
    Floats r = fma(n, Floats::all(-0.693359375f), clamped);
    r = fma(n, Floats::all(2.12194440e-4f), r);
    Floats p = Floats::all(1.9875691500e-4f);
    p = fma(p, r, Floats::all(1.3981999507e-3f));
    p = fma(p, r, Floats::all(8.3334519073e-3f));
    p = fma(p, r, Floats::all(4.1665795894e-2f));
    p = fma(p, r, Floats::all(1.6666665459e-1f));
    p = fma(p, r, Floats::all(5.0000001201e-1f));
    p = fma(p, r * r, r + Floats::all(1.0f));
    return p * power_of_two(n);
}

}  // namespace dspark
