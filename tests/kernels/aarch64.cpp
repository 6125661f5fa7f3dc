// The kernels in an emulator of another CPU, without a Python for it: reads the cases of test_aarch64.py from standard
// input and writes the names of the tiers, then what each of them makes of a case.
#include <cstdint>
#include <cstdio>

namespace nanobind {  // what module.cpp names of it; nothing is bound

struct gil_scoped_release {};
template <class... T>
struct call_guard {};
template <class... T>
struct init {};
struct attribute {
    template <class T>
    void operator=(T&&) {}
};
struct module_ {
    attribute attr(const char*) { return {}; }
    template <class... T>
    module_& def(T&&...) {
        return *this;
    }
    template <class... T>
    module_& def_prop_ro(T&&...) {
        return *this;
    }
};
template <class T>
struct class_ : module_ {
    class_(module_&, const char*) {}
};

}  // namespace nanobind

#define NB_MODULE(name, m) [[maybe_unused]] static void bind##name(nanobind::module_& m)
#include "module.cpp"

template <class T>
std::vector<T> take(int64_t count) {
    std::vector<T> items(count);
    if (int64_t(std::fread(items.data(), sizeof(T), count, stdin)) != count) std::exit(1);
    return items;
}

template <class T>
uintptr_t address(const std::vector<T>& items) {
    return uintptr_t(items.data());
}

template <class T>
void give(const std::vector<T>& items) {
    std::fwrite(items.data(), sizeof(T), items.size(), stdout);
}

// A weight, x for its product as a vector and as the operand of matmul.
void weight() {
    const auto sizes = take<int64_t>(8);
    const int64_t rows = sizes[0], columns = sizes[1], kept = sizes[2], size = sizes[3], vectors = sizes[4];
    const int threads = int(sizes[5]);
    const bool is_int4 = sizes[7];
    const auto bits = take<uint8_t>((columns + 63) / 64 * 8 * rows), values = take<uint8_t>(kept * size);
    const auto scale = take<uint8_t>(sizes[6]);
    const auto x = take<float>(vectors * columns), operand = take<float>(vectors * columns);
    std::vector<uint8_t> dense(rows * columns * size), unpacked = dense, compacted(values.size());
    std::vector<float> y(vectors * rows), product = y;
    expand(address(values), address(bits), address(dense), rows, columns, kept, int(size), threads);
    compact(address(dense), address(bits), address(compacted), rows, columns, kept, int(size), threads);
    const Packed packed(address(values), address(bits), address(scale), rows, columns, kept, int(size), is_int4,
                        threads);
    packed.expand(address(unpacked), threads);
    if (!packed.matvec(address(x), address(y), vectors, threads)) std::exit(1);
    packed.matmul(address(operand), vectors, address(product), threads);
    give(dense), give(compacted), give(unpacked), give(y), give(product);
}

// Activations and the norms of x, and heads that attend over a cache.
void steps() {
    const auto sizes = take<int64_t>(5);
    const int64_t width = sizes[0], heads = sizes[1], groups = sizes[2], dim = sizes[3], capacity = sizes[4];
    const auto x = take<float>(width), q = take<float>(heads * dim), k = take<float>(groups * dim);
    const auto v = take<float>(groups * dim);
    auto keys = take<float>(groups * blocks(capacity) * kKeyBlock * dim), cached = take<float>(groups * capacity * dim);
    for (int kind = 0; kind < 4; ++kind) {
        std::vector<float> y(width);
        activate_at(kind, address(x), 0, address(y), width);
        give(y);
    }
    for (bool is_rms : {false, true}) {
        auto hidden = x, y = x;
        add_and_normalise_at(address(hidden), 0, address(x), 0, address(y), 1, width, 1e-5f, is_rms);
        give(y);
    }
    const int64_t position = capacity - 1, start = 0;
    std::vector<uint16_t> short_keys(keys.size()), short_cached(cached.size());
    std::transform(keys.begin(), keys.end(), short_keys.begin(), to_bf16);
    std::transform(cached.begin(), cached.end(), short_cached.begin(), to_bf16);
    for (bool is_bf16 : {false, true}) {
        const Attention attention{1, heads, groups, dim, capacity, 0.5f, is_bf16,
                                  is_bf16 ? (void*)short_keys.data() : keys.data(),
                                  is_bf16 ? (void*)short_cached.data() : cached.data(), &position, &start, 0, nullptr,
                                  nullptr, nullptr, nullptr, nullptr, 0.0f};
        std::vector<float> out(heads * dim);
        attend_at(attention, address(q), address(k), address(v), address(out), heads * dim, groups * dim, 1);
        give(out);
    }
}

// One case per process, of the kind that argv[1] names; each tier reads it anew.
int main(int, char** argv) {
    const bool is_weight = argv[1] == std::string("weight");
    for (const std::string& name : tier_names()) std::printf("%s ", name.c_str());
    std::printf("\n");
    for (const std::string& name : tier_names()) {
        use_tier(name);
        std::rewind(stdin);
        is_weight ? weight() : steps();
    }
}
