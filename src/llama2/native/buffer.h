// Memory that starts at a 64-byte boundary and grows; its content is lost when it does.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace llama2 {

template <class T> class Buffer {
public:
    T* reserve(int64_t count) {
        if (count > count_) {
            memory_.reset();
            memory_.reset(static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t(64))));
            count_ = count;
        }
        return memory_.get();
    }
    T* get() const { return memory_.get(); }

private:
    struct Free {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::unique_ptr<T, Free> memory_;
    int64_t count_ = 0;
};

}  // namespace llama2
