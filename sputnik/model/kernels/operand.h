// Small matrices as factors of products: by the BLAS in fp32, or by the CPU's products of bf16 pairs.
//
// A factor is rows of fp32. For products of pairs its values are rounded to bf16 and laid out so that two which are multiplied
// and summed together share a 32-bit lane; sums are fp32, in an order that depends on the sizes alone. What is laid out once
// serves all later products with that factor. Where a pair has no second value it is zero.
#pragma once
#include "fused.h"

namespace sputnik {

class Operand {
 public:
  // Memory for `rows` x `width` values, `x` to be filled by the caller before the first product, of `scratch`, which must outlive it.
  Operand(Scratch& scratch, bool pairs, int64_t rows, int64_t width) : x(scratch.take(rows * width)), rows_(rows), width_(width), pairs_(pairs) {
    if (!pairs) return;
    const auto make = [&](int64_t lines, int64_t length) { return Form{reinterpret_cast<uint32_t*>(scratch.take(lines * length)), length, false}; };
    across_ = make(rows, half(width));
    down_ = make(half(rows), padded(width));
    turned_ = make(half(width), padded(rows));
  }

  float* const x;

  // c (m, n), rows `ldc` apart, = op(a) op(b), added to what is there if `add`; the sum is over k. op(a) may be the first rows
  // or, transposed, the first columns of what a holds; so for op(b).
  friend void multiply(bool ta, bool tb, int64_t m, int64_t n, int64_t k, Operand& a, Operand& b, bool add, float* c, int64_t ldc) {
    if (!a.pairs_) return gemm(ta, tb, m, n, k, a.x, a.width_, b.x, b.width_, add, c, ldc);
    const Form &left = ta ? a.down() : a.across(), &right = tb ? b.turned() : b.down();
    const int64_t row = ta ? 1 : left.length, step = ta ? left.length : 1, blocks = (m + MOST - 1) / MOST;
    for (int64_t j = 0; j < n; j += 32)
      for (int64_t block = 0; block < blocks; ++block) {  // even shares, so that no tile is left with a row or two
        const int64_t from = m * block / blocks, count = m * (block + 1) / blocks - from;
        tile(count, n - j, left.data + from * row, row, step, right.data + j, right.length, half(k), add, c + from * ldc + j, ldc);
      }
  }

 private:
  static constexpr int64_t MOST = 12;  // rows of a tile: its sums stay in registers

  struct Form {
    uint32_t* data = nullptr;
    int64_t length = 0;  // of a line
    bool made = false;
  };

  static int64_t half(int64_t n) { return (n + 1) / 2; }
  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

  // (rows, width / 2): two neighbours of a row.
  const Form& across() {
    if (std::exchange(across_.made, true)) return across_;
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t j = 0; j < width_; j += 32)
        _mm512_mask_storeu_epi32(across_.data + i * across_.length + j / 2, lanes(half(width_ - j)), neighbours(x + i * width_ + j, width_ - j));
    return across_;
  }

  // (rows / 2, width): two rows of a column.
  const Form& down() {
    if (std::exchange(down_.made, true)) return down_;
    for (int64_t i = 0; i < rows_; i += 2)
      for (int64_t j = 0; j < width_; j += 16) {
        const float* at = x + i * width_ + j;
        const __m512 upper = load(at, lanes(width_ - j)), lower = i + 1 < rows_ ? load(at + width_, lanes(width_ - j)) : _mm512_setzero_ps();
        const __m512i first = _mm512_cvtepu16_epi32(nearest_bf16(upper)), second = _mm512_cvtepu16_epi32(nearest_bf16(lower));
        _mm512_storeu_si512(down_.data + i / 2 * down_.length + j, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
      }
    return down_;
  }

  // (width / 2, rows): two neighbours of a row, rows along.
  const Form& turned() {
    if (std::exchange(turned_.made, true)) return turned_;
    for (int64_t i = 0; i < rows_; i += 16)
      for (int64_t j = 0; j < width_; j += 32) {
        __m512i a[16], b[16];
        for (int64_t r = 0; r < 16; ++r) a[r] = i + r < rows_ ? neighbours(x + (i + r) * width_ + j, width_ - j) : _mm512_setzero_si512();
        transpose(a, b);
        const int64_t lines = std::min<int64_t>(16, half(width_ - j));
        for (int64_t p = 0; p < lines; ++p) _mm512_storeu_si512(turned_.data + (j / 2 + p) * turned_.length + i, a[p]);
      }
    return turned_;
  }

  // The first `left` of 32 values in bf16, in order; zeros behind.
  static __m512i neighbours(const float* at, int64_t left) {
    const __m512 low = load(at, lanes(left)), high = left > 16 ? load(at + 16, lanes(left - 16)) : _mm512_setzero_ps();
#ifdef __AVX512BF16__
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
    return _mm512_inserti64x4(_mm512_castsi256_si512(nearest_bf16(low)), nearest_bf16(high), 1);
#endif
  }

  // a (16, 16) -> its transpose; b is for what lies between.
  static void transpose(__m512i (&a)[16], __m512i (&b)[16]) {
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
        a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
      }
    for (int i = 0; i < 16; i += 8)
      for (int j = 0; j < 4; ++j) {
        b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
        b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
      }
    for (int j = 0; j < 8; ++j) {
      a[j] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88);
      a[j + 8] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd);
    }
  }

  template <int M, int P>
  static void tile_of(const uint32_t* a, int64_t row, int64_t step, const uint32_t* b, int64_t ldb, int64_t pairs, bool add, float* c, int64_t ldc, __mmask16 last) {
#ifdef __AVX512BF16__
    __m512 sum[M][P] = {};
    if (add)
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < P; ++j) sum[i][j] = load(c + i * ldc + j * 16, j + 1 < P ? 0xffff : last);
    for (int64_t p = 0; p < pairs; ++p, a += step, b += ldb) {
      __m512bh right[P];
      for (int j = 0; j < P; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + j * 16);
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const auto left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i * row]));
        for (int j = 0; j < P; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
      }
    }
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < P; ++j) save(c + i * ldc + j * 16, j + 1 < P ? 0xffff : last, sum[i][j]);
#endif
  }

  template <int M = 1, class... A>
  static void tile(int64_t m, int64_t columns, A... rest) {
    if constexpr (M < MOST) {
      if (m != M) return tile<M + 1>(m, columns, rest...);
    }
    if (columns > 16) tile_of<M, 2>(rest..., lanes(columns - 16));
    else tile_of<M, 1>(rest..., lanes(columns));
  }

  friend void attend_causally(Operand& q, Operand& k, Operand& v, int64_t seen, float* out, float* lse, int64_t stride);

  int64_t rows_, width_;
  bool pairs_;
  Form across_, down_, turned_;
};

constexpr int64_t CAUSAL_ROWS = 64;  // queries whose scores exist at a time

// Queries q, scaled, that follow one another: the last one sees the first `seen` keys, each before it one less. out (rows, width
// of v); if wanted, the logarithm of each softmax's sum, `stride` apart.
inline void attend_causally(Operand& q, Operand& k, Operand& v, int64_t seen, float* out, float* lse, int64_t stride) {
  const int64_t rows = q.rows_, wide = v.width_;
  Scratch scratch;
  Operand p(scratch, q.pairs_, rows, seen);
  float* sum = scratch.take(rows);
  multiply(false, true, rows, seen, q.width_, q, k, false, p.x, seen);
  for (int64_t i = 0; i < rows; ++i) {
    const float all = exponentials(p.x + i * seen, seen - rows + i + 1, seen, sum[i]);
    if (lse) lse[i * stride] = all;
  }
  multiply(false, false, rows, wide, seen, p, v, false, out, wide);
  for (int64_t i = 0; i < rows; ++i) read(out + i * wide, wide, 1 / sum[i], out + i * wide);
}

}  // namespace sputnik
