// Attention of a long span of new tokens over all of its sequence's: keys and values of a head as rows of their own, gathered
// from the blocks, MLA's multiplied out. One task is some of the span's tokens with the query heads that share a key head.
#include "operand.h"
#include "runner.h"

namespace sputnik {
namespace {

constexpr int64_t ROWS = 256;  // tokens of a task: laying out keys and values for each costs a tenth of its products

}  // namespace

void Runner::whole(int64_t index, const Batch& b, int64_t s) {
  const Layer& l = layers[index];
  const at::Tensor& cache = caches[index];
  const int64_t from = b.starts[s], n = b.starts[s + 1] - from, first = b.positions[from], length = first + n, h = shape.heads;
  const bool latent = shape.latent > 0, pairs = use_bf16_dot() && cache.scalar_type() == at::kBFloat16;
  const int64_t width = latent ? shape.nope + shape.rope : shape.width, wide = latent ? shape.value : shape.width;
  const int64_t groups = latent ? h : shape.key_heads, share = h / groups, chunks = (n + ROWS - 1) / ROWS;
  by_type(cache, [&](auto zero) {
    const Pages<const decltype(zero)> pages{elements<const decltype(zero)>(cache), b.tables + s * b.table_width, cache.size(1), latent ? shape.cache_width() : shape.width,
                                            shape.parts(), b.table_width};
    const auto row = [&](int64_t token, int64_t part) { return pages.at(token / pages.size, part) + token % pages.size * pages.width; };
    at::Tensor up;  // (length, heads, nope + value)
    if (latent) {
      const at::Tensor rows = at::empty({length, shape.latent}, at::kFloat);
      for (int64_t t = 0; t < length; ++t) read(row(t, 0), shape.latent, 1, rows.data_ptr<float>() + t * shape.latent);
      up = at::empty({length, h, shape.nope + shape.value}, at::kFloat);
      product(rows.data_ptr<float>(), length, shape.latent, l.kv_b, up.data_ptr<float>(), h * up.size(2));
    }
    const auto lay_out = [&](int64_t g, int64_t count, float* k, float* v) {
      for (int64_t t = 0; t < count; ++t) {
        if (latent) {
          const float* own = up.data_ptr<float>() + (t * h + g) * up.size(2);
          std::copy_n(own, shape.nope, k + t * width);
          read(row(t, 0) + shape.latent, shape.rope, 1, k + t * width + shape.nope);
          std::copy_n(own + shape.nope, wide, v + t * wide);
        } else {
          read(row(t, g), width, 1, k + t * width);
          read(row(t, groups + g), wide, 1, v + t * wide);
        }
      }
    };
    tasks(groups * chunks, [&](int64_t task) {
      const int64_t g = task % groups, chunk = chunks - 1 - task / groups;  // those that see most first: the last ones are short
      const int64_t begin = chunk * ROWS, end = std::min(n, begin + ROWS);
      Scratch scratch;
      Operand k(scratch, pairs, first + end, width), v(scratch, pairs, first + end, wide);
      lay_out(g, first + end, k.x, v.x);
      for (int64_t j = g * share; j < (g + 1) * share; ++j)
        for (int64_t r = begin; r < end; r += CAUSAL_ROWS) {
          const int64_t rows = std::min(CAUSAL_ROWS, end - r);
          Scratch block;
          Operand q(block, pairs, rows, width);
          float* out = block.take(rows * wide);
          for (int64_t i = 0; i < rows; ++i) read(query.data() + ((from + r + i) * h + j) * width, width, static_cast<float>(shape.scale), q.x + i * width);
          attend_causally(q, k, v, first + r + rows, out, nullptr, 0);
          for (int64_t i = 0; i < rows; ++i) std::copy_n(out + i * wide, wide, attended.data() + ((from + r + i) * h + j) * wide);
        }
    });
  });
}

}  // namespace sputnik
