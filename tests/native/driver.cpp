// The kernels and the model without Python: answers requests on standard input, so that the tests of one instruction
// set also run where only an emulator has it.
//
// A request is a line of words, then the arrays it needs, raw; the answer is an array, raw. Errors end the program.
//
//     product FORMAT rows columns N   data, x (N, columns)      → (N, rows) floats
//     dequantize FORMAT rows columns  data                      → (rows, columns) floats
//     packed_bytes FORMAT rows columns                          → one int64
//     pack FORMAT rows columns        data                      → packed bytes
//     halves N                        N floats                  → N halves
//     exp N, silu N                   N floats                  → N floats
//     uniform SEED CHOICE POSITION                              → one double
//     draw N temperature top_k top_p min_p SEED CHOICE POSITION   N logits   → one int64
//     model dim layers heads kv_heads hidden vocab head_size context tied norm_eps threads blocks
//         attention_factor growth growth_context window         E / 2 doubles
//     tensor NAME FORMAT rows columns                           data
//     step N S W M                    tokens, positions, sequences, blocks, outputs → (M, vocab) floats

#include <cstdio>
#include <iostream>
#include <memory>
#include <sstream>
#include <vector>

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

#include "model.h"
#include "sampling.h"

using namespace llama2;

namespace {

template <class T> std::vector<T> receive(int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    std::cin.read(reinterpret_cast<char*>(values.data()), std::streamsize(values.size() * sizeof(T)));
    if (!std::cin) throw std::invalid_argument("a request ends early");
    return values;
}

template <class T> void answer(const std::vector<T>& values) {
    std::cout.write(reinterpret_cast<const char*>(values.data()), std::streamsize(values.size() * sizeof(T)));
    std::cout.flush();
}

// Words of a request's line.
class Line {
public:
    explicit Line(const std::string& text) : words_(text) {}
    template <class T> T next() {
        T value;
        if (!(words_ >> value)) throw std::invalid_argument("a request lacks a word");
        return value;
    }
    int64_t size() { return next<int64_t>(); }
    Format format() { return format_named(next<std::string>()); }

private:
    std::istringstream words_;
};

// A matrix as it is stored, and as the model wants it.
struct Matrix {
    std::vector<uint8_t> stored;
    Buffer<uint8_t> packed;
    Weight weight;

    Matrix(Line& line, bool keep) {
        const Format format = line.format();
        const int64_t rows = line.size(), columns = line.size();
        stored = receive<uint8_t>(rows * row_bytes(format, columns));
        weight = Weight(format, rows, columns, stored.data());
        if (keep || !weight.packed()) return;
        pack(format, stored.data(), rows, columns, packed.reserve(weight.bytes()));
        weight.data = packed.get();
    }
};

void product(Line& line) {
    const Matrix matrix(line, false);
    const int64_t N = line.size();
    const auto x = receive<float>(N * matrix.weight.columns);
    std::vector<float> y(size_t(N * matrix.weight.rows));
    llama2::product(matrix.weight, x.data(), N, y.data());
    answer(y);
}

void dequantize(Line& line) {
    const Matrix matrix(line, true);
    const Weight& w = matrix.weight;
    std::vector<float> out(size_t(w.rows * w.columns));
    for (int64_t r = 0; r < w.rows; ++r)
        dequantize_row(w.format, w.data + r * row_bytes(w.format, w.columns), w.columns, out.data() + r * w.columns);
    answer(out);
}

template <class Function> void map_vectors(Line& line, Function function) {
    const int64_t count = line.size();
    auto x = receive<float>(count);
    x.resize(size_t(panels(count)) * simd::kLanes);
    for (size_t i = 0; i < x.size(); i += simd::kLanes) simd::store(&x[i], function(simd::load(&x[i])));
    x.resize(size_t(count));
    answer(x);
}

void draw_one(Line& line) {
    const int64_t n = line.size();
    SamplingOptions o{};
    o.temperature = line.next<float>(), o.top_k = line.size(), o.top_p = line.next<double>();
    o.min_p = line.next<double>(), o.seed = line.next<uint64_t>(), o.choice = line.next<uint64_t>();
    o.position = line.next<uint64_t>(), o.repetition_penalty = 1;
    auto logits = receive<float>(n);
    Scratch scratch;
    answer(std::vector<int64_t>{draw(logits.data(), n, o, scratch)});
}

// The model that the requests build, and the memory that its weights point into.
struct Network {
    int64_t vocab;
    std::vector<std::unique_ptr<Matrix>> matrices;
    Model model;

    static std::unique_ptr<Network> from(Line& line) {
        Config c{};
        for (int64_t* size : {&c.dim, &c.layers, &c.heads, &c.kv_heads, &c.hidden, &c.vocab, &c.head_size, &c.context})
            *size = line.size();
        c.tied = line.next<int>() != 0, c.norm_eps = line.next<float>();
        const int threads = line.next<int>();
        const int64_t blocks = line.size();
        c.attention_factor = line.next<double>(), c.growth = line.next<double>();
        c.growth_context = line.next<int64_t>(), c.window = line.size();
        c.inverse_frequencies = receive<double>(c.head_size / 2);
        return std::unique_ptr<Network>(new Network{c.vocab, {}, Model(c, threads, blocks)});
    }

    void add(Line& line) {
        const auto name = line.next<std::string>();
        matrices.push_back(std::make_unique<Matrix>(line, name == "tok_embeddings.weight"));
        model.set(name, matrices.back()->weight);
    }

    void step(Line& line) {
        model.check();
        const int64_t N = line.size(), S = line.size(), W = line.size(), M = line.size();
        const auto tokens = receive<int32_t>(N), positions = receive<int32_t>(N), sequences = receive<int32_t>(N);
        const auto blocks = receive<int32_t>(S * W), outputs = receive<int32_t>(M);
        std::vector<float> logits(size_t(M * vocab));
        model.forward({N, S, W, M, tokens.data(), positions.data(), sequences.data(), blocks.data(), outputs.data()},
                      logits.data(), nullptr);
        answer(logits);
    }
};

void serve() {
    std::unique_ptr<Network> network;
    for (std::string text; std::getline(std::cin, text);) {
        Line line(text);
        const auto request = line.next<std::string>();
        if (request == "product") product(line);
        else if (request == "dequantize") dequantize(line);
        else if (request == "packed_bytes") {
            const Format format = line.format();
            const int64_t rows = line.size();
            answer(std::vector<int64_t>{packed_bytes(format, rows, line.size())});
        } else if (request == "pack") {
            const Matrix matrix(line, false);
            answer(std::vector<uint8_t>(matrix.packed.get(), matrix.packed.get() + matrix.weight.bytes()));
        } else if (request == "halves") {
            std::vector<uint16_t> halves;
            for (const float x : receive<float>(line.size())) halves.push_back(f32_to_f16(x));
            answer(halves);
        } else if (request == "exp") map_vectors(line, [](simd::F x) { return simd::exp(x); });
        else if (request == "silu") map_vectors(line, [](simd::F x) { return simd::silu(x); });
        else if (request == "uniform") {
            const auto seed = line.next<uint64_t>(), choice = line.next<uint64_t>();
            answer(std::vector<double>{uniform(seed, choice, line.next<uint64_t>())});
        } else if (request == "draw") draw_one(line);
        else if (request == "model") network = Network::from(line);
        else if (request == "tensor") network->add(line);
        else if (request == "step") network->step(line);
        else throw std::invalid_argument("unknown request " + request);
    }
}

}  // namespace

int main() {
#ifdef _WIN32  // whose text mode would change the bytes of arrays
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    std::ios::sync_with_stdio(false);
    try {
        serve();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "driver: %s\n", error.what());
        return 1;
    }
}
