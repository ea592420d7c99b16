// What the kernels of training share: rows of fp32 or bf16, products of the BLAS inside torch, scratch memory.
#pragma once
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "attention.h"
#include "packed.h"

extern "C" void sgemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k, const float* alpha, const float* a,
                       const int* lda, const float* b, const int* ldb, const float* beta, float* c, const int* ldc);

namespace sputnik {

// C (m, n) = op(A) op(B) + beta C, all row by row.
inline void gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float beta,
                 float* c, int64_t ldc) {
  const int im = static_cast<int>(m), in = static_cast<int>(n), ik = static_cast<int>(k);
  const int ia = static_cast<int>(lda), ib = static_cast<int>(ldb), ic = static_cast<int>(ldc);
  const float one = 1;
  sgemm_(tb ? "T" : "N", ta ? "T" : "N", &in, &im, &ik, &one, b, &ib, a, &ia, &beta, c, &ic);
}

using bf16 = uint16_t;

template <class F>
void by_type(const at::Tensor& t, const F& f) {
  if (t.scalar_type() == at::kFloat) f(float{});
  else if (t.scalar_type() == at::kBFloat16) f(bf16{});
  else TORCH_CHECK(false, "training kernels take float32 or bfloat16, not ", t.scalar_type());
}

// Elements of a tensor as T, which says bf16 as its bits.
template <class T>
T* elements(const at::Tensor& t) {
  const at::ScalarType wanted = std::is_same_v<std::remove_const_t<T>, float> ? at::kFloat : at::kBFloat16;
  TORCH_CHECK(t.scalar_type() == wanted && t.device().is_cpu(), "training kernels: ", wanted, " on the CPU is needed, not ", t.scalar_type());
  return reinterpret_cast<T*>(t.data_ptr());
}

inline void save(float* to, __mmask16 mask, __m512 v) { _mm512_mask_storeu_ps(to, mask, v); }

inline __m512i upper_half(__m512 v) {  // bits of the nearest bf16, ties to even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}

inline __m256i nearest_bf16(__m512 v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  return _mm512_cvtepi32_epi16(upper_half(v));
#endif
}

inline void save(bf16* to, __mmask16 mask, __m512 v) { _mm256_mask_storeu_epi16(to, mask, nearest_bf16(v)); }

// fp32 with the values of bf16.
template <class T>
void narrow(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += 16)
    save(to + i, lanes(n - i), _mm512_castsi512_ps(_mm512_slli_epi32(upper_half(load(from + i, lanes(n - i))), 16)));
}

template <class T>
void read(const T* from, int64_t n, float factor, float* to) {
  for (int64_t i = 0; i < n; i += 16) save(to + i, lanes(n - i), _mm512_mul_ps(load(from + i, lanes(n - i)), _mm512_set1_ps(factor)));
}

template <class T>
void write(const float* from, int64_t n, float factor, T* to) {
  for (int64_t i = 0; i < n; i += 16) save(to + i, lanes(n - i), _mm512_mul_ps(load(from + i, lanes(n - i)), _mm512_set1_ps(factor)));
}

inline void add(const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += 16) save(to + i, lanes(n - i), _mm512_add_ps(load(from + i, lanes(n - i)), load(to + i, lanes(n - i))));
}

inline float dot(const float* a, const float* b, int64_t n) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) sum = _mm512_fmadd_ps(load(a + i, lanes(n - i)), load(b + i, lanes(n - i)), sum);
  return _mm512_reduce_add_ps(sum);
}

// The first `n` scores become the numerators of their softmax, the rest up to `all` zeros. Returns the logarithm of the sum
// of the scores' exponentials; `sum` is that of the numerators.
inline float exponentials(float* x, int64_t n, int64_t all, float& sum) {
  __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) top = _mm512_mask_max_ps(top, lanes(n - i), top, load(x + i, lanes(n - i)));
  const float most = _mm512_reduce_max_ps(top);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 e = _mm512_maskz_mov_ps(lanes(n - i), exp16(_mm512_sub_ps(load(x + i, lanes(n - i)), _mm512_set1_ps(most))));
    save(x + i, lanes(n - i), e);
    total = _mm512_add_ps(total, e);
  }
  sum = _mm512_reduce_add_ps(total);
  std::fill(x + n, x + all, 0.f);
  return most + std::log(sum);
}

// Scores x become probabilities, and the gradient by them that by the scores: p (dp - delta).
inline void softmax_backward(float* x, float* dp, int64_t n, int64_t all, float lse, float delta) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512 p = exp16(_mm512_sub_ps(load(x + i, mask), _mm512_set1_ps(lse)));
    save(x + i, mask, p);
    save(dp + i, mask, _mm512_mul_ps(p, _mm512_sub_ps(load(dp + i, mask), _mm512_set1_ps(delta))));
  }
  std::fill(x + n, x + all, 0.f);
  std::fill(dp + n, dp + all, 0.f);
}

// Memory of one thread, given back in reverse when it goes out of scope and kept for the next: fresh pages cost as much as
// the work on them.
class Scratch {
 public:
  Scratch() : block_(pool().block), used_(pool().used) {}
  ~Scratch() {
    pool().block = block_;
    pool().used = used_;
  }
  Scratch(const Scratch&) = delete;

  float* take(int64_t n) {
    Pool& p = pool();
    const size_t size = (static_cast<size_t>(n) + 15) / 16 * 16;
    while (p.block < p.blocks.size() && p.used + size > p.blocks[p.block].size) {
      ++p.block;
      p.used = 0;
    }
    if (p.block == p.blocks.size()) p.blocks.emplace_back(std::bit_ceil(std::max(size, SIZE)));  // a little more next time needs no other block
    float* at = p.blocks[p.block].data.get() + p.used;
    p.used += size;
    return at;
  }

 private:
  static constexpr size_t SIZE = 1 << 20;
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  struct Block {
    explicit Block(size_t n) : size(n), data(static_cast<float*>(std::aligned_alloc(64, n * sizeof(float)))) {
      TORCH_CHECK(data, "out of memory");
    }
    size_t size;
    std::unique_ptr<float, Free> data;
  };
  struct Pool {
    std::deque<Block> blocks;
    size_t block = 0, used = 0;
  };
  static Pool& pool() {
    thread_local Pool p;
    return p;
  }
  size_t block_, used_;
};

}  // namespace sputnik
