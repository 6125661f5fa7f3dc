// AVX-512 with AMX, whose instructions multiply tiles of 16 rows of 64 bytes: dense products of prompts. All else is as
// in avx512.
// flags for x86_64: -march=x86-64-v4 -mavx512vbmi2 -mavx512vnni -mamx-tile -mamx-int8 -mamx-bf16
//
// A tile of sums is that of 16 rows of the weight and 16 rows of x. Four are summed together, so that every load of an
// operand serves two. The weight is expanded 32 rows at a time, and of these a panel of columns, which is multiplied
// with all rows of x at hand.
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <limits>

#include "avx512_vnni.h"

namespace sparse_train {
namespace {

constexpr int64_t kSide = TileProduct::kRows;  // rows of a tile, and its columns of 32 bits
constexpr int64_t kBytes = 64 * kSide;         // of a tile
constexpr int64_t kPanel = 32;                 // tiles side by side
constexpr int64_t kParts = 3;                  // bfloat16 whose sum is a float

struct alignas(64) Tile {
    union {
        uint8_t bytes[kBytes];
        int32_t integers[kSide][kSide];
        float floats[kSide][kSide];
    };
};

// 2 * kSide rows, expanded, of a part of the columns.
struct Panel {
    int64_t row;                                     // the first one
    int64_t first, last;                             // words first..last-1 of the columns
    Tile tiles[kPanel][2];                           // side by side: of the first kSide rows, and of the others
    float scales[kPanel / Int4::kGroup][2 * kSide];  // of INT4: groups, and in each the rows

    // Of rows 4 * four .. 4 * four + 3, which lie together in the weight, what is in these tiles.
    uint8_t* at(int64_t tile, int64_t four) { return tiles[tile][four / 4].bytes + 256 * (four % 4); }
};

// The compiler knows less than all of what instructions for tiles read.
inline void finish_stores(const void* to) { asm volatile("" : : "r"(to) : "memory"); }

void configure() {
    struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    finish_stores(&config);
    _tile_loadconfig(&config);
}

// What the precisions differ in: how four rows in memory become a part of a panel, from their values at `next` on
// (returns those of the next panel), and how tiles are multiplied. Values of kSize bytes: int8 or bfloat16.
template <int kSize>
struct ValueTiles {
    using Lanes = std::conditional_t<kSize == 1, Lanes1Avx512, Lanes2Avx512>;
    static constexpr int64_t kTilesPerWord = kSize, kTerms = kSize == 1 ? 1 : kParts;

    static const uint8_t* start(const TileOperands& a, int64_t row) {
        return (const uint8_t*)a.values + kSize * a.rows.start(row);
    }

    static const uint8_t* expand(const TileOperands& a, Panel& panel, int64_t four, const uint8_t* next) {
        for (int64_t w = panel.first; w < panel.last; ++w) {
            uint64_t words[kTileRows];
            std::memcpy(words, a.rows.words(panel.row + kTileRows * four, w), sizeof(words));
#pragma GCC unroll 4
            for (int i = 0; i < kTileRows; ++i) {
                prefetch(next);
#pragma GCC unroll 2
                for (int k = 0; k < kTilesPerWord; ++k)
                    _mm512_store_si512(panel.at(kTilesPerWord * (w - panel.first) + k, four) + 64 * i,
                                       Lanes::expand(k, words[i], nullptr, (const typename Lanes::Type*)next));
                next += kSize * __builtin_popcountll(words[i]);
            }
        }
        return next;
    }

    // The sums in tiles 0 and 2 += tiles 4 and 5, of the weight, times 6, of x.
    static void multiply_first() {
        if (kSize == 1) {
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(2, 5, 6);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
        }
    }

    // Those in 1 and 3 += 4 and 5 times 7.
    static void multiply_second() {
        if (kSize == 1) {
            _tile_dpbsud(1, 4, 7);
            _tile_dpbsud(3, 5, 7);
        } else {
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
};

struct Int4Tiles {
    static constexpr int64_t kTilesPerWord = 1;

    static const uint8_t* start(const TileOperands& a, int64_t row) {
        return a.int4->codes + a.int4->starts[row / kTileRows];
    }

    static const uint8_t* expand(const TileOperands& a, Panel& panel, int64_t four, const uint8_t* next) {
        const int64_t row = panel.row + kTileRows * four;
        for (int64_t w = panel.first; w < panel.last; w += Int4::kGroup) {
            const uint8_t* bits = a.rows.words(row, w);
            const uint16_t* scales = a.int4->scales_of(a.rows, row, w);
#pragma GCC unroll 4
            for (int i = 0; i < kTileRows; ++i, bits += 8) {
                const Int4Avx512::Codes codes = Int4Avx512::expand(bits, bits + 8 * kTileRows, next);
                _mm512_store_si512(panel.at(w - panel.first, four) + 64 * i, codes.first);
                _mm512_store_si512(panel.at(w - panel.first + 1, four) + 64 * i, codes.second);
                panel.scales[(w - panel.first) / Int4::kGroup][kTileRows * four + i] =
                    from_bf16(scales[i]) / Int4Avx512::kFactor;
                uint64_t words[2];
                std::memcpy(words, bits, 8);
                std::memcpy(words + 1, bits + 8 * kTileRows, 8);
                next += Int4::num_bytes(words[0], words[1]);
                prefetch(next);
            }
        }
        return next;
    }
};

// sums[r][m] += a panel times kCount tiles of 16 rows of x, whose tiles of columns are `between` tiles apart. r is 0 or
// 1 and `row_stride` tiles apart.
template <class Kind, int kCount>
void multiply_panel(const Panel& panel, const Tile* x, int64_t between, Tile* sums, int64_t row_stride) {
    Tile* last = sums + row_stride;
    _tile_loadd(0, sums, 64);
    _tile_loadd(2, last, 64);
    if (kCount == 2) {
        _tile_loadd(1, sums + 1, 64);
        _tile_loadd(3, last + 1, 64);
    }
    for (int64_t k = 0; k < Kind::kTilesPerWord * (panel.last - panel.first); ++k) {
        _tile_loadd(4, panel.tiles[k], 64);
        _tile_loadd(5, panel.tiles[k] + 1, 64);
#pragma GCC unroll 3
        for (int64_t t = 0; t < Kind::kTerms; ++t, ++x) {
            _tile_loadd(6, x, 64);
            Kind::multiply_first();
            if (kCount == 2) {
                _tile_loadd(7, x + between, 64);
                Kind::multiply_second();
            }
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(2, last, 64);
    if (kCount == 2) {
        _tile_stored(1, sums + 1, 64);
        _tile_stored(3, last + 1, 64);
    }
}

// Group after group, so that each sum of integers can be scaled. While one is scaled, the next one is multiplied.
void multiply_groups(const Panel& panel, int r, const Tile* x, Tile& sums) {
    const int64_t num_groups = (panel.last - panel.first) / Int4::kGroup;
    Tile group[2];
    __m512 sum[kSide];
    for (int i = 0; i < kSide; ++i) sum[i] = _mm512_load_ps(sums.floats[i]);
    for (int64_t g = 0; g <= num_groups; ++g) {
        if (g < num_groups) {
            _tile_zero(0);
            _tile_loadd(4, panel.tiles[2 * g] + r, 64);
            _tile_loadd(6, x + 2 * g, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(5, panel.tiles[2 * g + 1] + r, 64);
            _tile_loadd(7, x + 2 * g + 1, 64);
            _tile_dpbsud(0, 5, 7);
            _tile_stored(0, &group[g % 2], 64);
        }
        if (g == 0) continue;
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) {
            const __m512 integers = _mm512_cvtepi32_ps(_mm512_load_si512(group[(g - 1) % 2].integers[i]));
            sum[i] = _mm512_fmadd_ps(integers, _mm512_set1_ps(panel.scales[g - 1][kSide * r + i]), sum[i]);
        }
    }
    for (int i = 0; i < kSide; ++i) _mm512_store_ps(sums.floats[i], sum[i]);
}

// The sums of rows from `row` on with rows of x from m on, to y. Those of x past the last one have steps as well.
void finish(const TileOperands& a, const Tile& sums, int64_t row, int64_t last, int64_t m, float* y) {
    Tile products;
    const int64_t num_rows = std::min(kSide, last - row);
    for (int64_t i = 0; a.size == 1 && i < num_rows; ++i) {
        const double scale = a.int4 ? 1 : double(a.scale[row + i]), row_sum = a.row_sums[row + i];
        for (int64_t k = 0; k < kSide; ++k) {
            const double sum = a.int4 ? double(sums.floats[i][k]) : double(sums.integers[i][k]);
            products.floats[i][k] = float(scale * a.steps[m + k] * (sum - a.zeros[m + k] * row_sum));
        }
    }
    MatmulOf<kSide>::transpose<false>((a.size == 1 ? products : sums).floats[0], kSide, num_rows,
                                      std::min(kSide, a.num_x - m), y + m * a.rows.num_rows + row, a.rows.num_rows);
}

template <class Kind>
void multiply_as(const TileOperands& a, float* y, int64_t first, int64_t last) {
    static thread_local std::vector<Tile> sums;
    static thread_local std::vector<Panel> panels(1);
    static thread_local std::vector<const uint8_t*> next;
    constexpr int64_t kRows = 2 * kSide, kFours = kRows / kTileRows;
    const int64_t num_blocks = (last - first + kRows - 1) / kRows, num_m = (a.num_x + kSide - 1) / kSide;
    const int64_t per_word = TileProduct::num_bytes(a.size), between = per_word * a.rows.num_words;  // tiles of x
    Panel& panel = panels[0];
    sums.assign(2 * num_blocks * num_m, Tile{});
    next.resize(kFours * num_blocks);
    configure();
    for (panel.first = 0; panel.first < a.rows.num_words; panel.first = panel.last) {
        panel.last = std::min(panel.first + kPanel / Kind::kTilesPerWord, a.rows.num_words);
        for (int64_t block = 0; block < num_blocks; ++block) {
            panel.row = first + kRows * block;
            for (int64_t four = 0; four < kFours && panel.row + kTileRows * four < last; ++four) {
                const uint8_t*& values = next[kFours * block + four];
                if (!panel.first) values = Kind::start(a, panel.row + kTileRows * four);
                values = Kind::expand(a, panel, four, values);
            }
            finish_stores(&panel);
            for (int64_t m = 0; m < num_m; m += 2) {
                const Tile* x = (const Tile*)a.x + m * between + panel.first * per_word;
                Tile* to = &sums[2 * block * num_m + m];
                if constexpr (std::is_same_v<Kind, Int4Tiles>) {
                    for (int64_t i = 0; i < 4; ++i)
                        if (m + i / 2 < num_m)
                            multiply_groups(panel, i % 2, x + i / 2 * between, to[i % 2 * num_m + i / 2]);
                } else if (m + 1 < num_m) {
                    multiply_panel<Kind, 2>(panel, x, between, to, num_m);
                } else {
                    multiply_panel<Kind, 1>(panel, x, between, to, num_m);
                }
            }
        }
    }
    _tile_release();
    for (int64_t r = 0; first + kSide * r < last; ++r)
        for (int64_t m = 0; m < num_m; ++m)
            finish(a, sums[r * num_m + m], first + kSide * r, last, kSide * m, y);
}

void multiply(const TileOperands& a, float* y, int64_t first, int64_t last) {
    if (a.int4) multiply_as<Int4Tiles>(a, y, first, last);
    else if (a.size == 1) multiply_as<ValueTiles<1>>(a, y, first, last);
    else multiply_as<ValueTiles<2>>(a, y, first, last);
}

// The codes that matvec_i8 gets from x, and what they stand for; no number for an x that is not finite. The conversion
// rounds, so that no addition is contracted with the product.
void quantise(const float* x, int64_t count, uint8_t* codes, double& step, double& zero) {
    const auto load = [&](int64_t i) {
        return _mm512_maskz_loadu_ps(__mmask16(count - i < 16 ? (1 << (count - i)) - 1 : -1), x + i);
    };
    __m512 lows = _mm512_setzero_ps(), highs = lows, odd = lows;
    for (int64_t i = 0; i < count; i += 16) {
        lows = _mm512_min_ps(lows, load(i));
        highs = _mm512_max_ps(highs, load(i));
        odd = _mm512_fmadd_ps(load(i), _mm512_setzero_ps(), odd);
    }
    const bool is_finite = _mm512_reduce_add_ps(odd) == 0;
    const double low = _mm512_reduce_min_ps(lows), high = _mm512_reduce_max_ps(highs);
    step = !is_finite ? std::numeric_limits<double>::quiet_NaN() : high > low ? (high - low) / 255 : 1.0;
    const __m512d inverse = _mm512_set1_pd(is_finite ? 1 / step : 0);
    zero = is_finite ? _mm_cvtsd_si32(_mm_set_sd(-low * _mm512_cvtsd_f64(inverse))) : 0;
    const auto nearest = [&](__m256 part) {
        return _mm512_castsi256_si512(_mm512_cvtpd_epi32(_mm512_mul_pd(_mm512_cvtps_pd(part), inverse)));
    };
    for (int64_t i = 0; i < count; i += 16) {
        const __m512i first = nearest(_mm512_castps512_ps256(load(i)));
        const __m512i last = nearest(_mm512_extractf32x8_ps(load(i), 1));
        const __m512i both = _mm512_inserti64x4(first, _mm512_castsi512_si256(last), 1);
        const __m512i code = _mm512_max_epi32(_mm512_add_epi32(both, _mm512_set1_epi32(int(zero))), __m512i{});
        _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtusepi32_epi8(code));
    }
}

// Each float to the 8 first bits of its fraction, the 8 next ones and the 8 last ones, `between` apart.
void split(const float* x, int64_t count, uint16_t* to, int64_t between) {
    for (int64_t i = 0; i < count; ++i) {
        float rest = x[i];
        for (int64_t t = 0; t < kParts; ++t) {
            uint32_t bits;
            std::memcpy(&bits, &rest, 4);
            to[t * between + i] = uint16_t(bits >> 16);
            const bool is_finite = (bits & 0x7f800000) != 0x7f800000;
            rest = is_finite ? rest - from_bf16(uint16_t(bits >> 16)) : 0;
        }
    }
}

void pack(const float* x, int64_t num_x, const Rows& rows, int size, uint8_t* to, double* steps, double* zeros) {
    static thread_local std::vector<uint8_t> parts;
    // A row of x: codes, or all first parts, all second ones and all third ones.
    const int64_t width = 64 * rows.num_words, row_bytes = TileProduct::num_bytes(size) * width;
    parts.assign(kSide * row_bytes, 0);
    for (int64_t m = 0; m < kSide; ++m) {
        const float* from = x + m * rows.num_columns;
        if (m >= num_x) steps[m] = zeros[m] = 0;
        else if (size == 1) quantise(from, rows.num_columns, &parts[m * row_bytes], steps[m], zeros[m]);
        else split(from, rows.num_columns, (uint16_t*)&parts[m * row_bytes], width);
    }
    const int64_t num_terms = size == 1 ? 1 : kParts, num_tiles = row_bytes / 64 / num_terms;
    for (int64_t k = 0; k < num_tiles; ++k)
        for (int64_t t = 0; t < num_terms; ++t, to += kBytes)
            MatmulOf<kSide>::transpose<true>((const float*)&parts[64 * (t * num_tiles + k)], row_bytes / 4, kSide,
                                             kSide, (float*)to, kSide);
}

bool is_supported() {
    constexpr unsigned kTileInstructions = 1 << 22 | 1 << 24 | 1 << 25;  // bfloat16, tiles, int8
    unsigned a, b, c, d;
    if (!has_avx512_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & kTileInstructions) != kTileInstructions) return false;
    // Linux makes room for tiles in a process that asks for it.
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const Tier amx = avx512_tier("amx", is_supported, {pack, multiply});

}  // namespace sparse_train
#else
#include "tiers.h"
namespace sparse_train {
const Tier amx = {"amx", [] { return false; }};
}  // namespace sparse_train
#endif
