// Tokens drawn from logits (choose.cpp).
#pragma once
#include <ATen/ATen.h>

namespace sputnik {

// -> tokens (R,), and of each its probability at the row's temperature before any cut (`scored`) or its logit; not finite
// where the row's logits (R, V) are not. The others hold a number for each row; `positions` counts its tokens so far.
std::tuple<at::Tensor, at::Tensor> choose(const at::Tensor& logits, const at::Tensor& positions, const at::Tensor& streams, const at::Tensor& temperature,
                                          const at::Tensor& greedy, const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p, bool scored);

at::Tensor likeliest(const at::Tensor& logits);  // (R, V) -> (R,), the first of equals

}  // namespace sputnik
