// Drawing the next token. Random numbers are a function of (seed, choice, position), so that a token depends on
// nothing but its own request.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "simd.h"

namespace llama2 {

// First 64-bit word of Philox4x64-10 (Salmon et al. 2011) with key (seed, choice) and counter (position, 0, 0, 0), as a
// number in [0, 1).
inline double uniform(uint64_t seed, uint64_t choice, uint64_t position) {
    uint64_t c[4] = {position, 0, 0, 0}, k[2] = {seed, choice};
    const auto multiply = [](uint64_t a, uint64_t b, uint64_t& high) {  // 64 × 64 → 128 bits by halves
        const uint64_t al = uint32_t(a), ah = a >> 32, bl = uint32_t(b), bh = b >> 32;
        const uint64_t low = al * bl, middle = ah * bl + (low >> 32), other = al * bh + uint32_t(middle);
        high = ah * bh + (middle >> 32) + (other >> 32);
        return a * b;
    };
    for (int round = 0; round < 10; ++round) {
        uint64_t h0, h1;
        const uint64_t l0 = multiply(0xD2E7470EE14C6C93u, c[0], h0), l1 = multiply(0xCA5A826395121157u, c[2], h1);
        const uint64_t next[4] = {h1 ^ c[1] ^ k[0], l1, h0 ^ c[3] ^ k[1], l0};
        std::copy(next, next + 4, c);
        k[0] += 0x9E3779B97F4A7C15u, k[1] += 0xBB67AE8584CAA73Bu;
    }
    return double(c[0] >> 11) * 0x1p-53;
}

struct SamplingOptions {
    float temperature;
    int64_t top_k;  // 0: off
    double top_p, min_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    uint64_t seed, choice, position;
};

// The first of the largest. Found by stretches, so that only one of them is searched number by number.
inline int64_t argmax(const float* logits, int64_t n) {
    constexpr int64_t stretch = 1024;
    int64_t best_start = 0;
    float best = -std::numeric_limits<float>::infinity();
    for (int64_t start = 0; start < n; start += stretch) {
        const int64_t end = std::min(start + stretch, n);
        simd::F largest = simd::set(-std::numeric_limits<float>::infinity());
        int64_t i = start;
        for (; i + simd::kLanes <= end; i += simd::kLanes) largest = simd::max(largest, simd::load(logits + i));
        float lanes[simd::kLanes];
        simd::store(lanes, largest);
        float here = *std::max_element(lanes, lanes + simd::kLanes);
        for (; i < end; ++i) here = std::max(here, logits[i]);
        if (here > best) best = here, best_start = start;
    }
    int64_t i = best_start;
    while (i + 1 < n && logits[i] != best) ++i;
    return i;
}

// history: prompt, then answer. Edits `logits` (V). Repetition: Keskar et al. 2019; presence, frequency: OpenAI's.
inline void penalize(float* logits, const int32_t* history, int64_t length, int64_t prompt_length,
                     const SamplingOptions& o) {
    if (o.repetition_penalty == 1 && o.presence_penalty == 0 && o.frequency_penalty == 0) return;
    std::vector<int32_t> all(history, history + length), answer(history + prompt_length, history + length);
    std::sort(all.begin(), all.end());
    std::sort(answer.begin(), answer.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    if (o.repetition_penalty != 1)
        for (const int32_t t : all)
            logits[t] = logits[t] > 0 ? logits[t] / o.repetition_penalty : logits[t] * o.repetition_penalty;
    for (size_t i = 0; i < answer.size();) {
        size_t end = i;
        while (end < answer.size() && answer[end] == answer[i]) ++end;
        logits[answer[i]] -= o.presence_penalty + o.frequency_penalty * float(end - i);
        i = end;
    }
}

// Σ exp(x − maximum) in a fixed order, and the exponentials themselves.
inline double exponentials(const float* x, int64_t n, float maximum, float* out) {
    using namespace simd;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, exp(sub(load(x + i), set(maximum))));
    if (i < n) {
        float rest[kLanes] = {}, result[kLanes];
        std::memcpy(rest, x + i, size_t(n - i) * 4);
        store(result, exp(sub(load(rest), set(maximum))));
        std::memcpy(out + i, result, size_t(n - i) * 4);
    }
    double sums[8] = {}, sum = 0;  // side by side, because an addition waits for the one before it
    int64_t j = 0;
    for (; j + 8 <= n; j += 8)
        for (int64_t k = 0; k < 8; ++k) sums[k] += out[j + k];
    for (const double each : sums) sum += each;
    for (; j < n; ++j) sum += out[j];
    return sum;
}

// The next token from `logits` (V), which are edited: temperature, top-k, top-p, min-p, draw. Candidates are ordered by
// logit, equal ones by id. top-p keeps a token while the mass before it is at most top_p (spec 10.6).
inline int64_t draw(float* logits, int64_t n, const SamplingOptions& o) {
    if (o.temperature == 0) return argmax(logits, n);
    const float maximum = logits[argmax(logits, n)];
    for (int64_t i = 0; i < n; ++i) logits[i] = (logits[i] - maximum) / o.temperature;
    std::vector<float> weights(static_cast<size_t>(n));
    const double whole = exponentials(logits, n, 0, weights.data());
    const auto before = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    // Only as many candidates are gathered as are needed, band by band below the largest, and sorted from the front.
    std::vector<int32_t> order;
    int64_t sorted = 0;
    float end_of_band = 1;
    const auto gather = [&] {  // bands begin at -2, -4 … -64, and the last one has the rest
        const float band = end_of_band > 0 ? -2 : 2 * end_of_band;
        const bool last = end_of_band <= -64;
        for (int64_t i = 0; i < n; ++i)
            if (!(logits[i] >= end_of_band) && (logits[i] >= band || last)) order.push_back(int32_t(i));
        end_of_band = band;
    };
    const auto weight_at = [&](int64_t i) {
        if (i == sorted) {
            while (int64_t(order.size()) == sorted) gather();
            const int64_t end = std::min(std::max<int64_t>(64, 4 * sorted), int64_t(order.size()));
            if (end < int64_t(order.size()))
                std::nth_element(order.begin() + sorted, order.begin() + end, order.end(), before);
            std::sort(order.begin() + sorted, order.begin() + end, before);
            sorted = end;
        }
        return double(weights[size_t(order[size_t(i)])]);
    };
    int64_t kept = o.top_k > 0 ? std::min(o.top_k, n) : n;
    double mass = whole;
    if (kept < n) {
        mass = 0;
        for (int64_t i = 0; i < kept; ++i) mass += weight_at(i);
    }
    if (o.top_p < 1 || o.min_p > 0) {
        const double total = mass, floor = o.min_p * weight_at(0);
        const int64_t most = kept;
        mass = weight_at(0);
        for (kept = 1; kept < most; ++kept) {
            const double weight = weight_at(kept);
            if (mass > o.top_p * total || weight < floor) break;
            mass += weight;
        }
    }
    const double target = uniform(o.seed, o.choice, o.position) * mass;
    double cumulative = 0;
    for (int64_t i = 0; i < kept; ++i) {
        const double weight = weight_at(i);
        if (weight == 0) return order[size_t(i - 1)];  // the first weight is 1
        cumulative += weight;
        if (cumulative > target) return order[size_t(i)];
    }
    return order[size_t(kept - 1)];
}

// Natural log-probability of `token` under `logits` (V), and of the `count` likeliest, best first, equal ones by id.
inline float log_probabilities(const float* logits, int64_t n, int64_t token, int64_t count, int32_t* top,
                               float* values) {
    const float maximum = logits[argmax(logits, n)];
    std::vector<float> scratch(static_cast<size_t>(n));
    const double log_sum = std::log(exponentials(logits, n, maximum, scratch.data()));
    std::vector<int32_t> order(static_cast<size_t>(n));
    if (count > 0) {
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + count, order.end(),
                          [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
    }
    const auto value = [&](int64_t i) { return float(double(logits[i]) - maximum - log_sum); };
    for (int64_t i = 0; i < count; ++i) top[i] = order[size_t(i)], values[i] = value(order[size_t(i)]);
    return value(token);
}

}  // namespace llama2
