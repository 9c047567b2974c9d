// Drawing the next token. Random numbers are a function of (seed, choice, position), so that a token depends on
// nothing but its own request.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "simd.h"
#include "watermark.h"

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

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Logits by stretches, and the largest of each: only few stretches are then searched number by number.
constexpr int64_t kStretch = 256;

// The first of the largest; −1 when that is not finite, or anything is not a number.
inline int64_t argmax(const float* logits, int64_t n, std::vector<float>& largest) {
    largest.clear();
    for (int64_t start = 0; start < n; start += kStretch) {
        const int64_t end = std::min(start + kStretch, n);
        int32_t unordered = 0;
        for (int64_t i = start; i < end; ++i) unordered |= logits[i] != logits[i];
        if (unordered) return -1;
        simd::F most = simd::set(-kInfinity);
        int64_t i = start;
        for (; i + simd::kLanes <= end; i += simd::kLanes) most = simd::max(most, simd::load(logits + i));
        float lanes[simd::kLanes];
        simd::store(lanes, most);
        float here = *std::max_element(lanes, lanes + simd::kLanes);
        for (; i < end; ++i) here = std::max(here, logits[i]);
        largest.push_back(here);
    }
    const auto best = std::max_element(largest.begin(), largest.end());
    if (!std::isfinite(*best)) return -1;
    int64_t i = (best - largest.begin()) * kStretch;
    while (logits[i] != *best) ++i;
    return i;
}

// Logits while some of them are others, until this ends.
class Edits {
public:
    explicit Edits(float* logits) : logits_(logits) {}
    Edits(const Edits&) = delete;
    Edits& operator=(const Edits&) = delete;
    ~Edits() {
        for (auto edit = undo_.rbegin(); edit != undo_.rend(); ++edit) logits_[edit->first] = edit->second;
    }

    float operator[](int32_t token) const { return logits_[token]; }
    void set(int32_t token, float logit) {
        undo_.emplace_back(token, logits_[token]);
        logits_[token] = logit;
    }

private:
    float* logits_;
    std::vector<std::pair<int32_t, float>> undo_;
};

// history: prompt, then answer. Repetition: Keskar et al. 2019; presence, frequency: OpenAI's.
inline void penalize(Edits& logits, const int32_t* history, int64_t length, int64_t prompt_length,
                     const SamplingOptions& o) {
    std::vector<int32_t> all(history, history + length), answer(history + prompt_length, history + length);
    std::sort(all.begin(), all.end());
    std::sort(answer.begin(), answer.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    if (o.repetition_penalty != 1)
        for (const int32_t t : all)
            logits.set(t, logits[t] > 0 ? logits[t] / o.repetition_penalty : logits[t] * o.repetition_penalty);
    for (size_t i = 0; i < answer.size();) {
        size_t end = i;
        while (end < answer.size() && answer[end] == answer[i]) ++end;
        logits.set(answer[i], logits[answer[i]] - (o.presence_penalty + o.frequency_penalty * float(end - i)));
        i = end;
    }
}

// Σ exp((x − maximum) / temperature) in a fixed order, and the exponentials themselves.
inline double exponentials(const float* x, int64_t n, float maximum, float temperature, float* out) {
    using namespace simd;
    const auto of = [&](F x) { return exp(div(sub(x, set(maximum)), set(temperature))); };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, of(load(x + i)));
    if (i < n) {
        float rest[kLanes] = {}, result[kLanes];
        std::memcpy(rest, x + i, size_t(n - i) * 4);
        store(result, of(load(rest)));
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

// What drawing needs beside the logits, kept from one token to the next.
struct Scratch {
    std::vector<float> largest, weights;
    std::vector<int32_t> order, tokens;
    std::vector<double> marked;
    std::vector<uint32_t> bits;
};

// Tokens by logit, the largest first and equal ones by id. Only as many are sorted as are needed, and only those
// gathered that may be among them. Bands below `maximum`, 2, 4 … 64 times `width` deep, come first, and then the rest.
class Ranking {
public:
    // `scratch.largest` as argmax left it.
    Ranking(const float* logits, int64_t n, float maximum, float width, Scratch& scratch)
        : logits_(logits), n_(n), maximum_(maximum), width_(width), largest_(scratch.largest), order_(scratch.order) {
        order_.clear();
    }

    int32_t operator[](int64_t i) {  // 0 ≤ i < n, and at most one more than was asked for before
        if (i == sorted_) {
            while (int64_t(order_.size()) == sorted_) gather();
            const auto begin = order_.begin() + sorted_;
            const int64_t end = std::min(std::max<int64_t>(64, 4 * sorted_), int64_t(order_.size()));
            const auto before = [x = logits_](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; };
            if (end < int64_t(order_.size())) std::nth_element(begin, order_.begin() + end, order_.end(), before);
            std::sort(begin, order_.begin() + end, before);
            sorted_ = end;
        }
        return order_[size_t(i)];
    }

    // Whether there is an i-th token that is at most `depth` widths below the maximum, or was asked for before.
    bool within(int64_t i, float depth) {
        while (int64_t(order_.size()) <= i && depth_ < depth) gather();
        return i < int64_t(order_.size());
    }

private:
    void gather() {
        const float above = least_;
        depth_ *= 2;
        least_ = depth_ > 64 ? -kInfinity : maximum_ - depth_ * width_;
        for (size_t s = 0; s < largest_.size(); ++s) {
            if (largest_[s] < least_) continue;
            const int64_t start = int64_t(s) * kStretch, end = std::min(start + kStretch, n_);
            for (int64_t i = start; i < end; ++i)
                if (logits_[i] >= least_ && logits_[i] < above) order_.push_back(int32_t(i));
        }
    }

    const float* logits_;
    int64_t n_, sorted_ = 0;
    float maximum_, width_, depth_ = 1, least_ = kInfinity;
    const std::vector<float>& largest_;
    std::vector<int32_t>& order_;
};

// How many of the likeliest candidates a watermark changes, and how far their logits are below the largest at most, in
// temperatures. So their weights are at least exp(-8) of the likeliest's. The others keep their weights. They are
// seldom drawn, and with a whole vocabulary, marking would take longer than the model.
constexpr int64_t kMarked = 1024;
constexpr float kMarkedDepth = 8;

// Draws one of the first `kept` tokens of `ranking`, whose weights have the sum `mass`, after the watermark has changed
// those of the likeliest.
template <class WeightAt>
inline int64_t draw_marked(Ranking& ranking, int64_t kept, double mass, const WeightAt& weight_at, int64_t V,
                           double random, Scratch& scratch, const Watermark& watermark, const int32_t* before) {
    scratch.tokens.clear(), scratch.marked.clear();
    double head = 0;
    for (int64_t i = 0; i < std::min(kept, kMarked) && ranking.within(i, kMarkedDepth); ++i) {
        scratch.tokens.push_back(ranking[i]), scratch.marked.push_back(weight_at(i));
        head += scratch.marked.back();
    }
    const int64_t count = int64_t(scratch.tokens.size());
    scratch.bits.resize(size_t(count));
    watermark.bits(before, scratch.tokens.data(), count, V, scratch.bits.data());
    watermark.reweigh(scratch.bits.data(), scratch.marked.data(), count);
    const double changed = std::accumulate(scratch.marked.begin(), scratch.marked.end(), 0.0);
    const double target = random * (changed + std::max(0.0, mass - head));
    double cumulative = 0;
    int64_t last = 0;  // of those that can be drawn
    for (int64_t i = 0; i < kept; ++i) {
        const double weight = i < count ? scratch.marked[size_t(i)] : weight_at(i);
        if (weight == 0 && i >= count) break;
        if (weight > 0) cumulative += weight, last = i;
        if (cumulative > target) break;
    }
    return ranking[last];
}

// The next token from `logits` (V) after temperature, top-k, top-p, min-p. Candidates are ordered by logit, equal ones
// by id. top-p keeps a token while the mass before it is at most top_p (spec 10.6). −1 when there is none, because a
// logit is not a number or the largest is not finite. A watermark changes the weights of those that are left; `before`
// has its context. At temperature 0 nothing is drawn, and so nothing is marked.
inline int64_t draw(const float* logits, int64_t n, const SamplingOptions& o, Scratch& scratch,
                    const Watermark* watermark = nullptr, const int32_t* before = nullptr) {
    const int64_t best = argmax(logits, n, scratch.largest);
    if (o.temperature == 0 || best < 0) return best;
    scratch.weights.resize(size_t(n));
    const float *const weights = scratch.weights.data(), maximum = logits[best];
    const double whole = exponentials(logits, n, maximum, o.temperature, scratch.weights.data());
    Ranking ranking(logits, n, maximum, o.temperature, scratch);
    const auto weight_at = [&](int64_t i) { return double(weights[ranking[i]]); };
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
    const double random = uniform(o.seed, o.choice, o.position);
    if (watermark) {
        return draw_marked(ranking, kept, mass, weight_at, n, random, scratch, *watermark, before);
    }
    const double target = random * mass;
    double cumulative = 0;
    for (int64_t i = 0; i < kept; ++i) {
        const double weight = weight_at(i);
        if (weight == 0) return ranking[i - 1];  // the first weight is 1
        cumulative += weight;
        if (cumulative > target) return ranking[i];
    }
    return ranking[kept - 1];
}

// Natural log-probability of `token` under `logits` (V), and of the `count` likeliest, best first, equal ones by id.
// Not a number where nothing could be drawn.
inline float log_probabilities(const float* logits, int64_t n, int64_t token, int64_t count, int32_t* top,
                               float* values, Scratch& scratch) {
    const int64_t best = argmax(logits, n, scratch.largest);
    if (best < 0) return std::numeric_limits<float>::quiet_NaN();
    const float maximum = logits[best];
    scratch.weights.resize(size_t(n));
    const double log_sum = std::log(exponentials(logits, n, maximum, 1, scratch.weights.data()));
    const auto value = [&](int64_t i) { return float(double(logits[i]) - maximum - log_sum); };
    Ranking ranking(logits, n, maximum, 1, scratch);
    for (int64_t i = 0; i < count; ++i) top[i] = ranking[i], values[i] = value(top[i]);
    return value(token);
}

}  // namespace llama2
