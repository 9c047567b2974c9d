// 64-bit Arm with the dot-product extension: 4 lanes.
#pragma once

#include <arm_neon.h>

namespace llama2::simd {

constexpr int kLanes = 4;
constexpr int kByteBias = 0;
constexpr int kPanels = 2;
constexpr int kTokens = 4;
constexpr int kFloatTokens = 8;
constexpr int kAttentionRows = 2;
using F = float32x4_t;
using I = int32x4_t;
using B = int8x16_t;

inline F zero() { return vdupq_n_f32(0); }
inline F set(float x) { return vdupq_n_f32(x); }
inline F load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F x) { vst1q_f32(p, x); }
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F max(F a, F b) { return vmaxq_f32(a, b); }
inline F min(F a, F b) { return vminq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F round(F x) { return vrndnq_f32(x); }
inline F scale_by_power_of_two(F x, F n) {
    const I whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    const auto power = [](I e) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23)); };
    return vmulq_f32(vmulq_f32(x, power(half)), power(vsubq_s32(whole, half)));
}
inline F where_less(F a, F b, F x, F y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
inline F from_int(I x) { return vcvtq_f32_s32(x); }
inline F load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline F load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline F load_i8(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return from_int(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
inline F load_u8(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))))));
}

inline I set_int(int32_t x) { return vdupq_n_s32(x); }
template <int n> inline I shift_left(I x) { return vshlq_n_s32(x, n); }
inline I max_int(I a, I b) { return vmaxq_s32(a, b); }
inline I add_int(I a, I b) { return vaddq_s32(a, b); }
inline I magnitude_bits(F x) { return vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x7fffffff)); }
inline I to_int(F x) { return vcvtnq_s32_f32(x); }
inline void store_int(int32_t* p, I x) { vst1q_s32(p, x); }
inline void store_i8(int8_t* p, I x) {
    const int16x4_t words = vqmovn_s32(x);
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
    std::memcpy(p, &four, 4);
}

inline B load_bytes(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
inline B low(B x) { return vandq_s8(x, vdupq_n_s8(15)); }
inline B high(B x) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x), 4)); }
template <int left, int mask> inline B merge(B low, B x) {
    const uint8x16_t bytes = vreinterpretq_u8_s8(x);
    const uint8x16_t shifted = vshlq_u8(bytes, vdupq_n_s8(left));  // to the right where negative
    return vorrq_s8(low, vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8(mask))));
}
template <int bits, int quads, int P, int M>
LLAMA2_INLINE void dot(I (&sums)[M][P], const B* const* w, const int8_t* const* x) {
    LLAMA2_UNROLL
    for (int j = 0; j < quads; ++j) {
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) {
            const B four = vreinterpretq_s8_s32(set_int(load_four(x[m] + 4 * j)));
            LLAMA2_UNROLL
            for (int p = 0; p < P; ++p) sums[m][p] = vdotq_s32(sums[m][p], w[p][j], four);
        }
    }
}

}  // namespace llama2::simd
