// Products with many rows of x that skip zeros: one multiply-add of whole registers per kept weight and row of x.
//
// Lanes are rows of x. x is transposed into tiles of up to kRegisters registers, so that a column of a tile is a few
// registers side by side. A row of the weight takes the columns that its bits keep, one after the other: each time the
// value is broadcast, multiplied with the column, which is in the first-level cache, and added to the sums of the tile,
// which stay in registers. Values and bits are read where they are; nothing is laid out beforehand.
//
// A tier's file includes this, so that the code is compiled with its instructions. All is in an unnamed namespace: the
// linker must not put another tier's code in its place.
#pragma once
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "tiers.h"

namespace sparse_train {
namespace {

struct Bf16 {
    uint16_t bits;
    explicit operator float() const { return from_bf16(bits); }
};

// What a row keeps of 64 columns. A type of this file alone, for vectors of it.
template <class Value>
struct Part {
    const Value* values;
    uint64_t word;
    float scale;
};

// The entries of a and b, one after the other, at these places.
template <int... kPlace, class Register>
inline Register shuffle(Register a, Register b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, kPlace...);
#else  // GCC has that one from 12 on
    return __builtin_shuffle(a, b, decltype(a < b){kPlace...});
#endif
}

template <int kLanes>
struct MatmulOf {
    static constexpr int kRegisters = 8;  // as many sums hide the latency of multiply-adds, and 64 columns of so many
                                          // registers fit the first-level cache
    static constexpr int64_t kAhead = 16;  // tiles whose bits, and rows whose values, are fetched early: they are far
                                           // from one another

    typedef float Register __attribute__((vector_size(4 * kLanes)));
    struct alignas(64) Line {
        float at[16];
    };

    // Tiles lie one after the other; that which starts at row m of x starts at entry m * 64 * num_words and is
    // width_at(m) wide.
    static int64_t width_at(int64_t m, int64_t num_x) {
        return std::min<int64_t>(kRegisters, (num_x - m + kLanes - 1) / kLanes) * kLanes;
    }

    template <int kStep, int... kLane>
    static void exchange(Register& a, Register& b, std::integer_sequence<int, kLane...>) {
        const Register low = shuffle<(kLane & kStep ? kLanes + kLane - kStep : kLane)...>(a, b);
        b = shuffle<(kLane & kStep ? kLanes + kLane : kLane + kStep)...>(a, b);
        a = low;
    }

    template <int kStep>
    static void transpose(Register (&block)[kLanes]) {
        if constexpr (kStep < kLanes) {
            for (int i = 0; i < kLanes; ++i)
                if (!(i & kStep))
                    exchange<kStep>(block[i], block[i + kStep], std::make_integer_sequence<int, kLanes>());
            transpose<2 * kStep>(block);
        }
    }

    // A copy of a length that is only known at run time is a call or worse.
    static void copy(void* to, const void* from, int64_t count) {
        if (count >= kLanes) std::memcpy(to, from, 4 * kLanes);
        else for (int64_t i = 0; i < count; ++i) std::memcpy((float*)to + i, (const float*)from + i, 4);
    }

    // to[c][r] = from[r][c] for r < num_rows, c < num_columns, both at most kLanes; with kPad lanes past num_rows get
    // 0, otherwise they are not written.
    template <bool kPad>
    static void transpose(const float* from, int64_t from_stride, int64_t num_rows, int64_t num_columns, float* to,
                          int64_t to_stride) {
        Register block[kLanes];
        for (int r = 0; r < kLanes; ++r) {
            block[r] = Register{};
            if (r < num_rows) copy(&block[r], from + r * from_stride, num_columns);
        }
        transpose<1>(block);
        for (int c = 0; c < num_columns; ++c) copy(to + c * to_stride, &block[c], kPad ? kLanes : num_rows);
    }

    // Columns 64 * first .. 64 * last - 1 of x (num_x, num_columns) to their places in `tiles`.
    static void pack(const float* x, int64_t num_x, const Rows& rows, float* tiles, int64_t first, int64_t last) {
        const int64_t end = std::min(64 * last, rows.num_columns);
        for (int64_t m = 0; m < num_x; m += kLanes) {
            const int64_t tile = m / (kRegisters * kLanes) * (kRegisters * kLanes), width = width_at(tile, num_x);
            for (int64_t c = 64 * first; c < end; c += kLanes)
                transpose<true>(x + m * rows.num_columns + c, rows.num_columns, std::min<int64_t>(kLanes, num_x - m),
                                std::min<int64_t>(kLanes, end - c),
                                tiles + 64 * rows.num_words * tile + c * width + (m - tile), width);
        }
    }

    // sums += the kept weights of one word times the columns of a tile of kCount registers.
    template <int kCount, bool kScaled, class Value>
    static void add_word(const Part<Value>& part, const float* columns, Register* sums) {
        Register sum[kCount] = {};
        const Value* value = part.values;
        for (uint64_t word = part.word; word; word &= word - 1, ++value) {
            const Register* column = (const Register*)(columns + size_t(__builtin_ctzll(word)) * (kCount * kLanes));
            const float weight = float(*value);
            for (int i = 0; i < kCount; ++i) sum[i] += weight * column[i];
        }
        for (int i = 0; i < kCount; ++i) sums[i] += kScaled ? part.scale * sum[i] : sum[i];
    }

    template <int kCount, bool kScaled, class Value>
    static void add_parts(const Part<Value>* parts, int64_t count, const float* columns, float* sums) {
        for (int64_t r = 0; r < count; ++r) {
            const char* later = (const char*)parts[std::min(r + kAhead, count - 1)].values;
            for (size_t byte = 0; byte < 48 * sizeof(Value); byte += 64) __builtin_prefetch(later + byte);
            add_word<kCount, kScaled>(parts[r], columns, (Register*)sums + r * kCount);
        }
    }

    // Writes rows first..last-1 of the weight times all x, y (num_x, num_rows). Each sum is of one order, whatever rows
    // of x it is computed with: column by column within 64, then 64 after 64.
    template <bool kScaled = false, class Value>
    static void multiply_as(const Rows& rows, const Value* values, const float* tiles, int64_t num_x, float* y,
                            int64_t first, int64_t last, const Int4* int4 = nullptr) {
        static thread_local std::vector<Line> lines;
        static thread_local std::vector<Part<Value>> parts;
        const int64_t count = last - first;
        lines.assign(((num_x + 15) / 16) * count, Line{});
        float* sums = (float*)lines.data();
        parts.resize(count);
        for (int64_t w = 0; w < rows.num_words; ++w) {
            for (int64_t tile = 0; tile < count; tile += rows.tile) {
                const int64_t end = std::min(tile + rows.tile, count);
                const uint8_t* words = rows.words(first + tile, w);
                __builtin_prefetch(rows.words(first + tile + kAhead * rows.tile, w));
                const Value* next = w ? parts[end - 1].values + __builtin_popcountll(parts[end - 1].word)
                                      : values + rows.start(first + tile);
                for (int64_t r = tile; r < end; ++r) {
                    std::memcpy(&parts[r].word, words + 8 * (r - tile), 8);
                    parts[r].values = next;
                    if (kScaled) parts[r].scale = from_bf16(int4->scales_of(rows, first + tile, w)[r - tile]);
                    next += __builtin_popcountll(parts[r].word);
                }
            }
            for (int64_t m = 0, width; m < num_x; m += width) {
                width = width_at(m, num_x);
                const float* columns = tiles + 64 * (rows.num_words * m + w * width);
                switch (width / kLanes) {
#define SPARSE_TRAIN_WIDTH(COUNT)                                                             \
    case COUNT:                                                                               \
        add_parts<COUNT, kScaled>(parts.data(), count, columns, sums + count * m);            \
        break;
                    SPARSE_TRAIN_WIDTH(1)
                    SPARSE_TRAIN_WIDTH(2)
                    SPARSE_TRAIN_WIDTH(3)
                    SPARSE_TRAIN_WIDTH(4)
                    SPARSE_TRAIN_WIDTH(5)
                    SPARSE_TRAIN_WIDTH(6)
                    SPARSE_TRAIN_WIDTH(7)
                    SPARSE_TRAIN_WIDTH(8)
#undef SPARSE_TRAIN_WIDTH
                }
            }
        }
        for (int64_t m = 0; m < num_x; m += kLanes) {
            const int64_t tile = m / (kRegisters * kLanes) * (kRegisters * kLanes), width = width_at(tile, num_x);
            for (int64_t r = 0; r < count; r += kLanes)
                transpose<false>(sums + count * tile + r * width + (m - tile), width,
                                 std::min<int64_t>(kLanes, count - r), std::min<int64_t>(kLanes, num_x - m),
                                 y + m * rows.num_rows + first + r, rows.num_rows);
        }
    }

    static void multiply(const Rows& rows, int size, const void* values, const float* tiles, int64_t num_x, float* y,
                         int64_t first, int64_t last, const Int4* int4) {
        if (int4) return multiply_as<true>(rows, (const int8_t*)values, tiles, num_x, y, first, last, int4);
        if (size == 1) multiply_as(rows, (const int8_t*)values, tiles, num_x, y, first, last);
        if (size == 2) multiply_as(rows, (const Bf16*)values, tiles, num_x, y, first, last);
        if (size == 4) multiply_as(rows, (const float*)values, tiles, num_x, y, first, last);
    }
};

template <int kLanes>
constexpr Matmul kMatmul = {MatmulOf<kLanes>::pack, MatmulOf<kLanes>::multiply};

}  // namespace
}  // namespace sparse_train
