// Products of a sparse weight with vectors: the loops that tiers share. How the positions of a word are expanded and
// multiplied is a Kernel:
//
//   Value, X, Y                   of a weight as it is stored, of a vector, of a product
//   kLanes                        positions that are expanded into one register; 64 / kLanes make a word
//   expand(k, word, bits, values) the k-th of them: `bits` are the word's bytes, `values` those from its first one on
//   load(x)                       as many entries of a vector
//   Sum, add(weights, x, sum)     a register of sums, and the same with their products added
//   total(sum)                    over its lanes
//   kWordsPerSum                  words whose products fit a Sum
//   kMostVectors                  for so many an expanded register is used at once, as registers allow
//   rows(vectors)                 of a tile that share the loads of so many vectors
//
// The sum of a product is that of its row and its vector alone: its bits do not depend on what is computed beside it.
//
// Tiers' files include this with their own compiler flags: all is in an unnamed namespace, so that the linker does not
// put one tier's code in the place of another's.
#pragma once
#include "tiers.h"

namespace sparse_train {
namespace {

// What kernels for floats have in common, and those for bytes.
template <int kRegister, int kVectors>
struct FloatKernel {
    using X = float;
    using Y = float;
    static constexpr int kLanes = kRegister, kMostVectors = kVectors;
    static constexpr int64_t kWordsPerSum = INT64_MAX / 2;
    static constexpr int rows(int) { return 4; }
};

// A lane of sums, an int32, gets `kProducts` products of a word.
template <int kRegister, int kProducts>
struct Int8Kernel {
    using Value = int8_t;
    using X = uint8_t;
    using Y = int64_t;
    static constexpr int kLanes = kRegister, kMostVectors = 4;
    static constexpr int64_t kWordsPerSum = 65536 / kProducts;
    static_assert(kWordsPerSum * kProducts * 255 * 128 <= INT32_MAX);
};

// Bytes. The hardware's streamer stops at each 4 KiB page: with 1 KiB the product of an FP32 weight with half of its
// entries takes 1.6 times as long (Zen 5).
constexpr int64_t kAhead = 8192;

// FP32 values, of which a word has up to four lines, are fetched into the second-level cache, from twice as far: the
// first one has too few line buffers for them (Intel, half of the entries: 0.95 of the byte bound instead of 0.80).
template <class Value>
inline void prefetch(const Value* values) {
    const char* next = (const char*)values;
    if constexpr (sizeof(Value) == 4) {
        __builtin_prefetch(next + 2 * kAhead, 0, 2);
        __builtin_prefetch(next + 2 * kAhead + 64, 0, 2);
    } else __builtin_prefetch(next + kAhead);
}

// Kept positions of a word before its k-th part.
template <int kLanes>
inline int64_t kept_before(int k, uint64_t word) {
    return __builtin_popcountll(word & ((uint64_t(1) << kLanes * k) - 1));
}

// Rows part..part+kRows-1 of the tile at `row`, times M vectors.
template <class Kernel, int kRows, int M>
inline void dot(const Rows& rows, const typename Kernel::Value* values, Vectors<typename Kernel::X> x,
                typename Kernel::Y* y, int64_t row, int part) {
    constexpr int kTile = int(kTileRows);
    const typename Kernel::Value* next = values + rows.start(row);
    const uint8_t* bits = rows.bits + 8 * row * rows.num_words;
    for (int64_t first = 0; first == 0 || first < rows.num_words; first += Kernel::kWordsPerSum) {
        const int64_t last = std::min(first + Kernel::kWordsPerSum, rows.num_words);
        typename Kernel::Sum sums[kRows][M] = {};
        for (int64_t w = first; w < last; ++w, bits += 8 * kTile) {
            uint64_t words[kRows];
            const typename Kernel::Value* at[kRows];
#pragma GCC unroll 8
            for (int i = 0; i < kTile; ++i) {
                uint64_t word;
                std::memcpy(&word, bits + 8 * i, 8);
                const int mine = kRows == kTile ? i : i - part;
                if (kRows == kTile || (mine >= 0 && mine < kRows)) {
                    words[mine] = word;
                    at[mine] = next;
                    prefetch(next);
                }
                next += __builtin_popcountll(word);
            }
#pragma GCC unroll 8
            for (int k = 0; k < 64 / Kernel::kLanes; ++k) {
                decltype(Kernel::expand(k, words[0], bits, at[0])) weights[kRows];
#pragma GCC unroll 8
                for (int i = 0; i < kRows; ++i) weights[i] = Kernel::expand(k, words[i], bits + 8 * (part + i), at[i]);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const auto entries = Kernel::load(x.data + m * x.stride + 64 * w + Kernel::kLanes * k);
#pragma GCC unroll 8
                    for (int i = 0; i < kRows; ++i) sums[i][m] = Kernel::add(weights[i], entries, sums[i][m]);
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const auto total = Kernel::total(sums[i][m]);
                if (row + part + i >= rows.num_rows) continue;
                auto& out = y[m * rows.num_rows + row + part + i];
                out = first ? out + total : total;
            }
    }
}

template <class Kernel, int M>
inline void dot_tile(const Rows& rows, const typename Kernel::Value* values, Vectors<typename Kernel::X> x,
                     typename Kernel::Y* y, int64_t row) {
    if constexpr (M > 1)
        if (x.count < M) return dot_tile<Kernel, M - 1>(rows, values, x, y, row);
    constexpr int kRows = Kernel::rows(M);
    if constexpr (kRows == kTileRows) dot<Kernel, kRows, M>(rows, values, x, y, row, 0);
    else
#pragma GCC unroll 8
        for (int part = 0; part < kTileRows; part += kRows) dot<Kernel, kRows, M>(rows, values, x, y, row, part);
}

// A tile is multiplied with all vectors before the next one: its bits and values come from memory once.
template <class Kernel>
void matvec(const Rows& rows, const typename Kernel::Value* values, Vectors<typename Kernel::X> x,
            typename Kernel::Y* y, int64_t first, int64_t last) {
    for (; first < last; first += kTileRows)
        for (int64_t m = 0; m < x.count; m += Kernel::kMostVectors)
            dot_tile<Kernel, Kernel::kMostVectors>(
                rows, values, {x.data + m * x.stride, x.stride, std::min<int64_t>(Kernel::kMostVectors, x.count - m)},
                y + m * rows.num_rows, first);
}

inline int64_t count(const Rows& rows, int64_t row) {
    int64_t num_kept = 0;
    for (int64_t w = 0; w < rows.num_words; ++w) num_kept += __builtin_popcountll(rows.word(row, w));
    return num_kept;
}

}  // namespace
}  // namespace sparse_train
