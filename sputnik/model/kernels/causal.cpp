// Causal attention for training, forward and backward, with the rotation of queries and keys inside.
//
// Rows of a batch lie one after another, (N, heads, width), without padding. A segment is a run of rows that attend to
// themselves causally and to the whole of a prefix, an earlier segment that has none: a prompt and the answers drawn from
// it, which so need the prompt only once. Keys of MLA end in a part that all heads share.
//
// One task is one key head of one prefix with everything that hangs on it: nobody else adds to its gradients, and the order
// of sums does not depend on the number of threads, unless a task is alone and the BLAS shares its products out. Factors of
// products are copies that stay in the L2 cache, multiplied as bf16 if the rows are and the CPU does that faster. The scores
// of ROWS queries exist at a time, and the backward pass computes them again from what the forward pass kept: the logarithm
// of each softmax's sum.
#include "operand.h"

#include <map>
#include <optional>

namespace sputnik {
namespace {

constexpr int64_t ROWS = CAUSAL_ROWS, AHEAD = 8;

struct Segment {
  int64_t start, count, prefix_start, prefix_count;
  int64_t keys() const { return prefix_count + count; }
};

// The tensors of one call; strides in elements.
template <class T>
struct Heads {
  T* data;
  int64_t row, head, width;
  T* at(int64_t r, int64_t h) const { return data + r * row + h * head; }
  // Ahead of time: the hardware does not see that one head's part of each row is read.
  void fetch(int64_t r, int64_t h) const {
    for (const T* p = at(r, h); p < at(r, h) + width; p += 64 / sizeof(T)) _mm_prefetch(p, _MM_HINT_T0);
  }
};

template <class T>
Heads<T> heads(const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 3 && t.stride(2) == 1, "attention: (rows, heads, width) with dense widths is needed");
  return {elements<T>(t), t.stride(0), t.stride(1), t.size(2)};
}

struct Turns {
  const float* table;  // (positions, half, 2): cos and sin
  int64_t half;
  bool interleaved;

  // Rotate the last 2 * half of n rows of `width`, row i standing at position first + i; `sign` -1 turns back.
  void operator()(float* x, int64_t n, int64_t width, int64_t first, float sign) const {
    const __m512 factor = _mm512_set1_ps(sign);
    for (int64_t i = 0; i < n; ++i) {
      float* tail = x + i * width + width - 2 * half;
      const float* turn = table + (first + i) * half * 2;
      if (interleaved) {
        for (int64_t j = 0; j < 2 * half; j += 16) {
          const __mmask16 mask = lanes(2 * half - j);
          const __m512 t = load(turn + j, mask), pair = load(tail + j, mask);
          const __m512 crossed = _mm512_mul_ps(_mm512_permute_ps(pair, 0xb1), _mm512_mul_ps(_mm512_movehdup_ps(t), factor));
          save(tail + j, mask, _mm512_fmaddsub_ps(pair, _mm512_moveldup_ps(t), crossed));
        }
        continue;
      }
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
      for (int64_t j = 0; j < half; j += 16) {
        const __mmask16 mask = lanes(half - j);
        const __m512 low = load(turn + 2 * j, lanes(2 * (half - j))), high = load(turn + 2 * j + 16, lanes(std::max<int64_t>(0, 2 * (half - j) - 16)));
        const __m512 c = _mm512_permutex2var_ps(low, even, high), s = _mm512_mul_ps(_mm512_permutex2var_ps(low, odd, high), factor);
        const __m512 a = load(tail + j, mask), b = load(tail + half + j, mask);
        save(tail + j, mask, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        save(tail + half + j, mask, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
      }
    }
  }
};

template <class T>
struct Call {
  Heads<const T> query, key, value;
  std::optional<Heads<const T>> shared;
  Turns turns;
  float scale;
  int64_t groups() const { return query_heads / key_heads; }
  int64_t query_heads, key_heads, width;
  bool pairs = std::is_same_v<T, bf16> && use_bf16_dot();

  void load_queries(const Segment& s, int64_t first, int64_t rows, int64_t h, float* to) const {
    for (int64_t i = 0; i < rows; ++i) {
      query.fetch(s.start + first + i + AHEAD, h);
      read(query.at(s.start + first + i, h), width, scale, to + i * width);
    }
    turns(to, rows, width, s.prefix_count + first, 1);
  }

  void load_keys(const Segment& s, int64_t g, float* k, float* v) const {
    for (int64_t i = 0; i < s.keys(); ++i) {
      const int64_t r = i < s.prefix_count ? s.prefix_start + i : s.start + i - s.prefix_count;
      key.fetch(r + AHEAD, g);
      value.fetch(r + AHEAD, g);
      read(key.at(r, g), key.width, 1, k + i * width);
      if (shared) read(shared->at(r, 0), shared->width, 1, k + i * width + key.width);
      read(value.at(r, g), value.width, 1, v + i * value.width);
    }
    turns(k, s.keys(), width, 0, 1);
  }
};

template <class T>
Call<T> make_call(const at::Tensor& query, const at::Tensor& key, const std::optional<at::Tensor>& shared, const at::Tensor& value,
                  const at::Tensor& turn, bool interleaved, double scale) {
  TORCH_CHECK(turn.is_contiguous() && turn.scalar_type() == at::kFloat && turn.dim() == 3, "attention: turn must be (P, R/2, 2) fp32");
  Call<T> call{heads<const T>(query), heads<const T>(key), heads<const T>(value), {}, {turn.data_ptr<float>(), turn.size(1), interleaved},
               static_cast<float>(scale), query.size(1), key.size(1), query.size(2)};
  if (shared) call.shared = heads<const T>(*shared);
  TORCH_CHECK(key.size(2) + (shared ? shared->size(2) : 0) == call.width, "attention: keys and queries differ in width");
  TORCH_CHECK(2 * call.turns.half <= call.width && query.size(1) % key.size(1) == 0 && value.size(1) == key.size(1), "attention: heads do not fit");
  for (const at::Tensor& t : {key, value, shared ? *shared : key}) TORCH_CHECK(t.size(0) == query.size(0), "attention: rows do not fit");
  return call;
}

// Segments in families: each prefix with those that hang on it, the prefix first. They must follow one another: a row that
// is in none would be left as the memory was.
std::vector<std::vector<Segment>> families(const at::Tensor& segments, int64_t positions, int64_t rows) {
  TORCH_CHECK(segments.scalar_type() == at::kLong && segments.dim() == 2 && segments.size(1) == 4 && segments.is_contiguous(), "segments: (S, 4)");
  const int64_t* p = segments.data_ptr<int64_t>();
  std::map<int64_t, size_t> family_of;
  std::vector<std::vector<Segment>> out;
  int64_t end = 0;
  for (int64_t i = 0; i < segments.size(0); ++i, p += 4) {
    const Segment s{p[0], p[1], p[2], p[3]};
    TORCH_CHECK(s.keys() <= positions, "attention: more positions than the table has");
    TORCH_CHECK(s.start == end && s.count > 0 && s.count <= rows - end, "attention: a segment outside the rows, or not after the one before");
    end += s.count;
    if (s.prefix_count == 0) {
      family_of[s.start] = out.size();
      out.push_back({s});
    } else {
      const auto found = family_of.find(s.prefix_start);
      TORCH_CHECK(found != family_of.end() && out[found->second][0].count == s.prefix_count, "attention: a prefix must be an earlier segment");
      out[found->second].push_back(s);
    }
  }
  TORCH_CHECK(end == rows, "attention: rows in no segment");
  return out;
}

template <class T>
void forward(const Call<T>& call, const at::Tensor& segments, int64_t positions, const at::Tensor& out, float* lse) {
  const auto all = families(segments, positions, out.size(0));
  const Heads<T> to = heads<T>(out);
  tasks(static_cast<int64_t>(all.size()) * call.key_heads, [&](int64_t task) {
    const int64_t g = task % call.key_heads, width = call.width, wide = call.value.width;
    for (const Segment& s : all[task / call.key_heads]) {
      Scratch scratch;
      Operand k(scratch, call.pairs, s.keys(), width), v(scratch, call.pairs, s.keys(), wide);
      float* o = scratch.take(ROWS * wide);
      call.load_keys(s, g, k.x, v.x);
      for (int64_t h = g * call.groups(); h < (g + 1) * call.groups(); ++h) {
        for (int64_t r = 0; r < s.count; r += ROWS) {
          const int64_t rows = std::min(ROWS, s.count - r);
          Scratch block;
          Operand q(block, call.pairs, rows, width);
          call.load_queries(s, r, rows, h, q.x);
          attend_causally(q, k, v, s.prefix_count + r + rows, o, lse + (s.start + r) * call.query_heads + h, call.query_heads);
          for (int64_t i = 0; i < rows; ++i) write(o + i * wide, wide, 1, to.at(s.start + r + i, h));
        }
      }
    }
  });
}

template <class T>
struct Gradients {
  Heads<T> query, key, value;
  std::optional<Heads<T>> shared;  // one for each key head
};

template <class T>
void backward(const Call<T>& call, const at::Tensor& segments, int64_t positions, int64_t rows_in_all, const Heads<const T>& grad, const Heads<const T>& out,
              const float* lse, const Gradients<T>& to) {
  const auto all = families(segments, positions, rows_in_all);
  tasks(static_cast<int64_t>(all.size()) * call.key_heads, [&](int64_t task) {
    const auto& family = all[task / call.key_heads];
    const int64_t g = task % call.key_heads, width = call.width, wide = call.value.width, prefix = family[0].count;
    Scratch kept;
    float *prefix_k = kept.take(prefix * width), *prefix_v = kept.take(prefix * wide);
    std::fill_n(prefix_k, prefix * width, 0.f);
    std::fill_n(prefix_v, prefix * wide, 0.f);
    const auto store = [&](const Segment& s, const float* dk, const float* dv) {
      for (int64_t i = 0; i < s.count; ++i) {
        write(dk + i * width, to.key.width, 1, to.key.at(s.start + i, g));
        if (to.shared) write(dk + i * width + to.key.width, to.shared->width, 1, to.shared->at(s.start + i, g));
        write(dv + i * wide, wide, 1, to.value.at(s.start + i, g));
      }
    };
    for (const Segment& s : family) {
      const int64_t n = s.keys();
      Scratch scratch;
      Operand k(scratch, call.pairs, n, width), v(scratch, call.pairs, n, wide);
      float *dk = scratch.take(n * width), *dv = scratch.take(n * wide), *dq = scratch.take(ROWS * width), *o = scratch.take(wide);
      std::fill_n(dk, n * width, 0.f);
      std::fill_n(dv, n * wide, 0.f);
      call.load_keys(s, g, k.x, v.x);
      for (int64_t h = g * call.groups(); h < (g + 1) * call.groups(); ++h) {
        for (int64_t r = 0; r < s.count; r += ROWS) {
          const int64_t rows = std::min(ROWS, s.count - r), seen = s.prefix_count + r + rows;
          Scratch block;
          Operand q(block, call.pairs, rows, width), d(block, call.pairs, rows, wide);
          Operand p(block, call.pairs, rows, seen), dp(block, call.pairs, rows, seen);
          call.load_queries(s, r, rows, h, q.x);
          for (int64_t i = 0; i < rows; ++i) {
            grad.fetch(s.start + r + i + AHEAD, h);
            out.fetch(s.start + r + i, h);
            read(grad.at(s.start + r + i, h), wide, 1, d.x + i * wide);
          }
          multiply(false, true, rows, seen, width, q, k, false, p.x, seen);
          multiply(false, true, rows, seen, wide, d, v, false, dp.x, seen);
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t row = s.start + r + i;
            read(out.at(row, h), wide, 1, o);
            softmax_backward(p.x + i * seen, dp.x + i * seen, seen - rows + i + 1, seen, lse[row * call.query_heads + h], dot(o, d.x + i * wide, wide));
          }
          multiply(true, false, seen, wide, rows, p, d, true, dv, wide);
          multiply(true, false, seen, width, rows, dp, q, true, dk, width);
          multiply(false, false, rows, width, seen, dp, k, false, dq, width);
          call.turns(dq, rows, width, s.prefix_count + r, -1);
          for (int64_t i = 0; i < rows; ++i) write(dq + i * width, width, call.scale, to.query.at(s.start + r + i, h));
        }
      }
      call.turns(dk, n, width, 0, -1);
      add(dk, prefix * width, prefix_k);
      add(dv, prefix * wide, prefix_v);
      if (s.prefix_count) store(s, dk + prefix * width, dv + prefix * wide);
    }
    store(family[0], prefix_k, prefix_v);
  });
}

using Maybe = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> causal_forward(const at::Tensor& query, const at::Tensor& key, const Maybe& shared, const at::Tensor& value,
                                                  const at::Tensor& turn, bool interleaved, const at::Tensor& segments, double scale) {
  at::Tensor out = at::empty({query.size(0), query.size(1), value.size(2)}, query.options());
  at::Tensor lse = at::empty({query.size(0), query.size(1)}, query.options().dtype(at::kFloat));
  by_type(query, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(make_call<T>(query, key, shared, value, turn, interleaved, scale), segments, turn.size(0), out, lse.data_ptr<float>());
  });
  return {out, lse};
}

void causal_backward(const at::Tensor& grad, const at::Tensor& out, const at::Tensor& lse, const at::Tensor& query, const at::Tensor& key,
                     const Maybe& shared, const at::Tensor& value, const at::Tensor& turn, bool interleaved, const at::Tensor& segments,
                     double scale, const at::Tensor& grad_query, const at::Tensor& grad_key, const Maybe& grad_shared,
                     const at::Tensor& grad_value) {
  by_type(query, [&](auto zero) {
    using T = decltype(zero);
    Gradients<T> to{heads<T>(grad_query), heads<T>(grad_key), heads<T>(grad_value), {}};
    if (grad_shared) to.shared = heads<T>(*grad_shared);
    backward<T>(make_call<T>(query, key, shared, value, turn, interleaved, scale), segments, turn.size(0), query.size(0), heads<const T>(grad),
                heads<const T>(out), lse.data_ptr<float>(), to);
  });
}

}  // namespace
}  // namespace sputnik

TORCH_LIBRARY_FRAGMENT(sputnik, m) {
  m.def("causal_forward", &sputnik::causal_forward);
  m.def("causal_backward", &sputnik::causal_backward);
}
