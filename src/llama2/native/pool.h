// A thread pool for many short parallel regions that survives losing a core.
//
// A region is open while items are left. The caller works on it itself. A worker that comes in time enters and helps.
// One that comes too late, because another program holds its core, finds the region closed and is not waited for. Each
// thread starts with a contiguous share of the items, which keeps its memory accesses in one stretch. Then it takes
// from the end of the others' shares. Who computes an item never changes its result.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace llama2 {

inline void cpu_relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
    asm volatile("yield");
#endif
}

// Items begin…end of one thread's share, packed so that owner and thieves can take them with one exchange.
class alignas(64) Share {
public:
    void reset(int64_t begin, int64_t end) { range_.store(pack(begin, end), std::memory_order_relaxed); }
    bool take_first(int64_t& item) {
        return take([](uint64_t begin, uint64_t end) { return std::pair(begin + 1, end); },
                    [&](uint64_t begin, uint64_t) { item = int64_t(begin); });
    }
    bool take_last(int64_t& item) {
        return take([](uint64_t begin, uint64_t end) { return std::pair(begin, end - 1); },
                    [&](uint64_t, uint64_t end) { item = int64_t(end) - 1; });
    }

private:
    static uint64_t pack(uint64_t begin, uint64_t end) { return begin << 32 | end; }
    template <class Next, class Found> bool take(Next next, Found found) {
        uint64_t old = range_.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t begin = old >> 32, end = old & 0xffffffffu;
            if (begin >= end) return false;
            const auto [b, e] = next(begin, end);
            if (range_.compare_exchange_weak(old, pack(b, e), std::memory_order_relaxed)) {
                found(begin, end);
                return true;
            }
        }
    }
    std::atomic<uint64_t> range_{0};
};

// How many forks lie between the first process and this one: a child has its parent's memory, but not its threads.
inline std::atomic<int>& forks() {
    static std::atomic<int> count{0};
#if !defined(_WIN32)
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { forks().fetch_add(1); }); });
#endif
    return count;
}

class Pool {
public:
    explicit Pool(int threads) : shares_(new Share[size_t(threads)]), threads_(threads) { start(); }
    ~Pool() {
        if (forks_ != forks().load(std::memory_order_relaxed)) {
            abandon();
            return;
        }
        stop_.store(true, std::memory_order_relaxed);
        state_.fetch_add(kEpoch, std::memory_order_release);
        state_.notify_all();
        for (auto& worker : workers_) worker.join();
    }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Calls prepare(thread) once on every thread that takes part, then body(item, thread) once for every work item.
    template <class Prepare, class Body> void run(int64_t items, Prepare&& prepare, Body&& body) {
        const auto work = [&](int thread) {
            prepare(thread);
            int64_t item;
            while (shares_[thread].take_first(item)) body(item, thread);
            for (int other = 1; other < threads_; ++other)
                while (shares_[(thread + other) % threads_].take_last(item)) body(item, thread);
        };
        if (threads_ == 1 || items <= 1) {
            prepare(0);
            for (int64_t item = 0; item < items; ++item) body(item, 0);
            return;
        }
        if (forks_ != forks().load(std::memory_order_relaxed)) {
            abandon();
            state_.store(0, std::memory_order_relaxed);
            start();
        }
        for (int t = 0; t < threads_; ++t) shares_[t].reset(items * t / threads_, items * (t + 1) / threads_);
        using Work = decltype(work);
        task_ = [](const void* context, int thread) { (*static_cast<const Work*>(context))(thread); };
        context_ = &work;
        state_.store((state_.load(std::memory_order_relaxed) & ~(kEpoch - 1)) + kEpoch + kOpen,
                     std::memory_order_release);
        state_.notify_all();
        work(0);
        state_.fetch_and(~kOpen, std::memory_order_relaxed);
        for (int spins = 0; state_.load(std::memory_order_acquire) & (kOpen - 1); ++spins) pause(spins);
    }
    template <class Body> void run(int64_t items, Body&& body) {
        run(items, [](int) {}, body);
    }

private:
    // state: region number · 2^17 + open flag · 2^16 + workers inside
    static constexpr uint64_t kOpen = 1 << 16, kEpoch = 1 << 17;

    void start() {
        forks_ = forks().load(std::memory_order_relaxed);
        for (int id = 1; id < threads_; ++id) workers_.emplace_back([this, id] { serve(id); });
    }

    // The parent's threads can be neither joined nor destroyed in a child.
    void abandon() { new std::vector<std::thread>(std::move(workers_)); }

    // Spin first, then offer the core to the thread that waits for it: the awaited thread may need this very one.
    static void pause(int spins) {
        if (spins % 64 != 63) cpu_relax();
        else std::this_thread::yield();
    }

    void serve(int id) {
        uint64_t done = 0;
        for (int idle = 0;;) {
            uint64_t state = state_.load(std::memory_order_acquire);
            if (stop_.load(std::memory_order_relaxed)) return;
            if (!(state & kOpen) || state / kEpoch == done) {
                if (++idle < kSpins) pause(idle);
                else state_.wait(state, std::memory_order_acquire);
                continue;
            }
            if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) continue;
            task_(context_, id);
            done = state / kEpoch;
            state_.fetch_sub(1, std::memory_order_release);
            idle = 0;
        }
    }

    static constexpr int kSpins = 10000;  // some tenths of a millisecond, the time between two steps of the engine

    std::unique_ptr<Share[]> shares_;
    int threads_, forks_ = 0;
    std::vector<std::thread> workers_;
    alignas(64) std::atomic<uint64_t> state_{0};
    void (*task_)(const void*, int) = nullptr;
    const void* context_ = nullptr;
    std::atomic<bool> stop_{false};
};

}  // namespace llama2
