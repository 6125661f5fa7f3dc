// NEON, which every aarch64 CPU has.
// flags for aarch64: -fno-schedule-insns
//
// GCC's first scheduler brings so many loads forward that registers go to the stack and back.
#ifdef __aarch64__
#include "neon.h"

namespace sparse_train {
namespace {

struct Int8Neon : BytesNeon {
    // A product fits 16 bits, the sum of two does not: (-128)^2 twice. So each goes to sums of 32 bits.
    static Sum add(int8x16_t weights, int8x16_t x, Sum sum) {
        sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(weights), vget_low_s8(x)));
        return vpadalq_s16(sum, vmull_high_s8(weights, x));
    }
};

}  // namespace

const Tier neon = tier_with<Int8Neon>("neon", [] { return true; });

}  // namespace sparse_train
#else
#include "tiers.h"
namespace sparse_train {
const Tier neon = {"neon", [] { return false; }};
}  // namespace sparse_train
#endif
