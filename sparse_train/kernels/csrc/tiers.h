// A tier is the kernels for one instruction set. Its file, csrc/NAME.cpp, defines `const Tier NAME`; its compiler flags
// stand in a line of that file, "// flags for PROCESSOR: ...", which CMakeLists.txt reads.
#pragma once
#include "rows.h"

namespace sparse_train {

// Products with many rows of x at once (matmul.h); both functions may be called by several threads for different parts.
struct Matmul {
    // x (num_x, num_columns) to `tiles`, which have room for num_x, rounded up to 16, times num_words * 64 floats and
    // start at a multiple of 64 bytes; words first..last-1 of the columns.
    void (*pack)(const float* x, int64_t num_x, const Rows&, float* tiles, int64_t first, int64_t last);
    // y (num_x, num_rows) <- the values as they are, of `size` 4 (float), 2 (bfloat16) or 1 (int8) bytes, times the rows of x.
    void (*multiply)(const Rows&, int size, const void* values, const float* tiles, int64_t num_x, float* y,
                     int64_t first, int64_t last);
};

constexpr int64_t kTileRows = 4;  // of the weights that matvec_* multiplies

// A function works on rows first..last-1, whole tiles. Vectors have num_words * 64 readable entries, and product m is row
// m of y (vectors, num_rows). The values that matvec_* reads are followed by 64 readable bytes, those of expand and
// compact by none.
struct Tier {
    const char* name;
    // Whether this CPU has the instructions; false as well where the compiler had no flags for its kind of processor.
    bool (*is_supported)();

    void (*matvec_f32)(const Rows&, const float* values, Vectors<float> x, float* y, int64_t first, int64_t last);
    void (*matvec_bf16)(const Rows&, const uint16_t* values, Vectors<float> x, float* y, int64_t first, int64_t last);
    // Exact sums, of rows of any width.
    void (*matvec_i8)(const Rows&, const int8_t* values, Vectors<uint8_t> x, int64_t* y, int64_t first, int64_t last);
    // dense (num_rows, num_columns) <- values, and back (tiles of one row); `size` is an element's bytes: 1, 2 or 4.
    void (*expand)(const Rows&, int size, const void* values, void* dense, int64_t first, int64_t last);
    void (*compact)(const Rows&, int size, const void* dense, void* values, int64_t first, int64_t last);
    // Kept positions of a row.
    int64_t (*count)(const Rows&, int64_t row);
    // Reads num_bytes (a multiple of 512) once; the result only keeps the reads alive.
    uint64_t (*read)(const void* data, int64_t num_bytes);
    Matmul matmul;
};

extern const Tier avx512, avx512f, avx2, portable;

// Fastest first. The first that this CPU supports is used unless Python chooses another.
inline const Tier* const kTiers[] = {&avx512, &avx512f, &avx2, &portable};

}  // namespace sparse_train
