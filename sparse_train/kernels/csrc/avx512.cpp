// AVX-512 with VBMI2 and VNNI.
// flags for x86_64: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi2 -mavx512vnni -mfma -mbmi -mbmi2 -mpopcnt
#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#include "avx512_vnni.h"
namespace sparse_train {
const Tier avx512 = avx512_tier("avx512", has_avx512_vnni);
}  // namespace sparse_train
#else
#include "tiers.h"
namespace sparse_train {
const Tier avx512 = {"avx512", [] { return false; }};
}  // namespace sparse_train
#endif
