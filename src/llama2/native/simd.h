// One vector vocabulary, one header an instruction set; CMake picks it with LLAMA2_ISA_*.
//
// A vector has kLanes 32-bit lanes. In matrix products a lane is a row of the weight matrix, so that no sum ever
// crosses lanes and the order of additions never depends on the number of tokens. `fma` is fused wherever the hardware
// can fuse; nothing else may be (-ffp-contract=off).
//
//   F, I, B                floats, 32-bit integers, bytes (4 a lane)
//   load_bytes, low, high  4-bit weights: a byte holds two
//   dot4<bits>(a, w, x)    a[lane] += sum of 4 products w[lane][i]·x[i]; w is 0…15 for 4 bits, signed for 8 bits
//                          (stored with kByteBias added, where the instruction wants unsigned weights)
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "half.h"

#if defined(LLAMA2_ISA_AVX512_VNNI)
#include "simd_avx512_vnni.h"
#elif defined(LLAMA2_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(LLAMA2_ISA_NEON_DOTPROD)
#include "simd_neon_dotprod.h"
#else
#include "simd_plain.h"
#endif

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

inline void prefetch(const void* p) {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
#elif !defined(_MSC_VER)
    __builtin_prefetch(p);
#else
    (void)p;
#endif
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
    return zero_where_below(y, x, low);
}

inline F silu(F x) { return div(x, add(set(1.0f), exp(sub(zero(), x)))); }

}  // namespace llama2::simd
