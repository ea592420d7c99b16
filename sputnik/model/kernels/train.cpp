// The rest of a training step in one pass over memory each: norms with their residual sum, SwiGLU, the experts, and the
// gradient of the loss by the logits. Sums over rows go through a fixed number of partial sums: no result depends on the
// number of threads, save where the BLAS shares a product out (`narrow_product`, an expert that is the only one).
#include "fused.h"

#include <optional>

namespace sputnik {
namespace {

using Maybe = std::optional<at::Tensor>;

constexpr int64_t CHUNK = 64;  // rows of a task

template <class F>
void row_tasks(int64_t rows, const F& f) {
  tasks((rows + CHUNK - 1) / CHUNK, [&](int64_t task) { f(task, task * CHUNK, std::min(rows, (task + 1) * CHUNK)); });
}

const float* floats(const at::Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.dim() > 0 && t.stride(-1) == 1, "fp32 with dense rows is needed");
  return t.data_ptr<float>();
}

float* target(const at::Tensor& t) { return const_cast<float*>(floats(t)); }

template <class T>
T* dense_rows(const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 2 && t.stride(1) == 1, "dense rows are needed");
  return elements<T>(t);
}

// --- RMSNorm ---------------------------------------------------------------------------------------------------------

// x (N, D), and what is added to it first -> (sum, norm of the sum, 1 / rms of each row). Without delta the sum is x. x and
// delta are fp32 or bf16, a sum is fp32; `narrow`: the norm is rounded to bf16.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_forward(const at::Tensor& x, const Maybe& delta, const at::Tensor& weight, double eps, bool narrow) {
  const int64_t rows = x.size(0), n = x.size(1);
  TORCH_CHECK(weight.numel() == n && (!delta || delta->sizes() == x.sizes()), "norm: sizes do not fit");
  const auto wide = x.options().dtype(at::kFloat);
  at::Tensor sum = delta ? at::empty({rows, n}, wide) : x, scale = at::empty({rows}, wide);
  at::Tensor out = at::empty({rows, n}, narrow ? x.options().dtype(at::kBFloat16) : wide);
  const float* pw = floats(weight);
  float* pc = target(scale);
  const int64_t ldx = x.stride(0), ldd = delta ? delta->stride(0) : 0, lds = sum.stride(0);
  by_type(out, [&](auto o) {
    by_type(x, [&](auto v) {
      by_type(delta ? *delta : x, [&](auto d) {
        const auto* px = dense_rows<decltype(v)>(x);
        const auto* pd = delta ? dense_rows<decltype(d)>(*delta) : nullptr;
        float* ps = delta ? target(sum) : nullptr;
        auto* po = dense_rows<decltype(o)>(out);
        row_tasks(rows, [&](int64_t, int64_t first, int64_t last) {
          for (int64_t r = first; r < last; ++r) {
            __m512 squares = _mm512_setzero_ps();
            for (int64_t i = 0; i < n; i += 16) {
              const __mmask16 mask = lanes(n - i);
              __m512 value = load(px + r * ldx + i, mask);
              if (pd) {
                value = _mm512_add_ps(value, load(pd + r * ldd + i, mask));
                save(ps + r * lds + i, mask, value);
              }
              squares = _mm512_fmadd_ps(value, value, squares);
            }
            pc[r] = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(n) + static_cast<float>(eps));
            const __m512 c = _mm512_set1_ps(pc[r]);
            for (int64_t i = 0; i < n; i += 16) {
              const __mmask16 mask = lanes(n - i);
              const __m512 value = pd ? load(ps + r * lds + i, mask) : load(px + r * ldx + i, mask);
              save(po + r * n + i, mask, _mm512_mul_ps(_mm512_mul_ps(value, c), load(pw + i, mask)));
            }
          }
        });
      });
    });
  });
  return {sum, out, scale};
}

// Gradients by the sum, in its type, and by the weight; `straight` is the gradient that reaches the sum past the norm. In between,
// if `narrow`, the first again as bf16: that of a delta.
std::tuple<at::Tensor, Maybe, at::Tensor> norm_backward(const at::Tensor& grad, const Maybe& straight, const at::Tensor& x, const at::Tensor& scale,
                                                        const at::Tensor& weight, bool narrow) {
  const int64_t rows = x.size(0), n = x.size(1), ldx = x.stride(0), ldg = grad.stride(0), lds = straight ? straight->stride(0) : 0;
  at::Tensor grad_x = at::empty({rows, n}, x.options()), parts = at::zeros({(rows + CHUNK - 1) / CHUNK, n}, scale.options());
  Maybe grad_delta;
  if (narrow) grad_delta = at::empty({rows, n}, x.options().dtype(at::kBFloat16));
  const float *pc = floats(scale), *pw = floats(weight), *ps = straight ? floats(*straight) : nullptr;
  float* pp = target(parts);
  bf16* pd = narrow ? elements<bf16>(*grad_delta) : nullptr;
  by_type(grad, [&](auto zero) {
    by_type(x, [&](auto value) {
      const auto* pg = dense_rows<decltype(zero)>(grad);
      const auto* px = dense_rows<decltype(value)>(x);
      auto* po = dense_rows<decltype(value)>(grad_x);
      row_tasks(rows, [&](int64_t task, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
          const auto* g = pg + r * ldg;
          const auto* v = px + r * ldx;
          __m512 along = _mm512_setzero_ps();
          const __m512 c = _mm512_set1_ps(pc[r]);
          for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 mask = lanes(n - i);
            const __m512 gx = _mm512_mul_ps(load(g + i, mask), load(v + i, mask));
            along = _mm512_fmadd_ps(gx, load(pw + i, mask), along);
            save(pp + task * n + i, mask, _mm512_fmadd_ps(gx, c, load(pp + task * n + i, mask)));
          }
          const __m512 back = _mm512_set1_ps(_mm512_reduce_add_ps(along) * pc[r] * pc[r] * pc[r] / static_cast<float>(n));
          for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 mask = lanes(n - i);
            __m512 d = _mm512_mul_ps(_mm512_mul_ps(load(g + i, mask), load(pw + i, mask)), c);
            d = _mm512_fnmadd_ps(load(v + i, mask), back, d);
            if (ps) d = _mm512_add_ps(d, load(ps + r * lds + i, mask));
            save(po + r * n + i, mask, d);
            if (pd) save(pd + r * n + i, mask, d);
          }
        }
      });
    });
  });
  return {grad_x, grad_delta, parts.sum(0)};
}

// --- SwiGLU ----------------------------------------------------------------------------------------------------------

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

template <class T, class Out>
void silu_times(const T* gate, const T* up, int64_t n, Out* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512 g = load(gate + i, mask);
    save(out + i, mask, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), load(up + i, mask)));
  }
}

// One row of the gradient; `grad` is multiplied by `factor` first, `act` after. Returns sum(grad * act), factor left out.
// Outputs may lie on inputs.
template <class T>
float silu_times_backward(const T* grad, const T* gate, const T* up, int64_t n, float factor, T* grad_gate, T* grad_up, T* act) {
  const __m512 one = _mm512_set1_ps(1.f), f = _mm512_set1_ps(factor);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512 g = load(gate + i, mask), u = load(up + i, mask), d = load(grad + i, mask), s = sigmoid(g);
    const __m512 silu = _mm512_mul_ps(g, s), a = _mm512_mul_ps(silu, u), df = _mm512_mul_ps(d, f);
    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
    sum = _mm512_fmadd_ps(d, a, sum);
    save(grad_up + i, mask, _mm512_mul_ps(df, silu));
    save(grad_gate + i, mask, _mm512_mul_ps(df, _mm512_mul_ps(u, slope)));
    save(act + i, mask, _mm512_mul_ps(a, f));
  }
  return _mm512_reduce_add_ps(sum);
}

template <class T>
T* dense(const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 2 && t.is_contiguous(), "a contiguous matrix is needed");
  return elements<T>(t);
}

at::Tensor swiglu_forward(const at::Tensor& gate, const at::Tensor& up) {
  TORCH_CHECK(up.sizes() == gate.sizes(), "swiglu: sizes do not fit");
  at::Tensor out = at::empty_like(gate);
  const int64_t n = gate.size(1);
  by_type(gate, [&](auto zero) {
    using T = decltype(zero);
    const T *g = dense<T>(gate), *u = dense<T>(up);
    T* o = dense<T>(out);
    row_tasks(gate.size(0), [&](int64_t, int64_t first, int64_t last) { silu_times(g + first * n, u + first * n, (last - first) * n, o + first * n); });
  });
  return out;
}

// -> act again, and gradients by gate and up.
std::tuple<at::Tensor, at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up) {
  at::Tensor act = at::empty_like(gate), grad_gate = at::empty_like(gate), grad_up = at::empty_like(gate);
  const int64_t n = gate.size(1);
  TORCH_CHECK(grad.sizes() == gate.sizes(), "swiglu: sizes do not fit");
  by_type(gate, [&](auto zero) {
    using T = decltype(zero);
    const T *d = dense<T>(grad), *g = dense<T>(gate), *u = dense<T>(up);
    T *a = dense<T>(act), *dg = dense<T>(grad_gate), *du = dense<T>(grad_up);
    row_tasks(gate.size(0), [&](int64_t, int64_t first, int64_t last) {
      const int64_t at = first * n;
      silu_times_backward(d + at, g + at, u + at, (last - first) * n, 1.f, dg + at, du + at, a + at);
    });
  });
  return {act, grad_gate, grad_up};
}

// --- products of bf16 values with sums in fp32, for CPUs that multiply fp32 faster ------------------------------------

const float* narrowed(const at::Tensor& t, Scratch& scratch) {
  float* to = scratch.take(t.numel());
  const int64_t n = t.size(1);
  by_type(t, [&](auto zero) {
    const auto* from = dense<decltype(zero)>(t);
    row_tasks(t.size(0), [&](int64_t, int64_t first, int64_t last) { narrow(from + first * n, (last - first) * n, to + first * n); });
  });
  return to;
}

// op(a) op(b) of matrices in fp32 or bf16, all values rounded to bf16 first; the result is fp32, or rounded too.
at::Tensor narrow_product(const at::Tensor& a, bool ta, const at::Tensor& b, bool tb, bool narrow) {
  const int64_t m = a.size(ta), k = a.size(!ta), n = b.size(!tb);
  TORCH_CHECK(b.size(tb) == k, "narrow_product: ", a.sizes(), " and ", b.sizes(), " do not fit");
  at::Tensor out = at::empty({m, n}, a.options().dtype(narrow ? at::kBFloat16 : at::kFloat));
  if (m == 0 || n == 0 || k == 0) return out.zero_();
  Scratch scratch;
  const float *pa = narrowed(a, scratch), *pb = narrowed(b, scratch);
  float* sum = narrow ? scratch.take(m * n) : target(out);
  gemm(ta, tb, m, n, k, pa, a.size(1), pb, b.size(1), 0, sum, n);
  if (narrow)
    row_tasks(m, [&](int64_t, int64_t first, int64_t last) { write(sum + first * n, (last - first) * n, 1, dense<bf16>(out) + first * n); });
  return out;
}

// --- experts ---------------------------------------------------------------------------------------------------------

// chosen (N, K) -> order (N * K): the choices sorted by expert; slot (N, K): where each went; ends (E).
std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_order(const at::Tensor& chosen, int64_t experts) {
  TORCH_CHECK(chosen.scalar_type() == at::kLong && chosen.is_contiguous(), "experts: chosen must be int64");
  at::Tensor order = at::empty({chosen.numel()}, chosen.options()), slot = at::empty_like(chosen), ends = at::zeros({experts}, chosen.options());
  const int64_t* c = chosen.data_ptr<int64_t>();
  int64_t *o = order.data_ptr<int64_t>(), *s = slot.data_ptr<int64_t>(), *e = ends.data_ptr<int64_t>();
  for (int64_t i = 0; i < chosen.numel(); ++i) {
    TORCH_CHECK(c[i] >= 0 && c[i] < experts, "experts: there is none of number ", c[i]);
    ++e[c[i]];
  }
  std::vector<int64_t> next(experts, 0);
  for (int64_t i = 1; i < experts; ++i) next[i] = next[i - 1] + e[i - 1];
  for (int64_t i = 0; i < chosen.numel(); ++i) {
    s[i] = next[c[i]]++;
    o[s[i]] = i;
  }
  std::copy(next.begin(), next.end(), e);
  return {order, slot, ends};
}

template <class T>
void gather(const T* rows, const int64_t* order, int64_t count, int64_t picks, int64_t width, float* to) {
  for (int64_t i = 0; i < count; ++i) read(rows + order[i] / picks * width, width, 1, to + i * width);
}

// out[n] = sum_k factor[n, k] rows[slot[n, k]], factors 1 where there are none.
template <class T>
void sum_slots(const float* rows, const at::Tensor& slot, const float* factor, int64_t width, T* out) {
  const int64_t picks = slot.size(1), *s = slot.data_ptr<int64_t>();
  row_tasks(slot.size(0), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n)
      for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 mask = lanes(width - i);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = n * picks; k < (n + 1) * picks; ++k)
          sum = _mm512_fmadd_ps(load(rows + s[k] * width + i, mask), _mm512_set1_ps(factor ? factor[k] : 1.f), sum);
        save(out + n * width + i, mask, sum);
      }
  });
}

constexpr int64_t BLOCK = 256;  // rows of one expert whose values stay in the L2 cache

// fp32 as they are; with bf16 activations all that is multiplied has the values of bf16.
inline const float* read_or_keep(const float* from, int64_t, float*) { return from; }

inline const float* read_or_keep(const bf16* from, int64_t n, float* scratch) {
  read(from, n, 1, scratch);
  return scratch;
}

template <class T>
const float* factors(const float* from, int64_t n, float* scratch) {
  if constexpr (std::is_same_v<T, float>) return from;
  narrow(from, n, scratch);
  return scratch;
}

// x (N, D) in fp32 or bf16, all else fp32 -> (sum of the chosen experts (N, D), gate and up of every choice (N * K, 2 I), sorted)
template <class T>
std::tuple<at::Tensor, at::Tensor> experts_forward_of(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& order, const at::Tensor& slot,
                                                      const at::Tensor& ends, const at::Tensor& gate_up, const at::Tensor& down) {
  constexpr bool narrow_ = !std::is_same_v<T, float>;
  const int64_t width = x.size(1), wide = down.size(2), picks = slot.size(1), *e = ends.data_ptr<int64_t>(), *o = order.data_ptr<int64_t>();
  const int64_t matrix = width * wide;
  TORCH_CHECK(gate_up.is_contiguous() && down.is_contiguous() && weights.is_contiguous(), "experts: contiguous weights are needed");
  TORCH_CHECK(gate_up.numel() == 2 * ends.numel() * matrix && down.numel() == ends.numel() * matrix, "experts: sizes do not fit");
  at::Tensor inner = at::empty({order.numel(), 2 * wide}, x.options()), rows = at::empty({order.numel(), width}, weights.options());
  at::Tensor out = at::empty_like(x);
  const T* px = dense<T>(x);
  const float *pg = floats(gate_up), *pd = floats(down);
  T* pi = dense<T>(inner);
  float* pr = target(rows);
  tasks(ends.numel(), [&](int64_t expert) {
    const int64_t begin = expert ? e[expert - 1] : 0;
    if (begin == e[expert]) return;
    Scratch scratch;
    float *in = scratch.take(BLOCK * width), *act = scratch.take(BLOCK * wide), *sums = narrow_ ? scratch.take(BLOCK * 2 * wide) : nullptr;
    const float* by_in = factors<T>(pg + expert * 2 * matrix, 2 * matrix, narrow_ ? scratch.take(2 * matrix) : nullptr);
    const float* by_act = factors<T>(pd + expert * matrix, matrix, narrow_ ? scratch.take(matrix) : nullptr);
    for (int64_t first = begin; first < e[expert]; first += BLOCK) {
      const int64_t count = std::min(BLOCK, e[expert] - first);
      T* both = pi + first * 2 * wide;
      gather(px, o + first, count, picks, width, in);
      if constexpr (narrow_) {
        gemm(false, true, count, 2 * wide, width, in, width, by_in, width, 0, sums, 2 * wide);
        write(sums, count * 2 * wide, 1, both);
      } else {
        gemm(false, true, count, 2 * wide, width, in, width, by_in, width, 0, both, 2 * wide);
      }
      for (int64_t i = 0; i < count; ++i) silu_times(both + i * 2 * wide, both + (2 * i + 1) * wide, wide, act + i * wide);
      gemm(false, true, count, width, wide, factors<T>(act, count * wide, act), wide, by_act, wide, 0, pr + first * width, width);
    }
  });
  sum_slots(pr, slot, floats(weights), width, dense<T>(out));
  return {out, inner};
}

// -> gradients by x, weights, gate_up and down
template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> experts_backward_of(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weights,
                                                                               const at::Tensor& order, const at::Tensor& slot,
                                                                               const at::Tensor& ends, const at::Tensor& gate_up,
                                                                               const at::Tensor& down, const at::Tensor& inner) {
  constexpr bool narrow_ = !std::is_same_v<T, float>;
  const int64_t width = x.size(1), wide = down.size(2), picks = slot.size(1), *e = ends.data_ptr<int64_t>(), *o = order.data_ptr<int64_t>();
  at::Tensor grad_x = at::empty_like(x), grad_weights = at::empty_like(weights), rows = at::empty({order.numel(), width}, weights.options());
  at::Tensor grad_gate_up = at::empty_like(gate_up), grad_down = at::empty_like(down);
  const T *pg = dense<T>(grad), *px = dense<T>(x), *pi = dense<T>(inner);
  const float *pw = floats(weights), *pu = floats(gate_up), *pd = floats(down);
  float *pr = target(rows), *gw = target(grad_weights), *gu = target(grad_gate_up), *gd = target(grad_down);
  tasks(ends.numel(), [&](int64_t expert) {
    const int64_t begin = expert ? e[expert - 1] : 0;
    const int64_t matrix = width * wide;
    if (begin == e[expert]) {
      std::fill_n(gu + expert * 2 * matrix, 2 * matrix, 0.f);
      std::fill_n(gd + expert * matrix, matrix, 0.f);
      return;
    }
    Scratch scratch;
    float *out = scratch.take(BLOCK * width), *in = scratch.take(BLOCK * width), *halves = scratch.take(2 * wide);
    float *act = scratch.take(BLOCK * wide), *both = scratch.take(BLOCK * 2 * wide);
    const float* by_in = factors<T>(pu + expert * 2 * matrix, 2 * matrix, narrow_ ? scratch.take(2 * matrix) : nullptr);
    const float* by_act = factors<T>(pd + expert * matrix, matrix, narrow_ ? scratch.take(matrix) : nullptr);
    for (int64_t first = begin; first < e[expert]; first += BLOCK) {
      const int64_t count = std::min(BLOCK, e[expert] - first);
      const float more = first == begin ? 0.f : 1.f;
      gather(pg, o + first, count, picks, width, out);
      gather(px, o + first, count, picks, width, in);
      gemm(false, false, count, wide, width, out, width, by_act, wide, 0, act, wide);
      for (int64_t i = 0; i < count; ++i) {
        const float* gate = read_or_keep(pi + (first + i) * 2 * wide, 2 * wide, halves);
        float *a = act + i * wide, *g = both + i * 2 * wide;
        gw[o[first + i]] = silu_times_backward(a, gate, gate + wide, wide, pw[o[first + i]], g, g + wide, a);
      }
      factors<T>(act, count * wide, act);
      factors<T>(both, count * 2 * wide, both);
      gemm(true, false, width, wide, count, out, width, act, wide, more, gd + expert * matrix, wide);
      gemm(true, false, 2 * wide, width, count, both, 2 * wide, in, width, more, gu + expert * 2 * matrix, width);
      gemm(false, false, count, width, 2 * wide, both, 2 * wide, by_in, width, 0, pr + first * width, width);
    }
  });
  sum_slots(pr, slot, nullptr, width, dense<T>(grad_x));
  return {grad_x, grad_weights, grad_gate_up, grad_down};
}

std::tuple<at::Tensor, at::Tensor> experts_forward(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& order, const at::Tensor& slot,
                                                   const at::Tensor& ends, const at::Tensor& gate_up, const at::Tensor& down) {
  const auto f = x.scalar_type() == at::kFloat ? experts_forward_of<float> : experts_forward_of<bf16>;
  return f(x, weights, order, slot, ends, gate_up, down);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> experts_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weights,
                                                                            const at::Tensor& order, const at::Tensor& slot, const at::Tensor& ends,
                                                                            const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& inner) {
  const auto f = x.scalar_type() == at::kFloat ? experts_backward_of<float> : experts_backward_of<bf16>;
  return f(grad, x, weights, order, slot, ends, gate_up, down, inner);
}

// --- loss ------------------------------------------------------------------------------------------------------------

// Logits (N, V) become the gradient of the summed negative log-likelihood of `targets`, which is returned for each row; rows
// whose target is negative become zeros.
at::Tensor loss_error(const at::Tensor& logits, const at::Tensor& targets) {
  const int64_t n = logits.size(1), *t = targets.data_ptr<int64_t>();
  TORCH_CHECK(targets.numel() == logits.size(0) && targets.is_contiguous(), "a dense target for each row is needed");
  at::Tensor loss = at::empty({logits.size(0)}, logits.options());
  float *p = dense<float>(logits), *pl = target(loss);
  floats(logits);
  row_tasks(logits.size(0), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      float* x = p + r * n;
      pl[r] = 0;
      if (t[r] < 0) {
        std::fill_n(x, n, 0.f);
        continue;
      }
      TORCH_CHECK(t[r] < n, "target ", t[r], " is outside a vocabulary of ", n);
      float sum;
      const float own = x[t[r]];
      pl[r] = exponentials(x, n, n, sum) - own;
      write(x, n, 1 / sum, x);
      x[t[r]] -= 1;
    }
  });
  return loss;
}

}  // namespace
}  // namespace sputnik

TORCH_LIBRARY_FRAGMENT(sputnik, m) {
  m.def("norm_forward", &sputnik::norm_forward);
  m.def("norm_backward", &sputnik::norm_backward);
  m.def("swiglu_forward", &sputnik::swiglu_forward);
  m.def("swiglu_backward", &sputnik::swiglu_backward);
  m.def("narrow_product", &sputnik::narrow_product);
  m.def("expert_order", &sputnik::expert_order);
  m.def("experts_forward", &sputnik::experts_forward);
  m.def("experts_backward", &sputnik::experts_backward);
  m.def("loss_error", &sputnik::loss_error);
}
