// Several decoding steps in one call: the fast path of sputnik/engine/stride.py, whose rules these are.
//
// R rows, one sequence each; G guesses a row; T = 1 + G tokens of a row in a step; E ids that end a row.
#include "runner.h"

namespace sputnik {

namespace {

bool ends_with(int64_t token, const int64_t* ends, int64_t n) { return std::find(ends, ends + n, token) != ends + n; }

}  // namespace

Strode Runner::stride(const at::Tensor& first_ids, const at::Tensor& first_positions, const at::Tensor& starts, const at::Tensor& tables,
                      const at::Tensor& written_before, const at::Tensor& most, const at::Tensor& ends, const std::vector<at::Tensor>& draws,
                      bool scored, bool record, int64_t steps, int64_t idle) {
  const int64_t rows = first_ids.size(0), width = first_ids.size(1), guesses = width - 1, all = rows * width;
  for (const at::Tensor& t : {first_ids, first_positions, written_before, most, ends}) TORCH_CHECK(t.is_contiguous(), "stride: tensors must be contiguous");
  TORCH_CHECK(written_before.numel() == rows && most.numel() == rows && ends.size(0) == rows && draws.size() == 6, "stride: a number for each row is needed");
  TORCH_CHECK(guesses == 0 || !modules.empty(), "stride: guesses need a prediction module");
  const at::Tensor ids = first_ids.clone(), positions = first_positions.clone(), written = written_before.clone();
  const at::Tensor place = at::empty({all}, at::kLong), following = at::empty({all}, at::kLong), wanted = at::arange(all);
  const at::Tensor last = at::empty({rows}, at::kLong), alone = at::arange(rows), each = at::arange(rows + 1), going = at::ones({rows}, at::kBool);
  const at::Tensor counts = at::zeros({2 + guesses}, at::kLong);  // context, judged rows, accepted guesses by place
  int64_t *id = ids.data_ptr<int64_t>(), *at_ = positions.data_ptr<int64_t>(), *had = written.data_ptr<int64_t>(), *count = counts.data_ptr<int64_t>();
  const int64_t *limit = most.data_ptr<int64_t>(), *end = ends.data_ptr<int64_t>();
  bool* on = going.data_ptr<bool>();
  std::vector<at::Tensor> tokens, values, kept, taken;
  while (static_cast<int64_t>(tokens.size()) < steps) {
    for (int64_t i = 0; i < all; ++i) place.data_ptr<int64_t>()[i] = had[i / width] + i % width;
    for (int64_t r = 0; r < rows; ++r) count[0] += at_[r * width + guesses] + 1;
    const at::Tensor hidden = forward(ids.view(-1), positions.view(-1), starts, tables, wanted);
    if (record && routes.defined()) taken.push_back(routes);
    const auto [token, value] = sputnik::choose(logits(hidden, false), place, draws[0], draws[1], draws[2], draws[3], draws[4], draws[5], scored);
    const at::Tensor keep = at::zeros({rows, width}, at::kBool);
    const int64_t* drawn = token.data_ptr<int64_t>();
    int64_t running = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t base = r * width;
      bool stands = on[r], open = on[r], stopped = false;
      int64_t n = 0, right = 0;
      for (int64_t t = 0; t < width; ++t) {
        if (t > 0) stands = stands && id[base + t] == drawn[base + t - 1], right += stands;
        following.data_ptr<int64_t>()[base + t] = stands ? drawn[base + t] : 0;
        open = open && stands && !stopped && had[r] + t < limit[r];
        if (!open) continue;
        keep.data_ptr<bool>()[base + t] = true;
        ++n;
        stopped = !std::isfinite(value.data_ptr<float>()[base + t]) || ends_with(drawn[base + t], end + r * ends.size(1), ends.size(1));
      }
      had[r] += n;
      last.data_ptr<int64_t>()[r] = base + std::max<int64_t>(n - 1, 0);
      if (!on[r]) continue;
      on[r] = !stopped && limit[r] - had[r] >= std::max<int64_t>(1, guesses);
      if (!on[r]) continue;
      ++running, ++count[1];
      for (int64_t g = 0; g < right; ++g) ++count[2 + g];
    }
    tokens.push_back(token);
    values.push_back(value);
    kept.push_back(keep);
    if (running > 0) {
      std::vector<at::Tensor> guessed;
      at::Tensor further;
      for (int64_t depth = 0; depth < guesses; ++depth) {
        if (depth == 0) {
          further = ahead(0, following, c10::nullopt, positions.view(-1), starts, tables, last);
        } else {
          const at::Tensor beyond = positions.view(-1).index_select(0, last) + depth;
          further = ahead(std::min<int64_t>(depth, modules.size() - 1), guessed.back(), further, beyond, each, tables, alone);
        }
        guessed.push_back(likeliest(logits(further, false)));
      }
      for (int64_t r = 0; r < rows; ++r) {
        if (!on[r]) continue;
        const int64_t base = r * width, chosen = last.data_ptr<int64_t>()[r], n = chosen - base + 1;
        id[base] = drawn[chosen];
        for (int64_t g = 0; g < guesses; ++g) id[base + 1 + g] = guessed[g].data_ptr<int64_t>()[r];
        for (int64_t t = 0; t < width; ++t) at_[base + t] += n;
      }
    }
    if (idle * running < (idle - 1) * rows) break;
  }
  const auto by_row = [&](const std::vector<at::Tensor>& of) {  // (R, steps * T)
    return at::stack(of).view({static_cast<int64_t>(of.size()), rows, width}).transpose(0, 1).reshape({rows, -1});
  };
  return {by_row(tokens), by_row(values), by_row(kept), ids, going, counts, taken.empty() ? at::empty({0}, at::kLong) : at::stack(taken)};
}

}  // namespace sputnik
