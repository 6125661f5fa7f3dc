// What AVX-512 does with the bits of a weight: they are the mask of an instruction that expands or compresses.
#pragma once
#include "avx2.h"

namespace sparse_train {
namespace {

// A destination for an instruction that expands or compresses. On Zen 5 these wait for what their destination held
// before even where they zero it, which costs 5 cycles instead of 1, and the compiler reuses registers.
inline __m512i fresh() {
    __m512i zeros;
    asm volatile("vpxord %0, %0, %0" : "=v"(zeros));
    return zeros;
}

inline __m512i load512(const void* from) {
    __m512i loaded = _mm512_loadu_si512(from);
    asm volatile("" : "+v"(loaded));  // gcc would fold the load into the expand: that form is microcoded on some CPUs
    return loaded;
}

#define SPARSE_TRAIN_LANES(SIZE, TYPE, MASK, BITS)                                                                     \
    struct Lanes##SIZE##Avx512 {                                                                                       \
        using Type = TYPE;                                                                                             \
        static constexpr int kLanes = 64 / SIZE;                                                                       \
        static __m512i expand(int k, uint64_t word, const uint8_t*, const void* values) {                              \
            const __m512i loaded = load512((const Type*)values + kept_before<kLanes % 64>(k, word));                   \
            return _mm512_mask_expand_epi##BITS(fresh(), MASK(word >> kLanes % 64 * k), loaded);                       \
        }                                                                                                              \
        static __m512i compress(int k, uint64_t word, const uint8_t*, const Type* dense) {                             \
            return _mm512_mask_compress_epi##BITS(fresh(), MASK(word >> kLanes % 64 * k), load512(dense));             \
        }                                                                                                              \
        static void store(Type* to, __m512i v) { _mm512_storeu_si512(to, v); }                                         \
        static void stream(Type* to, __m512i v) { _mm512_stream_si512((__m512i*)to, v); }                              \
        static void fence() { _mm_sfence(); }                                                                          \
    };
SPARSE_TRAIN_LANES(4, uint32_t, __mmask16, 32)
#ifdef __AVX512VBMI2__
SPARSE_TRAIN_LANES(2, uint16_t, __mmask32, 16)
SPARSE_TRAIN_LANES(1, uint8_t, __mmask64, 8)
#endif
#undef SPARSE_TRAIN_LANES

struct FloatAvx512 : FloatKernel<16, 4> {
    using Sum = __m512;
    static __m512 load(const float* x) { return _mm512_loadu_ps(x); }
    static Sum add(__m512 weights, __m512 x, Sum sum) { return _mm512_fmadd_ps(weights, x, sum); }
    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

struct Fp32Avx512 : FloatAvx512 {
    using Value = float;
    static __m512 expand(int k, uint64_t word, const uint8_t* bits, const float* values) {
        return _mm512_castsi512_ps(Lanes4Avx512::expand(k, word, bits, values));
    }
};

struct Bf16Avx512 : FloatAvx512 {
    using Value = uint16_t;
    static __m512 expand(int k, uint64_t word, const uint8_t*, const uint16_t* values) {
        const auto* from = values + kept_before<kLanes>(k, word);
#ifdef __AVX512VBMI2__
        // A bit per half of a float: the words come to the upper ones, where they are floats.
        const __mmask32 upper = __mmask32(_pdep_u64(word >> kLanes * k, 0xaaaaaaaa));
        return _mm512_castsi512_ps(_mm512_mask_expand_epi16(fresh(), upper, load512(from)));
#else
        const __m512i floats = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(from)), 16);
        return _mm512_castsi512_ps(_mm512_mask_expand_epi32(fresh(), __mmask16(word >> kLanes * k), floats));
#endif
    }
};

inline uint64_t read(const void* data, int64_t num_bytes) {
    __m512i sum[8] = {};
    for (int64_t i = 0; i < num_bytes; i += 512)
        for (int k = 0; k < 8; ++k)
            sum[k] = _mm512_xor_si512(sum[k], _mm512_loadu_si512((const uint8_t*)data + i + 64 * k));
    for (int k = 1; k < 8; ++k) sum[0] = _mm512_xor_si512(sum[0], sum[k]);
    return uint64_t(_mm512_reduce_add_epi64(sum[0]));
}

inline bool has_avx512f() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace
}  // namespace sparse_train
