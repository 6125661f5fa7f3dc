// What a decoder computes for one new token beside its products: norms, attention, activations. All in float32; rows
// are those of the batch. Written for the compiler's vectoriser, attention in registers of a tier's width.
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

// Attention in registers of kLanes numbers.
template <int kLanes>
struct AttentionOf {
    static constexpr int kSums = 4;  // at once: they hide some of the latency of multiply-adds
    static constexpr int kRegisters = kKeyBlock / kLanes;

    typedef float Register __attribute__((vector_size(4 * kLanes)));

    static Register load(const float* from) {
        Register loaded;
        std::memcpy(&loaded, from, sizeof(loaded));
        return loaded;
    }

    // The dot products of a query with the keys of a block. A key is a column, so none is added up across lanes.
    static void score(const float* query, const float* block, int64_t dim, float scale, float* scores) {
        Register sums[kSums][kRegisters] = {};
        int64_t i = 0;
        for (; i + kSums <= dim; i += kSums)
            for (int s = 0; s < kSums; ++s)
                for (int r = 0; r < kRegisters; ++r)
                    sums[s][r] += query[i + s] * load(block + (i + s) * kKeyBlock + r * kLanes);
        for (; i < dim; ++i)
            for (int r = 0; r < kRegisters; ++r) sums[0][r] += query[i] * load(block + i * kKeyBlock + r * kLanes);
        for (int r = 0; r < kRegisters; ++r) {
            const Register sum = ((sums[0][r] + sums[1][r]) + (sums[2][r] + sums[3][r])) * scale;
            std::memcpy(scores + r * kLanes, &sum, sizeof(sum));
        }
    }

    // out = the values (count, dim), each times its share; entries first .. first + kCount * kLanes - 1 of dim.
    template <int kCount>
    static void mix(const float* shares, const float* values, int64_t count, int64_t dim, int64_t first, float* out) {
        Register even[kCount] = {}, odd[kCount] = {};
        int64_t p = 0;
        for (const float* value = values + first; p + 1 < count; p += 2, value += 2 * dim)
            for (int r = 0; r < kCount; ++r) {
                even[r] += shares[p] * load(value + r * kLanes);
                odd[r] += shares[p + 1] * load(value + dim + r * kLanes);
            }
        for (int r = 0; r < kCount; ++r) {
            if (p < count) even[r] += shares[p] * load(values + p * dim + first + r * kLanes);
            even[r] += odd[r];
            std::memcpy(out + first + r * kLanes, &even[r], sizeof(even[r]));
        }
    }

    static void mix(const float* shares, const float* values, int64_t count, int64_t dim, float* out) {
        int64_t i = 0;
        for (; i + kSums * kLanes <= dim; i += kSums * kLanes) mix<kSums>(shares, values, count, dim, i, out);
        for (; i + kLanes <= dim; i += kLanes) mix<1>(shares, values, count, dim, i, out);
        for (; i < dim; ++i) {
            out[i] = 0;
            for (int64_t p = 0; p < count; ++p) out[i] += shares[p] * values[p * dim + i];
        }
    }

    static void attend(const Attention& a, int64_t row, int64_t group, const float* q, const float* k, const float* v,
                       float* out, float* scratch) {
        const int64_t dim = a.head_dim, shared = a.num_heads / a.num_groups, last = *a.position, first = a.starts[row];
        const int64_t start = first / kKeyBlock * kKeyBlock, room = blocks(last + 1 - start) * kKeyBlock;
        const int64_t count = last + 1 - first, head = row * a.num_groups + group;
        float* keys = a.keys + head * blocks(a.capacity) * kKeyBlock * dim;
        float* values = a.values + head * a.capacity * dim;
        const float *cosine = a.cosine + (last - first) * a.rotary, *sine = a.sine + (last - first) * a.rotary;
        float *query = scratch, *scores = scratch + dim;
        if (k) {
            turn(a, k, a.key_norm, cosine, sine, query);
            for (int64_t i = 0; i < dim; ++i)
                keys[(last / kKeyBlock * dim + i) * kKeyBlock + last % kKeyBlock] = query[i];
            std::memcpy(values + last * dim, v, 4 * dim);
        }
        for (int64_t h = 0; h < shared; ++h) {
            turn(a, q + h * dim, a.query_norm, cosine, sine, query);
            for (int64_t p = 0; p < room; p += kKeyBlock)
                score(query, keys + (start + p) * dim, dim, a.scale, scores + p);
            float* share = scores + (first - start);  // the block of the first key may begin before it
            if (a.bias) {
                const float* bias = a.bias + (group * shared + h) * a.capacity;  // by distance
                for (int64_t p = 0; p < count; ++p) share[p] += bias[count - 1 - p];
            }
            float largest = share[0], sum = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t p = 0; p < count; ++p) largest = std::max(largest, share[p]);
#pragma omp simd reduction(+ : sum)
            for (int64_t p = 0; p < count; ++p) {
                share[p] = exponential(share[p] - largest);
                sum += share[p];
            }
#pragma omp simd
            for (int64_t p = 0; p < count; ++p) share[p] /= sum;
            mix(share, values + first * dim, count, dim, out + h * dim);
        }
    }
};

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
constexpr Steps kSteps = {AttentionOf<kLanes>::attend, add_and_normalise, activate};

}  // namespace
}  // namespace sparse_train
