// Matrix products y[t][r] = Σ_k w[r][k] · x[t][k]: one weight matrix, any number of tokens.
//
// Every y[t][r] is one chain of additions in the order of k that does not depend on how many tokens, rows or threads
// there are (architecture, decision 1).
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "packed.h"

namespace llama2 {

// 32 activations of one token, quantised: x ≈ scale · q. One cache line.
struct alignas(64) ActivationGroup {
    int8_t q[32];
    float scale;
    int32_t negative_sum;      // −Σ q
    int32_t negative_half[2];  // −Σ q of either half
    float sum;                 // scale · Σ q
    float half[2];
    int32_t place;  // which 32 columns these are
};
static_assert(sizeof(ActivationGroup) == 64);

// A few activations of a Llama are a hundred times larger than the rest and take the precision of all that share their
// scale. What rounding left of the kRefined largest groups is therefore quantised once more. On the default model that
// cuts the Kullback–Leibler divergence of the logits to a third, for two groups more a product.
constexpr int kRefined = 2;

// Groups a token has: one for every 32 columns, then the refining ones.
inline int64_t activation_groups(int64_t columns) { return columns / 32 + kRefined; }

// A group with a NaN or an infinity gets NaN scales, so that nothing hides it.
inline void quantize_group(const float* x, int64_t place, ActivationGroup& out) {
    using namespace simd;
    std::memset(&out, 0, sizeof out);
    out.place = int32_t(place);
    I largest = set_int(0);
    for (int i = 0; i < 32; i += kLanes) largest = max_int(largest, magnitude_bits(load(x + i)));
    int32_t lanes[kLanes], bits = 0;
    store_int(lanes, largest);
    for (const int32_t lane : lanes) bits = lane > bits ? lane : bits;
    if (bits >= 0x7f800000) {
        out.scale = out.sum = out.half[0] = out.half[1] = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    const float magnitude = std::bit_cast<float>(bits);
    if (magnitude < 1e-36f) return;  // 127 / magnitude would overflow; such a group is zero
    out.scale = magnitude / 127.0f;
    const F inverse = set(127.0f / magnitude);
    for (int i = 0; i < 32; i += kLanes) store_i8(out.q + i, to_int(mul(load(x + i), inverse)));
    int32_t sums[2] = {0, 0};
    for (int i = 0; i < 32; ++i) sums[i / 16] += out.q[i];
    out.negative_sum = -(sums[0] + sums[1]);
    out.sum = out.scale * float(sums[0] + sums[1]);
    for (int h = 0; h < 2; ++h) out.negative_half[h] = -sums[h], out.half[h] = out.scale * float(sums[h]);
}

// x: (columns) → groups: (activation_groups(columns))
inline void quantize_activations(const float* x, int64_t columns, ActivationGroup* groups) {
    const int64_t count = columns / 32;
    for (int64_t g = 0; g < count; ++g) quantize_group(x + g * 32, g, groups[g]);
    ActivationGroup* refining = groups + count;
    for (int n = 0; n < kRefined; ++n) {
        int64_t largest = -1;
        for (int64_t g = 0; g < count; ++g) {
            bool refined = false;
            for (int i = 0; i < n; ++i) refined |= refining[i].place == g;
            if (!refined && (largest < 0 || groups[g].scale > groups[largest].scale)) largest = g;
        }
        alignas(64) float rest[32] = {};
        for (int i = 0; largest >= 0 && i < 32; ++i)
            rest[i] = x[largest * 32 + i] - groups[largest].scale * float(groups[largest].q[i]);
        quantize_group(rest, std::max<int64_t>(largest, 0), refining[n]);
    }
}

constexpr int64_t kAhead = 4096;

constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// One panel times M tokens. x[m] points to a token's groups; y: (M, kLanes).
//
//     y[m][r] = Σ_g  s[g][r] · scale[m][g] · (Σ_k w·q − offset·Σ_k q)   (+ minimum[g][r] · sum[m][g])
//
// over the groups in order, and then the refining ones. For one token the memory is the limit: each group asks for its
// share of the stream kAhead bytes further on.
template <Format format, int M>
void packed_product(const uint8_t* panel, const Panel& part, int64_t columns, const ActivationGroup* const* x,
                    float* y) {
    using namespace simd;
    constexpr const FormatInfo& f = kFormats[size_t(format)];
    constexpr bool super = f.scales == Scales::super || f.scales == Scales::super_min;
    constexpr bool has_min = f.scales == Scales::half_min || f.scales == Scales::super_min;
    constexpr int halves = 32 / f.group;  // groups of the format in 32 columns
    constexpr int quads = f.group / 4;    // dot products a group
    constexpr int vectors = f.bits == 4 ? quads / 2 : quads;
    constexpr int offset = f.bits == 8 ? kByteBias : f.offset;
    constexpr int scale_bytes = (super ? 1 : 2) * (has_min ? 2 : 1) * kLanes * halves;
    constexpr int record = f.bits * kLanes * 4 + scale_bytes;  // of 32 columns
    const uint8_t *weights = panel + part.weights, *scales = panel + part.scales, *minima = panel + part.minima;
    const uint16_t *d_at = (const uint16_t*)(panel + part.d), *dmin_at = (const uint16_t*)(panel + part.dmin);

    // Half `half` of columns g32·32 …, for `count` tokens with their activations in a[m].
    const auto accumulate = [&](int64_t g32, int half, const ActivationGroup* const* a, F* acc, auto count) {
        const int64_t g = g32 * halves + half;
        F s, minimum = zero();
        if constexpr (!super) {
            s = load_f16((const uint16_t*)scales + g * kLanes);
            if constexpr (has_min) minimum = load_f16((const uint16_t*)minima + g * kLanes);
        } else {
            s = mul(load_f16(d_at + g32 / 8 * kLanes), load_i8((const int8_t*)scales + g * kLanes));
            if constexpr (has_min)
                minimum = sub(zero(), mul(load_f16(dmin_at + g32 / 8 * kLanes), load_u8(minima + g * kLanes)));
        }
        B weight[quads];
        LLAMA2_UNROLL
        for (int j = 0; j < vectors; ++j) {
            const B bytes = load_bytes(weights + (g * vectors + j) * 4 * kLanes);
            if constexpr (f.bits == 4) weight[2 * j] = low(bytes), weight[2 * j + 1] = high(bytes);
            else weight[j] = bytes;
        }
        LLAMA2_UNROLL
        for (int m = 0; m < decltype(count)::value; ++m) {
            I dots = set_int(0);
            if constexpr (offset != 0) {
                const int32_t negative = halves == 1 ? a[m]->negative_sum : a[m]->negative_half[half];
                dots = shift_left<log2_of(offset)>(set_int(negative));
            }
            LLAMA2_UNROLL
            for (int j = 0; j < quads; ++j) {
                int32_t four;
                std::memcpy(&four, a[m]->q + half * 16 + 4 * j, 4);
                dots = dot4<f.bits>(dots, weight[j], four);
            }
            acc[m] = fma(from_int(dots), mul(s, set(a[m]->scale)), acc[m]);
            if constexpr (has_min) acc[m] = fma(minimum, set(halves == 1 ? a[m]->sum : a[m]->half[half]), acc[m]);
        }
    };

    const uint8_t* ahead = panel + kAhead;
    F acc[M];
    LLAMA2_UNROLL
    for (int m = 0; m < M; ++m) acc[m] = zero();
    for (int64_t g32 = 0; g32 < columns / 32; ++g32) {
        if constexpr (M == 1) {
            LLAMA2_UNROLL
            for (int i = 0; i < record; i += 64) prefetch(ahead + i);
            ahead += record;
        }
        const ActivationGroup* a[M];
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) a[m] = x[m] + g32;
        LLAMA2_UNROLL
        for (int half = 0; half < halves; ++half) accumulate(g32, half, a, acc, std::integral_constant<int, M>{});
    }
    LLAMA2_UNROLL
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < kRefined; ++n) {
            const ActivationGroup* refining = x[m] + columns / 32 + n;
            LLAMA2_UNROLL
            for (int half = 0; half < halves; ++half)
                accumulate(refining->place, half, &refining, acc + m, std::integral_constant<int, 1>{});
        }
        store(y + m * kLanes, acc[m]);
    }
}

// Plain row-major weights (F32, F16, BF16), used where they lie: kLanes rows from `w` (`rows` of them exist) times M
// tokens. Lanes run along k; their sums are added in a fixed tree at the end. y: (M, kLanes).
template <Format format, int M>
void plain_product(const uint8_t* w, int64_t rows, int64_t columns, const float* const* x, float* y) {
    using namespace simd;
    constexpr int size = format == Format::F32 ? 4 : 2;
    const auto load_weights = [](const uint8_t* p) {
        if constexpr (format == Format::F32) return load((const float*)p);
        else if constexpr (format == Format::F16) return load_f16((const uint16_t*)p);
        else return load_bf16((const uint16_t*)p);
    };
    const int64_t whole = columns / kLanes * kLanes;
    for (int64_t r = 0; r < rows && r < kLanes; ++r) {
        const uint8_t* row = w + r * columns * size;
        F acc[M];
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) acc[m] = zero();
        for (int64_t k = 0; k < whole; k += kLanes) {
            const F weight = load_weights(row + k * size);
            LLAMA2_UNROLL
            for (int m = 0; m < M; ++m) acc[m] = fma(weight, load(x[m] + k), acc[m]);
        }
        if (whole < columns) {
            uint8_t tail[kLanes * size] = {};
            std::memcpy(tail, row + whole * size, size_t(columns - whole) * size);
            const F weight = load_weights(tail);
            for (int m = 0; m < M; ++m) {
                float rest[kLanes] = {};
                std::memcpy(rest, x[m] + whole, size_t(columns - whole) * 4);
                acc[m] = fma(weight, load(rest), acc[m]);
            }
        }
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) {
            float lanes[kLanes];
            store(lanes, acc[m]);
            for (int n = kLanes / 2; n; n /= 2)
                for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
            y[m * kLanes + r] = lanes[0];
        }
    }
}

// A weight matrix as the model uses it: quantised formats packed, the others row-major.
struct Weight {
    Format format = Format::F32;
    int64_t rows = 0, columns = 0;
    const uint8_t* data = nullptr;
    Panel panel;

    Weight() = default;
    Weight(Format f, int64_t r, int64_t c, const uint8_t* p) : format(f), rows(r), columns(c), data(p) {
        const int64_t row = row_bytes(f, c);  // refuses columns that do not divide
        if (packed()) panel = Panel(f, c);
        else panel.bytes = simd::kLanes * row;
    }
    bool packed() const { return info(format).bits != 0; }
    int64_t bytes() const { return packed() ? packed_bytes(format, rows, columns) : rows * row_bytes(format, columns); }
};

// Tokens on their way into a product: as floats, and quantised (where the columns divide into groups).
struct Activations {
    const float* floats;            // (N, columns)
    const ActivationGroup* groups;  // (N, activation_groups(columns))
    int64_t columns;
};

template <int M, class Product> inline bool tile_of(int64_t& t, int64_t end, Product&& product) {
    if (end - t < M) return false;
    product(std::integral_constant<int, M>{}, t);
    t += M;
    return true;
}

// Rows panel·kLanes … of `w` times tokens first…end; write(token, y) takes each token's kLanes results.
template <class Write>
void panel_product(const Weight& w, int64_t panel, const Activations& x, int64_t first, int64_t end, Write&& write) {
    const uint8_t* data = w.data + panel * w.panel.bytes;
    const int64_t rows = w.rows - panel * simd::kLanes;
    const auto tile = [&](auto size, int64_t t) {
        constexpr int M = size;
        alignas(64) float y[M * simd::kLanes];
        const auto packed = [&](auto format) {
            const ActivationGroup* at[M];
            for (int m = 0; m < M; ++m) at[m] = x.groups + (t + m) * activation_groups(x.columns);
            packed_product<decltype(format)::value, M>(data, w.panel, w.columns, at, y);
        };
        const auto plain = [&](auto format) {
            const float* at[M];
            for (int m = 0; m < M; ++m) at[m] = x.floats + (t + m) * x.columns;
            plain_product<decltype(format)::value, M>(data, rows, w.columns, at, y);
        };
        using enum Format;
        switch (w.format) {
            case F32: plain(std::integral_constant<Format, F32>{}); break;
            case F16: plain(std::integral_constant<Format, F16>{}); break;
            case BF16: plain(std::integral_constant<Format, BF16>{}); break;
            case Q4_0: packed(std::integral_constant<Format, Q4_0>{}); break;
            case Q4_1: packed(std::integral_constant<Format, Q4_1>{}); break;
            case Q5_0:
            case Q8_0: packed(std::integral_constant<Format, Q8_0>{}); break;  // the same when packed
            case Q5_1: packed(std::integral_constant<Format, Q5_1>{}); break;
            case Q2_K: packed(std::integral_constant<Format, Q2_K>{}); break;
            case Q3_K: packed(std::integral_constant<Format, Q3_K>{}); break;
            case Q4_K: packed(std::integral_constant<Format, Q4_K>{}); break;
            case Q5_K: packed(std::integral_constant<Format, Q5_K>{}); break;
            case Q6_K: packed(std::integral_constant<Format, Q6_K>{}); break;
        }
        for (int m = 0; m < M; ++m) write(t + m, y + m * simd::kLanes);
    };
    int64_t t = first;
    if constexpr (simd::kTokens >= 8)
        while (tile_of<8>(t, end, tile)) {}
    while (tile_of<4>(t, end, tile)) {}
    while (tile_of<2>(t, end, tile)) {}
    while (tile_of<1>(t, end, tile)) {}
}

}  // namespace llama2
