// The whole forward pass of a Transformer over a flat batch of tokens and a paged cache, in one call.
//
// The batch is N tokens of S sequences: sequence s owns tokens [starts[s], starts[s + 1]), consecutive in its text, at
// `positions`; row s of `tables` names its cache blocks. Tokens are written to the cache, then attend to everything of
// their sequence up to themselves. Residual stream, norms, router and attention are fp32; weights are what they were
// packed as. The twin in Python is sputnik/engine/runner.py: TorchRunner.
#pragma once
#include <torch/custom_class.h>
#include <torch/library.h>

#include "attention.h"
#include "choose.h"
#include "packed.h"

namespace sputnik {

using Tensors = c10::Dict<std::string, at::Tensor>;

struct Shape {
  int64_t hidden, heads, key_heads, width;            // GQA: width of a head
  int64_t nope, rope, value, latent;                  // MLA; latent 0: GQA
  int64_t experts, chosen, groups, kept_groups;       // MoE
  int64_t whole_prefill;                              // spans longer than this are attended to as a whole (prefill.cpp)
  bool sigmoid, normalise, two_best, by_group, interleaved;
  double eps, scale, routed_scale;
  int64_t cache_width() const { return latent ? latent + rope : 2 * key_heads * width; }
  int64_t parts() const { return latent ? 1 : 2 * key_heads; }
};

struct Layer {
  at::Tensor norm1, norm2, q_norm, kv_norm, qkv_bias, out_bias, router_bias;
  Packed qkv, q_b, kv_b, out, gate_up, down, router;
  std::vector<Packed> up_key, up_value, expert_gate_up, expert_down;
  int64_t query_rank = 0;  // rows of `qkv` that are the compressed query
  bool is_moe = false;
};

struct Module {
  at::Tensor enorm, hnorm, norm;
  Packed join;
};

struct Batch {
  int64_t tokens, sequences;
  const int64_t *positions, *starts;
  const int32_t* tables;
  int64_t table_width;
  std::vector<int32_t> sequence;  // of each token
  const int32_t* table(int64_t token) const { return tables + sequence[token] * table_width; }
};

// Tokens (R, steps * T), their probabilities or logits, which of them are kept; the next ids (R, T), rows that go on (R,),
// counts [context, rows whose guesses were judged, accepted of them at each place], routes (steps, moe layers, R * T, K), if any.
using Strode = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct Runner : torch::CustomClassHolder {
  Runner(const c10::Dict<std::string, double>& numbers, const at::Tensor& rope, const std::string& format);
  void add_layer(const Tensors& weights);
  void set_ends(const at::Tensor& embedding, const at::Tensor& norm, const at::Tensor& head);
  void set_caches(std::vector<at::Tensor> caches);
  void set_main_layers(int64_t count) { main_layers = count; }  // those before the prediction modules
  void set_rope(const at::Tensor& table) { rope_table = table.contiguous(); }
  // (R, D) normed hidden states of tokens `wanted`.
  at::Tensor forward(const at::Tensor& ids, const at::Tensor& positions, const at::Tensor& starts, const at::Tensor& tables, const at::Tensor& wanted);
  // A prediction module: its layer is added after the main ones, in order.
  void add_module(const Tensors& weights);
  // Module `index` on the tokens of a batch: `next` (N,) are the ids one further on, `hidden` (N, D) the normed states of
  // the module before, or nothing for those of the last `forward`. (R, D) normed states of `wanted`: two tokens ahead.
  at::Tensor ahead(int64_t index, const at::Tensor& next, const c10::optional<at::Tensor>& hidden, const at::Tensor& positions,
                   const at::Tensor& starts, const at::Tensor& tables, const at::Tensor& wanted);
  // (R, D) -> (R, V) fp32; not to keep: the next such call writes over them. Fresh pages cost more than the product.
  at::Tensor logits(const at::Tensor& hidden, bool keep);
  // Up to `steps` decoding steps (stride.cpp). `written` (R,) tokens of each row so far, `most` (R,) of them at most, `ends`
  // (R, E); `draws`: what `choose` takes besides logits and places, R * T of each. Ends early when more than one row in
  // `idle` is over.
  Strode stride(const at::Tensor& ids, const at::Tensor& positions, const at::Tensor& starts, const at::Tensor& tables, const at::Tensor& written,
                const at::Tensor& most, const at::Tensor& ends, const std::vector<at::Tensor>& draws, bool scored, bool record, int64_t steps, int64_t idle);
  at::Tensor residual, routes;                  // of the last forward: stream before the final norm (N, D); (moe layers, N, K)

  Shape shape;
  int64_t main_layers = 0;
  Format format;
  at::Tensor rope_table, embedding, final_norm, last_logits;
  Packed head;
  std::vector<Layer> layers;
  std::vector<Module> modules;
  std::vector<at::Tensor> caches;

 private:
  Batch batch(const at::Tensor& positions, const at::Tensor& starts, const at::Tensor& tables) const;
  void run(int64_t index, float* x, const Batch& b);
  at::Tensor normed_rows(const at::Tensor& x, const at::Tensor& rows, const at::Tensor& weight) const;
  void attention(int64_t index, const float* x, const Batch& b, float* out);
  void queries_keys(int64_t index, const float* x, const Batch& b);
  void paged(int64_t index, const Batch& b, int64_t from, int64_t to);
  void whole(int64_t index, const Batch& b, int64_t sequence);
  void write(int64_t index, const Batch& b);
  void dense(const Packed& gate_up, const Packed& down, const float* x, int64_t n, float* out);
  void experts(const Layer& l, const float* x, int64_t n, float* out);
  void choose(const Layer& l, const float* x, int64_t n);
  const float* turn(int64_t position) const { return rope_table.data_ptr<float>() + position * rope_table.size(1); }

  std::vector<float> normed, mixed, fused, query, cached, attended, inner, act, gathered, expert_out, scores, weights;
  std::vector<int64_t> picks, order, slots;
  std::vector<at::Tensor> route_rows;
};

}  // namespace sputnik
