// What AVX2 does with the bits of a weight: a shuffle by tables (byte_tables.h).
#pragma once
#include <immintrin.h>

#include "byte_tables.h"
#include "int4.h"
#include "moves.h"

namespace sparse_train {
namespace {

inline __m256i load256(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline __m128i load128(const void* from) { return _mm_loadu_si128((const __m128i*)from); }
inline __m128i load64(const void* from) { return _mm_loadl_epi64((const __m128i*)from); }

// 16 bytes at a time: half registers, for a byte shuffle does not cross them.
template <class Element>
struct HalfRegister {
    using Type = Element;
    static constexpr int kLanes = 16 / sizeof(Type);
    static void store(Type* to, __m128i v) { _mm_storeu_si128((__m128i*)to, v); }
    static void stream(Type* to, __m128i v) { _mm_stream_si128((__m128i*)to, v); }
    static void fence() { _mm_sfence(); }
};

struct Lanes1Avx2 : HalfRegister<uint8_t> {
    static __m128i expand(int k, uint64_t word, const uint8_t* bits, const void* values) {
        const __m128i loaded = load128((const Type*)values + kept_before<kLanes>(k, word));
        const __m128i first = load128(kExpandFirst1[bits[2 * k]]), second = load128(kExpandSecond1[bits[2 * k + 1]]);
        return _mm_shuffle_epi8(loaded, _mm_add_epi8(first, second));
    }

    static __m128i compress(int k, uint64_t, const uint8_t* bits, const Type* dense) {
        const __m128i first = _mm_shuffle_epi8(load64(dense), load64(kCompress4[bits[2 * k]]));
        const __m128i second = _mm_shuffle_epi8(load64(dense + 8), load64(kCompress4[bits[2 * k + 1]]));
        alignas(16) Type kept[32];
        _mm_storel_epi64((__m128i*)kept, first);
        _mm_storel_epi64((__m128i*)(kept + __builtin_popcount(bits[2 * k])), second);
        return load128(kept);
    }
};

struct Lanes2Avx2 : HalfRegister<uint16_t> {
    static __m128i expand(int k, uint64_t word, const uint8_t* bits, const Type* values) {
        return _mm_shuffle_epi8(load128(values + kept_before<kLanes>(k, word)), load128(kExpand2[bits[k]]));
    }

    static __m128i compress(int k, uint64_t, const uint8_t* bits, const Type* dense) {
        return _mm_shuffle_epi8(load128(dense), load128(kCompress2[bits[k]]));
    }
};

struct Lanes4Avx2 {
    using Type = uint32_t;
    static constexpr int kLanes = 8;

    static __m256i expand(int k, uint64_t word, const uint8_t* bits, const void* values) {
        const __m256i place = _mm256_cvtepi8_epi32(load64(kExpand4[bits[k]]));
        const __m256i loaded = load256((const Type*)values + kept_before<kLanes>(k, word));
        const __m256 placed = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(loaded, place));
        return _mm256_castps_si256(_mm256_blendv_ps(placed, _mm256_setzero_ps(), _mm256_castsi256_ps(place)));
    }

    static __m256i compress(int k, uint64_t, const uint8_t* bits, const Type* dense) {
        return _mm256_permutevar8x32_epi32(load256(dense), _mm256_cvtepi8_epi32(load64(kCompress4[bits[k]])));
    }

    static void store(Type* to, __m256i v) { _mm256_storeu_si256((__m256i*)to, v); }
    static void stream(Type* to, __m256i v) { _mm256_stream_si256((__m256i*)to, v); }
    static void fence() { _mm_sfence(); }
};

struct FloatAvx2 : FloatKernel<8, 2> {
    using Sum = __m256;
    static __m256 load(const float* x) { return _mm256_loadu_ps(x); }
    static Sum add(__m256 weights, __m256 x, Sum sum) { return _mm256_fmadd_ps(weights, x, sum); }

    static float total(Sum sum) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
};

struct Fp32Avx2 : FloatAvx2 {
    using Value = float;
    static __m256 expand(int k, uint64_t word, const uint8_t* bits, const float* values) {
        return _mm256_castsi256_ps(Lanes4Avx2::expand(k, word, bits, values));
    }
};

struct Bf16Avx2 : FloatAvx2 {
    using Value = uint16_t;
    static __m256 expand(int k, uint64_t word, const uint8_t* bits, const uint16_t* values) {
        const __m256i loaded = _mm256_broadcastsi128_si256(load128(values + kept_before<kLanes>(k, word)));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(loaded, load256(kWiden2[bits[k]])));
    }
};

// Products of 16-bit numbers: vpmaddubsw, which multiplies bytes, saturates.
struct Int8Avx2 : Int8Kernel<16, 8> {
    using Sum = __m256i;
    static constexpr int rows(int vectors) { return vectors <= 2 ? 4 : 1; }

    static __m256i expand(int k, uint64_t word, const uint8_t* bits, const int8_t* values) {
        return _mm256_cvtepi8_epi16(Lanes1Avx2::expand(k, word, bits, values));
    }

    static __m256i load(const uint8_t* x) { return _mm256_cvtepu8_epi16(load128(x)); }
    static Sum add(__m256i weights, __m256i x, Sum sum) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(weights, x));
    }

    static int64_t total(Sum sum) {
        const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(sum));
        alignas(32) int64_t lanes[4];
        _mm256_store_si256((__m256i*)lanes,
                           _mm256_add_epi64(low, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(sum, 1))));
        return lanes[0] + lanes[1] + lanes[2] + lanes[3];
    }
};

// vpmaddubsw cannot saturate here, nor can the sums of a group: 8 products of 255 and 8 fit 16 bits.
struct Int4Avx2 {
    using Sum = __m256;
    static constexpr int kMostVectors = 4, kFactor = 1;
    struct Codes {
        __m256i quarters[4];
    };

    static Codes expand(const uint8_t* bits, const uint8_t* second, const uint8_t* codes) {
        const __m256i signs =  // of each nibble the code
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
        Codes expanded;
#pragma GCC unroll 8
        for (int k = 0; k < 4; ++k) {
            const uint8_t* mine = k < 2 ? bits : second;
            uint64_t word;
            std::memcpy(&word, mine, 8);
            const __m128i low = Lanes1Avx2::expand(k % 2 * 2, word, mine, codes);
            const __m128i high = Lanes1Avx2::expand(k % 2 * 2 + 1, word, mine, codes);
            const __m256i pairs = _mm256_set_m128i(high, low);
            const __m256i nibbles = k < 2 ? pairs : _mm256_srli_epi16(pairs, 4);
            expanded.quarters[k] = _mm256_shuffle_epi8(signs, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
        }
        return expanded;
    }

    static Sum add(const Codes& codes, const uint8_t* x, float scale, Sum sum) {
        __m256i group = _mm256_maddubs_epi16(load256(x), codes.quarters[0]);
#pragma GCC unroll 8
        for (int k = 1; k < 4; ++k)
            group = _mm256_add_epi16(group, _mm256_maddubs_epi16(load256(x + 32 * k), codes.quarters[k]));
        const __m256 products = _mm256_cvtepi32_ps(_mm256_madd_epi16(group, _mm256_set1_epi16(1)));
        return _mm256_fmadd_ps(products, _mm256_set1_ps(scale), sum);
    }

    static float total(Sum sum) { return FloatAvx2::total(sum); }
};

inline bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

}  // namespace
}  // namespace sparse_train
