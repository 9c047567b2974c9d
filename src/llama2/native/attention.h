// Attention over the paged key/value cache.
//
// A cache block holds kBlock positions of all layers. For one layer and one key/value head (E = head size):
//     keys    (E / kDepth, kBlock, kDepth)   so that a lane is a key
//     values  (kBlock / kDepth, E, kDepth)   so that a lane is a dimension; E padded to whole vectors
//
// Numbers have half precision (kDepth = 1). Where the processor multiplies pairs of bfloat16, they are those
// (kDepth = 2). A query's sums are made tile by tile with running maximum and sum (Milakov & Gimelshein 2018). A tile
// is a block, at its absolute position. kChunk positions make a partial result, and partial results are merged in
// order. Nothing of that depends on which other queries are computed beside it.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace llama2 {

constexpr int kBlock = 32;
constexpr int kChunk = 512;

// Softmax-weighted sum of values so far: Σ exp(score − maximum) · value, with lane-wise Σ exp(score − maximum).
// Stored as floats: [maximum, sums (kLanes), values (E padded)]. Below, `head_size` is the padded one.
inline int64_t partial_size(int64_t head_size) { return 1 + simd::kLanes + head_size; }

// Head sizes are padded to whole vectors; the padding stays zero.
inline int64_t padded(int64_t head_size) { return (head_size + simd::kLanes - 1) / simd::kLanes * simd::kLanes; }

inline void clear_partial(float* p, int64_t head_size) {
    p[0] = -std::numeric_limits<float>::infinity();
    std::memset(p + 1, 0, size_t(simd::kLanes + head_size) * 4);
}

// One tile for M queries, each of `query_size` numbers, scaled by 1/√E, as multiply_add wants them. Query m sees the
// first counts[m] keys, but not the first hidden[m] < counts[m]. It sees no fewer than the query before it.
// `Number` is the cache's, or float for keys and values converted beforehand, which changes no bit.
template <int M, class Number>
void attend_tile(const float* const* queries, float* const* partials, const Number* keys, const Number* values,
                 int64_t query_size, int64_t head_size, const int* hidden, const int* counts) {
    using namespace simd;
    constexpr int vectors = kBlock / kLanes;
    const float infinity = std::numeric_limits<float>::infinity();
    alignas(64) float weights[M][kBlock];
    constexpr int strip = vectors * M <= 16 ? vectors : (16 / M > 0 ? 16 / M : 1);  // vectors of keys held at once
    for (int first = 0; first < vectors; first += strip) {
        F scores[M][strip];
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) {
            LLAMA2_UNROLL
            for (int v = 0; v < strip; ++v) scores[m][v] = zero();
        }
        for (int64_t e = 0; e < query_size / kDepth; ++e) {
            F key[strip];
            LLAMA2_UNROLL
            for (int v = 0; v < strip; ++v) key[v] = load_cached(keys + (e * kBlock + (first + v) * kLanes) * kDepth);
            LLAMA2_UNROLL
            for (int m = 0; m < M; ++m) {
                const F q = set(queries[m][e]);
                LLAMA2_UNROLL
                for (int v = 0; v < strip; ++v) scores[m][v] = multiply_add(q, key[v], scores[m][v]);
            }
        }
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) {
            LLAMA2_UNROLL
            for (int v = 0; v < strip; ++v) store(weights[m] + (first + v) * kLanes, scores[m][v]);
        }
    }
    for (int m = 0; m < M; ++m) {
        float* p = partials[m];
        for (int t = 0; t < hidden[m]; ++t) weights[m][t] = -infinity;
        for (int t = counts[m]; t < kBlock; ++t) weights[m][t] = -infinity;
        F largest = set(-infinity);
        for (int v = 0; v < vectors; ++v) largest = max(load(weights[m] + v * kLanes), largest);
        float maximum = std::max(p[0], largest_lane(largest));
        if (maximum == -infinity) maximum = 0;
        F sums = load(p + 1);
        if (p[0] != maximum) {
            const F shrink = exp(set(p[0] - maximum));
            p[0] = maximum;
            sums = mul(sums, shrink);
            float* out = p + 1 + kLanes;
            for (int64_t e = 0; e < head_size; e += kLanes) store(out + e, mul(load(out + e), shrink));
        }
        for (int v = 0; v < vectors; ++v) {
            const F weight = exp(sub(load(weights[m] + v * kLanes), set(maximum)));
            store(weights[m] + v * kLanes, weight);
            sums = add(sums, weight);
        }
        store(p + 1, sums);
        join(weights[m]);
    }
    constexpr int wide = M * 4 <= 16 ? 4 : (M * 2 <= 16 ? 2 : 1);
    const auto accumulate = [&](int64_t e, auto width) {
        constexpr int W = width;
        F sum[M][W];
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) {
            LLAMA2_UNROLL
            for (int v = 0; v < W; ++v) sum[m][v] = load(partials[m] + 1 + kLanes + e + v * kLanes);
        }
        for (int t = 0; t < counts[0] / kDepth; ++t) {
            F value[W];
            LLAMA2_UNROLL
            for (int v = 0; v < W; ++v) value[v] = load_cached(values + (t * head_size + e + v * kLanes) * kDepth);
            LLAMA2_UNROLL
            for (int m = 0; m < M; ++m) {
                const F weight = set(weights[m][t]);
                LLAMA2_UNROLL
                for (int v = 0; v < W; ++v) sum[m][v] = multiply_add(weight, value[v], sum[m][v]);
            }
        }
        LLAMA2_UNROLL
        for (int m = 0; m < M; ++m) {
            const auto step = [&](int t, auto&& seen) {
                const F weight = set(weights[m][t]);
                LLAMA2_UNROLL
                for (int v = 0; v < W; ++v) {
                    const F value = seen(load_cached(values + (t * head_size + e + v * kLanes) * kDepth));
                    sum[m][v] = multiply_add(weight, value, sum[m][v]);
                }
            };
            for (int t = counts[0] / kDepth; t < counts[m] / kDepth; ++t) step(t, [](F value) { return value; });
            if (counts[m] % kDepth) step(counts[m] / kDepth, first_of_pairs);  // the second may be anything
            LLAMA2_UNROLL
            for (int v = 0; v < W; ++v) store(partials[m] + 1 + kLanes + e + v * kLanes, sum[m][v]);
        }
    };
    int64_t e = 0;
    for (; e + wide * kLanes <= head_size; e += wide * kLanes) accumulate(e, std::integral_constant<int, wide>{});
    for (; e < head_size; e += kLanes) accumulate(e, std::integral_constant<int, 1>{});
}

// Half precision to floats; `count` divides into vectors.
inline void convert(const uint16_t* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += simd::kLanes) simd::store(to + i, simd::load_f16(from + i));
}

// total ← total merged with part, in place. Either may be empty.
inline void merge_partial(float* total, const float* part, int64_t head_size) {
    using namespace simd;
    const float infinity = std::numeric_limits<float>::infinity();
    if (part[0] == -infinity) return;
    if (total[0] == -infinity) {
        std::memcpy(total, part, size_t(partial_size(head_size)) * 4);
        return;
    }
    const float maximum = total[0] > part[0] ? total[0] : part[0];
    const F a = exp(set(total[0] - maximum)), b = exp(set(part[0] - maximum));
    total[0] = maximum;
    for (int64_t i = 1; i < partial_size(head_size); i += kLanes)
        store(total + i, fma(load(part + i), b, mul(load(total + i), a)));
}

inline void finish_partial(const float* total, int64_t query_size, float* out) {
    float sum = 0;
    for (int i = 0; i < simd::kLanes; ++i) sum += total[1 + i];
    const float inverse = 1.0f / sum;
    for (int64_t e = 0; e < query_size; ++e) out[e] = total[1 + simd::kLanes + e] * inverse;
}

}  // namespace llama2
