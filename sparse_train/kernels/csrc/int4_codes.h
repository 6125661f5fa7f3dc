// Codes of four bits in memory (Int4 of rows.h): made from codes of a byte.
#pragma once
#include <numeric>
#include <vector>

#include "block.h"
#include "rows.h"

namespace sparse_train {

// Bytes before the codes of each tile, and of all.
inline std::vector<int64_t> code_starts(const Rows& from, int num_threads) {
    const int64_t num_tiles = (from.num_rows + kTileRows - 1) / kTileRows;
    std::vector<int64_t> starts(num_tiles + 1);
#pragma omp parallel for num_threads(num_threads)
    for (int64_t tile = 0; tile < num_tiles; ++tile)
        for (int64_t r = kTileRows * tile; r < kTileRows * (tile + 1); ++r)
            for (int64_t w = 0; w < from.num_words; w += Int4::kGroup)
                starts[tile + 1] += Int4::num_bytes(from.word_or_none(r, w), from.word_or_none(r, w + 1));
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    return starts;
}

// The tile that starts with row `first`, to a block that has its starts: codes, scales, and of each row the sum of its
// codes times the scales of their groups. `codes` in the order of `from`, whose rows follow one another; `scales`
// (num_rows, groups) bfloat16.
inline void pack_codes(const Rows& from, const int8_t* codes, const uint16_t* scales, const Block& block,
                       int64_t first) {
    const int64_t num_rows = std::min(kTileRows, from.num_rows - first), num_groups = block.header->num_groups();
    uint8_t* to = block.values + block.starts[first / kTileRows];
    const int8_t* next[kTileRows];
    for (int64_t i = 0; i < num_rows; ++i) next[i] = codes + from.offsets[first + i];
    for (int64_t group = 0; group < num_groups; ++group)
        for (int64_t i = 0; i < num_rows; ++i) {
            const uint64_t words[] = {from.word_or_none(first + i, Int4::kGroup * group),
                                      from.word_or_none(first + i, Int4::kGroup * group + 1)};
            const int64_t counts[] = {__builtin_popcountll(words[0]), __builtin_popcountll(words[1])};
            const int64_t num_bytes = Int4::num_bytes(words[0], words[1]);
            std::fill_n(to, num_bytes, uint8_t(0));
            for (int64_t k = 0; k < counts[0]; ++k) to[k] = *next[i]++ & 15;
            for (int64_t k = 0; k < counts[1]; ++k) to[k] |= uint8_t(*next[i]++) << 4;
            to += num_bytes;
            const uint16_t scale = scales[(first + i) * num_groups + group];
            const int64_t sum = std::accumulate(next[i] - counts[0] - counts[1], next[i], int64_t(0));
            block.group_scales[first * num_groups + group * kTileRows + i] = scale;
            block.row_sums[first + i] += double(from_bf16(scale)) * double(sum);
        }
}

}  // namespace sparse_train
