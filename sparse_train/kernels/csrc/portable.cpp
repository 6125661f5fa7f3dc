// Any CPU: one kept position after the other.
#include "matmul.h"
#include "tiers.h"

namespace sparse_train {
namespace {

// Calls visit(column, index of its value) for each kept position of a row, in order.
template <class Visit>
void for_each_kept(const Rows& rows, int64_t row, Visit visit) {
    int64_t next = rows.offsets[row];
    for (int64_t w = 0; w < rows.num_words; ++w)
        for (uint64_t word = rows.word(row, w); word; word &= word - 1) visit(64 * w + __builtin_ctzll(word), next++);
}

void matvec_f32(const Rows& rows, const float* values, const float* x, float* y, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
        double sum = 0;
        for_each_kept(rows, r, [&](int64_t column, int64_t i) { sum += double(values[i]) * x[column]; });
        y[r] = float(sum);
    }
}

void matvec_i8(const Rows& rows, const int8_t* values, const uint8_t* x, int64_t* y, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
        int64_t sum = 0;
        for_each_kept(rows, r, [&](int64_t column, int64_t i) { sum += int32_t(values[i]) * x[column]; });
        y[r] = sum;
    }
}

template <class T>
void expand_as(const Rows& rows, const T* values, T* dense, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
        T* row = dense + r * rows.num_columns;
        std::memset(row, 0, rows.num_columns * sizeof(T));  // row by row: it is still in the cache when values come
        for_each_kept(rows, r, [&](int64_t column, int64_t i) { row[column] = values[i]; });
    }
}

template <class T>
void compact_as(const Rows& rows, const T* dense, T* values, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
        for_each_kept(rows, r, [&](int64_t column, int64_t i) { values[i] = dense[r * rows.num_columns + column]; });
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

int64_t count(const Rows& rows, int64_t row) {
    int64_t num_kept = 0;
    for (int64_t w = 0; w < rows.num_words; ++w) num_kept += __builtin_popcountll(rows.word(row, w));
    return num_kept;
}

uint64_t read(const void* data, int64_t num_bytes) {
    const uint64_t* words = (const uint64_t*)data;
    uint64_t sum = 0;
    for (int64_t i = 0; i < num_bytes / 8; ++i) sum ^= words[i];
    return sum;
}

}  // namespace

const Tier portable = {"portable", [] { return true; }, matvec_f32, matvec_i8, expand, compact, count, read, kMatmul<4>};

}  // namespace sparse_train
