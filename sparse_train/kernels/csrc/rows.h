// What the kernels of every tier work on, and the table of functions that a tier fills.
#pragma once
#include <cstdint>
#include <cstring>

namespace sparse_train {

// A sparse weight of num_rows x num_columns. Row r's bits are words r * num_words ..., its values start at offsets[r].
struct Rows {
    const uint8_t* bits;  // maybe unaligned: use word()
    const int64_t* offsets;  // num_rows + 1
    int64_t num_rows, num_columns, num_words;

    uint64_t word(int64_t row, int64_t index) const {
        uint64_t found;
        std::memcpy(&found, bits + 8 * (row * num_words + index), 8);
        return found;
    }
};

// Rows first..last-1 are one part's. Vectors x have num_words * 64 readable entries; packed values have 64 spare bytes.
struct Tier {
    void (*matvec_f32)(const Rows&, const float* values, const float* x, float* y, int64_t first, int64_t last);
    void (*matvec_i8)(const Rows&, const int8_t* values, const uint8_t* x, int64_t* y, int64_t first, int64_t last);
    // dense (num_rows, num_columns) <- values, and back; `size` is an element's bytes: 1, 2 or 4.
    void (*expand)(const Rows&, int size, const void* values, void* dense, int64_t first, int64_t last);
    void (*compact)(const Rows&, int size, const void* dense, void* values, int64_t first, int64_t last);
    // Kept positions of a row.
    int64_t (*count)(const Rows&, int64_t row);
    // Reads num_bytes (a multiple of 512) once; the result only keeps the reads alive.
    uint64_t (*read)(const void* data, int64_t num_bytes);
};

extern const Tier portable;
extern const Tier avx512;
bool has_avx512();

}  // namespace sparse_train
