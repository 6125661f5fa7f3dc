// The steps of a decoder between its products.
#pragma once
#include <cstdint>
#include <cstring>

namespace sparse_train {

// Self-attention of one new token per row of a batch, over a cache of keys and values.
struct Attention {
    int64_t num_rows, num_heads, num_groups, head_dim, capacity;  // num_groups: heads of keys and values
    float scale;
    float *keys, *values;  // (num_rows, num_groups, capacity, head_dim)
    const int64_t *position, *starts;  // where the new token goes; each row's first position (num_rows,)
    int64_t rotary;                    // how many of the head_dim entries turn; 0: none
    const float *cosine, *sine;        // (capacity, rotary), by the distance from a row's start
    const float* bias;                 // (num_heads, capacity), added to a score by its distance; may be null
    const float *query_norm, *key_norm;  // (head_dim,) RMS norms of each head; may be null
    float epsilon;

    // q, k and v have rows of `q_stride` and `kv_stride` numbers, which begin with num_heads or num_groups heads: they may
    // be parts of one product. out is (num_rows, num_heads * head_dim).
    void attend(const float* q, const float* k, const float* v, float* out, int64_t q_stride, int64_t kv_stride,
                int num_threads) const;
};

// hidden += change, where there is one; out = norm(hidden) * weight + bias; a layer norm or an RMS norm.
void add_and_normalise(float* hidden, const float* change, const float* weight, const float* bias, float* out,
                       int64_t num_rows, int64_t width, float epsilon, bool is_rms);

// y = f(x) * factor, or f(x); kind 0: SiLU, 1: GELU, 2: GELU by tanh, 3: ReLU.
void activate(int kind, const float* x, const float* factor, float* y, int64_t count);

}  // namespace sparse_train
