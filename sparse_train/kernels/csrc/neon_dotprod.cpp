// NEON with dot products of bytes (ARMv8.2's dotprod, which server and phone CPUs have had since about 2018).
// flags for aarch64: -march=armv8.2-a+dotprod -fno-schedule-insns
#ifdef __ARM_FEATURE_DOTPROD
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "neon.h"

namespace sparse_train {
namespace {

struct Int8Dotprod : BytesNeon {
    static Sum add(int8x16_t weights, int8x16_t x, Sum sum) { return vdotq_s32(sum, weights, x); }
};

bool is_supported() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }

}  // namespace

const Tier neon_dotprod = tier_with<Int8Dotprod>("neon_dotprod", is_supported);

}  // namespace sparse_train
#else
#include "tiers.h"
namespace sparse_train {
const Tier neon_dotprod = {"neon_dotprod", [] { return false; }};
}  // namespace sparse_train
#endif
