// What NEON does with the bits of a weight: a shuffle by tables (byte_tables.h), which gives 0 for each index past its
// registers.
#pragma once
#include <arm_neon.h>

#include "byte_tables.h"
#include "decode.h"
#include "int4.h"
#include "matmul.h"
#include "moves.h"

namespace sparse_train {
namespace {

// Places of bytes, for floats, whose 8 positions take two registers.
constexpr auto kExpandFloats = byte_table<uint8_t, 32>([](int byte, int at) {
    return is_kept(byte, at / 4) ? 4 * num_kept(byte, at / 4) + at % 4 : kZero;
});
constexpr auto kCompressFloats = byte_table<uint8_t, 32>([](int byte, int at) {
    return at / 4 < num_kept(byte) ? 4 * place_of(byte, at / 4) + at % 4 : kZero;
});

// As kept_before, of k-th parts of kBytes bytes: the counts of the bytes are added up by one product, which is the same
// for all parts of a word. The CPU counts bits in vector registers only.
template <int kBytes>
inline int64_t kept_before_part(int k, uint64_t word) {
    const uint64_t counts = vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(word))), 0);
    return k ? counts * 0x0101010101010101 >> (8 * (kBytes * k - 1)) & 255 : 0;
}

// 16 bytes; a stream past the caches has no intrinsic, and stores need no fence.
template <class Element>
struct Register16 {
    using Type = Element;
    static constexpr int kLanes = 16 / sizeof(Type);
    static void store(Type* to, uint8x16_t v) { vst1q_u8((uint8_t*)to, v); }
    static void stream(Type* to, uint8x16_t v) { store(to, v); }
    static void fence() {}
};

inline uint8x16_t load16(const void* from) { return vld1q_u8((const uint8_t*)from); }

struct Lanes1Neon : Register16<uint8_t> {
    static uint8x16_t expand(int k, uint64_t word, const uint8_t* bits, const void* values) {
        const uint8x16_t first = load16(kExpandFirst1[bits[2 * k]]), second = load16(kExpandSecond1[bits[2 * k + 1]]);
        return vqtbl1q_u8(load16((const Type*)values + kept_before_part<2>(k, word)), vaddq_u8(first, second));
    }

    static uint8x16_t compress(int k, uint64_t, const uint8_t* bits, const Type* dense) {
        const uint8x8_t first = vtbl1_u8(vld1_u8(dense), vld1_u8(kCompress4[bits[2 * k]]));
        const uint8x8_t second = vtbl1_u8(vld1_u8(dense + 8), vld1_u8(kCompress4[bits[2 * k + 1]]));
        Type kept[16];
        vst1_u8(kept, first);
        vst1_u8(kept + __builtin_popcount(bits[2 * k]), second);
        return load16(kept);
    }
};

struct Lanes2Neon : Register16<uint16_t> {
    static uint8x16_t expand(int k, uint64_t word, const uint8_t* bits, const Type* values) {
        return vqtbl1q_u8(load16(values + kept_before_part<1>(k, word)), load16(kExpand2[bits[k]]));
    }

    static uint8x16_t compress(int k, uint64_t, const uint8_t* bits, const Type* dense) {
        return vqtbl1q_u8(load16(dense), load16(kCompress2[bits[k]]));
    }
};

struct Lanes4Neon {
    using Type = uint32_t;
    static constexpr int kLanes = 8;
    struct Register {
        uint8x16_t low, high;
    };

    static Register expand(int k, uint64_t word, const uint8_t* bits, const void* values) {
        const Type* from = (const Type*)values + kept_before_part<1>(k, word);
        const uint8x16x2_t loaded = vld1q_u8_x2((const uint8_t*)from), places = vld1q_u8_x2(kExpandFloats[bits[k]]);
        return {vqtbl1q_u8(loaded.val[0], places.val[0]), vqtbl2q_u8(loaded, places.val[1])};
    }

    static Register compress(int k, uint64_t, const uint8_t* bits, const Type* dense) {
        const uint8x16x2_t loaded = vld1q_u8_x2((const uint8_t*)dense), places = vld1q_u8_x2(kCompressFloats[bits[k]]);
        return {vqtbl2q_u8(loaded, places.val[0]), vqtbl2q_u8(loaded, places.val[1])};
    }

    static void store(Type* to, Register v) {
        vst1q_u8((uint8_t*)to, v.low);
        vst1q_u8((uint8_t*)(to + 4), v.high);
    }
    static void stream(Type* to, Register v) { store(to, v); }
    static void fence() {}
};

struct FloatNeon : FloatKernel<8, 2> {
    struct Sum {
        float32x4_t low, high;
    };

    static Sum load(const float* x) { return {vld1q_f32(x), vld1q_f32(x + 4)}; }
    static Sum add(Sum weights, Sum x, Sum sum) {
        return {vfmaq_f32(sum.low, weights.low, x.low), vfmaq_f32(sum.high, weights.high, x.high)};
    }
    static float total(Sum sum) { return vaddvq_f32(vaddq_f32(sum.low, sum.high)); }
};

struct Fp32Neon : FloatNeon {
    using Value = float;
    static Sum expand(int k, uint64_t word, const uint8_t* bits, const float* values) {
        const Lanes4Neon::Register expanded = Lanes4Neon::expand(k, word, bits, values);
        return {vreinterpretq_f32_u8(expanded.low), vreinterpretq_f32_u8(expanded.high)};
    }
};

struct Bf16Neon : FloatNeon {
    using Value = uint16_t;
    static Sum expand(int k, uint64_t word, const uint8_t* bits, const uint16_t* values) {
        const uint16x8_t expanded = vreinterpretq_u16_u8(Lanes2Neon::expand(k, word, bits, values));
        return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(expanded), 16)),
                vreinterpretq_f32_u32(vshll_high_n_u16(expanded, 16))};
    }
};

// Products of signed bytes, with codes of x less 128, which is Tier::x_offset. Products of u8 and s8, which newer CPUs
// have (i8mm), would save the subtraction alone, one instruction per 16 codes of x and four rows.
struct BytesNeon : Int8Kernel<16, 16> {
    using Sum = int32x4_t;
    static constexpr int kOffset = 128;
    static constexpr int rows(int) { return 4; }

    static int8x16_t expand(int k, uint64_t word, const uint8_t* bits, const int8_t* values) {
        return vreinterpretq_s8_u8(Lanes1Neon::expand(k, word, bits, values));
    }

    static int8x16_t load(const uint8_t* x) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(x), vdupq_n_u8(kOffset))); }
    static int64_t total(Sum sum) { return vaddlvq_s32(sum); }
};

// With the products of an Int8 kernel. Codes lie in the upper halves of bytes, which have their signs.
template <class Int8>
struct Int4Neon {
    using Sum = float32x4_t;
    static constexpr int kMostVectors = 4, kFactor = 16;
    struct Codes {
        int8x16_t parts[8];
        int32x4_t start;  // kOffset times the codes, which their products with x less that lack
    };

    static Codes expand(const uint8_t* bits, const uint8_t* second, const uint8_t* codes) {
        Codes expanded;
        uint64_t words[2];
        std::memcpy(words, bits, 8);
        std::memcpy(words + 1, second, 8);
        int32x4_t half = vdupq_n_s32(0);
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
            const uint8x16_t pairs = Lanes1Neon::expand(k % 4, words[k / 4], k < 4 ? bits : second, codes);
            expanded.parts[k] = vreinterpretq_s8_u8(k < 4 ? vshlq_n_u8(pairs, 4) : vandq_u8(pairs, vdupq_n_u8(0xf0)));
            half = Int8::add(expanded.parts[k], vdupq_n_s8(BytesNeon::kOffset / 2), half);
        }
        expanded.start = vshlq_n_s32(half, 1);
        return expanded;
    }

    static Sum add(const Codes& codes, const uint8_t* x, float scale, Sum sum) {
        int32x4_t group = codes.start;
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) group = Int8::add(codes.parts[k], BytesNeon::load(x + 16 * k), group);
        return vfmaq_n_f32(sum, vcvtq_f32_s32(group), scale);
    }

    static float total(Sum sum) { return vaddvq_f32(sum); }
};

inline uint64_t read(const void* data, int64_t num_bytes) {
    uint64x2_t sum[16] = {};
    for (int64_t i = 0; i < num_bytes; i += 256)
        for (int k = 0; k < 16; ++k)
            sum[k] = veorq_u64(sum[k], vreinterpretq_u64_u8(load16((const uint8_t*)data + i + 16 * k)));
    for (int k = 1; k < 16; ++k) sum[0] = veorq_u64(sum[0], sum[k]);
    return vgetq_lane_u64(sum[0], 0) ^ vgetq_lane_u64(sum[0], 1);
}

// What tiers of NEON share is all but the products of bytes.
template <class Int8>
constexpr Tier tier_with(const char* name, bool (*is_supported)()) {
    return {name, is_supported, matvec<Fp32Neon>, matvec<Bf16Neon>, matvec<Int8>, matvec_int4<Int4Neon<Int8>>,
            unpack_int4, expand<Lanes1Neon, Lanes2Neon, Lanes4Neon>, compact<Lanes1Neon, Lanes2Neon, Lanes4Neon>, count,
            read, kMatmul<4>, kSteps<4>, BytesNeon::kOffset};
}

}  // namespace
}  // namespace sparse_train
