// AVX-512 with VBMI2 (expand and compress of bytes and words) and VNNI (u8 x s8 dot products).
// flags for x86_64: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi2 -mavx512vnni -mbmi -mbmi2 -mpopcnt -mfma
//
// Every position costs a share of one expand, whatever its value's width, so a word of 64 positions takes four expands
// in FP32 and one in INT8. Only `values += popcount` links one word to the next: the loads of a word start from counts
// of the mask alone. Loads go to a register before they are expanded: the memory form is microcoded on some CPUs.
#include "tiers.h"

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include <algorithm>

#include "matmul.h"

namespace sparse_train {
namespace {

constexpr int64_t kAhead = 1024;  // bytes; the hardware streamer stops at each 4 KiB page
constexpr int64_t kStreamed = 16 << 20;  // bytes of a dense weight that would push everything else out of the caches

inline __m512i in_register(__m512i v) {
    asm volatile("" : "+v"(v));  // keeps gcc from folding the load into the expand
    return v;
}

inline __m512 expand_ps(uint16_t mask, const float* values) {
    const __m512i loaded = in_register(_mm512_loadu_si512(values));
    return _mm512_castsi512_ps(_mm512_maskz_expand_epi32(mask, loaded));
}

void matvec_f32(const Rows& rows, const float* values, const float* x, float* y, int64_t first, int64_t last) {
    const float* next = values + rows.offsets[first];
    for (int64_t r = first; r < last; ++r) {
        __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
        for (int64_t w = 0; w < rows.num_words; ++w) {
            const uint64_t word = rows.word(r, w);
            const float* at = x + 64 * w;
            const float* part1 = next + _mm_popcnt_u64(word & 0xffff);
            const float* part2 = next + _mm_popcnt_u64(word & 0xffffffff);
            const float* part3 = next + _mm_popcnt_u64(word & 0xffffffffffff);
            _mm_prefetch((const char*)next + kAhead, _MM_HINT_T0);
            sum0 = _mm512_fmadd_ps(expand_ps(uint16_t(word), next), _mm512_loadu_ps(at), sum0);
            sum1 = _mm512_fmadd_ps(expand_ps(uint16_t(word >> 16), part1), _mm512_loadu_ps(at + 16), sum1);
            sum2 = _mm512_fmadd_ps(expand_ps(uint16_t(word >> 32), part2), _mm512_loadu_ps(at + 32), sum2);
            sum3 = _mm512_fmadd_ps(expand_ps(uint16_t(word >> 48), part3), _mm512_loadu_ps(at + 48), sum3);
            next += _mm_popcnt_u64(word);
        }
        y[r] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum0, sum1), _mm512_add_ps(sum2, sum3)));
    }
}

inline __m512i dot_word(__m512i sum, uint64_t word, const int8_t* values, const uint8_t* x) {
    const __m512i weights = _mm512_maskz_expand_epi8(word, in_register(_mm512_loadu_si512(values)));
    return _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(x), weights);
}

// Words first..last-1 of a row; `next` moves past their values.
inline int32_t dot_words(const Rows& rows, int64_t row, int64_t first, int64_t last, const int8_t*& next,
                         const uint8_t* x) {
    __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0;
    int64_t w = first;
    for (; w + 2 <= last; w += 2) {
        const uint64_t word0 = rows.word(row, w), word1 = rows.word(row, w + 1);
        const int8_t* second = next + _mm_popcnt_u64(word0);
        _mm_prefetch((const char*)next + kAhead, _MM_HINT_T0);
        sum0 = dot_word(sum0, word0, next, x + 64 * w);
        sum1 = dot_word(sum1, word1, second, x + 64 * w + 64);
        next = second + _mm_popcnt_u64(word1);
    }
    if (w < last) {
        const uint64_t word = rows.word(row, w);
        sum0 = dot_word(sum0, word, next, x + 64 * w);
        next += _mm_popcnt_u64(word);
    }
    return _mm512_reduce_add_epi32(_mm512_add_epi32(sum0, sum1));
}

// So many words, 65,536 columns, always fit an int32: each product is at most 255 * 128.
constexpr int64_t kWordsPerSum = 1024;
static_assert(kWordsPerSum * 64 * 255 * 128 <= INT32_MAX);

void matvec_i8(const Rows& rows, const int8_t* values, const uint8_t* x, int64_t* y, int64_t first, int64_t last) {
    const int8_t* next = values + rows.offsets[first];
    for (int64_t r = first; r < last; ++r) {
        y[r] = 0;
        for (int64_t w = 0; w < rows.num_words; w += kWordsPerSum)
            y[r] += dot_words(rows, r, w, std::min(w + kWordsPerSum, rows.num_words), next, x);
    }
}

// Lanes of `Element` bytes: how a register of them is expanded, compressed, loaded and stored under a mask.
template <int Element>
struct Lanes;

#define SPARSE_TRAIN_LANES(ELEMENT, TYPE, MASK, BITS)                                                                  \
    template <>                                                                                                        \
    struct Lanes<ELEMENT> {                                                                                            \
        using Type = TYPE;                                                                                             \
        using Mask = MASK;                                                                                             \
        static __m512i expand(Mask m, __m512i v) { return _mm512_maskz_expand_epi##BITS(m, v); }                       \
        static __m512i compress(Mask m, __m512i v) { return _mm512_maskz_compress_epi##BITS(m, v); }                   \
        static __m512i load(Mask m, const void* from) { return _mm512_maskz_loadu_epi##BITS(m, from); }                \
        static void store(void* to, Mask m, __m512i v) { _mm512_mask_storeu_epi##BITS(to, m, v); }                     \
    };
SPARSE_TRAIN_LANES(1, uint8_t, __mmask64, 8)
SPARSE_TRAIN_LANES(2, uint16_t, __mmask32, 16)
SPARSE_TRAIN_LANES(4, uint32_t, __mmask16, 32)
#undef SPARSE_TRAIN_LANES

template <class Mask>
inline Mask first_lanes(int64_t count) {
    if (count <= 0) return 0;
    return count >= int64_t(8 * sizeof(Mask)) ? Mask(~Mask(0)) : Mask((uint64_t(1) << count) - 1);
}

// Visits a word register by register: visit(kept lanes, column, kept positions before them in the
// word). The counts come from the word's bits alone, so registers do not wait for each other.
template <int Element, class Visit>
inline int64_t for_each_register(uint64_t word, int64_t column, Visit visit) {
    using Mask = typename Lanes<Element>::Mask;
    constexpr int64_t kLanes = 64 / Element;
    for (int64_t lane = 0; lane < 64; lane += kLanes)
        visit(Mask(word >> lane), column + lane, _mm_popcnt_u64(word & ((uint64_t(1) << lane) - 1)));
    return _mm_popcnt_u64(word);
}

// With kStream whole registers bypass the caches: a line that is written whole need not be read first.
template <int Element, bool kStream>
void expand_as(const Rows& rows, const void* values, void* dense, int64_t first, int64_t last) {
    using L = Lanes<Element>;
    using Mask = typename L::Mask;
    const auto* next = (const typename L::Type*)values + rows.offsets[first];
    const auto* end = (const typename L::Type*)values + rows.offsets[rows.num_rows];
    for (int64_t r = first; r < last; ++r) {
        auto* row = (typename L::Type*)dense + r * rows.num_columns;
        for (int64_t w = 0; w < rows.num_words; ++w) {
            const int64_t left = rows.num_columns - 64 * w;
            if (left >= 64 && end - next >= 128) {
                next += for_each_register<Element>(rows.word(r, w), 64 * w, [&](Mask kept, int64_t column, int64_t at) {
                    const __m512i expanded = L::expand(kept, in_register(_mm512_loadu_si512(next + at)));
                    if (kStream) _mm512_stream_si512((__m512i*)(row + column), expanded);
                    else _mm512_storeu_si512(row + column, expanded);
                });
            } else {  // whole registers would read or write past what is there
                next += for_each_register<Element>(rows.word(r, w), 64 * w, [&](Mask kept, int64_t column, int64_t at) {
                    const __m512i loaded = L::load(first_lanes<Mask>(end - next - at), next + at);
                    L::store(row + column, first_lanes<Mask>(rows.num_columns - column), L::expand(kept, loaded));
                });
            }
        }
    }
}

template <int Element>
void expand_of(const Rows& rows, const void* values, void* dense, int64_t first, int64_t last) {
    const int64_t row_bytes = rows.num_columns * Element;
    if (uintptr_t(dense) % 64 || row_bytes % 64 || rows.num_rows * row_bytes < kStreamed)
        return expand_as<Element, false>(rows, values, dense, first, last);
    expand_as<Element, true>(rows, values, dense, first, last);
    _mm_sfence();
}

template <int Element>
void compact_as(const Rows& rows, const void* dense, void* values, int64_t first, int64_t last) {
    using L = Lanes<Element>;
    using Mask = typename L::Mask;
    auto* next = (typename L::Type*)values + rows.offsets[first];
    auto* end = (typename L::Type*)values + rows.offsets[last];
    for (int64_t r = first; r < last; ++r) {
        const auto* row = (const typename L::Type*)dense + r * rows.num_columns;
        for (int64_t w = 0; w < rows.num_words; ++w) {
            // Whole registers may be stored while what they spill over is still this thread's to write.
            if (rows.num_columns - 64 * w >= 64 && end - next >= 128) {
                next += for_each_register<Element>(rows.word(r, w), 64 * w, [&](Mask kept, int64_t column, int64_t at) {
                    _mm512_storeu_si512(next + at, L::compress(kept, _mm512_loadu_si512(row + column)));
                });
            } else {
                next += for_each_register<Element>(rows.word(r, w), 64 * w, [&](Mask kept, int64_t column, int64_t at) {
                    const __m512i loaded = L::load(first_lanes<Mask>(rows.num_columns - column), row + column);
                    L::store(next + at, first_lanes<Mask>(_mm_popcnt_u64(kept)), L::compress(kept, loaded));
                });
            }
        }
    }
}

void expand(const Rows& rows, int size, const void* values, void* dense, int64_t first, int64_t last) {
    if (size == 1) expand_of<1>(rows, values, dense, first, last);
    if (size == 2) expand_of<2>(rows, values, dense, first, last);
    if (size == 4) expand_of<4>(rows, values, dense, first, last);
}

void compact(const Rows& rows, int size, const void* dense, void* values, int64_t first, int64_t last) {
    if (size == 1) compact_as<1>(rows, dense, values, first, last);
    if (size == 2) compact_as<2>(rows, dense, values, first, last);
    if (size == 4) compact_as<4>(rows, dense, values, first, last);
}

int64_t count(const Rows& rows, int64_t row) {
    int64_t num_kept = 0;
    for (int64_t w = 0; w < rows.num_words; ++w) num_kept += _mm_popcnt_u64(rows.word(row, w));
    return num_kept;
}

uint64_t read(const void* data, int64_t num_bytes) {
    const __m512i* at = (const __m512i*)data;
    __m512i sum[8];
    for (auto& s : sum) s = _mm512_setzero_si512();
    for (int64_t i = 0; i < num_bytes / 64; i += 8)
        for (int k = 0; k < 8; ++k) sum[k] = _mm512_xor_si512(sum[k], _mm512_loadu_si512(at + i + k));
    for (int k = 1; k < 8; ++k) sum[0] = _mm512_xor_si512(sum[0], sum[k]);
    return uint64_t(_mm512_reduce_add_epi64(sum[0]));
}

bool is_supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Tier avx512 = {"avx512", is_supported, matvec_f32, matvec_i8, expand, compact, count, read, kMatmul<16>};

}  // namespace sparse_train
#else
namespace sparse_train {
const Tier avx512 = {"avx512", [] { return false; }};
}  // namespace sparse_train
#endif
