// Codes of four bits (Int4 of rows.h): the loops that tiers share. What their instructions do is a Kernel:
//
//   Codes                          the codes of a group, 0 at the positions that are not kept
//   expand(bits, second, codes)    of the words at `bits` and `second`, whose kept codes are the halves of `codes`
//   Sum, add(codes, x, scale, sum) a register of sums, and the same with scale times the products with 128 entries of x
//   total(sum)                     over its lanes
//   kFactor                        what Codes are times the codes: 16 in the upper halves of bytes
//   kMostVectors                   for so many the codes are used at once
//
// In an unnamed namespace as matvec.h is.
#pragma once
#include "matvec.h"

namespace sparse_train {
namespace {

// Rows row..row+kTileRows-1 times M vectors.
template <class Kernel, int M>
inline void dot_int4(const Rows& rows, const Int4& int4, Vectors<uint8_t> x, float* y, int64_t row) {
    constexpr int64_t kScales = 512;  // that are floats for a while
    const uint8_t *bits = rows.words(row, 0), *next = int4.codes + int4.starts[row / kTileRows];
    const int64_t num_scales = rows.num_words / Int4::kGroup * kTileRows;
    const uint16_t* scales = int4.scales_of(rows, row, 0);
    typename Kernel::Sum sums[kTileRows][M] = {};
    for (int64_t done = 0; done < num_scales; done += kScales) {
        alignas(64) float scale[kScales];
        const int64_t count = std::min(kScales, num_scales - done);
        // Exact, even of subnormal scales, and so no sum is larger than it has to be.
        for (int64_t i = 0; i < count; ++i) scale[i] = from_bf16(scales[done + i]) / Kernel::kFactor;
        for (int64_t at = 0; at < count; at += kTileRows, bits += 8 * Int4::kGroup * kTileRows) {
            typename Kernel::Codes codes[kTileRows];
#pragma GCC unroll 8
            for (int i = 0; i < kTileRows; ++i) {
                const uint8_t *first = bits + 8 * i, *second = first + 8 * kTileRows;
                uint64_t words[Int4::kGroup];
                std::memcpy(words, first, 8);
                std::memcpy(words + 1, second, 8);
                codes[i] = Kernel::expand(first, second, next);
                __builtin_prefetch(next + kAhead);
                next += Int4::num_bytes(words[0], words[1]);
            }
            const uint8_t* entries = x.data + 64 * Int4::kGroup * ((done + at) / kTileRows);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
                for (int i = 0; i < kTileRows; ++i)
                    sums[i][m] = Kernel::add(codes[i], entries + m * x.stride, scale[at + i], sums[i][m]);
        }
    }
    for (int64_t i = 0; i < std::min(kTileRows, rows.num_rows - row); ++i)
        for (int m = 0; m < M; ++m) y[m * rows.num_rows + row + i] = Kernel::total(sums[i][m]);
}

template <class Kernel, int M>
inline void dot_int4_of(const Rows& rows, const Int4& int4, Vectors<uint8_t> x, float* y, int64_t row) {
    if constexpr (M > 1)
        if (x.count < M) return dot_int4_of<Kernel, M - 1>(rows, int4, x, y, row);
    dot_int4<Kernel, M>(rows, int4, x, y, row);
}

template <class Kernel>
void matvec_int4(const Rows& rows, const Int4& int4, Vectors<uint8_t> x, float* y, int64_t first, int64_t last) {
    constexpr int kMost = Kernel::kMostVectors;
    for (; first < last; first += kTileRows)
        for (int64_t m = 0; m < x.count; m += kMost)
            dot_int4_of<Kernel, kMost>(
                rows, int4, {x.data + m * x.stride, x.stride, std::min<int64_t>(kMost, x.count - m)},
                y + m * rows.num_rows, first);
}

void unpack_int4(const Rows& rows, const Int4& int4, int8_t* codes, int64_t first, int64_t last) {
    for (; first < last; first += kTileRows) {
        const uint8_t* next = int4.codes + int4.starts[first / kTileRows];
        for (int64_t w = 0; w < rows.num_words; ++w) {
            const uint8_t* from = next;
            for (int64_t r = first; r < first + kTileRows; ++r) {
                // As many as a word has at most; the next ones are written over the rest. So the length is known.
                if (w % 2) for (int k = 0; k < 64; ++k) codes[k] = int8_t((from[k] >> 4 ^ 8) - 8);
                else for (int k = 0; k < 64; ++k) codes[k] = int8_t(((from[k] & 15) ^ 8) - 8);
                codes += __builtin_popcountll(rows.word(r, w));
                from += Int4::num_bytes(rows.word(r, w & -2), rows.word(r, w | 1));
            }
            if (w % 2) next = from;
        }
    }
}

}  // namespace
}  // namespace sparse_train
