// AVX-512 with dot products of bfloat16 pairs, for attention: twice as many products an instruction as with floats.
#pragma once

#include "simd_avx512_vnni.h"

namespace llama2::simd {

constexpr int kDepth = 2;
inline uint16_t to_cached(float x) { return f32_to_bf16(x); }
inline F load_cached(const uint16_t* p) { return _mm512_loadu_ps(p); }  // a lane is a pair
inline F multiply_add(F a, F b, F c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
inline F first_of_pairs(F x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff)));
}
inline void join(float* x) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(load(x + kLanes), load(x));
    store(x, (F)pairs);
}

}  // namespace llama2::simd
