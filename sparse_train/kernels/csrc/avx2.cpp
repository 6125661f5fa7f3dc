// AVX2 with FMA and BMI.
// flags for x86_64: -mavx2 -mfma -mbmi -mbmi2 -mpopcnt
#ifdef __AVX2__
#include "avx2.h"
#include "decode.h"
#include "matmul.h"

namespace sparse_train {
namespace {

uint64_t read(const void* data, int64_t num_bytes) {
    __m256i sum[16] = {};
    for (int64_t i = 0; i < num_bytes; i += 512)
        for (int k = 0; k < 16; ++k) sum[k] = _mm256_xor_si256(sum[k], load256((const uint8_t*)data + i + 32 * k));
    for (int k = 1; k < 16; ++k) sum[0] = _mm256_xor_si256(sum[0], sum[k]);
    return uint64_t(_mm256_extract_epi64(sum[0], 0) ^ _mm256_extract_epi64(sum[0], 1) ^
                    _mm256_extract_epi64(sum[0], 2) ^ _mm256_extract_epi64(sum[0], 3));
}

}  // namespace

const Tier avx2 = {"avx2", has_avx2, matvec<Fp32Avx2>, matvec<Bf16Avx2>, matvec<Int8Avx2>,
                   matvec_int4<Int4Avx2>, unpack_int4, expand<Lanes1Avx2, Lanes2Avx2, Lanes4Avx2>,
                   compact<Lanes1Avx2, Lanes2Avx2, Lanes4Avx2>, count, read, kMatmul<8>, kSteps<8>};

}  // namespace sparse_train
#else
#include "tiers.h"
namespace sparse_train {
const Tier avx2 = {"avx2", [] { return false; }};
}  // namespace sparse_train
#endif
