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
    // y (num_x, num_rows) <- the values as they are, of `size` 4 (float), 2 (bfloat16) or 1 (int8) bytes, times the
    // rows of x. With `int4` the values are its codes, one byte each, and are multiplied by their scales as well.
    void (*multiply)(const Rows&, int size, const void* values, const float* tiles, int64_t num_x, float* y,
                     int64_t first, int64_t last, const Int4* int4);
};

// What a product by tiles reads: the weight, and x as `pack` left it.
struct TileOperands {
    const Rows& rows;
    int size;                // of a value: 2 (bfloat16), or 1 (int8, or codes of four bits where `int4` is given)
    const void* values;      // of bfloat16 and int8
    const Int4* int4;
    const float* scale;      // of the rows of int8
    const double* row_sums;  // of integers, as in Block
    int64_t num_x;
    const uint8_t* x;
    const double *steps, *zeros;  // of integers: x is step * (code - zero)
};

// Dense products with many rows of x, for instructions that multiply whole tiles: a part of the weight is expanded in a
// near cache. None where `multiply` is null.
struct TileProduct {
    static constexpr int64_t kRows = 16;         // of x, or the rest, that are packed together
    static constexpr int64_t kMostWords = 1024;  // of integers, whose sums 32 bits hold

    // Bytes of an entry of x: a code, or three bfloat16 that it is the sum of.
    static constexpr int64_t num_bytes(int size) { return size == 1 ? 1 : 6; }

    // x (num_x <= kRows, num_columns) to kRows * num_words * 64 entries that start at a multiple of 64 bytes, and of
    // integers to kRows steps and zeros.
    void (*pack)(const float* x, int64_t num_x, const Rows&, int size, uint8_t* to, double* steps, double* zeros);
    // y (num_x, num_rows), with the scales of rows; of int8 to the bits of a product by matvec_i8.
    void (*multiply)(const TileOperands&, float* y, int64_t first, int64_t last);
};

constexpr int64_t kKeyBlock = 16;  // tokens whose keys lie side by side, entry by entry

// Positions that a thread attends to at a time, counted from a row's first one: the bits of a result depend neither on
// the number of threads nor on the other rows.
constexpr int64_t kPart = 128;

inline int64_t blocks(int64_t capacity) { return (capacity + kKeyBlock - 1) / kKeyBlock; }

// Attention of one new token per row of a batch, over a cache of keys and values.
struct Attention {
    int64_t num_rows, num_heads, num_groups, head_dim, capacity;  // num_groups: heads of keys and values
    float scale;
    bool is_bf16;  // keys and values, else floats
    void* keys;    // (num_rows, num_groups, blocks(capacity), head_dim, kKeyBlock)
    void* values;  // (num_rows, num_groups, capacity, head_dim)
    const int64_t *position, *starts;    // the last position, a new token's; each row's first position (num_rows,)
    int64_t rotary;                      // how many of the head_dim entries turn; 0: none
    const float *cosine, *sine;          // (capacity, rotary), by the distance from a row's start
    const float* bias;                   // (num_heads, capacity), added to a score by its distance; may be null
    const float *query_norm, *key_norm;  // (head_dim,) RMS norms of each head; may be null
    float epsilon;
};

// The steps of a decoder between its products (decode.h).
struct Steps {
    // One row of the batch: q (num_heads, head_dim) with its norms and rotation to `queries`, k and v (num_groups,
    // head_dim) to the last position of the cache; k and v are null if it has all that q attends to.
    void (*prepare)(const Attention&, int64_t row, const float* q, const float* k, const float* v, float* queries);
    // A part of a row, kPart positions or the rest, and the `queries` of the heads that share head `group` of keys and
    // values. Of each head to `partials` (heads, head_dim + 2): the sum of values, each times e^(its score - the
    // largest score), the sum of these powers, and the largest score.
    void (*attend)(const Attention&, int64_t row, int64_t group, int64_t part, const float* queries, float* partials);
    // The partials (num_parts, num_heads, head_dim + 2) of a row to `out` (num_heads, head_dim).
    void (*merge)(const Attention&, int64_t num_parts, const float* partials, float* out);
    // hidden += change, where there is one; out = norm(hidden) * weight + bias; a layer norm or an RMS norm.
    void (*add_and_normalise)(float* hidden, const float* change, const float* weight, const float* bias, float* out,
                              int64_t num_rows, int64_t width, float epsilon, bool is_rms);
    // y = f(x) * factor, or f(x); kind 0: SiLU, 1: GELU, 2: GELU by tanh, 3: ReLU.
    void (*activate)(int kind, const float* x, const float* factor, float* y, int64_t count);
};

// A function works on rows first..last-1, whole tiles. Vectors have num_words * 64 readable entries, and product m is
// row m of y (vectors, num_rows). The values that matvec_* reads are followed by 64 readable bytes, those of some rows
// (Rows::skipped) as well; otherwise those of expand and compact by none.
struct Tier {
    const char* name;
    // Whether this CPU has the instructions; false as well where the compiler had no flags for its kind of processor.
    bool (*is_supported)();

    void (*matvec_f32)(const Rows&, const float* values, Vectors<float> x, float* y, int64_t first, int64_t last);
    void (*matvec_bf16)(const Rows&, const uint16_t* values, Vectors<float> x, float* y, int64_t first, int64_t last);
    // Exact sums, of rows of any width, with x less x_offset.
    void (*matvec_i8)(const Rows&, const int8_t* values, Vectors<uint8_t> x, int64_t* y, int64_t first, int64_t last);
    // Codes times their scales, summed as floats; exact within a group.
    void (*matvec_i4)(const Rows&, const Int4&, Vectors<uint8_t> x, float* y, int64_t first, int64_t last);
    // Codes of four bits to bytes in the order of Rows; up to 64 bytes behind them are written as well.
    void (*unpack_i4)(const Rows&, const Int4&, int8_t* codes, int64_t first, int64_t last);
    // dense (num_rows, num_columns) <- values, and back (tiles of one row); `size` is an element's bytes: 1, 2 or 4.
    void (*expand)(const Rows&, int size, const void* values, void* dense, int64_t first, int64_t last);
    void (*compact)(const Rows&, int size, const void* dense, void* values, int64_t first, int64_t last);
    // Kept positions of a row.
    int64_t (*count)(const Rows&, int64_t row);
    // Reads num_bytes (a multiple of 512) once; the result only keeps the reads alive.
    uint64_t (*read)(const void* data, int64_t num_bytes);
    Matmul matmul;
    Steps steps;
    int x_offset = 0;  // what matvec_i8 takes away from x: 128 where it multiplies signed bytes
    TileProduct tiles = {};
};

extern const Tier amx, avx512, avx512f, avx2, neon_dotprod, neon, portable;

// Fastest first. The first that this CPU supports is used unless Python chooses another.
inline const Tier* const kTiers[] = {&amx, &avx512, &avx512f, &avx2, &neon_dotprod, &neon, &portable};

}  // namespace sparse_train
