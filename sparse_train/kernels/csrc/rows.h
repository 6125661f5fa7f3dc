// A sparse weight as the kernels see it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace sparse_train {

// A sparse weight of num_rows x num_columns, its bits in words of 64 columns. Tiles of `tile` rows, a power of two,
// follow each other; in a tile come the first word of each row, then the second ones and so on, and the values in the
// same order. So rows that are multiplied together are one stream of memory. In a tile of one row all is as in a file.
// The last tile has bits for as many rows as the others.
struct Rows {
    const uint8_t* bits;  // may be unaligned: read them with word()
    const int64_t* offsets;  // num_rows + 1: values before each row, in tiles before the first row of each
    int64_t num_rows, num_columns, num_words;
    int64_t tile = 1;
    int64_t skipped = 0;  // values before the first one at hand, where those of some rows are

    // Where the values of a row, of a tile's first row, start among those at hand.
    int64_t start(int64_t row) const { return offsets[row] - skipped; }

    uint64_t word(int64_t row, int64_t index) const {
        uint64_t word;
        std::memcpy(&word, words(row & -tile, index) + 8 * (row & (tile - 1)), 8);
        return word;
    }

    // No bits past the last row and the last word.
    uint64_t word_or_none(int64_t row, int64_t index) const {
        return row < num_rows && index < num_words ? word(row, index) : 0;
    }

    // The words of all rows of the tile that starts with `first_row`.
    const uint8_t* words(int64_t first_row, int64_t index) const {
        return bits + 8 * (first_row * num_words + index * tile);
    }
};

constexpr int64_t kTileRows = 4;  // of the weights that matvec_* multiplies

// Codes of four bits, -8..7, in tiles of kTileRows rows: group after group, and of each one row after the other. The
// two words of a group share their bytes: the low nibbles are the codes of the first, the high ones those of the
// second, and the longer of the two says how many bytes there are. So a code needs no more than a shift and a mask, and
// no word begins in the middle of a byte. num_words is even.
struct Int4 {
    const uint8_t* codes;    // 64 readable bytes follow them
    const int64_t* starts;   // of the tiles in `codes`
    const uint16_t* scales;  // bfloat16; of each tile and group, those of its rows
    static constexpr int64_t kGroup = 2;  // words, which share a scale in each row

    // How many bytes the codes of a row and group are.
    static int64_t num_bytes(uint64_t first, uint64_t second) {
        return std::max(__builtin_popcountll(first), __builtin_popcountll(second));
    }

    const uint16_t* scales_of(const Rows& rows, int64_t first_row, int64_t word) const {
        return scales + first_row * (rows.num_words / kGroup) + word / kGroup * kTileRows;
    }
};

inline float from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float number;
    std::memcpy(&number, &wide, 4);
    return number;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    if (number != number) return uint16_t(bits >> 16 | 64);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Calls next = visit(row, index, word, next) for each word of rows first..last-1 as they are stored; `next` starts as
// start(first), and row `first` starts a tile.
template <class Visit>
void for_each_word(const Rows& rows, int64_t first, int64_t last, Visit visit) {
    for (int64_t next = rows.start(first); first < last; first += rows.tile)
        for (int64_t w = 0; w < rows.num_words; ++w)
            for (int64_t r = first; r < std::min(first + rows.tile, last); ++r)
                next = visit(r, w, rows.word(r, w), next);
}

// Vector m starts at data + m * stride.
template <class T>
struct Vectors {
    const T* data;
    int64_t stride, count;
};

}  // namespace sparse_train
