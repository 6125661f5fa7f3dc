// A sparse weight as the kernels see it.
#pragma once
#include <cstdint>
#include <cstring>

namespace sparse_train {

// A sparse weight of num_rows x num_columns. Row r's bits are words r * num_words ..., its values start at offsets[r].
struct Rows {
    const uint8_t* bits;  // may be unaligned: read them with word()
    const int64_t* offsets;  // num_rows + 1
    int64_t num_rows, num_columns, num_words;

    uint64_t word(int64_t row, int64_t index) const {
        uint64_t word;
        std::memcpy(&word, bits + 8 * (row * num_words + index), 8);
        return word;
    }
};

}  // namespace sparse_train
