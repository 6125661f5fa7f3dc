// Memory that kernels read from.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace sparse_train {

struct Freed {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint8_t, Freed>;

inline Buffer allocate(int64_t num_bytes) {
    constexpr int64_t kPage = 2 << 20;
    const bool is_large = num_bytes >= kPage;
    const int64_t alignment = is_large ? kPage : 64;
    void* memory = std::aligned_alloc(alignment, (num_bytes + alignment - 1) / alignment * alignment);
    if (!memory) throw std::bad_alloc();
    if (is_large) madvise(memory, num_bytes, MADV_HUGEPAGE);  // fewer page walks; a refusal costs only that
    return Buffer((uint8_t*)memory);
}

}  // namespace sparse_train
