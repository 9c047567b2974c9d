// The Python module of one instruction set: kernels, the model, sampling and the machine's limits.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <thread>
#include <unordered_map>

#include "machine.h"
#include "model.h"
#include "quantize.h"
#include "sampling.h"
#include "watermark.h"

namespace nb = nanobind;
using namespace llama2;

namespace {

template <class T, int dimensions> using In = nb::ndarray<const T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;
template <class T, int dimensions> using Out = nb::ndarray<T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;

// Gives the interpreter's lock away for a scope, as nb::gil_scoped_release does, and outlives the interpreter's end.
// Up to Python 3.13, a thread that wants the lock back during the end is made to exit. Its stack is unwound, which a
// destructor and nanobind's callers forbid, so the process aborts. Here it sleeps until the process is gone, as Python
// 3.14 lets it.
class Unlocked {
public:
    Unlocked() : state_(PyEval_SaveThread()) {}
    ~Unlocked() {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
        }
    }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

private:
    PyThreadState* state_;
};

void expect(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

Weight weight_of(Format format, const In<uint8_t, 1>& data, int64_t rows, int64_t columns, bool stored_rows) {
    expect(rows > 0 && columns > 0, "rows and columns must be positive");
    const Weight w{format, rows, columns, data.data()};
    const int64_t bytes = stored_rows ? rows * row_bytes(format, columns) : w.bytes();
    expect(int64_t(data.size()) == bytes, "the data's size does not fit its shape and format");
    return w;
}

// A model and the arrays that its weights point into.
class PyModel {
public:
    // 16 parameters: Python's ModelConfig has them by name, and a struct of them would be one more copy of that.
    PyModel(int64_t dim, int64_t layers, int64_t heads, int64_t kv_heads, int64_t hidden, int64_t vocab,
            int64_t head_size, int64_t context, bool tied, float norm_eps, std::vector<double> inverse_frequencies,
            double attention_factor, std::pair<double, int64_t> growth, int64_t window, int threads, int64_t blocks)
        : dim_(dim), vocab_(vocab), statistics_(layers * (2 * dim + heads * head_size + hidden) + dim),
          model_(make(dim, layers, heads, kv_heads, hidden, vocab, head_size, context, tied, norm_eps,
                      std::move(inverse_frequencies), attention_factor, growth, window, threads, blocks),
                 threads, blocks) {}

    void set(const std::string& name, const std::string& format, In<uint8_t, 1> data, int64_t rows, int64_t columns) {
        const Format f = format_named(format);
        model_.set(name, weight_of(f, data, rows, columns, name == "tok_embeddings.weight"));
        arrays_.insert_or_assign(name, std::move(data));
    }

    void forward(const In<int32_t, 1>& tokens, const In<int32_t, 1>& positions, const In<int32_t, 1>& sequences,
                 const In<int32_t, 2>& blocks, const In<int32_t, 1>& outputs, const Out<float, 2>& logits,
                 const std::optional<Out<float, 2>>& hidden) {
        expect(positions.size() == tokens.size() && sequences.size() == tokens.size(), "batch arrays differ in length");
        expect(logits.shape(0) == outputs.size() && int64_t(logits.shape(1)) == vocab_, "logits must be (outputs, V)");
        expect(!hidden || (hidden->shape(0) == tokens.size() && int64_t(hidden->shape(1)) == dim_),
               "hidden must be (N, D)");
        const Step step{
            int64_t(tokens.size()), int64_t(blocks.shape(0)), int64_t(blocks.shape(1)), int64_t(outputs.size()),
            tokens.data(),          positions.data(),         sequences.data(),         blocks.data(),
            outputs.data()};
        float *out = logits.data(), *states = hidden ? hidden->data() : nullptr;
        Unlocked unlocked;
        model_.forward(step, out, states);
    }

    void collect_statistics(Out<double, 1> sums) {
        expect(int64_t(sums.size()) == statistics_, "one sum for each column of a product's input");
        model_.collect_statistics(sums.data());
        sums_ = std::move(sums);
    }

    void check() const { model_.check(); }
    int64_t block_bytes() const { return model_.block_bytes(); }

private:
    static Config make(int64_t dim, int64_t layers, int64_t heads, int64_t kv_heads, int64_t hidden, int64_t vocab,
                       int64_t head_size, int64_t context, bool tied, float norm_eps, std::vector<double> frequencies,
                       double attention_factor, std::pair<double, int64_t> growth, int64_t window, int threads,
                       int64_t blocks) {
        expect(dim > 0 && layers > 0 && heads > 0 && kv_heads > 0 && hidden > 0 && vocab > 0 && context > 0,
               "sizes must be positive");
        expect(heads % kv_heads == 0, "heads must be a multiple of kv_heads");
        expect(head_size > 0 && head_size % 2 == 0, "head_size must be even");
        expect(int64_t(frequencies.size()) == head_size / 2, "one frequency for each pair of a head");
        expect(threads >= 1 && threads <= 1024 && blocks >= 1, "threads must be 1 to 1024, and blocks at least 1");
        expect(window >= 1 && growth.second >= 0, "the window must be at least 1, and no context negative");
        return {dim,
                layers,
                heads,
                kv_heads,
                hidden,
                vocab,
                head_size,
                context,
                tied,
                norm_eps,
                std::move(frequencies),
                attention_factor,
                growth.first,
                growth.second,
                window};
    }

    int64_t dim_, vocab_, statistics_;
    Model model_;
    Out<double, 1> sums_;
    std::unordered_map<std::string, In<uint8_t, 1>> arrays_;  // by tensor: who sets one again releases the one before
};

// data: rows in their stored format; x: (N, columns); y: (N, rows).
void stored_product(const std::string& name, const In<uint8_t, 1>& data, int64_t rows, int64_t columns,
                    const In<float, 2>& x, const Out<float, 2>& y) {
    const Format format = format_named(name);
    Weight w = weight_of(format, data, rows, columns, true);
    expect(int64_t(x.shape(1)) == columns && x.shape(0) == y.shape(0) && int64_t(y.shape(1)) == rows, "shapes differ");
    Buffer<uint8_t> packed;
    if (w.packed()) {
        pack(format, data.data(), rows, columns, packed.reserve(w.bytes()));
        w.data = packed.get();
    }
    llama2::product(w, x.data(), int64_t(x.shape(0)), y.data());
}

// data: rows in their stored format; importance: (columns,), or empty; out: the same rows in `target`. Returns the sums
// of squares of what was lost and of what there was.
std::pair<double, double> requantize(const std::string& source, const In<uint8_t, 1>& data, int64_t rows,
                                     int64_t columns, const std::string& target, const In<float, 1>& importance,
                                     const Out<uint8_t, 1>& out, int threads) {
    const Format from = format_named(source), to = format_named(target);
    weight_of(from, data, rows, columns, true);
    expect(int64_t(out.size()) == rows * row_bytes(to, columns), "wrong size of the output");
    expect(!importance.size() || int64_t(importance.size()) == columns, "importance must be of each column");
    expect(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
    const float* weights = importance.size() ? importance.data() : nullptr;
    Unlocked unlocked;
    const Loss loss = quantize(from, data.data(), rows, columns, to, weights, out.data(), threads);
    return {loss.lost, loss.total};
}

Scratch& scratch_of_thread() {
    thread_local Scratch scratch;
    return scratch;
}

// A watermark, of either scheme. Its type is of this module alone, as each instruction set has one.
class PyWatermark {
public:
    explicit PyWatermark(std::unique_ptr<Watermark> scheme) : scheme_(std::move(scheme)) {}

    // tokens: (T,); out: (T − context,), the bits of each token that has a context before it.
    void bits(const In<int32_t, 1>& tokens, int64_t vocab, const Out<uint32_t, 1>& out) const {
        const int64_t context = scheme_->context();
        check(tokens, vocab);
        expect(int64_t(tokens.size()) == int64_t(out.size()) + context, "one output for each token with a context");
        for (int64_t i = 0; i < int64_t(out.size()); ++i)
            scheme_->bits(tokens.data() + i, tokens.data() + i + context, 1, vocab, out.data() + i);
    }

    // before: (context,); tokens and weights: (count,), of which the weights are changed in place.
    void reweigh(const In<int32_t, 1>& before, const In<int32_t, 1>& tokens, int64_t vocab,
                 const Out<double, 1>& weights) const {
        const int64_t count = int64_t(tokens.size());
        check(before, vocab), check(tokens, vocab);
        expect(int64_t(before.size()) == scheme_->context() && int64_t(weights.size()) == count, "sizes differ");
        std::vector<uint32_t> bits(static_cast<size_t>(count));
        scheme_->bits(before.data(), tokens.data(), count, vocab, bits.data());
        scheme_->reweigh(bits.data(), weights.data(), count);
    }

    const Watermark& scheme() const { return *scheme_; }

private:
    static void check(const In<int32_t, 1>& tokens, int64_t vocab) {
        for (size_t i = 0; i < tokens.size(); ++i)
            expect(tokens.data()[i] >= 0 && tokens.data()[i] < vocab, "a token is not in the vocabulary");
    }

    std::unique_ptr<Watermark> scheme_;
};

// 16 parameters: Sampling's fields, a tuple that the caller makes once a request, because this runs once a token.
int64_t sample_marked(const PyWatermark* watermark, const Out<float, 1>& logits, const In<int32_t, 1>& history,
                      int64_t prompt_length, float temperature, int64_t top_k, double top_p, double min_p,
                      float repetition_penalty, float presence_penalty, float frequency_penalty,
                      const In<int32_t, 1>& bias_ids, const In<float, 1>& bias_values, uint64_t seed, uint64_t choice,
                      uint64_t position) {
    const int64_t n = int64_t(logits.size()), length = int64_t(history.size());
    expect(n > 0 && prompt_length >= 0 && prompt_length <= length, "empty logits, or a prompt longer than its history");
    expect(bias_ids.size() == bias_values.size(), "bias ids and values differ in length");
    const SamplingOptions o{temperature,       top_k, top_p,  min_p,   repetition_penalty, presence_penalty,
                            frequency_penalty, seed,  choice, position};
    Edits edits(logits.data());
    if (repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0) {
        for (int64_t i = 0; i < length; ++i)
            expect(history.data()[i] >= 0 && history.data()[i] < n, "a token of the history is not in the vocabulary");
        penalize(edits, history.data(), length, prompt_length, o);
    }
    for (size_t i = 0; i < bias_ids.size(); ++i) {
        const int32_t id = bias_ids.data()[i];
        expect(id >= 0 && id < n, "logit_bias names a token that is not in the vocabulary");
        edits.set(id, edits[id] + bias_values.data()[i]);
    }
    const Watermark* scheme = watermark ? &watermark->scheme() : nullptr;
    const int64_t context = scheme ? scheme->context() : 0;
    expect(context <= length, "the history is shorter than the watermark's context");
    // Sooner done than the lock would be back, if given away.
    return draw(logits.data(), n, o, scratch_of_thread(), scheme, history.data() + length - context);
}

int64_t sample(const Out<float, 1>& logits, const In<int32_t, 1>& history, int64_t prompt_length, float temperature,
               int64_t top_k, double top_p, double min_p, float repetition_penalty, float presence_penalty,
               float frequency_penalty, const In<int32_t, 1>& bias_ids, const In<float, 1>& bias_values, uint64_t seed,
               uint64_t choice, uint64_t position) {
    return sample_marked(nullptr, logits, history, prompt_length, temperature, top_k, top_p, min_p, repetition_penalty,
                         presence_penalty, frequency_penalty, bias_ids, bias_values, seed, choice, position);
}

float logprobs(const In<float, 1>& logits, int64_t token, const Out<int32_t, 1>& top, const Out<float, 1>& values) {
    const int64_t n = int64_t(logits.size());
    expect(token >= 0 && token < n, "token is not in the vocabulary");
    expect(top.size() == values.size() && int64_t(top.size()) <= n, "more alternatives than tokens");
    return log_probabilities(logits.data(), n, token, int64_t(top.size()), top.data(), values.data(),
                             scratch_of_thread());
}

template <double (*measure)(int, double)> double measured(int threads, double seconds) {
    expect(threads >= 1 && threads <= 1024 && seconds > 0 && seconds <= 60, "threads 1 to 1024, seconds up to 60");
    Unlocked unlocked;
    return measure(threads, seconds);
}

}  // namespace

NB_MODULE(LLAMA2_MODULE, m) {
    nb::set_leak_warnings(false);  // a thread that the interpreter's end found at work still holds its model
    m.attr("isa") = LLAMA2_ISA_NAME;
    m.attr("lanes") = simd::kLanes;
    m.attr("block") = kBlock;
    m.attr("chunk") = kChunk;
    m.def("packed_bytes", [](const std::string& format, int64_t rows, int64_t columns) {
        const Format f = format_named(format);
        expect(rows > 0 && columns > 0 && info(f).bits, "only quantized formats are packed, of positive shape");
        return packed_bytes(f, rows, columns);
    });
    m.def("pack", [](const std::string& format, const In<uint8_t, 1>& data, int64_t rows, int64_t columns,
                     const Out<uint8_t, 1>& out) {
        const Format f = format_named(format);
        weight_of(f, data, rows, columns, true);
        expect(info(f).bits && int64_t(out.size()) == packed_bytes(f, rows, columns),
               "wrong size of the packed output");
        Unlocked unlocked;
        pack(f, data.data(), rows, columns, out.data());
    });
    m.def("dequantize", [](const std::string& format, const In<uint8_t, 1>& data, int64_t rows, int64_t columns,
                           const Out<float, 2>& out) {
        const Format f = format_named(format);
        weight_of(f, data, rows, columns, true);
        expect(int64_t(out.shape(0)) == rows && int64_t(out.shape(1)) == columns, "wrong shape of the output");
        for (int64_t r = 0; r < rows; ++r)
            dequantize_row(f, data.data() + r * row_bytes(f, columns), columns, out.data() + r * columns);
    });
    m.def("product", &stored_product);
    m.def("quantize", &requantize);
    m.def("sample", &sample);
    m.def("sample_marked", &sample_marked);
    m.def("tournament", [](const std::vector<int64_t>& keys, int64_t ngram) {
        return PyWatermark(std::make_unique<Tournament>(keys, ngram));
    });
    m.def("green_list", [](int64_t key, double share, double bias) {
        return PyWatermark(std::make_unique<GreenList>(key, share, bias));
    });
    nb::class_<PyWatermark>(m, "Watermark").def("bits", &PyWatermark::bits).def("reweigh", &PyWatermark::reweigh);
    m.def("logprobs", &logprobs);
    m.def("uniform", &uniform);
    m.def("read_bandwidth", &measured<read_bandwidth>);
    m.def("int8_gemm_rate", &measured<int8_gemm_rate>);
    m.def("fma_rate", &measured<fma_rate>);
    nb::class_<PyModel>(m, "Model")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, float,
                      std::vector<double>, double, std::pair<double, int64_t>, int64_t, int, int64_t>())
        .def("set", &PyModel::set)
        .def("collect_statistics", &PyModel::collect_statistics)
        .def("check", &PyModel::check)
        .def("forward", &PyModel::forward)
        .def_prop_ro("block_bytes", &PyModel::block_bytes);
}
