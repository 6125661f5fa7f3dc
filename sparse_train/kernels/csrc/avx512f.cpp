// AVX-512 without VBMI2 and VNNI: floats are expanded by it, bytes and words in AVX2's way.
// flags for x86_64: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mbmi -mbmi2 -mpopcnt
#ifdef __AVX512F__
#include "avx512.h"
#include "decode.h"
#include "matmul.h"

namespace sparse_train {

const Tier avx512f = {"avx512f", has_avx512f, matvec<Fp32Avx512>, matvec<Bf16Avx512>, matvec<Int8Avx2>,
                      matvec_int4<Int4Avx2>, unpack_int4, expand<Lanes1Avx2, Lanes2Avx2, Lanes4Avx512>,
                      compact<Lanes1Avx2, Lanes2Avx2, Lanes4Avx512>, count, read, kMatmul<16>, kSteps<16>};

}  // namespace sparse_train
#else
#include "tiers.h"
namespace sparse_train {
const Tier avx512f = {"avx512f", [] { return false; }};
}  // namespace sparse_train
#endif
