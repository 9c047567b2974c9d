// AVX2 with FMA and F16C: 8 lanes.
//
// vpmaddubsw adds two products of an unsigned and a signed byte with saturation at 16 bits. With |x| ≤ 127, 4-bit
// weights stay so far below that eight such sums fit, 5-bit ones four, 6-bit ones two. For 8-bit weights the weight
// gives its sign to the activation: |w| ≤ 128, so 2·128·127 still fits.
#pragma once

#include <immintrin.h>

namespace llama2::simd {

constexpr int kLanes = 8;
constexpr int kByteBias = 0;
constexpr int kPanels = 1;
constexpr int kTokens = 2;
constexpr int kFloatTokens = 4;
constexpr int kAttentionRows = 2;
using F = __m256;
using I = __m256i;
using B = __m256i;

inline F zero() { return _mm256_setzero_ps(); }
inline F set(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F scale_by_power_of_two(F x, F n) {  // in two factors, because 2^128 is not a float
    const I whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    const auto power = [](I e) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
}
inline F where_less(F a, F b, F x, F y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline F from_int(I x) { return _mm256_cvtepi32_ps(x); }
inline F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline F load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F load_i8(const int8_t* p) { return from_int(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline F load_u8(const uint8_t* p) { return from_int(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))); }

inline I set_int(int32_t x) { return _mm256_set1_epi32(x); }
template <int n> inline I shift_left(I x) { return _mm256_slli_epi32(x, n); }
inline I max_int(I a, I b) { return _mm256_max_epi32(a, b); }
inline I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
inline I magnitude_bits(F x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)); }
inline I to_int(F x) { return _mm256_cvtps_epi32(x); }
inline void store_int(int32_t* p, I x) { _mm256_storeu_si256((__m256i*)p, x); }
inline void store_i8(int8_t* p, I x) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}

inline B load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline B low(B x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline B high(B x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
template <int left, int mask> inline B merge(B low, B x) {
    const I shifted =
        left >= 0 ? _mm256_slli_epi16(x, left >= 0 ? left : 0) : _mm256_srli_epi16(x, left < 0 ? -left : 0);
    return _mm256_or_si256(low, _mm256_and_si256(shifted, _mm256_set1_epi8(mask)));
}
template <int bits, int quads, int P, int M>
LLAMA2_INLINE void dot(I (&sums)[M][P], const B* const* w, const int8_t* const* x) {
    constexpr int fit = bits == 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;  // sums of two products in 16 bits
    I words[M][P];
    LLAMA2_UNROLL
    for (int j = 0; j < quads; ++j) {
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) {
            const I four = set_int(load_four(x[m] + 4 * j));
            LLAMA2_UNROLL
            for (int p = 0; p < P; ++p) {
                const B weight = bits == 8 ? _mm256_abs_epi8(w[p][j]) : w[p][j];
                const I y = bits == 8 ? _mm256_sign_epi8(four, w[p][j]) : four;
                const I pairs = _mm256_maddubs_epi16(weight, y);
                words[m][p] = j % fit == 0 ? pairs : _mm256_add_epi16(words[m][p], pairs);
                if (j % fit == fit - 1 || j == quads - 1)
                    sums[m][p] = _mm256_add_epi32(sums[m][p], _mm256_madd_epi16(words[m][p], _mm256_set1_epi16(1)));
            }
        }
    }
}

}  // namespace llama2::simd
