// Weight matrices in the layout that products with few rows want, and those products.
//
// W is (n, k) and y = x W^T. Rows of W lie in panels of 16, one per lane of a 512-bit register, stored k-major,
// so each load brings `step` values of all 16 rows and no lane is ever summed across. The sum over k of one output runs in
// one fixed order whatever the number of rows of x: a row's result does not depend on the rest of the batch.
//
//   f32   step 1
//   bf16  step 2, pairs in one 32-bit lane; multiplied as fp32, or by the bf16 dot product where that is faster
//   q8    step 4, groups of 32 along k with an fp16 scale; x is rounded to int8 in the same groups
//   q4    step 4, two quads to a byte, value times the group's fp16 scale plus its fp16 minimum: GGUF's Q4_1, which such a
//         file's weights survive without a change
//
// Panels go in pairs, step by step (quantised: group by group, the scales behind them): one product reads one stream.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace sputnik {

constexpr int64_t LANES = 16, UNIT = 32, GROUP = 32;  // UNIT: rows of W that one task computes
constexpr int MAX_ROWS = 12;                          // rows of x in one register tile

enum class Format { f32, bf16, q8, q4 };

struct Packed {
  Format format = Format::f32;
  int64_t n = 0, k = 0;
  at::Tensor data;
  const char* bytes = nullptr;  // of `data`: a tensor is asked for them too slowly for each tile
  int64_t units() const { return (n + UNIT - 1) / UNIT; }
  bool quantised() const { return format == Format::q8 || format == Format::q4; }
  int64_t group_bytes() const { return UNIT * (format == Format::q8 ? GROUP + 2 : GROUP / 2 + 4); }
  int64_t unit_bytes() const { return quantised() ? k / GROUP * group_bytes() : UNIT * k * (format == Format::f32 ? 4 : 2); }
  const char* unit(int64_t u) const { return bytes + u * unit_bytes(); }
};

// Rows of x as a product wants them: fp32, and for quantised weights int8 with a scale and a sum for each group.
struct Rows {
  const float* x = nullptr;
  int64_t ld = 0;
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sum;
  std::vector<uint32_t> pairs;  // bf16 pairs, for the bf16 dot product
};

// Zeros in pages of 2 MB, where the system has them: what is read as a whole in each step costs fewer page walks.
at::Tensor huge_zeros(at::IntArrayRef sizes, at::ScalarType type);

Packed pack(const at::Tensor& weight, Format format);
Format parse_format(const std::string& name);
// Whether this CPU multiplies bf16 pairs faster than fp32: AMD's cores four times, Intel's (without AMX) half as fast.
bool use_bf16_dot();
void set_bf16_dot(bool on);  // for tests of both

// Make what `format` needs of rows x (m, k).
void prepare(Rows& rows, const float* x, int64_t m, int64_t k, int64_t ld, Format format);

// y[:, unit * 32 : + 32] = rows x W^T for rows [first, first + m) of `rows`; y has leading dimension ldy.
void unit_product(const Rows& rows, int64_t first, int64_t m, const Packed& w, int64_t unit, float* y, int64_t ldy);

// y (m, n) = x (m, k) W^T, all threads.
void product(const float* x, int64_t m, int64_t ldx, const Packed& w, float* y, int64_t ldy);

// Call f(0) .. f(n - 1), each once, on all threads; the next free thread takes the next task.
template <class F>
void tasks(int64_t n, const F& f) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), n);
  if (threads <= 1 || at::in_parallel_region()) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  });
}

// The same for so many multiplications in all: few are done before another thread has woken up.
template <class F>
void tasks(int64_t n, int64_t work, const F& f) {
  if (work >= 150'000) return tasks(n, f);
  for (int64_t i = 0; i < n; ++i) f(i);
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

}  // namespace sputnik
