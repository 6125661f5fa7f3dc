// Moving values to their columns and back: the loops that tiers share. What a register does is a Lanes:
//
//   Type, kLanes                    an element, and how many make a register; 64 / kLanes registers make a word
//   expand(k, word, bits, values)   as a Kernel of matvec.h
//   compress(k, word, bits, dense)  the kept elements of the k-th register of a word come first
//   store, stream(to, register)     the second past the caches, to an aligned place
//   fence()                         what was streamed comes before all that is stored from now on
//
// In an unnamed namespace as matvec.h is.
#pragma once
#include "matvec.h"

namespace sparse_train {
namespace {

constexpr int64_t kStreamed = 16 << 20;  // bytes of a dense weight that would push everything else out of the caches
constexpr int64_t kSpare = 128;          // elements; registers that are read or written reach less far past a word's

template <class Lanes, bool kStream>
void expand_as(const Rows& rows, const typename Lanes::Type* values, typename Lanes::Type* dense, int64_t first,
               int64_t last) {
    const int64_t end = rows.start(rows.num_rows);
    for_each_word(rows, first, last, [&](int64_t r, int64_t w, uint64_t word, int64_t next) {
        auto* to = dense + r * rows.num_columns + 64 * w;
        const int64_t left = rows.num_columns - 64 * w, kept = __builtin_popcountll(word);
        if (left < 64 || end - next < kSpare) {  // whole registers would read or write past what is there
            for (int64_t i = 0; i < std::min<int64_t>(left, 64); ++i) to[i] = word >> i & 1 ? values[next++] : 0;
            return next;
        }
#pragma GCC unroll 8
        for (int k = 0; k < 64 / Lanes::kLanes; ++k) {
            const auto expanded = Lanes::expand(k, word, (const uint8_t*)&word, values + next);
            if (kStream) Lanes::stream(to + Lanes::kLanes * k, expanded);
            else Lanes::store(to + Lanes::kLanes * k, expanded);
        }
        return next + kept;
    });
}

template <class Lanes>
void expand_with(const Rows& rows, const void* values, void* dense, int64_t first, int64_t last) {
    using Type = typename Lanes::Type;
    const int64_t row_bytes = rows.num_columns * sizeof(Type);
    if (uintptr_t(dense) % 64 || row_bytes % 64 || rows.num_rows * row_bytes < kStreamed)
        return expand_as<Lanes, false>(rows, (const Type*)values, (Type*)dense, first, last);
    expand_as<Lanes, true>(rows, (const Type*)values, (Type*)dense, first, last);
    Lanes::fence();
}

template <class Lanes>
void compact_with(const Rows& rows, const void* dense, void* values, int64_t first, int64_t last) {
    using Type = typename Lanes::Type;
    auto* to = (Type*)values;
    for_each_word(rows, first, last, [&](int64_t r, int64_t w, uint64_t word, int64_t next) {
        const auto* from = (const Type*)dense + r * rows.num_columns + 64 * w;
        // Whole registers may be stored while what they spill over is still this thread's to write.
        if (rows.num_columns - 64 * w < 64 || rows.start(last) - next < kSpare) {
            for (; word; word &= word - 1) to[next++] = from[__builtin_ctzll(word)];
            return next;
        }
#pragma GCC unroll 8
        for (int k = 0; k < 64 / Lanes::kLanes; ++k)
            Lanes::store(to + next + kept_before<Lanes::kLanes>(k, word),
                         Lanes::compress(k, word, (const uint8_t*)&word, from + Lanes::kLanes * k));
        return next + __builtin_popcountll(word);
    });
}

template <class Lanes1, class Lanes2, class Lanes4>
void expand(const Rows& rows, int size, const void* values, void* dense, int64_t first, int64_t last) {
    if (size == 1) expand_with<Lanes1>(rows, values, dense, first, last);
    if (size == 2) expand_with<Lanes2>(rows, values, dense, first, last);
    if (size == 4) expand_with<Lanes4>(rows, values, dense, first, last);
}

template <class Lanes1, class Lanes2, class Lanes4>
void compact(const Rows& rows, int size, const void* dense, void* values, int64_t first, int64_t last) {
    if (size == 1) compact_with<Lanes1>(rows, dense, values, first, last);
    if (size == 2) compact_with<Lanes2>(rows, dense, values, first, last);
    if (size == 4) compact_with<Lanes4>(rows, dense, values, first, last);
}

}  // namespace
}  // namespace sparse_train
