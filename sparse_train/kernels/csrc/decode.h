// What a decoder computes for one new token beside its products: norms, attention, activations. All in float32, but for
// keys and values stored in bfloat16; rows are those of the batch. Written for the compiler's vectoriser, attention in
// registers of a tier's width.
//
// Tiers' files include this, as they do matmul.h: all is in an unnamed namespace.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "tiers.h"

namespace sparse_train {
namespace {

// e^x to 2 units in the last place, without a call that keeps loops from being vectorised. 2^n times a polynomial of
// the rest, |rest| <= ln 2 / 2. NaN stays NaN.
inline float exponential(float x) {
    const float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    constexpr float kShift = 0x1.8p23f;
    const float shifted = bounded * 1.44269504f + kShift, n = shifted - kShift;
    const float rest = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float sum = 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    uint32_t bits;  // the last ones are n, whatever x is; a conversion of NaN would be undefined
    std::memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return sum * power;
}

// Abramowitz and Stegun 7.1.26: |error| <= 1.5e-7.
inline float error_function(float x) {
    const float size = std::fabs(x), t = 1.0f / (1.0f + 0.3275911f * size);
    const float sum =
        t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return std::copysign(1.0f - sum * exponential(-size * size), x);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <class Function>
inline void map(const float* x, const float* factor, float* y, int64_t count, Function function) {
    if (factor) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) y[i] = function(x[i]) * factor[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) y[i] = function(x[i]);
    }
}

inline void normalise(const float* x, const float* weight, const float* bias, float* y, int64_t width, float epsilon,
                      bool is_rms) {
    float mean = 0, squares = 0;
    if (!is_rms) {
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < width; ++i) mean += x[i];
        mean /= float(width);
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float factor = 1.0f / std::sqrt(squares / float(width) + epsilon);
    if (bias) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * factor * weight[i] + bias[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * factor * weight[i];
    }
}

// One head of a query or a key: its norm, where it has one, and its rotation by (cosine, sine) (2, rotary).
inline void turn(const Attention& a, const float* x, const float* norm, const float* cosine, const float* sine,
                 float* y) {
    if (norm) normalise(x, norm, nullptr, y, a.head_dim, a.epsilon, true);
    else std::memcpy(y, x, 4 * a.head_dim);
    const int64_t half = a.rotary / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float low = y[i], high = y[half + i];
        y[i] = low * cosine[i] - high * sine[i];
        y[half + i] = high * cosine[half + i] + low * sine[half + i];
    }
}

inline float widen(float number) { return number; }
inline float widen(uint16_t number) { return from_bf16(number); }

inline void narrow(float number, float& to) { to = number; }
inline void narrow(float number, uint16_t& to) { to = to_bf16(number); }

// Attention in registers of kLanes numbers to keys and values that are Stored as floats or as bfloat16. Up to kHeads
// queries, which share a head of keys and values, go through it together, so that each is loaded once.
template <int kLanes, class Stored>
struct AttentionOf {
    static constexpr int kChains = 8;  // sums at a time: they hide the latency of multiply-adds
    static constexpr int kRegisters = kKeyBlock / kLanes;
    static constexpr int64_t kRoom = kPart + kKeyBlock;  // for the scores of a query: a part may begin inside a block
    // Bytes: the keys and values of all layers do not stay in a near cache.
    static constexpr int64_t kAhead = 4096;

    typedef float Register __attribute__((vector_size(4 * kLanes)));

    static Register load(const Stored* from) {
        float wide[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) wide[lane] = widen(from[lane]);
        Register loaded;
        std::memcpy(&loaded, wide, sizeof(loaded));
        __builtin_prefetch((const char*)from + kAhead);
        return loaded;
    }

    // The dot products of queries (kHeads, dim) with the keys of a block, to scores (kHeads, kRoom). A key is a column,
    // so none is added up across lanes.
    template <int kHeads>
    static void score(const float* queries, const Stored* block, int64_t dim, float scale, float* scores) {
        constexpr int kSums = std::max(1, kChains / (kHeads * kRegisters));
        Register sums[kSums][kHeads][kRegisters] = {};
        const auto add = [&](int64_t i, int s) {
            for (int r = 0; r < kRegisters; ++r) {
                const Register keys = load(block + i * kKeyBlock + r * kLanes);
                for (int h = 0; h < kHeads; ++h) sums[s][h][r] += queries[h * dim + i] * keys;
            }
        };
        int64_t i = 0;
        for (; i + kSums <= dim; i += kSums)
            for (int s = 0; s < kSums; ++s) add(i + s, s);
        for (; i < dim; ++i) add(i, 0);
        for (int h = 0; h < kHeads; ++h)
            for (int r = 0; r < kRegisters; ++r) {
                for (int s = 1; s < kSums; ++s) sums[0][h][r] += sums[s][h][r];
                const Register sum = sums[0][h][r] * scale;
                std::memcpy(scores + h * kRoom + r * kLanes, &sum, sizeof(sum));
            }
    }

    // Of the values (count, dim), each times its shares (kHeads, kRoom), the sums of kCount registers of entries from
    // `first` on, to `out` (kHeads, dim + 2).
    template <int kHeads, int kCount>
    static void mix_some(const float* shares, const Stored* values, int64_t count, int64_t dim, int64_t first,
                         float* out) {
        constexpr int kSums = std::max(1, kChains / (kHeads * kCount));
        Register sums[kSums][kHeads][kCount] = {};
        const auto add = [&](int64_t p, int s) {
            for (int r = 0; r < kCount; ++r) {
                const Register entries = load(values + p * dim + first + r * kLanes);
                for (int h = 0; h < kHeads; ++h) sums[s][h][r] += shares[h * kRoom + p] * entries;
            }
        };
        int64_t p = 0;
        for (; p + kSums <= count; p += kSums)
            for (int s = 0; s < kSums; ++s) add(p + s, s);
        for (; p < count; ++p) add(p, 0);
        for (int h = 0; h < kHeads; ++h)
            for (int r = 0; r < kCount; ++r) {
                for (int s = 1; s < kSums; ++s) sums[0][h][r] += sums[s][h][r];
                std::memcpy(out + h * (dim + 2) + first + r * kLanes, &sums[0][h][r], sizeof(Register));
            }
    }

    // All entries from `first` on.
    template <int kHeads, int kCount>
    static void mix(const float* shares, const Stored* values, int64_t count, int64_t dim, int64_t first, float* out) {
        for (; first + kCount * kLanes <= dim; first += kCount * kLanes)
            mix_some<kHeads, kCount>(shares, values, count, dim, first, out);
        if constexpr (kCount > 1) return mix<kHeads, kCount / 2>(shares, values, count, dim, first, out);
        for (; first < dim; ++first)
            for (int h = 0; h < kHeads; ++h) {
                float sum = 0;
                for (int64_t p = 0; p < count; ++p) sum += shares[h * kRoom + p] * widen(values[p * dim + first]);
                out[h * (dim + 2) + first] = sum;
            }
    }

    // Positions first..last-1 of one head of keys and values. `bias` (kHeads, capacity) is that of the last one's
    // distance, and may be null.
    template <int kHeads>
    static void attend_to(const Attention& a, const float* queries, const Stored* keys, const Stored* values,
                          const float* bias, int64_t first, int64_t last, float* partials) {
        const int64_t dim = a.head_dim, count = last - first, start = first / kKeyBlock * kKeyBlock;
        float scores[kHeads * kRoom];
        for (int64_t p = start; p < last; p += kKeyBlock)
            score<kHeads>(queries, keys + p * dim, dim, a.scale, scores + p - start);
        for (int h = 0; h < kHeads; ++h) {
            float *share = scores + (first - start) + h * kRoom, *partial = partials + h * (dim + 2);
            if (bias)
                for (int64_t p = 0; p < count; ++p) share[p] += bias[h * a.capacity + count - 1 - p];
            float largest = share[0], sum = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t p = 0; p < count; ++p) largest = share[p] > largest ? share[p] : largest;
#pragma omp simd reduction(+ : sum)
            for (int64_t p = 0; p < count; ++p) {
                share[p] = exponential(share[p] - largest);
                sum += share[p];
            }
            partial[dim] = sum, partial[dim + 1] = largest;
        }
        constexpr int kCount = kHeads == 1 ? 8 : kHeads < 4 ? 4 : 2;  // kHeads times as many sums fit 16 registers
        mix<kHeads, kCount>(scores + (first - start), values + first * dim, count, dim, 0, partials);
    }

    static void attend(const Attention& a, int64_t row, int64_t group, int64_t part, const float* queries,
                       float* partials) {
        const int64_t dim = a.head_dim, shared = a.num_heads / a.num_groups, end = *a.position + 1;
        const int64_t first = a.starts[row] + part * kPart, last = std::min(first + kPart, end);
        const int64_t head = row * a.num_groups + group;
        const Stored* keys = (const Stored*)a.keys + head * blocks(a.capacity) * kKeyBlock * dim;
        const Stored* values = (const Stored*)a.values + head * a.capacity * dim;
        for (int64_t h = 0; h < shared; h += 4) {
            const float* bias = a.bias ? a.bias + (group * shared + h) * a.capacity + end - last : nullptr;
            const auto with = [&](auto attend_to) {
                attend_to(a, queries + h * dim, keys, values, bias, first, last, partials + h * (dim + 2));
            };
            switch (shared - h) {
                case 1: with(attend_to<1>); break;
                case 2: with(attend_to<2>); break;
                case 3: with(attend_to<3>); break;
                default: with(attend_to<4>);
            }
        }
    }
};

template <int kLanes>
inline void attend(const Attention& a, int64_t row, int64_t group, int64_t part, const float* queries,
                   float* partials) {
    const auto attend_as = a.is_bf16 ? AttentionOf<kLanes, uint16_t>::attend : AttentionOf<kLanes, float>::attend;
    attend_as(a, row, group, part, queries, partials);
}

// Head `head` of keys and values, of all rows; the key has its norm and rotation.
template <class Stored>
inline void append(const Attention& a, int64_t head, const float* key, const float* value) {
    const int64_t dim = a.head_dim, last = *a.position;
    Stored* keys = (Stored*)a.keys + (head * blocks(a.capacity) + last / kKeyBlock) * kKeyBlock * dim;
    Stored* values = (Stored*)a.values + (head * a.capacity + last) * dim;
    for (int64_t i = 0; i < dim; ++i) {
        narrow(key[i], keys[i * kKeyBlock + last % kKeyBlock]);
        narrow(value[i], values[i]);
    }
}

inline void prepare(const Attention& a, int64_t row, const float* q, const float* k, const float* v, float* queries) {
    const int64_t dim = a.head_dim, distance = *a.position - a.starts[row];
    const float *cosine = a.cosine + distance * a.rotary, *sine = a.sine + distance * a.rotary;
    for (int64_t g = 0; k && g < a.num_groups; ++g) {
        float* key = queries;  // for a while
        turn(a, k + g * dim, a.key_norm, cosine, sine, key);
        (a.is_bf16 ? append<uint16_t> : append<float>)(a, row * a.num_groups + g, key, v + g * dim);
    }
    for (int64_t h = 0; h < a.num_heads; ++h) turn(a, q + h * dim, a.query_norm, cosine, sine, queries + h * dim);
}

inline void merge(const Attention& a, int64_t num_parts, const float* partials, float* out) {
    const int64_t dim = a.head_dim, between = a.num_heads * (dim + 2);
    for (int64_t h = 0; h < a.num_heads; ++h, partials += dim + 2, out += dim) {
        float largest = partials[dim + 1], total = 0;
        for (int64_t p = 1; p < num_parts; ++p) largest = std::max(largest, partials[p * between + dim + 1]);
        for (int64_t p = 0; p < num_parts; ++p) {
            const float* partial = partials + p * between;
            const float weight = exponential(partial[dim + 1] - largest);
            total += weight * partial[dim];
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) out[i] = (p ? out[i] : 0) + weight * partial[i];
        }
        const float factor = 1 / total;
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) out[i] *= factor;
    }
}

inline void add_and_normalise(float* hidden, const float* change, const float* weight, const float* bias, float* out,
                              int64_t num_rows, int64_t width, float epsilon, bool is_rms) {
    for (int64_t row = 0; row < num_rows; ++row) {
        float* x = hidden + row * width;
        if (change) {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) x[i] += change[row * width + i];
        }
        normalise(x, weight, bias, out + row * width, width, epsilon, is_rms);
    }
}

inline void activate(int kind, const float* x, const float* factor, float* y, int64_t count) {
    switch (kind) {
        case 0: return map(x, factor, y, count, [](float v) { return v * sigmoid(v); });
        case 1: return map(x, factor, y, count, [](float v) {
            return 0.5f * v * (1.0f + error_function(v * 0.70710678f));
        });
        case 2: return map(x, factor, y, count, [](float v) {  // 0.5 (1 + tanh u) = sigmoid(2 u)
            return v * sigmoid(1.59576912f * (v + 0.044715f * v * v * v));
        });
        default: return map(x, factor, y, count, [](float v) { return v < 0.0f ? 0.0f : v; });
    }
}

template <int kLanes>
constexpr Steps kSteps = {prepare, attend<kLanes>, merge, add_and_normalise, activate};

}  // namespace
}  // namespace sparse_train
