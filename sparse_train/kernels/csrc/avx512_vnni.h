// What the tiers of AVX-512 with VBMI2 (expand and compress of bytes and words) and VNNI (u8 x s8 dot products) share.
//
// Every position costs a share of one expand, whatever its value's width, so a word of 64 positions takes four expands
// in FP32 and one in INT8.
#pragma once
#include "avx512.h"
#include "decode.h"
#include "matmul.h"

namespace sparse_train {
namespace {

struct Int8Avx512 : Int8Kernel<64, 4> {
    using Sum = __m512i;
    static constexpr int rows(int) { return 4; }

    static __m512i expand(int k, uint64_t word, const uint8_t* bits, const int8_t* values) {
        return Lanes1Avx512::expand(k, word, bits, values);
    }

    static __m512i load(const uint8_t* x) { return _mm512_loadu_si512(x); }
    static Sum add(__m512i weights, __m512i x, Sum sum) { return _mm512_dpbusd_epi32(sum, x, weights); }

    static int64_t total(Sum sum) {
        const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sum));
        return _mm512_reduce_add_epi64(_mm512_add_epi64(low, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sum, 1))));
    }
};

struct Int4Avx512 {
    using Sum = __m512;
    static constexpr int kMostVectors = 4, kFactor = 16;
    struct Codes {  // in the upper halves of bytes they have their signs
        __m512i first, second;
    };

    static Codes expand(const uint8_t* bits, const uint8_t* second, const uint8_t* codes) {
        uint64_t words[2];
        std::memcpy(words, bits, 8);
        std::memcpy(words + 1, second, 8);
        const __m512i pairs = load512(codes), upper = _mm512_set1_epi8(-16);
        const __m512i low = _mm512_and_si512(_mm512_slli_epi16(pairs, 4), upper);
        return {_mm512_mask_expand_epi8(fresh(), words[0], low),
                _mm512_mask_expand_epi8(fresh(), words[1], _mm512_and_si512(pairs, upper))};
    }

    static Sum add(const Codes& codes, const uint8_t* x, float scale, Sum sum) {
        const __m512i half = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(x), codes.first);
        const __m512i group = _mm512_dpbusd_epi32(half, _mm512_loadu_si512(x + 64), codes.second);
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(group), _mm512_set1_ps(scale), sum);
    }

    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

bool has_avx512_vnni() {
    return has_avx512f() && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
}

constexpr Tier avx512_tier(const char* name, bool (*is_supported)(), TileProduct tiles = {}) {
    return {name, is_supported, matvec<Fp32Avx512>, matvec<Bf16Avx512>, matvec<Int8Avx512>, matvec_int4<Int4Avx512>,
            unpack_int4, expand<Lanes1Avx512, Lanes2Avx512, Lanes4Avx512>,
            compact<Lanes1Avx512, Lanes2Avx512, Lanes4Avx512>, count, read, kMatmul<16>, kSteps<16>, 0, tiles};
}

}  // namespace
}  // namespace sparse_train
