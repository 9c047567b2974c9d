// One vector vocabulary, one header an instruction set; CMake picks it with LLAMA2_ISA_*.
//
// A vector has kLanes 32-bit lanes. In matrix products a lane is a row of the weight matrix. So no sum ever crosses
// lanes, and the order of additions never depends on the number of tokens. `fma` is fused wherever the hardware can
// fuse; nothing else may be (-ffp-contract=off).
//
//   F, I, B                floats, 32-bit integers, bytes (4 a lane)
//   where_less(a, b, x, y) x in the lanes where a < b, y in the others
//   load_bytes, low, high  4-bit weights: a byte holds two
//   merge<left, mask>      low | (x << left & mask) byte by byte; to the right where `left` is negative
//   dot<bits, quads, P, M> sums[m][p][lane] += Σ_j Σ_i w[p][j][lane][i]·x[m][4j + i]
//
// In `dot`, w is 0 … 2^bits − 1. With 8 bits it is signed, and stored with kByteBias added where the instruction wants
// unsigned weights.
//
// The key/value cache holds 16-bit numbers, of which a lane takes kDepth at a time (attention.h):
//
//   to_cached              a number as the cache holds it
//   load_cached            kLanes · kDepth of them
//   multiply_add(a, b, c)  c[lane] + Σ_i a[lane][i]·b[lane][i], i < kDepth
//   first_of_pairs         the second numbers of all lanes made zero
//   join(x)                kBlock floats at x, rounded and joined by kDepth to a lane, in place
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "half.h"

#if defined(_MSC_VER) && !defined(__clang__)
#define LLAMA2_INLINE __forceinline
#define LLAMA2_UNROLL
#else
#define LLAMA2_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define LLAMA2_UNROLL _Pragma("clang loop unroll(full)")
#else
#define LLAMA2_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

namespace llama2::simd {
inline int32_t load_four(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return x;
}
}  // namespace llama2::simd

#if defined(LLAMA2_ISA_AVX512_BF16)
#define LLAMA2_ISA_AVX512_VNNI  // which it extends
#include "simd_avx512_bf16.h"
#elif defined(LLAMA2_ISA_AVX512_VNNI)
#include "simd_avx512_vnni.h"
#elif defined(LLAMA2_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(LLAMA2_ISA_NEON_DOTPROD)
#include "simd_neon_dotprod.h"
#else
#include "simd_plain.h"
#endif

namespace llama2::simd {

#if !defined(LLAMA2_ISA_AVX512_BF16)
constexpr int kDepth = 1;  // half precision; both factors are floats by then
inline uint16_t to_cached(float x) { return f32_to_f16(x); }
inline F load_cached(const uint16_t* p) { return load_f16(p); }
inline F load_cached(const float* p) { return load(p); }
inline F multiply_add(F a, F b, F c) { return fma(a, b, c); }
inline F first_of_pairs(F x) { return x; }
inline void join(float*) {}
#endif

// Ask for a cache line; there need be no memory.
inline void prefetch(const void* p) {
#if defined(_MSC_VER) && !defined(__clang__)
    (void)p;
#else
    __builtin_prefetch(p);
#endif
}

inline void prefetch_to_write(const float* p) {
#if defined(_MSC_VER) && !defined(__clang__)
    (void)p;
#else
    __builtin_prefetch(p, 1);
#endif
}

// Of lanes that are not negative.
inline int32_t largest_lane(I x) {
#if defined(LLAMA2_ISA_AVX512_VNNI)
    return _mm512_reduce_max_epi32(x);
#else
    int32_t lanes[kLanes], largest = 0;
    store_int(lanes, x);
    for (const int32_t lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
#endif
}

inline float largest_lane(F x) {
#if defined(LLAMA2_ISA_AVX512_VNNI)
    return _mm512_reduce_max_ps(x);
#else
    float lanes[kLanes];
    store(lanes, x);
    float largest = lanes[0];
    for (const float lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
#endif
}

inline int32_t sum_of_16(const int8_t* p) {
#if defined(__SSE2__) || defined(_M_X64)
    const __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8(-128));  // plus 128
    const __m128i sums = _mm_sad_epu8(bytes, _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_cvtsi128_si32(_mm_unpackhi_epi64(sums, sums)) - 16 * 128;
#else
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += p[i];
    return sum;
#endif
}

inline int32_t sum_lanes(I x) {
    int32_t lanes[kLanes], sum = 0;
    store_int(lanes, x);
    for (const int32_t lane : lanes) sum += lane;
    return sum;
}

// e^x, relative error below 2e-7; 0 below −87.3, +inf above 88.7, NaN stays NaN. Cephes' expf split: x = n·ln2 + r.
inline F exp(F x) {
    const F low = set(-87.33654f), high = set(89.0f);  // e^89 overflows
    const F clamped = min(high, max(low, x));          // this operand order keeps NaN
    const F n = round(mul(clamped, set(1.44269504f)));
    F r = fma(n, set(-0.693359375f), clamped);
    r = fma(n, set(2.12194440e-4f), r);
    F p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set(1.0f)));
    const F y = scale_by_power_of_two(p, n);
    return where_less(x, low, zero(), y);
}

inline F silu(F x) { return div(x, add(set(1.0f), exp(sub(zero(), x)))); }

}  // namespace llama2::simd
