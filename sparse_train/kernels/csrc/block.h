// A packed weight in one piece of memory. It holds no addresses, so it means the same in a file and in any process.
#pragma once
#include <cstdint>
#include <cstring>

#include "buffer.h"
#include "rows.h"

namespace sparse_train {

struct Block {
    struct Header {
        int64_t num_rows, num_columns, num_values;
        int64_t size;  // bytes of a value as it was given: 4, 2 or 1
        int64_t is_int4, num_code_bytes;

        int64_t num_words() const {  // of a row, whole groups for codes of four bits
            const int64_t num_words = (num_columns + 63) / 64;
            return is_int4 ? (num_words + Int4::kGroup - 1) / Int4::kGroup * Int4::kGroup : num_words;
        }
        int64_t num_groups() const { return num_words() / Int4::kGroup; }
        int64_t num_tiles() const { return (num_rows + kTileRows - 1) / kTileRows; }
    };

    Header* header = nullptr;
    int64_t num_bytes = 0;
    int64_t* offsets = nullptr;        // of the values of rows, as in Rows
    float* scale = nullptr;            // of the rows of int8
    double* row_sums = nullptr;        // of the values, for int4 times the scales of their groups
    int64_t* starts = nullptr;         // this and the next as in Int4
    uint16_t* group_scales = nullptr;
    uint8_t* bits = nullptr;           // of whole tiles, as in Rows
    uint8_t* values = nullptr;         // as in Rows, or the codes of Int4; 64 readable bytes follow

    Block() = default;

    // What lies at `memory`, which starts with a header.
    explicit Block(uint8_t* memory) : header((Header*)memory) {
        const Header& h = *header;
        const int64_t num_rows = kTileRows * h.num_tiles();
        uint8_t* next = memory;
        auto part = [&](int64_t num_bytes) {
            uint8_t* start = next;
            next += (num_bytes + kLine - 1) / kLine * kLine;
            return start;
        };
        part(sizeof(Header));
        offsets = (int64_t*)part(8 * (h.num_rows + 1));
        scale = (float*)part(h.size == 1 && !h.is_int4 ? 4 * h.num_rows : 0);
        row_sums = (double*)part(h.size == 1 ? 8 * h.num_rows : 0);
        starts = (int64_t*)part(h.is_int4 ? 8 * (h.num_tiles() + 1) : 0);
        group_scales = (uint16_t*)part(h.is_int4 ? 2 * num_rows * h.num_groups() : 0);
        bits = part(8 * num_rows * h.num_words());
        values = part((h.is_int4 ? h.num_code_bytes : h.size * h.num_values) + kLine);
        num_bytes = next - memory;
    }

    // New memory for what `header` says. Zero, but for the bits and values, whose pages belong to the threads that
    // write them: of these the ends alone.
    static Buffer allocate(Header header) {
        Block block((uint8_t*)&header);  // its addresses are used as distances
        const int64_t before_bits = block.bits - (uint8_t*)&header, num_bytes = block.num_bytes;
        Buffer memory = sparse_train::allocate(num_bytes);
        std::memset(memory.get(), 0, before_bits);
        std::memset(memory.get() + (block.values - (uint8_t*)&header) - kLine, 0, kLine);
        std::memset(memory.get() + num_bytes - 2 * kLine, 0, 2 * kLine);
        std::memcpy(memory.get(), &header, sizeof(header));
        return memory;
    }

private:
    static constexpr int64_t kLine = 64;  // of the cache; each part starts with one
};

}  // namespace sparse_train
