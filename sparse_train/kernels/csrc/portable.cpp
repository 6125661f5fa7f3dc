// Any CPU: one kept position after the other.
#include "decode.h"
#include "int4.h"
#include "matmul.h"
#include "matvec.h"

namespace sparse_train {
namespace {

// Products of rows first..last-1, summed as Sum; `weight` turns a value into a number of it.
template <class Sum, class Value, class X, class Y, class Weight>
void multiply(const Rows& rows, const Value* values, Vectors<X> x, Y* y, int64_t first, int64_t last, Weight weight) {
    std::vector<Sum> sums(rows.tile * x.count);
    for (; first < last; first += rows.tile) {
        const int64_t end = std::min(first + rows.tile, last);
        std::fill(sums.begin(), sums.end(), Sum());
        for_each_word(rows, first, end, [&](int64_t r, int64_t w, uint64_t word, int64_t next) {
            for (; word; word &= word - 1, ++next) {
                const X* column = x.data + 64 * w + __builtin_ctzll(word);
                Sum* sum = sums.data() + (r - first) * x.count;
                for (int64_t m = 0; m < x.count; ++m) sum[m] += weight(values[next]) * column[m * x.stride];
            }
            return next;
        });
        for (int64_t r = first; r < end; ++r)
            for (int64_t m = 0; m < x.count; ++m) y[m * rows.num_rows + r] = Y(sums[(r - first) * x.count + m]);
    }
}

void matvec_f32(const Rows& rows, const float* values, Vectors<float> x, float* y, int64_t first, int64_t last) {
    multiply<double>(rows, values, x, y, first, last, [](float value) { return double(value); });
}

void matvec_bf16(const Rows& rows, const uint16_t* values, Vectors<float> x, float* y, int64_t first, int64_t last) {
    multiply<double>(rows, values, x, y, first, last, [](uint16_t value) { return double(float(Bf16{value})); });
}

void matvec_i8(const Rows& rows, const int8_t* values, Vectors<uint8_t> x, int64_t* y, int64_t first, int64_t last) {
    multiply<int64_t>(rows, values, x, y, first, last, [](int8_t value) { return int32_t(value); });
}

void matvec_i4(const Rows& rows, const Int4& int4, Vectors<uint8_t> x, float* y, int64_t first, int64_t last) {
    std::vector<float> sums(x.count);
    std::vector<int32_t> group(x.count);
    for (; first < last; first += kTileRows)
        for (int64_t r = first; r < std::min(first + kTileRows, last); ++r) {
            const uint8_t* next = int4.codes + int4.starts[first / kTileRows];
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int64_t w = 0; w < rows.num_words; w += Int4::kGroup)
                for (int64_t i = first; i < first + kTileRows; ++i) {
                    const uint64_t words[] = {rows.word(i, w), rows.word(i, w + 1)};
                    std::fill(group.begin(), group.end(), 0);
                    for (int64_t half = 0; i == r && half < Int4::kGroup; ++half) {
                        const uint8_t* at = next;
                        for (uint64_t word = words[half]; word; word &= word - 1) {
                            const uint8_t* column = x.data + 64 * (w + half) + __builtin_ctzll(word);
                            const int32_t code = int8_t(*at++ << (half ? 0 : 4)) >> 4;
                            for (int64_t m = 0; m < x.count; ++m) group[m] += code * column[m * x.stride];
                        }
                    }
                    next += Int4::num_bytes(words[0], words[1]);
                    if (i != r) continue;
                    const float scale = from_bf16(int4.scales_of(rows, first, w)[r - first]);
                    for (int64_t m = 0; m < x.count; ++m) sums[m] += scale * float(group[m]);
                }
            for (int64_t m = 0; m < x.count; ++m) y[m * rows.num_rows + r] = sums[m];
        }
}

template <class T>
void expand_as(const Rows& rows, const T* values, T* dense, int64_t first, int64_t last) {
    for_each_word(rows, first, last, [&](int64_t r, int64_t w, uint64_t word, int64_t next) {
        T* to = dense + r * rows.num_columns + 64 * w;
        if (64 * w < rows.num_columns) std::memset(to, 0, std::min<int64_t>(64, rows.num_columns - 64 * w) * sizeof(T));
        for (; word; word &= word - 1) to[__builtin_ctzll(word)] = values[next++];
        return next;
    });
}

template <class T>
void compact_as(const Rows& rows, const T* dense, T* values, int64_t first, int64_t last) {
    for_each_word(rows, first, last, [&](int64_t r, int64_t w, uint64_t word, int64_t next) {
        const T* from = dense + r * rows.num_columns + 64 * w;
        for (; word; word &= word - 1) values[next++] = from[__builtin_ctzll(word)];
        return next;
    });
}

// Elements are moved, never computed with: an unsigned integer of their size carries every bit pattern.
void expand(const Rows& rows, int size, const void* values, void* dense, int64_t first, int64_t last) {
    if (size == 1) expand_as(rows, (const uint8_t*)values, (uint8_t*)dense, first, last);
    if (size == 2) expand_as(rows, (const uint16_t*)values, (uint16_t*)dense, first, last);
    if (size == 4) expand_as(rows, (const uint32_t*)values, (uint32_t*)dense, first, last);
}

void compact(const Rows& rows, int size, const void* dense, void* values, int64_t first, int64_t last) {
    if (size == 1) compact_as(rows, (const uint8_t*)dense, (uint8_t*)values, first, last);
    if (size == 2) compact_as(rows, (const uint16_t*)dense, (uint16_t*)values, first, last);
    if (size == 4) compact_as(rows, (const uint32_t*)dense, (uint32_t*)values, first, last);
}

uint64_t read(const void* data, int64_t num_bytes) {
    const uint64_t* words = (const uint64_t*)data;
    uint64_t sum = 0;
    for (int64_t i = 0; i < num_bytes / 8; ++i) sum ^= words[i];
    return sum;
}

}  // namespace

const Tier portable = {"portable", [] { return true; }, matvec_f32, matvec_bf16, matvec_i8, matvec_i4, unpack_int4,
                       expand, compact, count, read, kMatmul<4>, kSteps<4>};

}  // namespace sparse_train
