// What this machine can do at most: the denominators of `llama2 bench`.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

namespace llama2 {

// Runs work(thread) on every thread until `seconds` have passed; work returns its amount. Returns amount a second.
template <class Work> double rate(int threads, double seconds, Work&& work) {
    using Clock = std::chrono::steady_clock;
    std::vector<double> amounts(static_cast<size_t>(threads));
    std::atomic<int> ready{0};
    std::vector<std::thread> others;
    const auto loop = [&](int thread) {
        ++ready;
        while (ready.load() < threads) std::this_thread::yield();
        const auto begin = Clock::now();
        double amount = 0, elapsed;
        do {
            amount += work(thread);
            elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
        } while (elapsed < seconds);
        amounts[size_t(thread)] = amount / elapsed;
    };
    for (int t = 1; t < threads; ++t) others.emplace_back(loop, t);
    loop(0);
    for (auto& t : others) t.join();
    double sum = 0;
    for (const double a : amounts) sum += a;
    return sum;
}

// Bytes a second read from memory larger than any cache but the very largest. Each thread reads a stretch of its own,
// in large pages where the system gives them.
inline double read_bandwidth(int threads, double seconds) {
    constexpr size_t bytes = size_t(512) << 20, piece = size_t(1) << 20, page = size_t(2) << 20;
    struct Free {
        void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(page)); }
    };
    std::vector<std::unique_ptr<uint8_t, Free>> memory(static_cast<size_t>(threads));
    std::vector<size_t> at(static_cast<size_t>(threads));
    std::atomic<int64_t> sink{0};
    const size_t each = std::max(bytes / size_t(threads) / page, size_t(1)) * page;
    for (auto& m : memory) {
        m.reset(static_cast<uint8_t*>(::operator new(each, std::align_val_t(page))));
#if defined(__linux__)
        madvise(m.get(), each, MADV_HUGEPAGE);
#endif
        std::memset(m.get(), 1, each);
    }
    return rate(threads, seconds, [&](int thread) {
        const uint8_t* p = memory[size_t(thread)].get() + at[size_t(thread)];
        simd::I sum[4] = {simd::set_int(0), simd::set_int(0), simd::set_int(0), simd::set_int(0)};
        constexpr size_t vector = 4 * simd::kLanes;
        for (size_t i = 0; i < piece; i += 4 * vector)
            for (int k = 0; k < 4; ++k) {
                simd::I x;
                std::memcpy(&x, p + i + size_t(k) * vector, sizeof x);
                sum[k] = simd::add_int(sum[k], x);
            }
        int32_t lanes[simd::kLanes];
        simd::store_int(lanes, simd::add_int(simd::add_int(sum[0], sum[1]), simd::add_int(sum[2], sum[3])));
        sink += lanes[0];
        at[size_t(thread)] = (at[size_t(thread)] + piece) % each;
        return double(piece);
    });
}

// Operations a second of 8-bit dot products with operands in the L1 cache. A multiplication and an addition are two.
// The products are those of an ideal matrix product: a tile of kPanels panels by 6 tokens.
inline double int8_gemm_rate(int threads, double seconds) {
    constexpr int depth = 16, quads = 4, tall = 6;
    using Vector = uint8_t[4 * simd::kLanes];
    std::atomic<int64_t> sink{0};
    return rate(threads, seconds, [&](int) {
        alignas(64) static thread_local Vector weights[depth][simd::kPanels][quads];
        alignas(64) static thread_local int8_t tokens[depth][tall][4 * quads];
        simd::I acc[tall][simd::kPanels];
        for (auto& row : acc)
            for (auto& a : row) a = simd::set_int(0);
        for (int repeat = 0; repeat < 800; ++repeat)
            for (int k = 0; k < depth; ++k) {
                simd::B w[simd::kPanels][quads];
                LLAMA2_UNROLL
                for (int p = 0; p < simd::kPanels; ++p) {
                    LLAMA2_UNROLL
                    for (int q = 0; q < quads; ++q) w[p][q] = simd::load_bytes(weights[k][p][q]);
                }
                const simd::B* panels[simd::kPanels];
                const int8_t* x[tall];
                for (int p = 0; p < simd::kPanels; ++p) panels[p] = w[p];
                for (int t = 0; t < tall; ++t) x[t] = tokens[k][t];
                simd::dot<8, quads, simd::kPanels, tall>(acc, panels, x);
            }
        for (auto& row : acc)
            for (auto& a : row) sink += simd::sum_lanes(a);
        return 800.0 * depth * tall * simd::kPanels * simd::kLanes * quads * 4 * 2;
    });
}

// Single-precision operations a second; two threads reach twice one thread's rate only if both have a core.
inline double fma_rate(int threads, double seconds) {
    std::atomic<int64_t> sink{0};
    return rate(threads, seconds, [&](int) {
        constexpr int chains = 12;
        simd::F acc[chains];
        for (auto& a : acc) a = simd::zero();
        const simd::F a = simd::set(0.999f), b = simd::set(1e-3f);
        for (int repeat = 0; repeat < 2000; ++repeat) {
            LLAMA2_UNROLL
            for (int k = 0; k < chains; ++k) acc[k] = simd::fma(acc[k], a, b);
        }
        float lanes[simd::kLanes], sum = 0;
        for (auto& x : acc) simd::store(lanes, x), sum += lanes[0];
        sink += int64_t(sum);
        return 2000.0 * chains * simd::kLanes * 2;
    });
}

}  // namespace llama2
