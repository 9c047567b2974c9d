// The transformer's forward pass (paper 2.2) over a batch of tokens from any number of sequences.
//
// N tokens  D width  H heads  G key/value heads  E head size  F hidden width  V vocabulary
#pragma once

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "pool.h"

namespace llama2 {

struct Config {
    int64_t dim, layers, heads, kv_heads, hidden, vocab, head_size, context;
    bool tied;  // embeddings are the output head's rows
    float norm_eps;
    std::vector<double> inverse_frequencies;  // (E / 2) radians a position
    double attention_factor;                  // of cosines and sines
    double growth;                            // dynamic scaling of positions beyond `growth_context`, if that is not 0
    int64_t growth_context;
    int64_t window;  // how many keys a token reads at most
};

// Tokens of one step; the layout of llama2.engine.runner.Batch.
struct Step {
    int64_t tokens_count, sequences_count, width, outputs_count;
    const int32_t *tokens, *positions, *sequences, *blocks, *outputs;
};

struct Layer {
    Weight attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3;
};

inline void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* out) {
    using namespace simd;
    const int64_t whole = size / kLanes * kLanes;
    F squares = zero();
    for (int64_t i = 0; i < whole; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
    float lanes[kLanes], sum = 0;
    store(lanes, squares);
    for (const float lane : lanes) sum += lane;
    for (int64_t i = whole; i < size; ++i) sum += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(sum / float(size) + eps);
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, mul(mul(load(x + i), set(scale)), load(weight + i)));
    for (int64_t i = whole; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

// Turns pairs of numbers (RoPE) and scales them. turn: for each number cos of its pair's angle, then for each −sin or
// sin. Sums alone, because GCC 12 fuses a difference beside a sum with their products whatever -ffp-contract says.
inline void rotate(const float* x, const float* turn, int64_t head_size, int64_t size, float scale, float* out) {
    const float *cos = turn, *sin = turn + head_size;
    for (int64_t i = 0; i < size; i += 2) {
        out[i] = (x[i] * cos[i] + x[i + 1] * sin[i]) * scale;
        out[i + 1] = (x[i + 1] * cos[i + 1] + x[i] * sin[i + 1]) * scale;
    }
}

inline void to_cached(const float* x, int64_t count, uint16_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = simd::to_cached(x[i]);
}

class Model {
public:
    Model(Config config, int threads, int64_t blocks)
        : config_(std::move(config)), layers_(size_t(config_.layers)), blocks_(blocks), pool_(threads),
          private_(size_t(threads)) {
        head_bytes_ = kBlock * (config_.head_size + padded(config_.head_size)) * 2;
        block_bytes_ = config_.layers * config_.kv_heads * head_bytes_;
        if (blocks_ > (std::numeric_limits<int64_t>::max() - 64) / block_bytes_) throw std::bad_alloc();
        // calloc's pages cost nothing until a block is first written.
        cache_.reset(static_cast<uint8_t*>(std::calloc(size_t(blocks_) * size_t(block_bytes_) + 64, 1)));
        if (!cache_) throw std::bad_alloc();
        cache_start_ = cache_.get() + (64 - reinterpret_cast<uintptr_t>(cache_.get()) % 64) % 64;
    }

    int threads() const { return pool_.threads(); }
    int64_t block_bytes() const { return block_bytes_; }

    // `data` must outlive the model: packed panels for quantized formats, row-major numbers otherwise. The embedding is
    // given as its file stores it, and not at all where it is tied. A bias comes after its matrix. Shapes are checked
    // by `check`.
    void set(const std::string& name, Weight weight) {
        if (name == "tok_embeddings.weight") embedding_ = weight;
        else if (name == "norm.weight") norm_ = weight;
        else if (name == "output.weight") output_ = weight;
        else if (name.rfind("layers.", 0) == 0) {
            const size_t dot = name.find('.', 7);
            const int64_t index = dot == std::string::npos ? -1 : std::atoll(name.substr(7, dot - 7).c_str());
            if (index < 0 || index >= config_.layers) throw std::invalid_argument("no layer for tensor " + name);
            const std::string rest = name.substr(dot + 1);
            const size_t end = rest.size() > 5 ? rest.size() - 5 : 0;
            if (rest.compare(end, 5, ".bias") == 0) {
                Weight& matrix = member(layers_[size_t(index)], rest.substr(0, end) + ".weight");
                if (weight.format != Format::F32 || weight.columns != matrix.rows)
                    throw std::invalid_argument(name + " has a wrong shape or format, or comes before its matrix");
                matrix.bias = floats(weight);
            } else member(layers_[size_t(index)], rest) = weight;
        } else throw std::invalid_argument("unknown tensor " + name);
    }

    // Every tensor is there and has its shape; throws std::invalid_argument otherwise.
    void check() const {
        const int64_t D = config_.dim, Q = config_.heads * config_.head_size, K = config_.kv_heads * config_.head_size;
        const auto expect = [](const Weight& w, int64_t rows, int64_t columns, const char* name, bool is_norm) {
            if (!w.data || w.rows != rows || w.columns != columns || (is_norm && w.format != Format::F32))
                throw std::invalid_argument(std::string(name) + " is missing or has a wrong shape or format");
        };
        if (!config_.tied) expect(embedding_, config_.vocab, D, "tok_embeddings.weight", false);
        expect(output_, config_.vocab, D, "output.weight", false);
        expect(norm_, 1, D, "norm.weight", true);
        for (const auto& layer : layers_) {
            expect(layer.attention_norm, 1, D, "attention_norm", true), expect(layer.ffn_norm, 1, D, "ffn_norm", true);
            expect(layer.wq, Q, D, "wq", false), expect(layer.wk, K, D, "wk", false);
            expect(layer.wv, K, D, "wv", false), expect(layer.wo, D, Q, "wo", false);
            expect(layer.w1, config_.hidden, D, "w1", false), expect(layer.w3, config_.hidden, D, "w3", false);
            expect(layer.w2, D, config_.hidden, "w2", false);
        }
    }

    // From now on adds the squares of every product's inputs to `sums`, one number a column. Each layer has those of
    // wq, wk and wv, of wo, of w1 and w3, and of w2. Those of the output head follow.
    void collect_statistics(double* sums) { statistics_ = sums; }

    // logits: (outputs, V). hidden, unless it is null: (N, D), every token's state after the final norm.
    void forward(const Step& step, float* logits, float* hidden) {
        check_step(step);
        const int64_t N = step.tokens_count, D = config_.dim, M = step.outputs_count;
        if (N == 0) return;
        residual_.reserve(N * D);
        qkv_.reserve(N * token_floats());
        rotations_.reserve(N * 2 * config_.head_size);
        statistics_here_ = statistics_;
        const std::vector<Part> parts = divide(step);
        over_parts(parts, [&](const Workers& workers, const Part& part) {
            over_tokens(workers, part.count, [&](int64_t t) { begin_token(step, part.first + t); });
            project(step, workers, part, 0);
        });
        for (int64_t l = 0; l < config_.layers; ++l)
            over_parts(parts, [&](const Workers& workers, const Part& part) {
                attend_and_feed_forward(step, workers, part, l);
                if (l + 1 < config_.layers) project(step, workers, part, l + 1);
            });
        if (hidden)
            over_tokens(together(), N, [&](int64_t t) {
                rms_norm(residual_.get() + t * D, floats(norm_), D, config_.norm_eps, hidden + t * D);
            });
        float* last = last_.reserve(M * D);
        for (int64_t i = 0; i < M; ++i) std::memcpy(last + i * D, residual_.get() + step.outputs[i] * D, size_t(D) * 4);
        add_statistics({last, D, floats(norm_)}, M);
        products(together(), {last, D, floats(norm_)}, M, {{output_, logits, config_.vocab, false}});
    }

private:
    struct QueryTile {
        int64_t first, count;  // tokens of one sequence
    };

    // Tokens that go through a layer together: all of a step, or a block of them.
    struct Part {
        int64_t first, count;
        std::vector<QueryTile> tiles;
    };

    struct Scratch {
        Buffer<float> normalised, attended, hidden, partials, converted;
        ActivationBuffer quantized;
    };

    // Who computes a part, and in which memory: all threads, or one of them alone.
    struct Workers {
        Pool* pool;  // null for a thread alone
        int thread;
        Scratch& scratch;

        int threads() const { return pool ? pool->threads() : 1; }
        // As Pool::run.
        template <class Prepare, class Body> void run(int64_t items, Prepare&& prepare, Body&& body) const {
            if (pool) return pool->run(items, prepare, body);
            prepare(thread);
            for (int64_t item = 0; item < items; ++item) body(item, thread);
        }
        template <class Body> void run(int64_t items, Body&& body) const {
            run(items, [](int) {}, body);
        }
    };
    Workers together() { return {&pool_, 0, shared_}; }

    // Threads divide the rows of every product, or the tokens. Tokens then stay with one thread through a layer, in its
    // L2 cache, and threads wait for each other once a layer. For that there must be some for every thread. The
    // last-level cache must hold the weights, as each thread goes through all of them.
    bool divides_tokens(int64_t N) const {
        const Layer& l = layers_[0];
        int64_t bytes = 0;
        for (const Weight* w : {&l.wq, &l.wk, &l.wv, &l.wo, &l.w1, &l.w2, &l.w3}) bytes += w->bytes();
        return N >= kTokensEach * pool_.threads() && bytes <= kCachedBytes;
    }
    static constexpr int64_t kCachedBytes = 8 << 20, kTokensEach = 16;

    std::vector<Part> divide(const Step& step) const {
        const int64_t N = step.tokens_count, T = pool_.threads();
        if (statistics_ || !divides_tokens(N)) return {{0, N, query_tiles(step, 0, N)}};
        if (N < kTokenBlock * T) return divide_evenly(step);
        // As many blocks for each thread, of nearly one size.
        const int64_t each = (N + T * kTokenBlock - 1) / (T * kTokenBlock), count = each * T;
        const int64_t tiles = (N + simd::kTokens - 1) / simd::kTokens;
        std::vector<Part> parts(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) {
            const int64_t first = i * tiles / count * simd::kTokens;
            const int64_t end = std::min(N, (i + 1) * tiles / count * simd::kTokens);
            // Later tokens attend to more: they are dealt out to and fro, and done first.
            const int64_t round = i / T, thread = round % 2 ? T - 1 - i % T : i % T;
            parts[size_t(thread * each + each - 1 - round)] = {first, end - first, query_tiles(step, first, end)};
        }
        return parts;
    }

    // A part for each thread, by the work that its tokens are. That of attention grows with their positions. A number
    // in the cache takes about eight times as long as a weight.
    std::vector<Part> divide_evenly(const Step& step) const {
        const int64_t N = step.tokens_count, T = pool_.threads();
        const int64_t D = config_.dim, Q = config_.heads * config_.head_size, K = config_.kv_heads * config_.head_size;
        const double products = double(D) * double(2 * Q + 2 * K + 3 * config_.hidden), attention = 8.0 * 2 * double(Q);
        double total = 0, done = 0;
        for (int64_t t = 0; t < N; ++t) total += products + attention * step.positions[t];
        std::vector<Part> parts;
        for (int64_t first = 0, t = 0; t < N; ++t) {
            done += products + attention * step.positions[t];
            const bool whole = (t + 1 - first) % simd::kTokens == 0;  // as products take their tokens
            if (t + 1 < N && !(whole && done >= total * double(parts.size() + 1) / double(T))) continue;
            parts.push_back({first, t + 1 - first, query_tiles(step, first, t + 1)});
            first = t + 1;
        }
        return parts;
    }

    template <class Body> void over_parts(const std::vector<Part>& parts, Body&& body) {
        if (parts.size() == 1) return body(together(), parts[0]);
        pool_.run(int64_t(parts.size()), [&](int64_t i, int thread) {
            body(Workers{nullptr, thread, private_[size_t(thread)]}, parts[size_t(i)]);
        });
    }

    // Queries, and the cache's keys and values.
    void project(const Step& step, const Workers& workers, const Part& part, int64_t l) {
        const Layer& layer = layers_[size_t(l)];
        const int64_t D = config_.dim, N = part.count, stride = token_floats();
        float* q = qkv_.get() + part.first * stride;
        float* k = q + layer.wq.rows;
        const Source source{residual_.get() + part.first * D, D, floats(layer.attention_norm)};
        add_statistics(source, N);
        products(
            workers, source, N,
            {{layer.wq, q, stride, false}, {layer.wk, k, stride, false}, {layer.wv, k + layer.wk.rows, stride, false}});
        over_tokens(workers, N, [&](int64_t t) { rotate_and_cache(step, part.first + t, l, q + t * stride); });
    }

    void attend_and_feed_forward(const Step& step, const Workers& workers, const Part& part, int64_t l) {
        const Layer& layer = layers_[size_t(l)];
        const int64_t D = config_.dim, Q = layer.wo.columns, F = config_.hidden, N = part.count;
        float* x = residual_.get() + part.first * D;
        float* attended = workers.scratch.attended.reserve(N * Q);
        float* hidden = workers.scratch.hidden.reserve(N * F);
        attend(step, workers, part, l, attended);
        add_statistics({attended, Q, nullptr}, N);
        products(workers, {attended, Q, nullptr}, N, {{layer.wo, x, D, true}});
        add_statistics({x, D, floats(layer.ffn_norm)}, N);
        gated_products(workers, {x, D, floats(layer.ffn_norm)}, N, layer.w1, layer.w3, hidden);
        add_statistics({hidden, F, nullptr}, N);
        products(workers, {hidden, F, nullptr}, N, {{layer.w2, x, D, true}});
    }

    static constexpr int64_t kPiece = 64;  // of a head, an even number

    template <class Body> void over_tokens(const Workers& workers, int64_t N, Body&& body) {
        if (N <= 4)
            for (int64_t t = 0; t < N; ++t) body(t);
        else workers.run(N, [&](int64_t t, int) { body(t); });
    }

    // Queries, keys and values of a token.
    int64_t token_floats() const { return (config_.heads + 2 * config_.kv_heads) * config_.head_size; }

    // The token's embedding and its rotation, (2, E) as `rotate` wants it. In double precision, because positions reach
    // thousands.
    void begin_token(const Step& step, int64_t t) {
        const int64_t E = config_.head_size;
        embed(step.tokens[t], residual_.get() + t * config_.dim);
        float *cos = rotations_.get() + t * 2 * E, *sin = cos + E;
        double stretch = 1;
        if (config_.growth_context)
            stretch =
                config_.growth * double(step.positions[t] + 1) / double(config_.growth_context) - (config_.growth - 1);
        for (int64_t i = 0; i < E; i += 2) {
            double angle = double(step.positions[t]) * config_.inverse_frequencies[size_t(i / 2)];
            if (stretch > 1) angle /= std::pow(stretch, double(i) / double(E - 2));
            cos[i] = cos[i + 1] = float(config_.attention_factor * std::cos(angle));
            sin[i + 1] = float(config_.attention_factor * std::sin(angle)), sin[i] = -sin[i + 1];
        }
    }

    void embed(int32_t token, float* x) const {
        const int64_t D = config_.dim;
        const Weight& w = config_.tied ? output_ : embedding_;
        if (config_.tied && w.packed()) dequantize_packed_row(w.format, w.data, token, D, x);
        else dequantize_row(w.format, w.data + token * row_bytes(w.format, D), D, x);
    }

    static const float* floats(const Weight& w) { return reinterpret_cast<const float*>(w.data); }

    static Weight& member(Layer& layer, const std::string& name) {
        if (name == "attention_norm.weight") return layer.attention_norm;
        if (name == "attention.wq.weight") return layer.wq;
        if (name == "attention.wk.weight") return layer.wk;
        if (name == "attention.wv.weight") return layer.wv;
        if (name == "attention.wo.weight") return layer.wo;
        if (name == "ffn_norm.weight") return layer.ffn_norm;
        if (name == "feed_forward.w1.weight") return layer.w1;
        if (name == "feed_forward.w2.weight") return layer.w2;
        if (name == "feed_forward.w3.weight") return layer.w3;
        throw std::invalid_argument("unknown tensor layers.N." + name);
    }

    void check_step(const Step& s) const {
        for (int64_t t = 0; t < s.tokens_count; ++t) {
            const int64_t position = s.positions[t], sequence = s.sequences[t];
            if (s.tokens[t] < 0 || s.tokens[t] >= config_.vocab) throw std::invalid_argument("token id out of range");
            if (sequence < 0 || sequence >= s.sequences_count) throw std::invalid_argument("sequence out of range");
            if (position < 0 || position >= config_.context || position / kBlock >= s.width)
                throw std::invalid_argument("position out of range");
            if (t > 0 && (s.sequences[t] < s.sequences[t - 1] ||
                          (s.sequences[t] == s.sequences[t - 1] && s.positions[t] != s.positions[t - 1] + 1)))
                throw std::invalid_argument("tokens of a sequence must be adjacent, at consecutive positions");
            const bool last = t + 1 == s.tokens_count || s.sequences[t + 1] != sequence;
            for (int64_t b = 0; last && b <= position / kBlock; ++b) {
                const int32_t block = s.blocks[sequence * s.width + b];
                if (block < 0 || block >= blocks_) throw std::invalid_argument("cache block out of range");
            }
        }
        for (int64_t i = 0; i < s.outputs_count; ++i)
            if (s.outputs[i] < 0 || s.outputs[i] >= s.tokens_count) throw std::invalid_argument("output out of range");
    }

    // --- products ----------------------------------------------------------------------------------------------------

    // Where a product's activations come from: rows of `columns` floats, normalised first if `norm` is given.
    struct Source {
        const float* x;
        int64_t columns;
        const float* norm;
    };

    // A product of a source: `out` takes its results, or has them added, for row r of token t at out[t · stride + r].
    struct Product {
        const Weight& weight;
        float* out;
        int64_t stride;
        bool add;
    };

    // Adds the squares of N inputs to the sums, if these are wanted, and goes on to those of the next product.
    void add_statistics(const Source& source, int64_t N) {
        if (!statistics_here_) return;
        float* normalised = private_[0].normalised.reserve(source.columns);
        for (int64_t t = 0; t < N; ++t) {
            const float* x = source.x + t * source.columns;
            if (source.norm) rms_norm(x, source.norm, source.columns, config_.norm_eps, normalised), x = normalised;
            for (int64_t i = 0; i < source.columns; ++i) statistics_here_[i] += double(x[i]) * x[i];
        }
        statistics_here_ += source.columns;
    }

    // Calls body(item, activations) for every work item, after the activations of all N tokens have been made. A single
    // token is prepared by every thread for itself, which is cheaper than waiting for one another.
    template <class Body>
    void with_activations(const Workers& workers, const Source& source, int64_t N, int64_t items, Body&& body) {
        const int64_t columns = source.columns;
        const auto reserve = [&](Scratch& s) {
            s.quantized.reserve(N, columns);
            if (source.norm) s.normalised.reserve(N * columns);
        };
        const auto prepare = [&](int64_t t, Scratch& s) {
            const float* x = source.x + t * columns;
            if (source.norm) {
                float* normalised = s.normalised.get() + t * columns;
                rms_norm(x, source.norm, columns, config_.norm_eps, normalised), x = normalised;
            }
            s.quantized.quantize(t, x);
        };
        const auto view = [&](const Scratch& s) {
            return s.quantized.view(source.norm ? s.normalised.get() : source.x);
        };
        if (N == 1) {
            const auto prepare_for_itself = [&](int thread) {
                Scratch& s = private_[size_t(thread)];
                reserve(s), prepare(0, s);
            };
            workers.run(items, prepare_for_itself,
                        [&](int64_t item, int thread) { body(item, view(private_[size_t(thread)])); });
            return;
        }
        reserve(workers.scratch);
        workers.run(N, [&](int64_t t, int) { prepare(t, workers.scratch); });
        workers.run(token_blocks(N), [&](int64_t block, int) { workers.scratch.quantized.order(block); });
        const Activations all = view(workers.scratch);
        workers.run(items, [&](int64_t item, int) { body(item, all); });
    }

    // A work item is some panels times a block of tokens, in whole pairs of panels. They are few enough that every
    // thread gets several. For a single token they are about 64 KB of weights.
    int64_t panels_an_item(const Workers& workers, const Weight& w, int64_t N) const {
        const int64_t most = N == 1 ? std::max<int64_t>(1, (64 << 10) / w.panel_bytes) : kItemPanels;
        const int64_t even = panels(w.rows) * token_blocks(N) / (4 * workers.threads());
        return std::clamp<int64_t>(even / simd::kPanels * simd::kPanels, simd::kPanels,
                                   std::max<int64_t>(most, simd::kPanels));
    }
    int64_t items(const Workers& workers, const Weight& w, int64_t N) const {
        const int64_t each = panels_an_item(workers, w, N);
        return (panels(w.rows) + each - 1) / each * token_blocks(N);
    }

    // Calls body(first panel, count, block) for a work item of `w`, at most kItemPanels panels at a time.
    template <class Body>
    void over_panels(const Workers& workers, const Weight& w, int64_t N, int64_t item, Body&& body) const {
        const int64_t each = panels_an_item(workers, w, N), blocks = token_blocks(N);
        const int64_t first = item / blocks * each, last = std::min(first + each, panels(w.rows));
        for (int64_t p = first; p < last; p += kItemPanels)
            body(p, std::min<int64_t>(kItemPanels, last - p), item % blocks);
    }

    void products(const Workers& workers, const Source& source, int64_t N, std::initializer_list<Product> all) {
        int64_t total = 0;
        for (const Product& product : all) total += items(workers, product.weight, N);
        with_activations(workers, source, N, total, [&](int64_t item, const Activations& x) {
            const Product* product = all.begin();
            for (int64_t mine; item >= (mine = items(workers, product->weight, N)); ++product) item -= mine;
            over_panels(workers, product->weight, N, item, [&](int64_t first, int64_t count, int64_t block) {
                Results results;
                const Output out(*product, first, count, x, block);
                multiply(product->weight, first, count, x, block, results);
                out.each([&](float* to, int64_t p, int64_t t, int64_t rows) {
                    float* y = results.at(p, t);
                    if (const float* bias = product->weight.bias) add_bias(bias + (first + p) * simd::kLanes, rows, y);
                    if (product->add)
                        for (int64_t i = 0; i < rows; ++i) y[i] += to[i];
                    copy_row(to, y, rows);
                });
            });
        });
    }

    static void add_bias(const float* bias, int64_t rows, float* y) {
        for (int64_t i = 0; i < rows; ++i) y[i] += bias[i];
    }

    // out = silu(w1 x) ⊙ w3 x: (N, F)
    void gated_products(const Workers& workers, const Source& source, int64_t N, const Weight& w1, const Weight& w3,
                        float* out) {
        with_activations(workers, source, N, items(workers, w1, N), [&](int64_t item, const Activations& x) {
            over_panels(workers, w1, N, item, [&](int64_t first, int64_t count, int64_t block) {
                Results gates, values;
                const Output to({w1, out, w1.rows, false}, first, count, x, block);
                multiply(w1, first, count, x, block, gates);
                multiply(w3, first, count, x, block, values);
                to.each([&](float* to, int64_t p, int64_t t, int64_t rows) {
                    float *gate = gates.at(p, t), *y = values.at(p, t);
                    if (w1.bias) add_bias(w1.bias + (first + p) * simd::kLanes, rows, gate);
                    if (w3.bias) add_bias(w3.bias + (first + p) * simd::kLanes, rows, y);
                    simd::store(y, simd::mul(simd::silu(simd::load(gate)), simd::load(y)));
                    copy_row(to, y, rows);
                });
            });
        });
    }

    // Where the results of some panels and one block of tokens go. They are asked for before the product begins, as the
    // outputs of all tokens are more than the L2 cache holds.
    class Output {
    public:
        Output(const Product& product, int64_t first, int64_t count, const Activations& x, int64_t block)
            : out_(product.out + x.block_start(block) * product.stride + first * simd::kLanes), stride_(product.stride),
              tokens_(x.block_size(block)), count_(count), rows_(product.weight.rows - first * simd::kLanes) {
            if (tokens_ > 1) each([](float* to, int64_t, int64_t, int64_t) { simd::prefetch_to_write(to); });
        }
        // body(place, panel, token, rows)
        template <class Body> void each(Body&& body) const {
            for (int64_t t = 0; t < tokens_; ++t)
                for (int64_t p = 0; p < count_; ++p)
                    body(out_ + t * stride_ + p * simd::kLanes, p, t,
                         std::min<int64_t>(simd::kLanes, rows_ - p * simd::kLanes));
        }

    private:
        float* out_;
        int64_t stride_, tokens_, count_, rows_;
    };

    // --- attention ---------------------------------------------------------------------------------------------------

    uint16_t* keys(int32_t block, int64_t layer, int64_t head) const {
        return reinterpret_cast<uint16_t*>(cache_start_ + block * block_bytes_ +
                                           (layer * config_.kv_heads + head) * head_bytes_);
    }
    // Keys and values of a head, in a block.
    void prefetch(const uint16_t* keys) const {
        for (int64_t line = 0; line < head_bytes_; line += 64) simd::prefetch((const uint8_t*)keys + line);
    }
    uint16_t* values(uint16_t* keys) const { return keys + kBlock * config_.head_size; }

    // Rotates a token's queries (scaled by 1/√E) in place, as attention wants them, and writes its rotated keys and its
    // values to the cache.
    void rotate_and_cache(const Step& step, int64_t t, int64_t layer, float* qkv) const {
        using simd::kDepth;
        const int64_t E = config_.head_size, wide = padded(E), position = step.positions[t];
        const int32_t block = step.blocks[step.sequences[t] * step.width + position / kBlock];
        const int64_t at = position % kBlock;
        const float* turn = rotations_.get() + t * 2 * E;
        const float scale = 1.0f / std::sqrt(float(E));
        float rotated[kPiece];
        uint16_t cached[kPiece];
        // body(first, count) for every piece of a head
        const auto over_pieces = [&](auto&& body) {
            for (int64_t i = 0; i < E; i += kPiece) body(i, std::min(kPiece, E - i));
        };
        for (int64_t h = 0; h < config_.heads; ++h, qkv += E)
            over_pieces([&](int64_t i, int64_t count) {
                rotate(qkv + i, turn + i, E, count, scale, rotated);
                if constexpr (kDepth == 1) std::memcpy(qkv + i, rotated, size_t(count) * 4);
                else to_cached(rotated, count, cached), std::memcpy(qkv + i / 2, cached, size_t(count) * 2);
            });
        const float* value = qkv + config_.kv_heads * E;
        for (int64_t g = 0; g < config_.kv_heads; ++g, qkv += E, value += E) {
            uint16_t* key = keys(block, layer, g) + at * kDepth;
            uint16_t* out = values(keys(block, layer, g)) + at / kDepth * wide * kDepth + at % kDepth;
            over_pieces([&](int64_t i, int64_t count) {
                rotate(qkv + i, turn + i, E, count, 1, rotated);
                to_cached(rotated, count, cached);
                for (int64_t e = 0; e < count; e += kDepth) std::memcpy(key + (i + e) * kBlock, cached + e, 2 * kDepth);
                to_cached(value + i, count, cached);
                for (int64_t e = 0; e < count; ++e) out[(i + e) * kDepth] = cached[e];
            });
        }
    }

    std::vector<QueryTile> query_tiles(const Step& step, int64_t first, int64_t end) const {
        const int64_t most = std::max<int64_t>(1, 48 / (config_.heads / config_.kv_heads));  // rows in whole tiles
        std::vector<QueryTile> tiles;
        for (int64_t t = first; t < end; ++t) {
            const bool room = !tiles.empty() && tiles.back().count < most;
            if (room && step.sequences[t] == step.sequences[t - 1]) ++tiles.back().count;
            else tiles.push_back({t, 1});
        }
        return tiles;
    }

    // The first position that a token at this one reads.
    int64_t oldest_visible(int64_t position) const { return std::max<int64_t>(position - config_.window + 1, 0); }

    // One chunk of positions for one tile and one key/value head.
    //
    // partials: (rows, partial_size), rows by (token, head). converted: scratch for a block's keys and values.
    template <int depth = simd::kDepth>
    void attend_chunk(const Step& step, const QueryTile& tile, int64_t layer, int64_t head, int64_t chunk,
                      float* partials, float* converted) const {
        const int64_t E = config_.head_size, share = config_.heads / config_.kv_heads, wide = padded(E);
        const int64_t rows = tile.count * share, last = step.positions[tile.first + tile.count - 1];
        const int64_t size = partial_size(wide);
        const int32_t* table = step.blocks + step.sequences[tile.first] * step.width;
        for (int64_t r = 0; r < rows; ++r) clear_partial(partials + r * size, wide);
        const int64_t oldest = oldest_visible(step.positions[tile.first]) / kBlock * kBlock;
        for (int64_t start = std::max(chunk * kChunk, oldest);
             start < std::min((chunk + 1) * int64_t(kChunk), last + 1); start += kBlock) {
            const uint16_t* key = keys(table[start / kBlock], layer, head);
            const uint16_t* value = key + kBlock * E;
            if (rows <= simd::kAttentionRows) {  // memory is the limit
                if (start + kBlock <= last) prefetch(keys(table[start / kBlock + 1], layer, head));
                else if (head + 1 < config_.kv_heads) prefetch(keys(table[0], layer, head + 1));
            }
            int64_t row = 0, end = rows;  // tokens at the front and, with a window, at the back may see nothing of it
            while (step.positions[tile.first + row / share] < start) row += share;
            while (oldest_visible(step.positions[tile.first + end / share - 1]) >= start + kBlock) end -= share;
            const auto attend_rows = [&](auto key_numbers, auto value_numbers) {
                const auto some = [&](auto size_of_tile, int64_t first) {
                    constexpr int M = size_of_tile;
                    const float* queries[M];
                    float* outs[M];
                    int hidden[M], counts[M];
                    for (int m = 0; m < M; ++m) {
                        const int64_t t = tile.first + (first + m) / share, h = head * share + (first + m) % share;
                        queries[m] = qkv_.get() + t * token_floats() + h * E, outs[m] = partials + (first + m) * size;
                        hidden[m] = int(std::max<int64_t>(oldest_visible(step.positions[t]) - start, 0));
                        counts[m] = int(std::min<int64_t>(step.positions[t] - start + 1, kBlock));
                    }
                    attend_tile<M>(queries, outs, key_numbers, value_numbers, E, wide, hidden, counts);
                };
                while (tile_of<simd::kAttentionRows>(row, end, some)) {}
                if constexpr (simd::kAttentionRows > 4)
                    while (tile_of<4>(row, end, some)) {}
                if constexpr (simd::kAttentionRows > 3)
                    while (tile_of<3>(row, end, some)) {}
                if constexpr (simd::kAttentionRows > 2)
                    while (tile_of<2>(row, end, some)) {}
                while (tile_of<1>(row, end, some)) {}
            };
            if constexpr (depth == 1) {
                if (end - row > simd::kAttentionRows) {  // worth converting once for all
                    convert(key, kBlock * E, converted);
                    convert(value, kBlock * wide, converted + kBlock * E);
                    const float* floats = converted;
                    attend_rows(floats, floats + kBlock * E);
                    continue;
                }
            }
            attend_rows(key, value);
        }
    }

    // out: (tile.count, H·E)
    void finish(const QueryTile& tile, int64_t head, const float* totals, float* out) const {
        const int64_t E = config_.head_size, share = config_.heads / config_.kv_heads;
        for (int64_t r = 0; r < tile.count * share; ++r)
            finish_partial(totals + r * partial_size(padded(E)), E,
                           out + (r / share * config_.heads + head * share + r % share) * E);
    }

    // out: (part.count, H·E)
    void attend(const Step& step, const Workers& workers, const Part& part, int64_t layer, float* out) {
        const int64_t G = config_.kv_heads, wide = padded(config_.head_size);
        const auto rows = [&](const QueryTile& tile) { return tile.count * (config_.heads / G); };
        const auto chunks = [&](const QueryTile& tile) {
            return step.positions[tile.first + tile.count - 1] / kChunk + 1;
        };
        const auto first_chunk = [&](const QueryTile& tile) {
            return oldest_visible(step.positions[tile.first]) / kChunk;
        };
        const auto finish_at = [&](const QueryTile& tile, int64_t head, const float* totals) {
            finish(tile, head, totals, out + (tile.first - part.first) * config_.heads * config_.head_size);
        };
        int64_t most_rows = 0, most_chunks = 0;
        for (const auto& tile : part.tiles)
            most_rows = std::max(most_rows, rows(tile)), most_chunks = std::max<int64_t>(most_chunks, chunks(tile));
        const int64_t size = partial_size(wide) * most_rows, count = int64_t(part.tiles.size()) * G;
        const auto reserve = [&](int thread) {
            private_[size_t(thread)].partials.reserve(2 * size);
            private_[size_t(thread)].converted.reserve(kBlock * (config_.head_size + wide));
        };
        // Few queries over many keys: chunks are items of their own.
        if (most_chunks > 1 && count < 4 * workers.threads() && workers.threads() > 1) {
            float* partials = workers.scratch.partials.reserve(count * most_chunks * size);
            workers.run(count * most_chunks, reserve, [&](int64_t item, int thread) {
                const QueryTile& tile = part.tiles[size_t(item / most_chunks / G)];
                if (item % most_chunks >= first_chunk(tile) && item % most_chunks < chunks(tile))
                    attend_chunk(step, tile, layer, item / most_chunks % G, item % most_chunks, partials + item * size,
                                 private_[size_t(thread)].converted.get());
            });
            for (int64_t i = 0; i < count; ++i) {
                const QueryTile& tile = part.tiles[size_t(i / G)];
                const int64_t first = first_chunk(tile);
                float* totals = partials + (i * most_chunks + first) * size;
                for (int64_t chunk = first + 1; chunk < chunks(tile); ++chunk)
                    merge(rows(tile), totals, totals + (chunk - first) * size);
                finish_at(tile, i % G, totals);
            }
            return;
        }
        workers.run(count, reserve, [&](int64_t item, int thread) {
            const QueryTile& tile = part.tiles[size_t(item / G)];
            float *totals = private_[size_t(thread)].partials.get(), *next = totals + size;
            float* converted = private_[size_t(thread)].converted.get();
            int64_t chunk = first_chunk(tile);
            attend_chunk(step, tile, layer, item % G, chunk, totals, converted);
            while (++chunk < chunks(tile)) {
                attend_chunk(step, tile, layer, item % G, chunk, next, converted);
                merge(rows(tile), totals, next);
            }
            finish_at(tile, item % G, totals);
        });
    }

    void merge(int64_t rows, float* totals, const float* parts) const {
        const int64_t wide = padded(config_.head_size), size = partial_size(wide);
        for (int64_t r = 0; r < rows; ++r) merge_partial(totals + r * size, parts + r * size, wide);
    }

    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };

    Config config_;
    std::vector<Layer> layers_;
    Weight embedding_, norm_, output_;
    int64_t blocks_, head_bytes_, block_bytes_;
    double *statistics_ = nullptr, *statistics_here_ = nullptr;  // all sums, and those of the next product
    std::unique_ptr<uint8_t, Free> cache_;
    uint8_t* cache_start_;
    Pool pool_;
    Buffer<float> residual_, qkv_, rotations_, last_;  // of all tokens of a step
    Scratch shared_;
    std::vector<Scratch> private_;  // of each thread
};

}  // namespace llama2
