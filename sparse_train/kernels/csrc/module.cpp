// The Python module: threads, tiers and packed matrices. Pointers and sizes arrive checked by the modules that
// call it: native.py, ops.py, packed.py, steps.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.h"
#include "buffer.h"
#include "int4_codes.h"
#include "tiers.h"

namespace nb = nanobind;
using namespace sparse_train;

namespace {

std::vector<const Tier*> supported_tiers() {
    std::vector<const Tier*> tiers;
    std::copy_if(std::begin(kTiers), std::end(kTiers), std::back_inserter(tiers),
                 [](const Tier* tier) { return tier->is_supported(); });
    return tiers;
}

const std::vector<const Tier*> tiers = supported_tiers();
const Tier* tier = tiers.front();
constexpr int64_t kRowsPerThread = 32;      // fewer are not worth waking a thread
constexpr int64_t kBytesPerThread = 65536;  // nor are fewer bytes
constexpr int64_t kProductsPerThread = 1 << 19;  // nor fewer products of a weight and an activation
constexpr int64_t kAttendedPerThread = 1 << 17;  // nor fewer of attention

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// work(first row, last row) on each part of the rows, whole tiles; the values, not the rows, are divided evenly. OpenMP
// may give fewer threads than it is asked for (OMP_THREAD_LIMIT, OMP_DYNAMIC, nested regions): the loop does all parts
// on any number.
template <class Work>
void over_rows(const Rows& rows, int num_threads, int64_t value_bytes, Work work) {
    const int64_t num_values = rows.offsets[rows.num_rows];
    const int64_t useful = std::min(rows.num_rows / kRowsPerThread, num_values * value_bytes / kBytesPerThread);
    const int count = int(std::max<int64_t>(1, std::min<int64_t>(num_threads, useful)));
    if (count == 1) return work(0, rows.num_rows);
    // Bits weigh in with the values: a row costs something even when nothing of it is kept.
    const double row_bytes = 8.0 * rows.num_words, total = num_values * value_bytes + rows.num_rows * row_bytes;
    auto boundary = [&](int part) {
        int64_t low = 0, high = rows.num_rows;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (rows.offsets[middle] * value_bytes + middle * row_bytes < total * part / count) low = middle + 1;
            else high = middle;
        }
        return std::min((low + rows.tile - 1) / rows.tile * rows.tile, rows.num_rows);
    };
#pragma omp parallel for num_threads(count) schedule(static, 1)
    for (int part = 0; part < count; ++part)
        work(boundary(part), part + 1 == count ? rows.num_rows : boundary(part + 1));
}

// offsets[r] = kept positions before row r.
void count_rows(const Rows& rows, int64_t* offsets, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (rows.num_rows * rows.num_words > 16384)
    for (int64_t r = 0; r < rows.num_rows; ++r) offsets[r + 1] = tier->count(rows, r);
    offsets[0] = 0;
    for (int64_t r = 0; r < rows.num_rows; ++r) offsets[r + 1] += offsets[r];
}

// A view with fresh offsets. Refuses bits that do not fit: nothing is read or written past what the caller owns.
struct Counted {
    Rows rows;
    std::vector<int64_t> offsets;

    Counted(uintptr_t bits, int64_t num_rows, int64_t num_columns, int64_t num_values, int num_threads)
        : rows{at<const uint8_t>(bits), nullptr, num_rows, num_columns, (num_columns + 63) / 64},
          offsets(num_rows + 1) {
        count_rows(rows, offsets.data(), num_threads);
        rows.offsets = offsets.data();
        if (offsets[num_rows] != num_values)
            throw std::invalid_argument("the bits keep " + std::to_string(offsets[num_rows]) +
                                        " positions, but there are " + std::to_string(num_values) +
                                        " values; both must come from one weight");
        if (num_columns % 64)
            for (int64_t r = 0; r < num_rows; ++r)
                if (rows.word(r, rows.num_words - 1) >> (num_columns % 64))
                    throw std::invalid_argument("row " + std::to_string(r) + " has bits past column " +
                                                std::to_string(num_columns) + "; padding bits must be 0");
    }
};

void expand(uintptr_t values, uintptr_t bits, uintptr_t dense, int64_t num_rows, int64_t num_columns,
            int64_t num_values, int size, int num_threads) {
    const Counted counted(bits, num_rows, num_columns, num_values, num_threads);
    over_rows(counted.rows, num_threads, size, [&](int64_t first, int64_t last) {
        tier->expand(counted.rows, size, at<void>(values), at<void>(dense), first, last);
    });
}

void compact(uintptr_t dense, uintptr_t bits, uintptr_t values, int64_t num_rows, int64_t num_columns,
             int64_t num_values, int size, int num_threads) {
    const Counted counted(bits, num_rows, num_columns, num_values, num_threads);
    over_rows(counted.rows, num_threads, size, [&](int64_t first, int64_t last) {
        tier->compact(counted.rows, size, at<void>(dense), at<void>(values), first, last);
    });
}

bool is_finite(const float* x, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        largest = std::max(largest, bits & 0x7fffffff);
    }
    return largest < 0x7f800000;
}

// std::nearbyint, without a call that keeps loops from being vectorised.
inline int nearest(double v) {
    constexpr double kShift = 0x1.8p52;  // a double of this size has no place for fractions
    return int(v + kShift - kShift);
}

// The operand of decoding: all that products read, in one block of memory (block.h), which others may have made.
class Packed {
public:
    // `size` of a value: 4 (float), 2 (bfloat16) or 1 (int8). `scale` of int8: floats of the rows; with `is_int4` the
    // values are codes of four bits, and the scales bfloat16 of each row's groups.
    Packed(uintptr_t values, uintptr_t bits, uintptr_t scale, int64_t num_rows, int64_t num_columns, int64_t num_values,
           int size, bool is_int4, int num_threads) {
        const Counted counted(bits, num_rows, num_columns, num_values, num_threads);
        const Rows& from = counted.rows;
        Block::Header header{num_rows, num_columns, num_values, size, is_int4, 0};
        std::vector<int64_t> starts;
        if (is_int4) {
            starts = code_starts(from, num_values > kBytesPerThread ? num_threads : 1);
            header.num_code_bytes = starts.back();
        }
        own_ = Block::allocate(header);
        block_ = Block(own_.get());
        view();
        std::copy_n(from.offsets, num_rows + 1, block_.offsets);
        std::copy(starts.begin(), starts.end(), block_.starts);
        if (size == 1 && !is_int4) pack_int8(at<const int8_t>(values), at<const float>(scale));
#pragma omp parallel for num_threads(num_threads) if (num_values * size > kBytesPerThread)
        for (int64_t r = 0; r < num_rows; r += kTileRows) {
            pack_tile(from, at<const uint8_t>(values), r);
            if (is_int4) pack_codes(from, at<const int8_t>(values), at<const uint16_t>(scale), block_, r);
        }
    }

    // A block that another Packed made, maybe in another process; it stays where it is, and is only read.
    Packed(uintptr_t block, int64_t num_bytes) : block_(at<uint8_t>(block)) {
        if (block_.num_bytes != num_bytes)
            throw std::invalid_argument("a packed weight of " + std::to_string(block_.num_bytes) + " bytes has " +
                                        std::to_string(num_bytes));
        view();
    }

    const Block& block() const { return block_; }

    // To `scale` as it was given: (num_rows,) floats, or (num_rows, groups) bfloat16.
    void copy_scale(uintptr_t scale) const {
        if (!is_int4_) {
            std::copy_n(block_.scale, rows_.num_rows, at<float>(scale));
            return;
        }
        const int64_t num_groups = block_.header->num_groups();
        for (int64_t r = 0; r < rows_.num_rows; ++r)
            for (int64_t g = 0; g < num_groups; ++g)
                at<uint16_t>(scale)[r * num_groups + g] =
                    int4_.scales_of(rows_, r & -kTileRows, Int4::kGroup * g)[r % kTileRows];
    }

    // y (num_vectors, num_rows) from x (num_vectors, num_columns). False, and y is not written, where x is not finite.
    bool matvec(uintptr_t x, uintptr_t y, int64_t num_vectors, int num_threads) const {
        constexpr int64_t kFew = 8;  // vectors: for more, tiles give the same bits of int8 in less time
        const float* input = at<const float>(x);
        if (!is_finite(input, num_vectors * rows_.num_columns)) return false;
        const bool is_int8 = size_ == 1 && !is_int4_;
        if (is_int8 && num_vectors > kFew && multiply_tiles(x, num_vectors, y, num_threads)) return true;
        if (size_ == 1) matvec_integer(input, at<float>(y), num_vectors, num_threads);
        else matvec_float(input, at<float>(y), num_vectors, num_threads);
        return true;
    }

    // y (num_x, num_rows) = x (num_x, num_columns) times the values as they are stored: without scales of rows.
    void matmul(uintptr_t x, int64_t num_x, uintptr_t y, int num_threads) const {
        constexpr int64_t kMostX = 256;  // at once: what the sums and the tiles then take still fits caches
        const Rows& rows = rows_;
        const Tier& chosen = *tier;  // for all of it: what one has packed, another cannot read
        const int64_t most_x = std::min(num_x, kMostX);
        const Buffer tiles = allocate(4 * 64 * rows.num_words * ((most_x + 15) / 16 * 16));
        const Division divided = division(rows.offsets[rows.num_rows] * most_x, num_threads);
        for (int64_t m = 0; m < num_x; m += kMostX) {
            const float* from = at<const float>(x) + m * rows.num_columns;
            const int64_t count = std::min(kMostX, num_x - m);
#pragma omp parallel num_threads(divided.threads)
            {
#pragma omp for
                for (int64_t w = 0; w < rows.num_words; ++w)
                    chosen.matmul.pack(from, count, rows, (float*)tiles.get(), w, w + 1);
#pragma omp for schedule(dynamic)
                for (int64_t r = 0; r < rows.num_rows; r += divided.part) {
                    const int64_t end = std::min(r + divided.part, rows.num_rows);
                    const AtHand these = at_hand(r, end);
                    chosen.matmul.multiply(these.rows, size_, these.values, (const float*)tiles.get(), count,
                                          at<float>(y) + m * rows.num_rows, r, end, is_int4_ ? &int4_ : nullptr);
                }
            }
        }
    }

    // y (num_x, num_rows) = x (num_x, num_columns) times the weight, whatever its zeros. False, and y is not written,
    // where the tier has no tiles for it.
    bool multiply_tiles(uintptr_t x, int64_t num_x, uintptr_t y, int num_threads) const {
        constexpr int64_t kSide = TileProduct::kRows, kMostX = 128;
        const Rows& rows = rows_;
        const TileProduct& product = tier->tiles;
        if (!product.multiply || size_ == 4 || (size_ == 1 && rows.num_words > product.kMostWords)) return false;
        const int64_t most_x = std::min((num_x + kSide - 1) / kSide * kSide, kMostX);
        const int64_t x_bytes = product.num_bytes(size_) * 64 * rows.num_words;
        const Buffer packed = allocate(x_bytes * most_x);
        std::vector<double> steps(most_x), zeros(most_x);
        TileOperands operands{rows, size_, block_.values, is_int4_ ? &int4_ : nullptr, block_.scale, block_.row_sums,
                              0, packed.get(), steps.data(), zeros.data()};
        const Division divided = division(rows.num_rows * rows.num_columns * most_x, num_threads);
        for (int64_t m = 0; m < num_x; m += kMostX) {
            const float* from = at<const float>(x) + m * rows.num_columns;
            operands.num_x = std::min(kMostX, num_x - m);
#pragma omp parallel num_threads(divided.threads)
            {
#pragma omp for
                for (int64_t k = 0; k < operands.num_x; k += kSide)
                    product.pack(from + k * rows.num_columns, std::min(kSide, operands.num_x - k), rows, size_,
                                 packed.get() + k * x_bytes, &steps[k], &zeros[k]);
#pragma omp for schedule(dynamic)
                for (int64_t r = 0; r < rows.num_rows; r += divided.part)
                    product.multiply(operands, at<float>(y) + m * rows.num_rows, r,
                                     std::min(r + divided.part, rows.num_rows));
            }
        }
        return true;
    }

    // Writes (num_rows, num_columns) values as they are stored: float32, bfloat16, or int8 without scales.
    void expand(uintptr_t dense, int num_threads) const {
        constexpr int64_t kPart = 64;  // rows whose codes of four bits are bytes for a while
        over_rows(rows_, num_threads, size_, [&](int64_t first, int64_t last) {
            for (int64_t end; first < last; first = end) {
                end = is_int4_ ? std::min(first + kPart, last) : last;
                const AtHand these = at_hand(first, end);
                tier->expand(these.rows, size_, these.values, at<void>(dense), first, end);
            }
        });
    }

    // out (count, num_columns) float32 <- the rows of these indices, of float or bfloat16 values.
    void gather(uintptr_t indices, int64_t count, uintptr_t out) const {
        const int64_t num_columns = rows_.num_columns;
        std::vector<uint8_t> dense(kTileRows * num_columns * size_);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = at<const int64_t>(indices)[i], first = row & -kTileRows;
            if (row < 0 || row >= rows_.num_rows)
                throw std::out_of_range("row " + std::to_string(row) + " of a weight with " +
                                        std::to_string(rows_.num_rows));
            Rows tile = rows_;
            tile.bits = rows_.words(first, 0), tile.offsets = rows_.offsets + first;
            tile.skipped = rows_.offsets[first], tile.num_rows = std::min(kTileRows, rows_.num_rows - first);
            tier->expand(tile, size_, block_.values + size_ * tile.skipped, dense.data(), 0, tile.num_rows);
            const uint8_t* from = dense.data() + (row - first) * num_columns * size_;
            float* to = at<float>(out) + i * num_columns;
            if (size_ == 4) std::memcpy(to, from, 4 * num_columns);
            else for (int64_t k = 0; k < num_columns; ++k) to[k] = from_bf16(((const uint16_t*)from)[k]);
        }
    }

    int64_t num_bytes() const { return num_bytes_; }

private:
    void view() {
        const Block::Header& header = *block_.header;
        size_ = int(header.size), is_int4_ = header.is_int4 != 0;
        rows_ = {block_.bits, block_.offsets, header.num_rows, header.num_columns, header.num_words(), kTileRows};
        int4_ = {block_.values, block_.starts, block_.group_scales};
        num_bytes_ = header.num_values * header.size + 8 * header.num_rows * ((header.num_columns + 63) / 64);
        if (header.is_int4) {
            num_bytes_ += (header.num_values + 1) / 2 - header.num_values +
                          int64_t(sizeof(double) + sizeof(uint16_t) * header.num_groups()) * header.num_rows;
        } else if (header.size == 1) {
            num_bytes_ += int64_t(sizeof(float) + sizeof(double)) * header.num_rows;
        }
    }

    // From rows one after the other to a tile.
    void pack_tile(const Rows& from, const uint8_t* values, int64_t first) {
        const int64_t num_words = rows_.num_words;
        uint8_t* to = is_int4_ ? nullptr : block_.values + size_ * from.offsets[first];
        uint8_t* bits = block_.bits + 8 * first * num_words;
        int64_t next[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) next[i] = from.offsets[std::min(first + i, from.num_rows)];
        for (int64_t w = 0; w < num_words; ++w)
            for (int64_t i = 0; i < kTileRows; ++i, bits += 8) {
                const uint64_t word = from.word_or_none(first + i, w);
                const int64_t kept = __builtin_popcountll(word);
                std::memcpy(bits, &word, 8);
                if (is_int4_) continue;
                to = std::copy_n(values + size_ * next[i], size_ * kept, to);  // memcpy may not copy nothing from null
                next[i] += kept;
            }
    }

    void pack_int8(const int8_t* values, const float* scale) {
        const int64_t num_rows = rows_.num_rows;
        std::copy_n(scale, num_rows, block_.scale);
        for (int64_t r = 0; r < num_rows; ++r)
            for (int64_t i = block_.offsets[r]; i < block_.offsets[r + 1]; ++i) block_.row_sums[r] += values[i];
    }

    // Threads and rows of a part for a product of so many multiplications. Several parts per thread even out what they
    // differ in.
    struct Division {
        int threads;
        int64_t part;
    };
    Division division(int64_t num_products, int num_threads) const {
        constexpr int64_t kMostRows = 512;  // that a tile of x is read for, while it is in a near cache
        const int64_t useful = num_products / kProductsPerThread;
        const int threads = int(std::max<int64_t>(1, std::min<int64_t>(num_threads, useful)));
        const int64_t even = rows_.num_rows / (4 * threads) / kRowsPerThread * kRowsPerThread;
        return {threads, std::min(kMostRows, std::max(kRowsPerThread, even))};
    }

    struct AtHand {
        Rows rows;
        const void* values;
    };

    // The values of rows first..last-1, or of all. Codes of four bits become bytes, which the next call in this thread
    // replaces.
    AtHand at_hand(int64_t first, int64_t last) const {
        constexpr int64_t kSpare = 64;  // so far past the last value unpack_i4 writes and expand reads
        static thread_local std::vector<int8_t> codes;
        Rows rows = rows_;
        if (!is_int4_) return {rows, block_.values};
        rows.skipped = rows.offsets[first];
        codes.resize(rows.start(last) + kSpare);
        tier->unpack_i4(rows, int4_, codes.data(), first, last);
        return {rows, codes.data()};
    }

    // Columns are padded to whole words, and vectors do not start at the same places of the first-level cache's sets.
    int64_t stride(int64_t spare) const { return 64 * rows_.num_words + spare; }

    void matvec_float(const float* input, float* y, int64_t num_vectors, int num_threads) const {
        static thread_local std::vector<float> copy;
        const Rows& rows = rows_;
        Vectors<float> x{input, rows.num_columns, num_vectors};
        if (num_vectors > 1 || rows.num_columns % 64) {
            x.stride = stride(16);
            copy.assign(num_vectors * x.stride, 0.0f);
            for (int64_t m = 0; m < num_vectors; ++m)
                std::copy_n(input + m * rows.num_columns, rows.num_columns, copy.data() + m * x.stride);
            x.data = copy.data();
        }
        over_rows(rows, num_threads, size_, [&](int64_t first, int64_t last) {
            if (size_ == 2) tier->matvec_bf16(rows, (const uint16_t*)block_.values, x, y, first, last);
            else tier->matvec_f32(rows, (const float*)block_.values, x, y, first, last);
        });
    }

    struct Quantised {
        double step;
        int zero;
    };

    // To u8 with one scale and zero point: x = step * (code - zero). In double no finite x makes step, its inverse or a
    // product of them overflow or vanish.
    static Quantised quantise(const float* x, int64_t count, uint8_t* codes) {
        float low = 0, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
        for (int64_t i = 0; i < count; ++i) {
            low = std::min(low, x[i]);
            high = std::max(high, x[i]);
        }
        const double step = high > low ? (double(high) - low) / 255 : 1.0;
        const double inverse = 1 / step;
        const int zero = nearest(-low * inverse);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
            codes[i] = uint8_t(std::min(255, std::max(0, nearest(x[i] * inverse) + zero)));
        return {step, zero};
    }

    // Pruned weights add nothing, so the zero point is corrected by the sum of the row's kept weights alone.
    void matvec_integer(const float* input, float* y, int64_t num_vectors, int num_threads) const {
        static thread_local std::vector<uint8_t> codes;
        static thread_local std::vector<Quantised> scales;
        static thread_local std::vector<int64_t> sums;
        const Rows& rows = rows_;
        const int64_t between = stride(64);
        codes.resize(num_vectors * between);
        scales.resize(num_vectors);
        sums.resize(num_vectors * rows.num_rows);
        for (int64_t m = 0; m < num_vectors; ++m)
            scales[m] = quantise(input + m * rows.num_columns, rows.num_columns, codes.data() + m * between);
        const Vectors<uint8_t> x{codes.data(), between, num_vectors};
        const Quantised* of = scales.data();
        const Tier& chosen = *tier;  // for all of it: its sums have its offset
        int64_t* output = sums.data();
        over_rows(rows, num_threads, 1, [&](int64_t first, int64_t last) {
            if (is_int4_) chosen.matvec_i4(rows, int4_, x, y, first, last);
            else chosen.matvec_i8(rows, (const int8_t*)block_.values, x, output, first, last);
            for (int64_t m = 0; m < num_vectors; ++m) {
                const int zero = of[m].zero - (is_int4_ ? 0 : chosen.x_offset);
                for (int64_t i = m * rows.num_rows, r = first; r < last; ++r) {
                    const double sum = is_int4_ ? double(y[i + r]) : double(output[i + r]);
                    const double step = is_int4_ ? of[m].step : block_.scale[r] * of[m].step;
                    y[i + r] = float(step * (sum - zero * block_.row_sums[r]));
                }
            }
        });
    }

    Buffer own_;  // none where the block is another's
    Block block_;
    int size_ = 0;
    bool is_int4_ = false;
    Rows rows_{};
    Int4 int4_{};
    int64_t num_bytes_ = 0;
};

// Median bytes per second of `repeats` passes over a buffer, all threads reading their own part.
double read_bandwidth(int64_t num_bytes, int num_threads, int repeats) {
    const int64_t part = num_bytes / num_threads / 512 * 512;
    const Buffer buffer = allocate(part * num_threads);
    uint8_t* data = buffer.get();
    std::vector<double> seconds;
    uint64_t kept = 0;
#pragma omp parallel for num_threads(num_threads)
    for (int t = 0; t < num_threads; ++t) std::memset(data + t * part, 1, part);
    for (int pass = 0; pass <= repeats; ++pass) {
        const auto start = std::chrono::steady_clock::now();
#pragma omp parallel for num_threads(num_threads) reduction(^ : kept)
        for (int t = 0; t < num_threads; ++t) kept ^= tier->read(data + t * part, part);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        if (pass) seconds.push_back(took.count());
    }
    asm volatile("" : : "r"(kept));
    std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
    return double(part * num_threads) / seconds[repeats / 2];
}

std::vector<std::string> tier_names() {
    std::vector<std::string> names;
    for (const Tier* each : tiers) names.push_back(each->name);
    return names;
}

std::string tier_name() { return tier->name; }

void use_tier(const std::string& name) {
    for (const Tier* each : tiers)
        if (each->name == name) tier = each;
}

void add_and_normalise_at(uintptr_t hidden, uintptr_t change, uintptr_t weight, uintptr_t bias, uintptr_t out,
                          int64_t num_rows, int64_t width, float epsilon, bool is_rms) {
    tier->steps.add_and_normalise(at<float>(hidden), at<const float>(change), at<const float>(weight),
                                  at<const float>(bias), at<float>(out), num_rows, width, epsilon, is_rms);
}

void activate_at(int kind, uintptr_t x, uintptr_t factor, uintptr_t y, int64_t count) {
    tier->steps.activate(kind, at<const float>(x), at<const float>(factor), at<float>(y), count);
}

// q, k and v have rows of `q_stride` and `kv_stride` numbers, which begin with num_heads or num_groups heads: they may
// be parts of one product. k and v are 0 where nothing is appended. out is (num_rows, num_heads * head_dim), NaN for a
// row that starts behind the last position: a softmax of no scores.
void attend_at(const Attention& a, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int64_t q_stride,
               int64_t kv_stride, int num_threads) {
    static thread_local std::vector<float> queries, partials;
    const int64_t shared = a.num_heads / a.num_groups, width = a.num_heads * a.head_dim, end = *a.position + 1;
    const auto parts = [&](int64_t row) { return (end - a.starts[row] + kPart - 1) / kPart; };
    int64_t most_parts = 0;
    for (int64_t row = 0; row < a.num_rows; ++row) most_parts = std::max(most_parts, parts(row));
    const int64_t of_part = a.num_heads * (a.head_dim + 2), of_row = most_parts * of_part;
    if (int64_t(queries.size()) < a.num_rows * width) queries.resize(a.num_rows * width);
    if (int64_t(partials.size()) < a.num_rows * of_row) partials.resize(a.num_rows * of_row);
    float *turned = queries.data(), *found = partials.data();
    for (int64_t row = 0; row < a.num_rows; ++row)
        if (parts(row) > 0)
            tier->steps.prepare(a, row, at<const float>(q) + row * q_stride,
                                k ? at<const float>(k) + row * kv_stride : nullptr,
                                k ? at<const float>(v) + row * kv_stride : nullptr, turned + row * width);
    const int64_t tasks = a.num_rows * a.num_groups * most_parts;
    const int64_t useful = std::min(tasks, a.num_rows * width * end / kAttendedPerThread);
    const int count = int(std::max<int64_t>(1, std::min<int64_t>(num_threads, useful)));
#pragma omp parallel for num_threads(count) schedule(static) if (count > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t part = task % most_parts, head = task / most_parts;
        const int64_t row = head / a.num_groups, group = head % a.num_groups, first = group * shared;
        if (part < parts(row))
            tier->steps.attend(a, row, group, part, turned + row * width + first * a.head_dim,
                               found + row * of_row + part * of_part + first * (a.head_dim + 2));
    }
    for (int64_t row = 0; row < a.num_rows; ++row) {
        float* merged = at<float>(out) + row * width;
        if (parts(row) > 0) tier->steps.merge(a, parts(row), found + row * of_row, merged);
        else std::fill_n(merged, width, NAN);
    }
}

}  // namespace

NB_MODULE(_native, m) {
    using release = nb::call_guard<nb::gil_scoped_release>;
    m.def("expand", &expand, release());
    m.def("compact", &compact, release());
    m.def("read_bandwidth", &read_bandwidth, release());
    m.attr("key_block") = kKeyBlock;
    m.def("tiers", &tier_names);
    m.def("tier", &tier_name);
    m.def("use_tier", &use_tier);
    m.def("add_and_normalise", &add_and_normalise_at, release());
    m.def("activate", &activate_at, release());
    nb::class_<Attention>(m, "Attention")
        .def("__init__", [](Attention* self, int64_t num_rows, int64_t num_heads, int64_t num_groups, int64_t head_dim,
                            int64_t capacity, float scale, bool is_bf16, uintptr_t keys, uintptr_t values,
                            uintptr_t position, uintptr_t starts, int64_t rotary, uintptr_t cosine, uintptr_t sine,
                            uintptr_t bias, uintptr_t query_norm, uintptr_t key_norm, float epsilon) {
            new (self) Attention{num_rows, num_heads, num_groups, head_dim, capacity, scale, is_bf16, at<void>(keys),
                                 at<void>(values), at<const int64_t>(position), at<const int64_t>(starts), rotary,
                                 at<const float>(cosine), at<const float>(sine), at<const float>(bias),
                                 at<const float>(query_norm), at<const float>(key_norm), epsilon};
        })
        .def("attend", &attend_at, release());
    nb::class_<Packed>(m, "Packed")
        .def(nb::init<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int, bool, int>())
        .def(nb::init<uintptr_t, int64_t>())
        .def_prop_ro("block", [](const Packed& p) {
            return std::make_pair((uintptr_t)p.block().header, p.block().num_bytes);
        })
        .def_prop_ro("num_rows", [](const Packed& p) { return p.block().header->num_rows; })
        .def_prop_ro("num_columns", [](const Packed& p) { return p.block().header->num_columns; })
        .def_prop_ro("num_values", [](const Packed& p) { return p.block().header->num_values; })
        .def_prop_ro("size", [](const Packed& p) { return p.block().header->size; })
        .def_prop_ro("is_int4", [](const Packed& p) { return p.block().header->is_int4 != 0; })
        .def("copy_scale", &Packed::copy_scale)
        .def("matvec", &Packed::matvec, release())
        .def("matmul", &Packed::matmul, release())
        .def("multiply_tiles", &Packed::multiply_tiles, release())
        .def("expand", &Packed::expand, release())
        .def("gather", &Packed::gather, release())
        .def_prop_ro("num_bytes", &Packed::num_bytes);
}
