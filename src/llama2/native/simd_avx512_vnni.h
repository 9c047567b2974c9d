// AVX-512 with VNNI: 16 lanes. vpdpbusd wants unsigned weights, so 8-bit ones are stored with 128 added.
#pragma once

#include <immintrin.h>

namespace llama2::simd {

constexpr int kLanes = 16;
constexpr int kByteBias = 128;
constexpr int kPanels = 2;         // panels that a product of many tokens unpacks at a time
constexpr int kTokens = 4;         // tokens that they meet at a time
constexpr int kFloatTokens = 8;    // likewise where weights are floats
constexpr int kAttentionRows = 8;  // queries a tile of attention
using F = __m512;
using I = __m512i;
using B = __m512i;

inline F zero() { return _mm512_setzero_ps(); }
inline F set(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F scale_by_power_of_two(F x, F n) { return _mm512_scalef_ps(x, n); }
inline F where_less(F a, F b, F x, F y) { return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x); }
inline F from_int(I x) { return _mm512_cvtepi32_ps(x); }
inline F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F load_i8(const int8_t* p) { return from_int(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline F load_u8(const uint8_t* p) { return from_int(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }

inline I set_int(int32_t x) { return _mm512_set1_epi32(x); }
template <int n> inline I shift_left(I x) { return _mm512_slli_epi32(x, n); }
inline I max_int(I a, I b) { return _mm512_max_epi32(a, b); }
inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
inline I magnitude_bits(F x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
inline I to_int(F x) { return _mm512_cvtps_epi32(x); }  // to nearest, ties to even
inline void store_int(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
inline void store_i8(int8_t* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(x)); }

inline B load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline B low(B x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline B high(B x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
template <int left, int mask> inline B merge(B low, B x) {
    const I shifted =
        left >= 0 ? _mm512_slli_epi16(x, left >= 0 ? left : 0) : _mm512_srli_epi16(x, left < 0 ? -left : 0);
    return _mm512_ternarylogic_epi32(low, shifted, _mm512_set1_epi8(mask), 0xf8);  // low | (shifted & mask)
}
template <int bits, int quads, int P, int M>
LLAMA2_INLINE void dot(I (&sums)[M][P], const B* const* w, const int8_t* const* x) {
    LLAMA2_UNROLL
    for (int j = 0; j < quads; ++j) {
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) {
            const I four = set_int(load_four(x[m] + 4 * j));
            LLAMA2_UNROLL
            for (int p = 0; p < P; ++p) sums[m][p] = _mm512_dpbusd_epi32(sums[m][p], w[p][j], four);
        }
    }
}

}  // namespace llama2::simd
