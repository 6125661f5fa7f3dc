// For tiers that have a shuffle of bytes and no expand: for each byte of bits, where each of its 8 positions has its
// value among those that come next, or which positions are kept.
#pragma once
#include <cstdint>

namespace sparse_train {
namespace {

template <class T, int kWidth>
struct ByteTable {
    alignas(64) T entries[256][kWidth];
    const T* operator[](uint8_t byte) const { return entries[byte]; }
};

// The entries are entry(byte, lane).
template <class T, int kWidth, class Entry>
constexpr ByteTable<T, kWidth> byte_table(Entry entry) {
    ByteTable<T, kWidth> table{};
    for (int byte = 0; byte < 256; ++byte)
        for (int lane = 0; lane < kWidth; ++lane) table.entries[byte][lane] = T(entry(byte, lane));
    return table;
}

constexpr bool is_kept(int byte, int position) { return byte >> position & 1; }

constexpr int num_kept(int byte, int before = 8) {
    int count = 0;
    for (int position = 0; position < before; ++position) count += is_kept(byte, position);
    return count;
}

// The place of the kept position with so many before it; 8 where there is none.
constexpr int place_of(int byte, int rank) {
    int position = 0;
    while (position < 8 && !(is_kept(byte, position) && num_kept(byte, position) == rank)) ++position;
    return position;
}

constexpr int kZero = 0x80;  // as an index of bytes: a byte of zeros; as an index of floats on AVX2: its sign

constexpr auto kExpand4 = byte_table<uint8_t, 8>([](int byte, int at) {
    return is_kept(byte, at) ? num_kept(byte, at) : kZero;
});
constexpr auto kCompress4 = byte_table<uint8_t, 8>([](int byte, int at) { return place_of(byte, at); });
constexpr auto kExpand2 = byte_table<uint8_t, 16>([](int byte, int at) {
    return is_kept(byte, at / 2) ? 2 * num_kept(byte, at / 2) + at % 2 : kZero;
});
constexpr auto kCompress2 = byte_table<uint8_t, 16>([](int byte, int at) {
    return at / 2 < num_kept(byte) ? 2 * place_of(byte, at / 2) + at % 2 : kZero;
});
// BF16 to FP32: to the upper halves of the lanes.
constexpr auto kWiden2 = byte_table<uint8_t, 32>([](int byte, int at) {
    return is_kept(byte, at / 4) && at % 4 >= 2 ? 2 * num_kept(byte, at / 4) + at % 2 : kZero;
});
// Of 16 positions: the sum of the first byte's entry in the one table and the second byte's in the other.
constexpr auto kExpandFirst1 = byte_table<uint8_t, 16>([](int byte, int at) {
    return at >= 8 ? num_kept(byte) : is_kept(byte, at) ? num_kept(byte, at) : kZero;
});
constexpr auto kExpandSecond1 = byte_table<uint8_t, 16>([](int byte, int at) {
    return at < 8 ? 0 : is_kept(byte, at - 8) ? num_kept(byte, at - 8) : kZero;
});

}  // namespace
}  // namespace sparse_train
