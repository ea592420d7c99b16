#include "packed.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>

namespace sputnik {

Format parse_format(const std::string& name) {
  if (name == "fp32") return Format::f32;
  if (name == "bf16") return Format::bf16;
  if (name == "int8") return Format::q8;
  TORCH_CHECK(name == "int4", "weight format must be fp32, bf16, int8 or int4, not ", name);
  return Format::q4;
}

at::Tensor huge_zeros(at::IntArrayRef sizes, at::ScalarType type) {
  constexpr uintptr_t PAGE = 1 << 21;
  at::Tensor out = at::empty(sizes, type);
  const auto start = reinterpret_cast<uintptr_t>(out.data_ptr());
  const uintptr_t first = (start + PAGE - 1) / PAGE * PAGE, last = (start + out.nbytes()) / PAGE * PAGE;
#ifdef MADV_HUGEPAGE
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: no harm in a no
#endif
  return out.zero_();
}

// --- packing ---------------------------------------------------------------------------------------------------------

namespace {

void pack_quantised(const Packed& out, const float* w, int64_t unit, char* to) {
  const bool four = out.format == Format::q4;
  for (int64_t group = 0; group < out.k / GROUP; ++group, to += out.group_bytes()) {
    auto* bytes = reinterpret_cast<uint8_t*>(to);
    auto* scales = reinterpret_cast<at::Half*>(to + UNIT * (four ? GROUP / 2 : GROUP));
    for (int64_t i = 0; i < UNIT; ++i) {
      const int64_t row = unit * UNIT + i, lane = i % LANES;
      uint8_t* panel = bytes + i / LANES * (four ? GROUP * LANES / 2 : GROUP * LANES);
      float values[GROUP] = {};
      if (row < out.n) std::copy_n(w + row * out.k + group * GROUP, GROUP, values);
      const float least = *std::min_element(values, values + GROUP), most = *std::max_element(values, values + GROUP);
      // The value of largest size becomes +-127; the smallest 0 and the largest 15.
      scales[i] = static_cast<at::Half>(four ? (most - least) / 15 : std::max(-least, most) / 127);
      if (four) scales[UNIT + i] = static_cast<at::Half>(least);
      if (std::any_of(values, values + GROUP, [](float v) { return std::isnan(v); })) scales[i] = static_cast<at::Half>(NAN);
      const float scale = static_cast<float>(scales[i]), inverse = scale == 0 ? 0 : 1 / scale;
      const float from = four ? static_cast<float>(scales[UNIT + i]) : 0;
      for (int64_t j = 0; j < GROUP; ++j) {
        const int64_t quad = j / 4, at = lane * 4 + j % 4;
        const auto rounded = static_cast<int>(std::lround((values[j] - from) * inverse));
        if (four) {  // quads 0..3 in the low halves of four registers, 4..7 in the high halves
          const int q = std::clamp(rounded, 0, 15);
          panel[quad % 4 * 64 + at] |= static_cast<uint8_t>(quad < 4 ? q : q << 4);
        } else {
          panel[quad * 64 + at] = static_cast<uint8_t>(std::clamp(rounded, -127, 127) + 128);
        }
      }
    }
  }
}

}  // namespace

Packed pack(const at::Tensor& weight, Format format) {
  TORCH_CHECK(weight.dim() == 2 && weight.device().is_cpu(), "pack: a matrix on the CPU is needed");
  Packed out;
  out.n = weight.size(0);
  out.k = weight.size(1);
  if ((format == Format::q8 || format == Format::q4) && out.k % GROUP != 0) format = Format::bf16;
  if (format == Format::bf16 && out.k % 2 != 0) format = Format::f32;
  out.format = format;
  const int64_t k = out.k;
  out.data = huge_zeros({out.units() * out.unit_bytes()}, at::kByte);
  out.bytes = static_cast<const char*>(out.data.data_ptr());
  const at::Tensor source = weight.detach().to(at::kFloat).contiguous();
  const float* w = source.data_ptr<float>();
  tasks(out.units(), [&](int64_t unit) {
    char* to = const_cast<char*>(out.unit(unit));
    if (out.quantised()) return pack_quantised(out, w, unit, to);
    for (int64_t i = 0; i < UNIT && unit * UNIT + i < out.n; ++i) {
      const float* row = w + (unit * UNIT + i) * k;
      for (int64_t j = 0; j < k; ++j) {
        if (format == Format::f32) reinterpret_cast<float*>(to)[j * UNIT + i] = row[j];
        else reinterpret_cast<uint16_t*>(to)[(j / 2 * UNIT + i) * 2 + j % 2] = to_bf16(row[j]);
      }
    }
  });
  return out;
}

// --- rows of x -------------------------------------------------------------------------------------------------------

namespace {

template <class T>
void grow(std::vector<T>& v, int64_t n) {  // never smaller again: what comes back would be cleared each time
  if (static_cast<int64_t>(v.size()) < n) v.resize(n);
}

void round_row(const float* x, int64_t k, uint16_t* to) {
  int64_t j = 0;
#ifdef __AVX512BF16__
  for (; j + 16 <= k; j += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + j)));
#endif
  for (; j < k; ++j) to[j] = to_bf16(x[j]);
}

}  // namespace

void prepare(Rows& rows, const float* x, int64_t m, int64_t k, int64_t ld, Format format) {
  rows.x = x;
  rows.ld = ld;
  if (format == Format::bf16 && use_bf16_dot()) {
    grow(rows.pairs, m * k / 2);
    auto* to = reinterpret_cast<uint16_t*>(rows.pairs.data());
    at::parallel_for(0, m, 1 + 32768 / k, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) round_row(x + i * ld, k, to + i * k);
    });
  }
  if (format != Format::q8 && format != Format::q4) return;
  const int64_t groups = k / GROUP;
  grow(rows.q, m * k);
  grow(rows.scale, m * groups);
  grow(rows.sum, m * groups);
  at::parallel_for(0, m * groups, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t i = place / groups, g = place % groups;
      const __m512 a = _mm512_loadu_ps(x + i * ld + g * GROUP), b = _mm512_loadu_ps(x + i * ld + g * GROUP + 16);
      const bool odd = _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);  // integers have no NaN: the scale keeps it
      const float size = odd ? NAN : _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
      const __m512 inverse = _mm512_set1_ps(size < 1e-36f ? 0 : 127 / size);
      const __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)), qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(&rows.q[i * k + g * GROUP]), _mm512_cvtsepi32_epi8(qa));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(&rows.q[i * k + g * GROUP + 16]), _mm512_cvtsepi32_epi8(qb));
      rows.scale[i * groups + g] = size / 127;
      rows.sum[i * groups + g] = _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
    }
  });
}

// --- register tiles: M rows of x by 2 panels ------------------------------------------------------------------------

namespace {

constexpr int P = UNIT / LANES;
constexpr int64_t STAYING = 288;  // pairs along k of a unit, 36 KB, which stay in the L1 cache while rows pass
constexpr int64_t PREFETCH = 4096;  // bytes ahead; panels are too short for the hardware to see the stream

// The two lines that a step reads, ahead of time, for up to MOST rows: with more the products take longer than the reading.
template <int M, int MOST = 4>
inline void fetch(const void* at) {
  if constexpr (M <= MOST) {
    _mm_prefetch(static_cast<const char*>(at) + PREFETCH, _MM_HINT_T0);
    _mm_prefetch(static_cast<const char*>(at) + PREFETCH + 64, _MM_HINT_T0);
  }
}

inline __mmask16 lanes_of(int64_t left) { return left >= LANES ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(left, 0)) - 1); }

template <int M>
inline void store(__m512 (&acc)[M][P], float* y, int64_t ldy, int64_t columns) {
  for (int p = 0; p < P; ++p)
    for (int i = 0; i < M; ++i) _mm512_mask_storeu_ps(y + i * ldy + p * LANES, lanes_of(columns - p * LANES), acc[i][p]);
}

template <int M>
void tile_f32(const Rows& rows, int64_t first, const Packed& w, int64_t unit, float* y, int64_t ldy, int64_t columns) {
  const float* x = rows.x + first * rows.ld;
  const auto* at = reinterpret_cast<const float*>(w.unit(unit));
  __m512 acc[M][P] = {};
  for (int64_t k = 0; k < w.k; ++k, at += UNIT) {
    fetch<M>(at);
    const __m512 a = _mm512_loadu_ps(at), b = _mm512_loadu_ps(at + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const __m512 value = _mm512_set1_ps(x[i * rows.ld + k]);
      acc[i][0] = _mm512_fmadd_ps(a, value, acc[i][0]);
      acc[i][1] = _mm512_fmadd_ps(b, value, acc[i][1]);
    }
  }
  store<M>(acc, y, ldy, columns);
}

template <int M>
void tile_bf16(const Rows& rows, int64_t first, const Packed& w, int64_t unit, float* y, int64_t ldy, int64_t columns) {
  const float* x = rows.x + first * rows.ld;
  const char* at = w.unit(unit);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  __m512 acc[M][P] = {};
  for (int64_t k = 0; k < w.k; k += 2, at += 128) {
    fetch<M>(at);
    const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + 64);
    const __m512 a0 = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), b0 = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    const __m512 a1 = _mm512_castsi512_ps(_mm512_and_si512(a, high)), b1 = _mm512_castsi512_ps(_mm512_and_si512(b, high));
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const __m512 even = _mm512_set1_ps(x[i * rows.ld + k]), odd = _mm512_set1_ps(x[i * rows.ld + k + 1]);
      acc[i][0] = _mm512_fmadd_ps(a1, odd, _mm512_fmadd_ps(a0, even, acc[i][0]));
      acc[i][1] = _mm512_fmadd_ps(b1, odd, _mm512_fmadd_ps(b0, even, acc[i][1]));
    }
  }
  store<M>(acc, y, ldy, columns);
}

// Of pairs [begin, end) along k, added to y where these are not the first.
template <int M>
void tile_bf16_dot(const Rows& rows, int64_t first, const Packed& w, int64_t unit, float* y, int64_t ldy, int64_t columns, int64_t begin, int64_t end) {
#ifdef __AVX512BF16__
  const int64_t half = w.k / 2;
  const uint32_t* x = rows.pairs.data() + first * half;
  const char* at = w.unit(unit) + begin * 128;
  __m512 acc[M][P];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
    for (int p = 0; p < P; ++p) acc[i][p] = begin ? _mm512_maskz_loadu_ps(lanes_of(columns - p * LANES), y + i * ldy + p * LANES) : _mm512_setzero_ps();
  for (int64_t k = begin; k < end; ++k, at += 128) {
    fetch<M, 12>(at);
    const auto a = (__m512bh)_mm512_loadu_si512(at), b = (__m512bh)_mm512_loadu_si512(at + 64);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const auto pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[i * half + k]));
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a, pair);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], b, pair);
    }
  }
  store<M>(acc, y, ldy, columns);
#endif
}

inline int quad(const int8_t* x) {
  int value;
  std::memcpy(&value, x, 4);
  return value;
}

inline __m512i dot(__m512i acc, __m512i weights, __m512i values) {
#ifdef __AVX512VNNI__
  return _mm512_dpbusd_epi32(acc, weights, values);
#else  // without VNNI: widen to 16 bits, where no product of u8 and s8 pairs overflows
  const __m512i even = _mm512_and_si512(weights, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(weights, 8);
  const __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16(values, 8), 8), x_odd = _mm512_srai_epi16(values, 8);
  return _mm512_add_epi32(acc, _mm512_add_epi32(_mm512_madd_epi16(even, x_even), _mm512_madd_epi16(odd, x_odd)));
#endif
}

// q8 and q4. The integers of one group are summed exactly, then scaled: one fixed order of fp32 sums over groups.
template <int M, bool FOUR>
void tile_quantised(const Rows& rows, int64_t first, const Packed& w, int64_t unit, float* y, int64_t ldy, int64_t columns) {
  const int64_t k = w.k, groups = k / GROUP;
  const int8_t* x = rows.q.data() + first * k;
  const float* x_scale = rows.scale.data() + first * groups;
  const int32_t* x_sum = rows.sum.data() + first * groups;
  constexpr int64_t BYTES = FOUR ? GROUP * LANES / 2 : GROUP * LANES;  // of one panel's group
  const char* at_group = w.unit(unit);
  const __m512i low = _mm512_set1_epi8(0x0f);
  __m512 acc[M][P] = {};
  constexpr int64_t WHOLE = P * BYTES + (FOUR ? 4 : 2) * UNIT;
  for (int64_t g = 0; g < groups; ++g, at_group += WHOLE) {
    for (int64_t ahead = 0; ahead < WHOLE; ahead += 64) _mm_prefetch(at_group + PREFETCH + ahead, _MM_HINT_T0);
    __m512i whole[M][P];
    for (int i = 0; i < M; ++i) {
      // q8 weights are stored with 128 added: start from what that adds to the sum, taken off.
      whole[i][0] = whole[i][1] = _mm512_set1_epi32(FOUR ? 0 : -128 * x_sum[i * groups + g]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < (FOUR ? 4 : 8); ++j) {
      for (int p = 0; p < P; ++p) {
        const __m512i bytes = _mm512_loadu_si512(at_group + p * BYTES + j * 64);
        if (FOUR) {
          const __m512i a = _mm512_and_si512(bytes, low), b = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
#pragma GCC unroll 12
          for (int i = 0; i < M; ++i) {
            const int8_t* at = x + i * k + g * GROUP;
            whole[i][p] = dot(whole[i][p], a, _mm512_set1_epi32(quad(at + 4 * j)));
            whole[i][p] = dot(whole[i][p], b, _mm512_set1_epi32(quad(at + 16 + 4 * j)));
          }
        } else {
#pragma GCC unroll 12
          for (int i = 0; i < M; ++i)
            whole[i][p] = dot(whole[i][p], bytes, _mm512_set1_epi32(quad(x + i * k + g * GROUP + 4 * j)));
        }
      }
    }
    for (int p = 0; p < P; ++p) {
      const auto* halves = reinterpret_cast<const __m256i*>(at_group + P * BYTES) + p;
      const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
      const __m512 least = FOUR ? _mm512_cvtph_ps(_mm256_loadu_si256(halves + P)) : _mm512_setzero_ps();
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const float own = x_scale[i * groups + g];
        acc[i][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[i][p]), _mm512_mul_ps(scale, _mm512_set1_ps(own)), acc[i][p]);
        if (FOUR) acc[i][p] = _mm512_fmadd_ps(least, _mm512_set1_ps(own * static_cast<float>(x_sum[i * groups + g])), acc[i][p]);
      }
    }
  }
  store<M>(acc, y, ldy, columns);
}

using Tile = void (*)(const Rows&, int64_t, const Packed&, int64_t, float*, int64_t, int64_t);

template <int M>
Tile tile_of(Format format) {
  switch (format) {
    case Format::f32: return tile_f32<M>;
    case Format::bf16: return tile_bf16<M>;
    case Format::q8: return tile_quantised<M, false>;
    default: return tile_quantised<M, true>;
  }
}

// f(the number m, known to the compiler), up to what the registers hold.
template <int M = 1, class F>
void with_rows(int64_t m, const F& f) {
  if constexpr (M < MAX_ROWS) {
    if (m != M) return with_rows<M + 1>(m, f);
  }
  f(std::integral_constant<int, M>());
}

void unit_with(const Rows& rows, int64_t first, int64_t m, const Packed& w, int64_t unit, float* y, int64_t ldy, bool dot) {
  const int64_t most = w.quantised() ? MAX_ROWS / 2 : MAX_ROWS;  // quantised tiles need two accumulators each
  const int64_t blocks = (m + most - 1) / most, columns = w.n - unit * UNIT;
  const auto block_by_block = [&](const auto& f) {  // even shares, so that no tile is left with a row or two
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t from = m * block / blocks;
      with_rows(m * (block + 1) / blocks - from, [&](auto count) { f(count, from, y + from * ldy + unit * UNIT); });
    }
  };
  if (w.format != Format::bf16 || !dot)
    return block_by_block([&](auto count, int64_t from, float* to) { tile_of<count>(w.format)(rows, first + from, w, unit, to, ldy, columns); });
  const int64_t pairs = w.k / 2, parts = blocks > 1 ? (pairs + STAYING - 1) / STAYING : 1;
  for (int64_t part = 0; part < parts; ++part)
    block_by_block([&](auto count, int64_t from, float* to) {
      tile_bf16_dot<count>(rows, first + from, w, unit, to, ldy, columns, pairs * part / parts, pairs * (part + 1) / parts);
    });
}

}  // namespace

namespace {
std::atomic<int> bf16_dot{-1};
}

void set_bf16_dot(bool on) { bf16_dot = on; }

bool use_bf16_dot() {
#ifdef __AVX512BF16__
  const int set = bf16_dot.load(std::memory_order_relaxed);
  return set < 0 ? __builtin_cpu_is("amd") : set != 0;
#else
  return false;
#endif
}

void unit_product(const Rows& rows, int64_t first, int64_t m, const Packed& w, int64_t unit, float* y, int64_t ldy) {
  unit_with(rows, first, m, w, unit, y, ldy, use_bf16_dot());
}

void product(const float* x, int64_t m, int64_t ldx, const Packed& w, float* y, int64_t ldy) {
  if (m == 0) return;
  static thread_local Rows kept;
  Rows& rows = kept;  // other threads read those of this one
  prepare(rows, x, m, w.k, ldx, w.format);
  // Neighbours in memory to one thread, unless the work of each is so much that threads would wait for the last one.
  const int64_t runs = m > MAX_ROWS ? w.units() : std::min<int64_t>(w.units(), 8 * at::get_num_threads());
  tasks(runs, m * w.n * w.k, [&](int64_t run) {
    for (int64_t unit = w.units() * run / runs; unit < w.units() * (run + 1) / runs; ++unit) unit_product(rows, 0, m, w, unit, y, ldy);
  });
}

}  // namespace sputnik
