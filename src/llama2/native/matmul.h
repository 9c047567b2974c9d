// Matrix products y[t][r] = Σ_k w[r][k] · x[t][k]: one weight matrix, any number of tokens.
//
// Every y[t][r] is one chain of additions in the order of k. It does not depend on how many tokens, rows or threads
// there are (architecture, decision 1).
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "buffer.h"
#include "packed.h"

namespace llama2 {

// 32 activations of one token, quantized: x ≈ scale · q. One cache line.
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
// scale. What rounding left of the kRefined largest groups is therefore quantized once more. On the default model that
// cuts the Kullback–Leibler divergence of the logits to a third, for two groups more a product.
constexpr int kRefined = 2;

// A group with a NaN or an infinity gets NaN scales, so that nothing hides it.
inline void quantize_group(const float* x, int64_t place, ActivationGroup& out) {
    using namespace simd;
    std::memset(&out, 0, sizeof out);
    out.place = int32_t(place);
    I largest = set_int(0);
    for (int i = 0; i < 32; i += kLanes) largest = max_int(largest, magnitude_bits(load(x + i)));
    const int32_t bits = largest_lane(largest);
    if (bits >= 0x7f800000) {
        out.scale = out.sum = out.half[0] = out.half[1] = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    const float magnitude = std::bit_cast<float>(bits);
    if (magnitude < 1e-36f) return;  // 127 / magnitude would overflow; such a group is zero
    out.scale = magnitude / 127.0f;
    const F inverse = set(127.0f / magnitude);
    for (int i = 0; i < 32; i += kLanes) store_i8(out.q + i, to_int(mul(load(x + i), inverse)));
    const int32_t sums[] = {sum_of_16(out.q), sum_of_16(out.q + 16)};
    out.negative_sum = -(sums[0] + sums[1]);
    out.sum = out.scale * float(sums[0] + sums[1]);
    for (int h = 0; h < 2; ++h) out.negative_half[h] = -sums[h], out.half[h] = out.scale * float(sums[h]);
}

// x: (columns) → the token's group g at groups[g · stride], and its refining group n at refining[n · tokens].
inline void quantize_activations(const float* x, int64_t columns, ActivationGroup* groups, int64_t stride,
                                 ActivationGroup* refining, int64_t tokens) {
    const int64_t count = columns / 32;
    int64_t places[kRefined];
    float scales[kRefined];
    for (int n = 0; n < kRefined; ++n) places[n] = 0, scales[n] = -1;
    for (int64_t g = 0; g < count; ++g) {
        ActivationGroup& group = groups[g * stride];
        quantize_group(x + g * 32, g, group);
        // The largest so far, largest first; the earlier of equal ones.
        int n = kRefined;
        for (; n > 0 && group.scale > scales[n - 1]; --n)
            if (n < kRefined) scales[n] = scales[n - 1], places[n] = places[n - 1];
        if (n < kRefined) scales[n] = group.scale, places[n] = g;
    }
    std::sort(places, places + kRefined);
    for (int n = 0; n < kRefined; ++n) {
        const ActivationGroup& group = groups[places[n] * stride];
        alignas(64) float rest[32] = {};
        if (n == 0 || places[n] != places[n - 1])  // there may be fewer groups
            for (int i = 0; i < 32; ++i) rest[i] = x[places[n] * 32 + i] - group.scale * float(group.q[i]);
        quantize_group(rest, places[n], refining[n * tokens]);
    }
}

// Activations are kept in blocks of tokens, and within a block group by group. So what a product needs for one group of
// columns is contiguous.
constexpr int64_t kTokenBlock = 64;
inline int64_t token_blocks(int64_t tokens) { return (tokens + kTokenBlock - 1) / kTokenBlock; }
// A full block's groups of the same columns are a line further apart than there are tokens. Otherwise all groups of a
// token would fall into one set of the L1 cache.
inline int64_t group_stride(int64_t tokens) { return tokens == kTokenBlock ? tokens + 1 : tokens; }
// Groups of a block with so many tokens, the refining ones among them.
inline int64_t block_groups(int64_t tokens, int64_t columns) {
    return columns / 32 * group_stride(tokens) + kRefined * tokens;
}

// Tokens on their way into a product: as floats, and quantized (where the columns divide into groups).
struct Activations {
    const float* floats;  // (N, columns)
    // Block by block (n tokens): (columns / 32, group_stride(n)), then the refining groups, (kRefined, n)
    const ActivationGroup* groups;
    // Block by block: its kRefined · n refining groups by place, as indices into them.
    const uint8_t* refining;
    int64_t tokens, columns;

    int64_t block_start(int64_t block) const { return block * kTokenBlock; }
    int64_t block_size(int64_t block) const { return std::min(kTokenBlock, tokens - block_start(block)); }
    const ActivationGroup* block_activations(int64_t block) const {
        return groups + block * block_groups(kTokenBlock, columns);
    }
};
static_assert(kTokenBlock * kRefined <= 256);

// The memory behind Activations, and its making: every token by itself, then every block by itself.
class ActivationBuffer {
public:
    void reserve(int64_t tokens, int64_t columns) {
        tokens_ = tokens, columns_ = columns;
        groups_.reserve(token_blocks(tokens) * block_groups(std::min(tokens, kTokenBlock), columns));
        refining_.reserve(tokens * kRefined);
    }
    void quantize(int64_t token, const float* x) {
        if (columns_ % 32) return;
        const int64_t block = token / kTokenBlock, t = token % kTokenBlock, size = block_size(block);
        quantize_activations(x, columns_, groups(block) + t, group_stride(size), refining(block) + t, size);
    }
    // After all tokens of the block.
    void order(int64_t block) {
        if (columns_ % 32) return;
        const int64_t size = block_size(block);
        const ActivationGroup* g = refining(block);
        uint8_t* out = refining_.get() + block * kTokenBlock * kRefined;
        for (int64_t i = 0; i < size * kRefined; ++i) {  // nearly all of them have one of a few places
            int64_t at = i;
            for (; at > 0 && g[out[at - 1]].place > g[i].place; --at) out[at] = out[at - 1];
            out[at] = uint8_t(i);
        }
    }
    Activations view(const float* floats) const { return {floats, groups_.get(), refining_.get(), tokens_, columns_}; }

private:
    int64_t block_size(int64_t block) const { return std::min(kTokenBlock, tokens_ - block * kTokenBlock); }
    ActivationGroup* groups(int64_t block) { return groups_.get() + block * block_groups(kTokenBlock, columns_); }
    ActivationGroup* refining(int64_t block) { return groups(block) + columns_ / 32 * group_stride(block_size(block)); }

    Buffer<ActivationGroup> groups_;
    Buffer<uint8_t> refining_;
    int64_t tokens_ = 0, columns_ = 0;
};

constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// One group of columns of a panel, unpacked: what it adds to a token's sums is
//
//     y[r] += s[r] · scale · (Σ_k w·q − offset·Σ_k q)   (+ minimum[r] · sum)
template <Format format> class PanelGroup {
    static constexpr const FormatInfo& f = kFormats[size_t(format)];
    static constexpr bool super = f.scales == Scales::super || f.scales == Scales::super_min;
    static constexpr bool has_min = f.scales == Scales::half_min || f.scales == Scales::super_min;
    static constexpr int quads = f.group / 4;  // vectors of unpacked weights
    static constexpr int nibbles = f.bits == 8 ? quads : quads / 2;
    static constexpr int offset = f.bits == 8 ? simd::kByteBias : f.offset;
    static constexpr Record record{f};

public:
    static constexpr int halves = 32 / f.group;            // groups in 32 columns
    static constexpr int places = record.groups / halves;  // of 32 columns, in a record
    static constexpr int record_bytes = record.bytes;

    // The record of columns 32·place … 32·place + 31.
    static const uint8_t* record_of(const uint8_t* panel, int64_t place) {
        return panel + place / places * record.bytes;
    }
    // Group i of the record at `at`.
    LLAMA2_INLINE PanelGroup(const uint8_t* at, int i) {
        using namespace simd;
        if constexpr (!super) {
            scale_ = load_f16((const uint16_t*)(at + record.scales));
            if constexpr (has_min) minimum_ = load_f16((const uint16_t*)(at + record.minima));
        } else {
            scale_ = mul(load_f16((const uint16_t*)at), load_i8((const int8_t*)(at + record.scales + i * kLanes)));
            if constexpr (has_min)
                minimum_ = sub(zero(), mul(load_f16((const uint16_t*)(at + record.dmin)),
                                           load_u8(at + record.minima + i * kLanes)));
        }
        at += record.weights + i * record.group_bytes;
        LLAMA2_UNROLL
        for (int j = 0; j < nibbles; ++j) {
            const B bytes = load_bytes(at + j * 4 * kLanes);
            if constexpr (f.bits == 8) weight_[j] = bytes;
            else weight_[2 * j] = low(bytes), weight_[2 * j + 1] = high(bytes);
        }
        if constexpr (f.bits == 5 || f.bits == 6) merge_high(load_bytes(at + nibbles * 4 * kLanes));
    }

    // y[m] += what P panels have to add to the sums of M tokens: (M, kPanels, kLanes). `half` says which 16 columns of
    // the tokens' groups these are, where the format's groups have 16.
    template <int P, int M>
    static LLAMA2_INLINE void add(const PanelGroup* const* panels, const ActivationGroup* const* a, int half,
                                  float* const* y) {
        using namespace simd;
        I dots[M][P];
        const B* weights[P];
        const int8_t* x[M];
        LLAMA2_UNROLL
        for (int p = 0; p < P; ++p) weights[p] = panels[p]->weight_;
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) {
            x[m] = a[m]->q + half * 16;
            LLAMA2_UNROLL
            for (int p = 0; p < P; ++p) {
                dots[m][p] = set_int(0);
                if constexpr (offset != 0)
                    dots[m][p] = shift_left<log2_of(offset)>(
                        set_int(halves == 1 ? a[m]->negative_sum : a[m]->negative_half[half]));
            }
        }
        dot<f.bits, quads, P, M>(dots, weights, x);
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) {
            const F scale = set(a[m]->scale), sum = set(halves == 1 ? a[m]->sum : a[m]->half[half]);
            LLAMA2_UNROLL
            for (int p = 0; p < P; ++p) {
                F sums = fma(from_int(dots[m][p]), mul(panels[p]->scale_, scale), load(y[m] + p * kLanes));
                if constexpr (has_min) sums = fma(panels[p]->minimum_, sum, sums);
                store(y[m] + p * kLanes, sums);
            }
        }
    }

private:
    LLAMA2_INLINE void merge_high(simd::B high) {
        constexpr int step = f.bits - 4, mask = f.bits == 5 ? 0x10 : 0x30;
        const auto one = [&]<int j>(std::integral_constant<int, j>) {
            weight_[j] = simd::merge<4 - step * j, mask>(weight_[j], high);
        };
        [&]<int... j>(std::integer_sequence<int, j...>) {
            (one(std::integral_constant<int, j>{}), ...);
        }(std::make_integer_sequence<int, quads>{});
    }

    simd::B weight_[quads];
    simd::F scale_, minimum_;
};

constexpr int64_t kTile = simd::kPanels * simd::kLanes;  // sums of one token

// How far ahead of its use a record of many groups is asked for.
constexpr int64_t kAhead = 4096;

// One panel times one token. Memory is the limit, and a panel is one stream, which the processor reads ahead by itself.
// A record of many groups is read at many places by turns, and there it does not.
//
// a: the token's groups, the refining ones last. y: (kLanes)
template <Format format> void token_product(const uint8_t* panel, int64_t columns, const ActivationGroup* a, float* y) {
    using namespace simd;
    using Group = PanelGroup<format>;
    alignas(64) float sums[kLanes] = {};
    const int64_t count = columns / 32;
    const auto add = [&](const uint8_t* record, int place, const ActivationGroup& group) {
        LLAMA2_UNROLL
        for (int half = 0; half < Group::halves; ++half) {
            const Group one(record, place * Group::halves + half);
            const Group* groups[] = {&one};
            const ActivationGroup* a[] = {&group};
            float* y[] = {sums};
            Group::template add<1, 1>(groups, a, half, y);
        }
    };
    for (int64_t g = 0; g < count; g += Group::places) {  // what a record's groups share is loaded once
        const uint8_t* record = Group::record_of(panel, g);
        if constexpr (Group::places > 1)
            for (int64_t line = 0; line < Group::record_bytes; line += 64) prefetch(record + kAhead + line);
        LLAMA2_UNROLL
        for (int place = 0; place < Group::places; ++place) add(record, place, a[g + place]);
    }
    for (int64_t g = count; g < count + kRefined; ++g)
        add(Group::record_of(panel, a[g].place), a[g].place % Group::places, a[g]);
    store(y, load(sums));
}

// Does the M things from t on if there are as many.
template <int M, class Product> LLAMA2_INLINE bool tile_of(int64_t& t, int64_t end, Product&& product) {
    if (end - t < M) return false;
    product(std::integral_constant<int, M>{}, t);
    t += M;
    return true;
}

// How many groups ahead of their use a product of many tokens prefetches weights. The processor makes no stream of so
// few bytes between so much arithmetic.
constexpr int64_t kGroupsAhead = 12;

// P panels (1 or 2) times the tokens of a block, columns 32·first … 32·last. Unpacked once, a group of weights meets
// every token, whose sums wait in y: (tokens, kPanels, kLanes).
template <Format format, int P>
void block_product(const uint8_t* panel, int64_t panel_bytes, const ActivationGroup* a, int64_t tokens, int64_t first,
                   int64_t last, float* y) {
    using Group = PanelGroup<format>;
    for (int64_t g = first; g < last; ++g) {
        const int64_t later = g + kGroupsAhead;  // of these panels, or of those that follow
        const uint8_t* ahead = later < last ? Group::record_of(panel, later)
                                            : Group::record_of(panel + P * panel_bytes, first + later - last);
        constexpr int64_t share = Group::record_bytes / Group::places;
        LLAMA2_UNROLL
        for (int p = 0; p < P; ++p)
            for (int64_t line = 0; line < share; line += 64)
                simd::prefetch(ahead + g % Group::places * share + p * panel_bytes + line);
        LLAMA2_UNROLL
        for (int half = 0; half < Group::halves; ++half) {
            const int index = int(g % Group::places) * Group::halves + half;
            const Group one(Group::record_of(panel, g), index);
            const Group other(Group::record_of(panel + (P - 1) * panel_bytes, g), index);
            const Group* groups[] = {&one, &other};
            int64_t t = 0;
            const auto tile = [&](auto size, int64_t from) {
                constexpr int M = size;
                const ActivationGroup* at[M];
                float* sums[M];
                LLAMA2_UNROLL
                for (int m = 0; m < M; ++m)
                    at[m] = a + g * group_stride(tokens) + from + m, sums[m] = y + (from + m) * kTile;
                Group::template add<P, M>(groups, at, half, sums);
            };
            while (tile_of<simd::kTokens>(t, tokens, tile)) {}
            while (tile_of<1>(t, tokens, tile)) {}
        }
    }
}

// Likewise the refining groups at `a` in the order given: (tokens · kRefined).
template <Format format, int P>
void block_refinement(const uint8_t* panel, int64_t panel_bytes, const ActivationGroup* a, const uint8_t* order,
                      int64_t tokens, float* y) {
    using Group = PanelGroup<format>;
    for (int64_t i = 0, end; i < tokens * kRefined; i = end) {
        const int64_t g = a[order[i]].place;
        for (end = i + 1; end < tokens * kRefined && a[order[end]].place == g;) ++end;
        LLAMA2_UNROLL
        for (int half = 0; half < Group::halves; ++half) {
            const int index = int(g % Group::places) * Group::halves + half;
            const Group one(Group::record_of(panel, g), index);
            const Group other(Group::record_of(panel + (P - 1) * panel_bytes, g), index);
            const Group* groups[] = {&one, &other};
            int64_t k = i;
            const auto tile = [&](auto size, int64_t from) {
                constexpr int M = size;
                const ActivationGroup* at[M];
                float* sums[M];
                LLAMA2_UNROLL
                for (int m = 0; m < M; ++m) at[m] = a + order[from + m], sums[m] = y + order[from + m] % tokens * kTile;
                Group::template add<P, M>(groups, at, half, sums);
            };
            while (tile_of<simd::kTokens>(k, end, tile)) {}
            while (tile_of<1>(k, end, tile)) {}
        }
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

// A weight matrix as the model uses it: quantized formats packed, the others row-major.
struct Weight {
    Format format = Format::F32;
    int64_t rows = 0, columns = 0;
    const uint8_t* data = nullptr;
    int64_t panel_bytes = 0;      // of kLanes rows
    const float* bias = nullptr;  // (rows), or none

    Weight() = default;
    Weight(Format f, int64_t r, int64_t c, const uint8_t* p) : format(f), rows(r), columns(c), data(p) {
        const int64_t row = row_bytes(f, c);  // refuses columns that do not divide
        panel_bytes = packed() ? llama2::panel_bytes(f, c) : simd::kLanes * row;
    }
    bool packed() const { return info(format).bits != 0; }
    int64_t bytes() const { return packed() ? packed_bytes(format, rows, columns) : rows * row_bytes(format, columns); }
};

// kLanes sums for each of up to kItemPanels panels and each token of a block.
constexpr int kItemPanels = 8;
static_assert(kItemPanels % simd::kPanels == 0);
class Results {
public:
    const float* at(int64_t panel, int64_t token) const {
        return y_[panel / simd::kPanels][token][panel % simd::kPanels];
    }
    float* at(int64_t panel, int64_t token) { return y_[panel / simd::kPanels][token][panel % simd::kPanels]; }

private:
    alignas(64) float y_[kItemPanels / simd::kPanels][kTokenBlock][simd::kPanels][simd::kLanes];
};

// Columns that many tokens take at a time, so that their activations stay in the L2 cache from panel to panel.
constexpr int64_t kSegment = 64;  // groups

template <Format format>
void packed_results(const Weight& w, int64_t first, int64_t count, const Activations& x, int64_t block, Results& out) {
    using simd::kPanels;
    const int64_t tokens = x.block_size(block), groups = w.columns / 32;
    const uint8_t* data = w.data + first * w.panel_bytes;
    const ActivationGroup* a = x.block_activations(block);
    if (tokens == 1) {
        for (int64_t p = 0; p < count; ++p) token_product<format>(data + p * w.panel_bytes, w.columns, a, out.at(p, 0));
        return;
    }
    const auto each = [&](auto&& product) {
        int64_t p = 0;
        for (; p + kPanels <= count; p += kPanels)
            product(std::integral_constant<int, kPanels>{}, data + p * w.panel_bytes, out.at(p, 0));
        for (; p < count; ++p) product(std::integral_constant<int, 1>{}, data + p * w.panel_bytes, out.at(p, 0));
    };
    each([&](auto, const uint8_t*, float* y) { std::memset(y, 0, size_t(tokens * kTile) * 4); });
    for (int64_t g = 0; g < groups; g += kSegment)
        each([&](auto P, const uint8_t* panel, float* y) {
            block_product<format, P>(panel, w.panel_bytes, a, tokens, g, std::min(g + kSegment, groups), y);
        });
    each([&](auto P, const uint8_t* panel, float* y) {
        block_refinement<format, P>(panel, w.panel_bytes, a + groups * group_stride(tokens),
                                    x.refining + x.block_start(block) * kRefined, tokens, y);
    });
}

template <Format format>
void plain_results(const Weight& w, int64_t first, int64_t count, const Activations& x, int64_t block, Results& out) {
    for (int64_t p = 0; p < count; ++p) {
        const uint8_t* data = w.data + (first + p) * w.panel_bytes;
        const auto tile = [&](auto size, int64_t t) {
            constexpr int M = size;
            alignas(64) float y[M * simd::kLanes];
            const float* at[M];
            for (int m = 0; m < M; ++m) at[m] = x.floats + (x.block_start(block) + t + m) * x.columns;
            plain_product<format, M>(data, w.rows - (first + p) * simd::kLanes, w.columns, at, y);
            for (int m = 0; m < M; ++m) simd::store(out.at(p, t + m), simd::load(y + m * simd::kLanes));
        };
        const int64_t end = x.block_size(block);
        int64_t t = 0;
        while (tile_of<simd::kFloatTokens>(t, end, tile)) {}
        while (tile_of<1>(t, end, tile)) {}
    }
}

// The first `count` (at most kLanes) of a panel's results.
inline void copy_row(float* out, const float* y, int64_t count) {
    if (count == simd::kLanes) simd::store(out, simd::load(y));
    else std::memcpy(out, y, size_t(count) * 4);
}

// `count` panels of `w` from the first on, times one block of tokens.
inline void multiply(const Weight& w, int64_t first, int64_t count, const Activations& x, int64_t block, Results& out) {
    const auto packed = [&](auto format) { packed_results<decltype(format)::value>(w, first, count, x, block, out); };
    const auto plain = [&](auto format) { plain_results<decltype(format)::value>(w, first, count, x, block, out); };
    using enum Format;
    switch (w.format) {
        case F32: plain(std::integral_constant<Format, F32>{}); break;
        case F16: plain(std::integral_constant<Format, F16>{}); break;
        case BF16: plain(std::integral_constant<Format, BF16>{}); break;
        case Q4_0: packed(std::integral_constant<Format, Q4_0>{}); break;
        case Q4_1: packed(std::integral_constant<Format, Q4_1>{}); break;
        case Q5_0: packed(std::integral_constant<Format, Q5_0>{}); break;
        case Q5_1: packed(std::integral_constant<Format, Q5_1>{}); break;
        case IQ4_NL:
        case Q8_0: packed(std::integral_constant<Format, Q8_0>{}); break;
        case Q2_K: packed(std::integral_constant<Format, Q2_K>{}); break;
        case Q3_K: packed(std::integral_constant<Format, Q3_K>{}); break;
        case Q4_K: packed(std::integral_constant<Format, Q4_K>{}); break;
        case Q5_K: packed(std::integral_constant<Format, Q5_K>{}); break;
        case Q6_K: packed(std::integral_constant<Format, Q6_K>{}); break;
    }
}

// y = x wᵀ, by one thread. x: (N, columns); y: (N, rows)
inline void product(const Weight& w, const float* x, int64_t N, float* y) {
    ActivationBuffer buffer;
    buffer.reserve(N, w.columns);
    for (int64_t t = 0; t < N; ++t) buffer.quantize(t, x + t * w.columns);
    for (int64_t block = 0; block < token_blocks(N); ++block) buffer.order(block);
    const Activations activations = buffer.view(x);
    Results results;
    for (int64_t block = 0; block < token_blocks(N); ++block)
        for (int64_t first = 0; first < panels(w.rows); first += kItemPanels) {
            const int64_t count = std::min<int64_t>(kItemPanels, panels(w.rows) - first);
            multiply(w, first, count, activations, block, results);
            for (int64_t t = 0; t < activations.block_size(block); ++t)
                for (int64_t p = 0; p < count; ++p) {
                    const int64_t row = (first + p) * simd::kLanes;
                    copy_row(y + (activations.block_start(block) + t) * w.rows + row, results.at(p, t),
                             std::min<int64_t>(simd::kLanes, w.rows - row));
                }
        }
}

}  // namespace llama2
