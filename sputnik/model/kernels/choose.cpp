// Tokens drawn from logits, a row at a time while it is in the cache: the twin of sputnik/engine/sampling.py, whose rules
// and order of sums (blocks of 128, then doubles) these are. Rows of the batch know nothing of each other.
#include <torch/library.h>

#include "attention.h"
#include "choose.h"
#include "packed.h"

namespace sputnik {
namespace {

constexpr int64_t SUMMED = 128;

uint64_t mix(uint64_t state) {  // SplitMix64
  state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ULL;
  state = (state ^ (state >> 27)) * 0x94d049bb133111ebULL;
  return state ^ (state >> 31);
}

// In (0, 1].
double uniform(uint64_t stream, uint64_t position, uint64_t attempt) {
  const uint64_t bits = mix(stream ^ mix(position * 0x9e3779b97f4a7c15ULL + attempt));
  return static_cast<double>((bits >> 11) + 1) * 0x1p-53;
}

// The largest of x, or NaN if there is one; `at` is the first place of it.
float largest(const float* x, int64_t n, int64_t& at) {
  __m512 top = _mm512_set1_ps(-INFINITY);
  __mmask16 odd = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512 v = load(x + i, mask);
    odd |= _mm512_mask_cmp_ps_mask(mask, v, v, _CMP_UNORD_Q);
    top = _mm512_mask_max_ps(top, mask, top, v);
  }
  const float most = odd ? NAN : _mm512_reduce_max_ps(top);
  at = 0;
  for (int64_t i = 0; !odd && i < n; i += 16) {
    const __mmask16 same = _mm512_mask_cmp_ps_mask(lanes(n - i), load(x + i, lanes(n - i)), _mm512_set1_ps(most), _CMP_EQ_OQ);
    if (same) return at = i + __builtin_ctz(same), most;
  }
  return most;
}

struct Weights {
  std::vector<float> w;         // padded with zeros to whole blocks
  std::vector<double> reached;  // running sums of the blocks
  int64_t n = 0;

  int64_t blocks() const { return (n + SUMMED - 1) / SUMMED; }

  // e^(x / temperature), the largest being 1.
  void set(const float* x, int64_t count, float most, float temperature) {
    n = count;
    w.assign(blocks() * SUMMED, 0.f);
    const __m512 top = _mm512_set1_ps(most), inverse = _mm512_set1_ps(1 / temperature);
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = lanes(n - i);
      _mm512_mask_storeu_ps(&w[i], mask, exp16(_mm512_mul_ps(_mm512_sub_ps(load(x + i, mask), top), inverse)));
    }
  }

  double sum_up() {
    reached.resize(blocks());
    double total = 0;
    for (int64_t b = 0; b < blocks(); ++b) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < SUMMED; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(&w[b * SUMMED + i]));
      reached[b] = total += _mm512_reduce_add_ps(sum);
    }
    return total;
  }

  // Where the running sum reaches `share` of the total; after `sum_up`. Never a weight of 0.
  int64_t reach(double share) const {
    const double point = share * reached.back();
    const int64_t b = std::min<int64_t>(std::lower_bound(reached.begin(), reached.end(), point) - reached.begin(), blocks() - 1);
    const double left = point - (b ? reached[b - 1] : 0);
    int64_t last = b * SUMMED;
    double sum = 0;
    for (int64_t i = b * SUMMED; i < std::min((b + 1) * SUMMED, n); ++i) {
      if (w[i] <= 0) continue;
      last = i;
      if ((sum += w[i]) >= left) break;
    }
    return last;
  }

  void drop(float bound, bool equals) {
    const __m512 limit = _mm512_set1_ps(bound);
    for (int64_t i = 0; i < n; i += 16) {
      const __m512 v = _mm512_loadu_ps(&w[i]);
      const __mmask16 out = equals ? _mm512_cmp_ps_mask(v, limit, _CMP_LE_OQ) : _mm512_cmp_ps_mask(v, limit, _CMP_LT_OQ);
      _mm512_storeu_ps(&w[i], _mm512_mask_mov_ps(v, out, _mm512_setzero_ps()));
    }
  }

  float ranked(int64_t k) const {  // the k-th largest
    thread_local std::vector<float> sorted;
    sorted.assign(w.begin(), w.begin() + n);
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    return sorted[k - 1];
  }
};

struct Cut {
  int64_t top_k;
  double top_p;
  float min_p;
  bool any() const { return top_k > 0 || top_p <= 1 || min_p > 0; }
};

// sampling.py: _Truncation. Drawn again from what is likelier than a token outside top-p.
int64_t draw(Weights& weights, const Cut& cut, uint64_t stream, uint64_t position, double& total) {
  total = weights.sum_up();
  if (!cut.any()) return weights.reach(uniform(stream, position, 0));
  if (cut.top_k > 0 && cut.top_k < weights.n) weights.drop(weights.ranked(cut.top_k), false);
  const double limit = cut.top_p * weights.sum_up();
  if (cut.min_p > 0) weights.drop(cut.min_p, false);
  for (uint64_t attempt = 0;; ++attempt) {
    weights.sum_up();
    const int64_t token = weights.reach(uniform(stream, position, attempt));
    weights.drop(weights.w[token], true);
    if (weights.sum_up() < limit) return token;
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> choose(const at::Tensor& logits, const at::Tensor& positions, const at::Tensor& streams, const at::Tensor& temperature,
                                          const at::Tensor& greedy, const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p, bool scored) {
  TORCH_CHECK(logits.scalar_type() == at::kFloat && logits.is_contiguous() && logits.dim() == 2 && logits.size(1) > 0, "choose: logits must be (R, V) fp32");
  const int64_t rows = logits.size(0), n = logits.size(1);
  for (const at::Tensor& t : {positions, streams, temperature, greedy, top_k, top_p, min_p})
    TORCH_CHECK(t.numel() == rows && t.is_contiguous(), "choose: one number a row is needed, not ", t.sizes());
  at::Tensor tokens = at::empty({rows}, at::kLong), values = at::empty({rows}, at::kFloat);
  const float *x = logits.data_ptr<float>(), *heat = temperature.data_ptr<float>(), *floor = min_p.data_ptr<float>();
  const int64_t *at = positions.data_ptr<int64_t>(), *stream = streams.data_ptr<int64_t>(), *k = top_k.data_ptr<int64_t>();
  const double* p = top_p.data_ptr<double>();
  const bool* plain = greedy.data_ptr<bool>();
  int64_t* token = tokens.data_ptr<int64_t>();
  float* value = values.data_ptr<float>();
  const auto one = [&](int64_t r) {
    thread_local Weights weights;
    const float most = largest(x + r * n, n, token[r]);
    value[r] = most;
    if (!scored || !std::isfinite(most)) {
      value[r] = std::isfinite(most) ? most : NAN;
      return;
    }
    weights.set(x + r * n, n, most, heat[r]);
    double total;
    if (plain[r]) total = weights.sum_up();
    else token[r] = draw(weights, {k[r], p[r], floor[r]}, stream[r], at[r], total);
    const float apart = (x[r * n + token[r]] - most) / heat[r];
    value[r] = static_cast<float>(std::exp(static_cast<double>(apart)) / total);
  };
  if (rows * n < 16384) {  // waking a thread takes longer
    for (int64_t r = 0; r < rows; ++r) one(r);
  } else {
    tasks(rows, one);
  }
  return {tokens, values};
}

at::Tensor likeliest(const at::Tensor& logits) {
  at::Tensor tokens = at::empty({logits.size(0)}, at::kLong);
  const int64_t n = logits.size(1);
  for (int64_t r = 0; r < logits.size(0); ++r) largest(logits.data_ptr<float>() + r * n, n, tokens.data_ptr<int64_t>()[r]);
  return tokens;
}

}  // namespace sputnik

TORCH_LIBRARY_FRAGMENT(sputnik, m) { m.def("choose", &sputnik::choose); }
