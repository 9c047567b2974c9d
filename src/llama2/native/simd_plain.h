// Any processor: plain C++ over arrays of 4. The compiler may vectorise it; multiply and add stay two roundings.
#pragma once

namespace llama2::simd {

constexpr int kLanes = 4;
constexpr int kByteBias = 0;
constexpr int kPanels = 1;
constexpr int kTokens = 4;
constexpr int kFloatTokens = 4;
constexpr int kAttentionRows = 2;
struct F {
    float v[kLanes];
};
struct I {
    int32_t v[kLanes];
};
struct B {
    int8_t v[4 * kLanes];
};

template <class R, class Op> inline R each(Op op) {
    R r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = op(i);
    return r;
}

inline F set(float x) { return {{x, x, x, x}}; }
inline F zero() { return set(0); }
inline F load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
// clang-format off: an operation a line
inline F add(F a, F b) { return each<F>([&](int i) { return a.v[i] + b.v[i]; }); }
inline F sub(F a, F b) { return each<F>([&](int i) { return a.v[i] - b.v[i]; }); }
inline F mul(F a, F b) { return each<F>([&](int i) { return a.v[i] * b.v[i]; }); }
inline F div(F a, F b) { return each<F>([&](int i) { return a.v[i] / b.v[i]; }); }
inline F max(F a, F b) { return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F min(F a, F b) { return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline F fma(F a, F b, F c) { return each<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline F round(F x) { return each<F>([&](int i) { return std::nearbyint(x.v[i]); }); }
inline F scale_by_power_of_two(F x, F n) {
    return each<F>([&](int i) { return std::ldexp(x.v[i], n.v[i] == n.v[i] ? int(n.v[i]) : 0); });
}
inline F where_less(F a, F b, F x, F y) { return each<F>([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; }); }
inline F from_int(I x) { return each<F>([&](int i) { return float(x.v[i]); }); }
inline F load_f16(const uint16_t* p) { return each<F>([&](int i) { return f16_to_f32(p[i]); }); }
inline F load_bf16(const uint16_t* p) { return each<F>([&](int i) { return bf16_to_f32(p[i]); }); }
inline F load_i8(const int8_t* p) { return each<F>([&](int i) { return float(p[i]); }); }
inline F load_u8(const uint8_t* p) { return each<F>([&](int i) { return float(p[i]); }); }

inline I set_int(int32_t x) { return {{x, x, x, x}}; }
template <int n> inline I shift_left(I x) { return each<I>([&](int i) { return x.v[i] * (1 << n); }); }
inline I max_int(I a, I b) { return each<I>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline I add_int(I a, I b) { return each<I>([&](int i) { return a.v[i] + b.v[i]; }); }
inline I magnitude_bits(F x) { return each<I>([&](int i) { return std::bit_cast<int32_t>(x.v[i]) & 0x7fffffff; }); }
inline I to_int(F x) { return each<I>([&](int i) { return int32_t(std::nearbyint(x.v[i])); }); }
// clang-format on
inline void store_int(int32_t* p, I x) { std::memcpy(p, x.v, sizeof x.v); }
inline void store_i8(int8_t* p, I x) {
    for (int i = 0; i < kLanes; ++i) p[i] = int8_t(x.v[i]);
}

inline B load_bytes(const uint8_t* p) {
    B b;
    std::memcpy(b.v, p, sizeof b.v);
    return b;
}
inline B low(B x) {
    for (auto& b : x.v) b &= 15;
    return x;
}
inline B high(B x) {
    for (auto& b : x.v) b = int8_t(uint8_t(b) >> 4);
    return x;
}
template <int left, int mask> inline B merge(B low, B x) {
    for (size_t i = 0; i < sizeof x.v; ++i) {
        const auto byte = uint8_t(x.v[i]);
        low.v[i] =
            int8_t(low.v[i] | ((left >= 0 ? byte << (left >= 0 ? left : 0) : byte >> (left < 0 ? -left : 0)) & mask));
    }
    return low;
}
template <int bits, int quads, int P, int M>
inline void dot(I (&sums)[M][P], const B* const* w, const int8_t* const* x) {
    for (int m = 0; m < M; ++m)
        for (int p = 0; p < P; ++p)
            for (int j = 0; j < quads; ++j)
                for (int i = 0; i < kLanes; ++i)
                    for (int k = 0; k < 4; ++k) sums[m][p].v[i] += int32_t(w[p][j].v[4 * i + k]) * x[m][4 * j + k];
}

}  // namespace llama2::simd
