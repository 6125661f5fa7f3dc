// Codes of four bits in memory (Int4 of rows.h): made from codes of a byte.
#pragma once
#include <numeric>
#include <vector>

#include "buffer.h"
#include "rows.h"

namespace sparse_train {

class Int4Codes {
public:
    // `codes` in the order of `from`, whose rows follow one another; `scales` (num_rows, groups) bfloat16. To row_sums
    // (num_rows,) is added, of each row, the sum of its codes times the scales of their groups.
    Int4Codes(const Rows& from, const int8_t* codes, const uint16_t* scales, double* row_sums, int num_threads)
        : num_groups_((from.num_words + Int4::kGroup - 1) / Int4::kGroup) {
        const int64_t num_tiles = (from.num_rows + kTileRows - 1) / kTileRows;
        starts_.resize(num_tiles + 1);
        scales_.resize(num_tiles * kTileRows * num_groups_);
#pragma omp parallel for num_threads(num_threads)
        for (int64_t tile = 0; tile < num_tiles; ++tile) starts_[tile + 1] = count(from, kTileRows * tile);
        std::partial_sum(starts_.begin(), starts_.end(), starts_.begin());
        codes_ = allocate(starts_.back() + 64);
        std::memset(codes_.get() + starts_.back(), 0, 64);
#pragma omp parallel for num_threads(num_threads)
        for (int64_t tile = 0; tile < num_tiles; ++tile) pack(from, codes, scales, row_sums, kTileRows * tile);
        view_ = {codes_.get(), starts_.data(), scales_.data()};
    }

    const Int4& view() const { return view_; }

private:
    // Bytes of the tile that starts with row `first`.
    static int64_t count(const Rows& from, int64_t first) {
        int64_t num_bytes = 0;
        for (int64_t r = first; r < first + kTileRows; ++r)
            for (int64_t w = 0; w < from.num_words; w += Int4::kGroup)
                num_bytes += Int4::num_bytes(from.word_or_none(r, w), from.word_or_none(r, w + 1));
        return num_bytes;
    }

    void pack(const Rows& from, const int8_t* codes, const uint16_t* scales, double* row_sums, int64_t first) {
        const int64_t num_rows = std::min(kTileRows, from.num_rows - first);
        uint8_t* to = codes_.get() + starts_[first / kTileRows];
        const int8_t* next[kTileRows];
        for (int64_t i = 0; i < num_rows; ++i) next[i] = codes + from.offsets[first + i];
        for (int64_t group = 0; group < num_groups_; ++group)
            for (int64_t i = 0; i < num_rows; ++i) {
                const uint64_t words[] = {from.word_or_none(first + i, Int4::kGroup * group),
                                          from.word_or_none(first + i, Int4::kGroup * group + 1)};
                const int64_t counts[] = {__builtin_popcountll(words[0]), __builtin_popcountll(words[1])};
                const int64_t num_bytes = Int4::num_bytes(words[0], words[1]);
                std::fill_n(to, num_bytes, uint8_t(0));
                for (int64_t k = 0; k < counts[0]; ++k) to[k] = *next[i]++ & 15;
                for (int64_t k = 0; k < counts[1]; ++k) to[k] |= uint8_t(*next[i]++) << 4;
                to += num_bytes;
                const uint16_t scale = scales[(first + i) * num_groups_ + group];
                const int64_t sum = std::accumulate(next[i] - counts[0] - counts[1], next[i], int64_t(0));
                scales_[first * num_groups_ + group * kTileRows + i] = scale;
                row_sums[first + i] += double(from_bf16(scale)) * double(sum);
            }
    }

    int64_t num_groups_;
    Buffer codes_;
    std::vector<int64_t> starts_;
    std::vector<uint16_t> scales_;
    Int4 view_{};
};

}  // namespace sparse_train
