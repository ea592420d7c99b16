// Attention of single tokens over the paged cache, and the elementwise functions of the forward pass.
//
// A cached token has W values: [latent | shared RoPE key] for MLA, [keys of all heads | values of all heads] for GQA. Token t
// of a sequence is in its block table[t / size]; within a block each head has its tokens together, so that a head's keys
// are read in one go. One fixed order of sums over tokens: a token's output depends on its own sequence alone.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace sputnik {

inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }

inline __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }

inline __m512 load(const uint16_t* p, __mmask16 mask) {  // bf16
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

// e^x to about 1e-7 relative; 0 below -104; NaN stays NaN (of the two, min and max give the second).
inline __m512 exp16(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.f), _mm512_min_ps(_mm512_set1_ps(88.3f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
  return _mm512_scalef_ps(p, n);
}

// out = x / rms(x) * weight
inline void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 v = load(x + i, lanes(n - i));
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  const __m512 scale = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(_mm512_mul_ps(load(x + i, mask), scale), load(weight + i, mask)));
  }
}

// out = silu(gate) * up, `gate_up` holding the gates first; out may lie on them
inline void swiglu(const float* gate_up, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = lanes(width - i);
    const __m512 g = load(gate_up + i, mask), one = _mm512_set1_ps(1.f);
    const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), g))));
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(silu, load(gate_up + width + i, mask)));
  }
}

// Rotate x by the table row `turn` of (cos, sin) pairs: pairs (2i, 2i + 1), or (i, i + half) as Llama does.
inline void rotate(float* x, const float* turn, int64_t half, bool interleaved) {
  const int64_t step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float c = turn[2 * i], s = turn[2 * i + 1], a = x[i * step], b = x[i * step + other];
    x[i * step] = a * c - b * s;
    x[i * step + other] = a * s + b * c;
  }
}

// The blocks of one sequence. In a block each part (a key or value head; for MLA the one row) has its tokens together.
template <class T>
struct Pages {
  const T* rows;
  const int32_t* table;
  int64_t size, width, parts, most;  // tokens of a block, values of a token in one part, parts, length of the table
  const T* at(int64_t block, int64_t part) const { return rows + (table[block] * parts + part) * size * width; }
};

// What is attended to after this: the same sequence's other heads, or the next sequence.
template <class T>
struct Next {
  Pages<T> pages;
  int64_t key_part, value_part;
};

// Where to fetch from while block `block` of `blocks` is worked on: six further, then in part `next_part` of what comes next.
// Blocks lie anywhere, so the hardware does not see what follows.
template <class T>
const char* fetched(const Pages<T>& pages, const Pages<T>& next, int64_t block, int64_t blocks, int64_t part, int64_t next_part) {
  const int64_t ahead = block + std::min<int64_t>(6, blocks);
  return reinterpret_cast<const char*>(ahead < blocks ? pages.at(ahead, part) : next.at(std::min(ahead - blocks, next.most - 1), next_part));
}

inline void fetch_four(const char* block, int64_t token, int64_t bytes) {
  for (int64_t byte = 0; byte < 4 * bytes; byte += 64) _mm_prefetch(block + token * bytes + byte, _MM_HINT_T0);
}

struct PagedScratch {
  std::vector<float> scores;
  std::vector<uint16_t> halves;
};

// Four registers summed up, each to one number.
inline __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// R query heads (rows of `query`, `stride` apart) against the first `length` tokens: keys are the first `key` values of
// part `key_part`, values the first `value` of `value_part`. out rows are `out_stride` apart. `scratch` is kept
// between calls.
template <int R, class T>
void attend_heads(const float* query, int64_t stride, const Pages<T>& pages, int64_t length, int64_t key_part, int64_t key,
                  int64_t value_part, int64_t value, float scale, float* out, int64_t out_stride, PagedScratch& scratch, const Next<T>& next) {
  std::vector<float>& p = scratch.scores;
  // Scores are stored four at a time: past a block's end by up to three, also where a block is a single token.
  const int64_t size = pages.size, padded = (length + std::max<int64_t>(size, 4) + 15) / 16 * 16;
  if (static_cast<int64_t>(p.size()) < R * padded) p.resize(R * padded);
  for (int64_t start = 0; start < length; start += size) {
    const T* rows = pages.at(start / size, key_part);
    const int64_t count = std::min(size, length - start);
    const char* ahead = fetched(pages, next.pages, start / size, (length + size - 1) / size, key_part, next.key_part);
    for (int64_t t = 0; t < count; t += 4) {
      fetch_four(ahead, t, pages.width * static_cast<int64_t>(sizeof(T)));
      const T* row[4];
      for (int64_t j = 0; j < 4; ++j) row[j] = rows + std::min(t + j, count - 1) * pages.width;
      __m512 sum[R][4] = {};
      for (int64_t i = 0; i < key; i += 16) {
        const __mmask16 mask = lanes(key - i);
        __m512 q[R];
        for (int r = 0; r < R; ++r) q[r] = load(query + r * stride + i, mask);
        for (int j = 0; j < 4; ++j) {
          const __m512 k = load(row[j] + i, mask);
          for (int r = 0; r < R; ++r) sum[r][j] = _mm512_fmadd_ps(q[r], k, sum[r][j]);
        }
      }
      for (int r = 0; r < R; ++r)  // the last four may reach past the end: written over or cut off below
        _mm_storeu_ps(p.data() + r * padded + start + t, _mm_mul_ps(sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]), _mm_set1_ps(scale)));
    }
  }
  float inverse[R];
  for (int r = 0; r < R; ++r) {
    float* s = p.data() + r * padded;
    std::fill(s + length, s + padded, -INFINITY);
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t t = 0; t < length; t += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(s + t));
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t t = 0; t < length; t += 16) {
      const __m512 e = _mm512_maskz_mov_ps(lanes(length - t), exp16(_mm512_sub_ps(_mm512_loadu_ps(s + t), most)));
      _mm512_storeu_ps(s + t, e);
      total = _mm512_add_ps(total, e);
    }
    inverse[r] = 1 / _mm512_reduce_add_ps(total);
  }
  const bool apart = value_part != key_part;  // else they have just been read
  for (int64_t i = 0; i < value; i += 64) {  // 64 values of each head at a time stay in registers
    __m512 acc[R][4] = {};
    __mmask16 mask[4];
    for (int j = 0; j < 4; ++j) mask[j] = value - i - j * 16 > 0 ? lanes(value - i - j * 16) : 0;
    for (int64_t start = 0; start < length; start += size) {
      const T* rows = pages.at(start / size, value_part) + i;
      const int64_t count = std::min(size, length - start);
      const char* ahead = fetched(pages, next.pages, start / size, (length + size - 1) / size, value_part, next.value_part);
      for (int64_t t = 0; t < count; ++t) {
        if (apart && t % 4 == 0) fetch_four(ahead, t, pages.width * static_cast<int64_t>(sizeof(T)));
        __m512 v[4];
        for (int j = 0; j < 4; ++j) v[j] = load(rows + t * pages.width + j * 16, mask[j]);
        for (int r = 0; r < R; ++r) {
          const __m512 weight = _mm512_set1_ps(p[r * padded + start + t]);
          for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_fmadd_ps(weight, v[j], acc[r][j]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 4; ++j)
        _mm512_mask_storeu_ps(out + r * out_stride + i + j * 16, mask[j], _mm512_mul_ps(acc[r][j], _mm512_set1_ps(inverse[r])));
  }
}

#ifdef __AVX512BF16__
inline __mmask32 halves(int64_t left) { return left >= 32 ? 0xffffffff : (1u << std::max<int64_t>(left, 0)) - 1; }

// The same with products of bf16 pairs, two to a lane: queries and weights are rounded to bf16, sums stay fp32. The
// weights are divided by the sum of what they were rounded to.
template <int R>
void attend_heads_dot(const float* query, int64_t stride, const Pages<uint16_t>& pages, int64_t length, int64_t key_part, int64_t key,
                      int64_t value_part, int64_t value, float scale, float* out, int64_t out_stride, PagedScratch& scratch, const Next<uint16_t>& next) {
  const int64_t size = pages.size, padded = (length + std::max<int64_t>(size, 4) + 15) / 16 * 16, wide = (key + 31) / 32 * 32;
  if (static_cast<int64_t>(scratch.scores.size()) < R * padded) scratch.scores.resize(R * padded);
  if (static_cast<int64_t>(scratch.halves.size()) < R * (padded + wide)) scratch.halves.resize(R * (padded + wide));
  float* scores = scratch.scores.data();
  uint16_t *weights = scratch.halves.data(), *queries = weights + R * padded;
  for (int r = 0; r < R; ++r)
    for (int64_t i = 0; i < wide; i += 32) {
      const float* from = query + r * stride + i;
      const __m512 low = load(from, lanes(key - i)), high = key - i > 16 ? load(from + 16, lanes(key - i - 16)) : _mm512_setzero_ps();
      _mm512_storeu_si512(queries + r * wide + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  for (int64_t start = 0; start < length; start += size) {
    const uint16_t* rows = pages.at(start / size, key_part);
    const int64_t count = std::min(size, length - start);
    const char* ahead = fetched(pages, next.pages, start / size, (length + size - 1) / size, key_part, next.key_part);
    for (int64_t t = 0; t < count; t += 4) {
      fetch_four(ahead, t, 2 * pages.width);
      const uint16_t* row[4];
      for (int64_t j = 0; j < 4; ++j) row[j] = rows + std::min(t + j, count - 1) * pages.width;
      __m512 sum[R][4] = {};
      for (int64_t i = 0; i < key; i += 32) {
        __m512bh q[R];
        for (int r = 0; r < R; ++r) q[r] = (__m512bh)_mm512_loadu_si512(queries + r * wide + i);
        for (int j = 0; j < 4; ++j) {
          const auto k = (__m512bh)_mm512_maskz_loadu_epi16(halves(key - i), row[j] + i);
          for (int r = 0; r < R; ++r) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], q[r], k);
        }
      }
      for (int r = 0; r < R; ++r)
        _mm_storeu_ps(scores + r * padded + start + t, _mm_mul_ps(sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]), _mm_set1_ps(scale)));
    }
  }
  float inverse[R];
  for (int r = 0; r < R; ++r) {
    float* s = scores + r * padded;
    std::fill(s + length, s + padded, -INFINITY);
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t t = 0; t < length; t += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(s + t));
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t t = 0; t < padded; t += 16) {
      const __m512 e = _mm512_maskz_mov_ps(lanes(std::max<int64_t>(length - t, 0)), exp16(_mm512_sub_ps(_mm512_loadu_ps(s + t), most)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + r * padded + t), (__m256i)_mm512_cvtneps_pbh(e));
      total = _mm512_add_ps(total, load(weights + r * padded + t, 0xffff));
    }
    inverse[r] = 1 / _mm512_reduce_add_ps(total);
  }
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const bool apart = value_part != key_part;  // else they have just been read
  for (int64_t i = 0; i < value; i += 64) {  // 64 values of each head at a time, two tokens at once
    const int parts = value - i > 32 ? 2 : 1;
    __m512 low[R][2] = {}, high[R][2] = {};
    for (int64_t start = 0; start < length; start += size) {
      const uint16_t* rows = pages.at(start / size, value_part) + i;
      const int64_t count = std::min(size, length - start);
      const char* ahead = fetched(pages, next.pages, start / size, (length + size - 1) / size, value_part, next.value_part);
      for (int64_t t = 0; t < count; t += 2) {
        if (apart && t % 4 == 0) fetch_four(ahead, t, 2 * pages.width);
        const uint16_t *a = rows + t * pages.width, *b = t + 1 < count ? a + pages.width : a;
        const uint32_t known = t + 1 < count ? 0xffffffff : 0xffff;
        __m512bh pair[R];
        for (int r = 0; r < R; ++r) {
          uint32_t both;
          std::memcpy(&both, weights + r * padded + start + t, 4);
          pair[r] = (__m512bh)_mm512_set1_epi32(static_cast<int>(both & known));
        }
        for (int j = 0; j < parts; ++j) {
          const __mmask32 mask = halves(value - i - j * 32);
          const __m512i va = _mm512_maskz_loadu_epi16(mask, a + j * 32), vb = _mm512_maskz_loadu_epi16(mask, b + j * 32);
          const auto lo = (__m512bh)_mm512_unpacklo_epi16(va, vb), hi = (__m512bh)_mm512_unpackhi_epi16(va, vb);
          for (int r = 0; r < R; ++r) {
            low[r][j] = _mm512_dpbf16_ps(low[r][j], lo, pair[r]);
            high[r][j] = _mm512_dpbf16_ps(high[r][j], hi, pair[r]);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < parts; ++j) {
        const int64_t from = i + j * 32;
        const __m512 by = _mm512_set1_ps(inverse[r]);
        const __m512 a = _mm512_permutex2var_ps(low[r][j], first, high[r][j]), b = _mm512_permutex2var_ps(low[r][j], second, high[r][j]);
        _mm512_mask_storeu_ps(out + r * out_stride + from, lanes(value - from), _mm512_mul_ps(a, by));
        if (value - from > 16) _mm512_mask_storeu_ps(out + r * out_stride + from + 16, lanes(value - from - 16), _mm512_mul_ps(b, by));
      }
  }
}
#endif

// `dot`: with the bf16 dot product, if the cache is bf16.
template <class T>
void attend(bool dot, int64_t heads, const float* query, int64_t stride, const Pages<T>& pages, int64_t length, int64_t key_part, int64_t key,
            int64_t value_part, int64_t value, float scale, float* out, int64_t out_stride, PagedScratch& scratch, const Next<T>& next) {
  for (int64_t h = 0; h < heads; h += 4) {
    const auto some = [&](auto count) {
      constexpr int R = decltype(count)::value;
      const float* q = query + h * stride;
      float* o = out + h * out_stride;
#ifdef __AVX512BF16__
      if constexpr (std::is_same_v<T, uint16_t>)
        if (dot) return attend_heads_dot<R>(q, stride, pages, length, key_part, key, value_part, value, scale, o, out_stride, scratch, next);
#endif
      attend_heads<R>(q, stride, pages, length, key_part, key, value_part, value, scale, o, out_stride, scratch, next);
    };
    switch (std::min<int64_t>(4, heads - h)) {
      case 1: some(std::integral_constant<int, 1>()); break;
      case 2: some(std::integral_constant<int, 2>()); break;
      case 3: some(std::integral_constant<int, 3>()); break;
      default: some(std::integral_constant<int, 4>());
    }
  }
}

}  // namespace sputnik
