// Watermarks: weights of the candidates that are left after temperature, top-k, top-p and min-p, changed by a key and
// the tokens before. Both schemes hash as transformers' processors do, so that its detectors find these marks too.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace llama2 {

class Watermark {
public:
    virtual ~Watermark() = default;

    // Tokens before the marked one on which the mark depends.
    virtual int64_t context() const = 0;

    // Bits of each of `count` candidates that may follow `before`, whose last `context()` tokens count. They are set
    // more often in marked text than in any other. V is the size of the vocabulary.
    virtual void bits(const int32_t* before, const int32_t* tokens, int64_t count, int64_t V, uint32_t* out) const = 0;

    // Changes the candidates' weights, which keep their sum or not, by their bits.
    virtual void reweigh(const uint32_t* bits, double* weights, int64_t count) const = 0;
};

// SynthID's tournament (Dathathri et al. 2024, Nature 634). For each layer's bits g and weights p, of sum 1:
// p[i] *= 1 + g[i] − Σ g p. That is the probability of winning a match of two drawn candidates.
//
// A layer's bit is s[h mod 2^16], for a table s of random bits and h = f(f(f(… f(1, t0) …, t), key)).
// Here f(h, x) = (h + x) · M + 1. So its low 16 bits depend on those of h alone: one table of 2^16 rows has all layers'
// bits.
class Tournament : public Watermark {
public:
    Tournament(const std::vector<int64_t>& keys, int64_t ngram) : context_(ngram - 1), layers_(int(keys.size())) {
        if (keys.empty() || keys.size() > 32 || ngram < 2) throw std::invalid_argument("1 to 32 keys, ngram from 2");
        std::mt19937 random(0);  // transformers' sampling_table_seed
        std::vector<uint8_t> table(kRows);
        for (auto& bit : table) bit = uint8_t(random() & 1);
        bits_.assign(kRows, 0);
        for (int layer = 0; layer < layers_; ++layer)
            for (uint32_t h = 0; h < kRows; ++h)
                bits_[h] |= uint32_t(table[step(h, uint64_t(keys[size_t(layer)])) & (kRows - 1)]) << layer;
    }

    int64_t context() const override { return context_; }

    void bits(const int32_t* before, const int32_t* tokens, int64_t count, int64_t, uint32_t* out) const override {
        uint64_t h = 1;
        for (int64_t i = 0; i < context_; ++i) h = step(h, uint64_t(before[i]));
        for (int64_t i = 0; i < count; ++i) out[i] = bits_[step(h, uint64_t(tokens[i])) & (kRows - 1)];
    }

    void reweigh(const uint32_t* bits, double* weights, int64_t count) const override {
        double total = 0, mass = 0;  // of all candidates, and of those whose bit is set
        for (int64_t i = 0; i < count; ++i) total += weights[i], mass += (bits[i] & 1) ? weights[i] : 0;
        for (int layer = 0; layer < layers_; ++layer) {
            const double lost = 1 - std::min(1.0, mass / total);  // a rounded share above 1 would make weights negative
            const int next = std::min(layer + 1, layers_ - 1);
            double sums[8] = {};  // side by side, because an addition waits for the one before it
            const auto update = [&](int64_t i, double& sum) {
                const double weight = weights[i] * (lost + double(int32_t(bits[i] >> layer & 1)));
                weights[i] = weight > kLeast ? weight : 0;  // what has no normal number is slow, and never drawn
                sum += weights[i] * double(int32_t(bits[i] >> next & 1));
            };
            int64_t i = 0;
            for (; i + 8 <= count; i += 8)
                for (int64_t k = 0; k < 8; ++k) update(i + k, sums[k]);
            for (; i < count; ++i) update(i, sums[0]);
            mass = std::accumulate(sums, sums + 8, 0.0);
        }
    }

private:
    static constexpr uint32_t kRows = 1 << 16;
    static constexpr double kLeast = 1e-100;
    static uint64_t step(uint64_t h, uint64_t x) { return (h + x) * 6364136223846793005u + 1; }

    int64_t context_;
    int layers_;
    std::vector<uint32_t> bits_;  // of each h before the key's step, all layers
};

// A green list (Kirchenbauer et al. 2023, algorithm 2): a share of the vocabulary, drawn by the token before, whose
// logits are `bias` higher. The list is a beginning of PyTorch's random permutation.
class GreenList : public Watermark {
public:
    GreenList(int64_t key, double share, double bias) : key_(uint64_t(key)), share_(share), factor_(std::exp(bias)) {
        if (key < 1 || key >= int64_t(1) << 40 || !(share > 0 && share < 1))
            throw std::invalid_argument("key from 1 below 2^40, share between 0 and 1");
    }

    int64_t context() const override { return 1; }

    void bits(const int32_t* before, const int32_t* tokens, int64_t count, int64_t V, uint32_t* out) const override {
        std::mt19937 random(uint32_t(key_ * uint64_t(before[0])));
        thread_local std::vector<int32_t> order;  // memory is not asked for once a token
        thread_local std::vector<uint8_t> green;
        order.resize(size_t(V));
        std::iota(order.begin(), order.end(), 0);
        green.assign(size_t(V), 0);
        const uint32_t n = uint32_t(V), size = uint32_t(double(V) * share_);
        for (uint32_t i = 0; i < size; ++i) {
            std::swap(order[i], order[i + uint32_t(random()) % (n - i)]);
            green[size_t(order[i])] = 1;
        }
        for (int64_t i = 0; i < count; ++i) out[i] = green[size_t(tokens[i])];
    }

    void reweigh(const uint32_t* bits, double* weights, int64_t count) const override {
        for (int64_t i = 0; i < count; ++i) weights[i] *= bits[i] ? factor_ : 1;
    }

private:
    uint64_t key_;
    double share_, factor_;
};

}  // namespace llama2
