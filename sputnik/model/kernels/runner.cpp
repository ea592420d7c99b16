#include "runner.h"

#include <numeric>

namespace sputnik {

namespace {

float* room(std::vector<float>& buffer, int64_t n) {
  if (static_cast<int64_t>(buffer.size()) < n) buffer.resize(n);
  return buffer.data();
}

const float* data(const at::Tensor& t) { return t.defined() ? t.data_ptr<float>() : nullptr; }

void add_bias(float* y, int64_t n, int64_t width, const at::Tensor& bias) {
  if (!bias.defined()) return;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < width; ++j) y[i * width + j] += data(bias)[j];
}

// Rows are shared out only when there are enough of them to be worth waking a thread for.
template <class F>
void for_rows(int64_t n, int64_t work_per_row, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work_per_row));
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

template <class T>
void store_row(T* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, float>) to[i] = from[i];
    else to[i] = to_bf16(from[i]);
  }
}

// f(task, the next one) for each of n, eight neighbours to a thread, so that what comes next is known.
template <class F>
void in_runs(int64_t n, const F& f) {
  const int64_t run = std::clamp<int64_t>(n / (4 * at::get_num_threads()), 1, 8);
  tasks((n + run - 1) / run, [&](int64_t r) {
    for (int64_t task = r * run; task < std::min(n, (r + 1) * run); ++task) f(task, std::min(n - 1, task + 1));
  });
}

PagedScratch& paged_scratch() {
  thread_local PagedScratch kept;
  return kept;
}

template <class F>
void by_type(const at::Tensor& cache, const F& f) {
  if (cache.scalar_type() == at::kFloat) f(cache.data_ptr<float>());
  else f(reinterpret_cast<uint16_t*>(cache.data_ptr<at::BFloat16>()));
}

}  // namespace

Runner::Runner(const c10::Dict<std::string, double>& numbers, const at::Tensor& rope, const std::string& name)
    : format(parse_format(name)), rope_table(rope.contiguous()) {
  const auto whole = [&](const char* key) { return static_cast<int64_t>(numbers.at(key)); };
  const auto yes = [&](const char* key) { return numbers.at(key) != 0; };
  shape = {whole("hidden"), whole("heads"), whole("key_heads"), whole("width"), whole("nope"), whole("rope"), whole("value"),
           whole("latent"), whole("experts"), whole("chosen"), whole("groups"), whole("kept_groups"), whole("whole_prefill"),
           yes("sigmoid"), yes("normalise"), yes("two_best"), yes("by_group"), yes("interleaved"),
           numbers.at("eps"), numbers.at("scale"), numbers.at("routed_scale")};
}

void Runner::add_layer(const Tensors& w) {
  const auto given = [&](const char* key) { return w.contains(key); };
  const auto vector = [&](const char* key) { return given(key) ? w.at(key).detach().to(at::kFloat).contiguous() : at::Tensor(); };
  const auto matrix = [&](const char* key) { return given(key) ? pack(w.at(key), format) : Packed(); };
  const auto stack = [&](const char* key, Format as) {
    std::vector<Packed> out;
    if (given(key))
      for (const at::Tensor& one : w.at(key).unbind(0)) out.push_back(pack(one, as));
    return out;
  };
  Layer l;
  l.norm1 = vector("norm1");
  l.norm2 = vector("norm2");
  l.q_norm = vector("q_norm");
  l.kv_norm = vector("kv_norm");
  l.qkv_bias = vector("qkv_bias");
  l.out_bias = vector("out_bias");
  l.qkv = matrix("qkv");
  l.q_b = matrix("q_b");
  l.kv_b = matrix("kv_b");
  l.out = matrix("out");
  // Per-head halves of kv_b, (H, C, N) and (H, V, C): never below bf16, they are small and read by every step.
  const Format half = format == Format::f32 ? Format::f32 : Format::bf16;
  l.up_key = stack("up_key", half);
  l.up_value = stack("up_value", half);
  l.query_rank = l.q_norm.defined() ? l.q_norm.numel() : 0;
  l.gate_up = matrix("gate_up");
  l.down = matrix("down");
  l.is_moe = given("router");
  if (l.is_moe) {
    l.router = pack(w.at("router"), Format::f32);
    l.router_bias = vector("router_bias");
    l.expert_gate_up = stack("expert_gate_up", format);
    l.expert_down = stack("expert_down", format);
  }
  layers.push_back(std::move(l));
}

void Runner::set_ends(const at::Tensor& table, const at::Tensor& norm, const at::Tensor& head_weight) {
  embedding = table.detach();
  final_norm = norm.detach().to(at::kFloat).contiguous();
  head = pack(head_weight, format == Format::f32 ? Format::f32 : format == Format::q4 ? Format::q8 : format);
}

void Runner::set_caches(std::vector<at::Tensor> given) {
  for (const at::Tensor& cache : given)
    TORCH_CHECK(cache.dim() == 3 && cache.size(2) == shape.cache_width() && cache.is_contiguous(), "cache must be (blocks, size, ", shape.cache_width(), ")");
  caches = std::move(given);
}

Batch Runner::batch(const at::Tensor& positions, const at::Tensor& starts, const at::Tensor& tables) const {
  for (const at::Tensor& t : {positions, starts, tables}) TORCH_CHECK(t.is_contiguous(), "a batch's tensors must be contiguous");
  TORCH_CHECK(tables.dim() == 2 && starts.size(0) == tables.size(0) + 1, "a batch needs a row of blocks for each sequence");
  Batch b{positions.size(0), starts.size(0) - 1, positions.data_ptr<int64_t>(), starts.data_ptr<int64_t>(), tables.data_ptr<int32_t>(), tables.size(1), {}};
  TORCH_CHECK(b.starts[0] == 0 && b.starts[b.sequences] == b.tokens && std::is_sorted(b.starts, b.starts + b.sequences + 1),
              "the sequences of a batch must be its tokens");
  const int64_t most = std::min(rope_table.size(0), caches.at(0).size(1) * b.table_width);
  for (int64_t i = 0; i < b.tokens; ++i) TORCH_CHECK(b.positions[i] >= 0 && b.positions[i] < most, "position ", b.positions[i], " of ", most);
  b.sequence.resize(b.tokens);
  for (int64_t s = 0; s < b.sequences; ++s) std::fill(b.sequence.begin() + b.starts[s], b.sequence.begin() + b.starts[s + 1], static_cast<int32_t>(s));
  return b;
}

at::Tensor Runner::forward(const at::Tensor& ids, const at::Tensor& positions, const at::Tensor& starts, const at::Tensor& tables, const at::Tensor& wanted) {
  const Batch b = batch(positions, starts, tables);
  TORCH_CHECK(ids.size(0) == b.tokens, "a batch needs a position for each token");
  at::Tensor x = embedding.index_select(0, ids).to(at::kFloat);
  route_rows.clear();
  for (int64_t i = 0; i < main_layers; ++i) run(i, x.data_ptr<float>(), b);
  residual = x;
  routes = route_rows.empty() ? at::Tensor() : at::stack(route_rows);
  return normed_rows(x, wanted, final_norm);
}

at::Tensor Runner::normed_rows(const at::Tensor& x, const at::Tensor& rows, const at::Tensor& weight) const {
  at::Tensor out = x.index_select(0, rows);
  float* row = out.data_ptr<float>();
  for (int64_t i = 0; i < out.size(0); ++i, row += shape.hidden)
    rms_norm(row, data(weight), static_cast<float>(shape.eps), shape.hidden, row);
  return out;
}

void Runner::add_module(const Tensors& w) {
  const auto vector = [&](const char* key) { return w.at(key).detach().to(at::kFloat).contiguous(); };
  modules.push_back({vector("enorm"), vector("hnorm"), vector("norm"), pack(w.at("join"), format)});
}

at::Tensor Runner::ahead(int64_t index, const at::Tensor& next, const c10::optional<at::Tensor>& hidden, const at::Tensor& positions,
                         const at::Tensor& starts, const at::Tensor& tables, const at::Tensor& wanted) {
  const Module& m = modules.at(index);
  const int64_t n = next.size(0), d = shape.hidden;
  const auto eps = static_cast<float>(shape.eps);
  const at::Tensor embedded = embedding.index_select(0, next).to(at::kFloat);
  const at::Tensor before = hidden.has_value() ? hidden->contiguous() : residual;
  TORCH_CHECK(before.size(0) == n && positions.size(0) == n, "a prediction module needs the hidden states of its batch");
  at::Tensor joined = at::empty({n, 2 * d}, at::kFloat), x = at::empty({n, d}, at::kFloat);
  float* rows = joined.data_ptr<float>();
  for_rows(n, 4 * d, [&](int64_t i) {  // the embedding first: the order of the released weights
    float* second = rows + i * 2 * d + d;
    rms_norm(embedded.data_ptr<float>() + i * d, data(m.enorm), eps, d, rows + i * 2 * d);
    const float* from = before.data_ptr<float>() + i * d;
    if (!hidden.has_value()) rms_norm(from, data(final_norm), eps, d, second), from = second;
    rms_norm(from, data(m.hnorm), eps, d, second);
  });
  product(rows, n, 2 * d, m.join, x.data_ptr<float>(), d);
  run(main_layers + index, x.data_ptr<float>(), batch(positions, starts, tables));
  return normed_rows(x, wanted, m.norm);
}

at::Tensor Runner::logits(const at::Tensor& hidden, bool keep) {
  const at::Tensor rows = hidden.contiguous();
  const int64_t count = rows.size(0);
  at::Tensor out = keep || !last_logits.defined() || last_logits.size(0) < count ? at::empty({count, head.n}, at::kFloat) : last_logits;
  if (!keep) last_logits = out;
  product(rows.data_ptr<float>(), count, shape.hidden, head, out.data_ptr<float>(), head.n);
  return out.narrow(0, 0, count);
}

void Runner::run(int64_t index, float* x, const Batch& b) {
  const Layer& l = layers[index];
  const int64_t n = b.tokens, d = shape.hidden;
  const auto eps = static_cast<float>(shape.eps);
  float *rows = room(normed, n * d), *added = room(mixed, n * d);
  for_rows(n, d, [&](int64_t i) { rms_norm(x + i * d, data(l.norm1), eps, d, rows + i * d); });
  attention(index, rows, b, added);
  for_rows(n, d, [&](int64_t i) {
    for (int64_t j = 0; j < d; ++j) x[i * d + j] += added[i * d + j];
    rms_norm(x + i * d, data(l.norm2), eps, d, rows + i * d);
  });
  const bool has_dense = l.gate_up.n > 0;
  if (has_dense) dense(l.gate_up, l.down, rows, n, added);
  else std::fill(added, added + n * d, 0.f);
  if (l.is_moe) experts(l, rows, n, added);
  for_rows(n, d, [&](int64_t i) {
    for (int64_t j = 0; j < d; ++j) x[i * d + j] += added[i * d + j];
  });
}

void Runner::dense(const Packed& gate_up, const Packed& down, const float* x, int64_t n, float* out) {
  const int64_t width = gate_up.n / 2;
  float* wide = room(inner, n * gate_up.n);
  product(x, n, shape.hidden, gate_up, wide, gate_up.n);
  for_rows(n, 4 * width, [&](int64_t i) { swiglu(wide + i * 2 * width, width, wide + i * 2 * width); });
  product(wide, n, 2 * width, down, out, shape.hidden);
}

// --- attention -------------------------------------------------------------------------------------------------------

void Runner::attention(int64_t index, const float* x, const Batch& b, float* out) {
  const Layer& l = layers[index];
  queries_keys(index, x, b);
  write(index, b);
  room(attended, b.tokens * l.out.k);
  for (int64_t s = 0; s < b.sequences;) {  // neighbouring short spans together, long ones each by itself
    if (b.starts[s + 1] - b.starts[s] > shape.whole_prefill) {
      whole(index, b, s++);
      continue;
    }
    const int64_t from = b.starts[s];
    while (s < b.sequences && b.starts[s + 1] - b.starts[s] <= shape.whole_prefill) ++s;
    paged(index, b, from, b.starts[s]);
  }
  product(attended.data(), b.tokens, l.out.k, l.out, out, shape.hidden);
  add_bias(out, b.tokens, shape.hidden, l.out_bias);
}

// `query` (N, H, Q), rotated; `cached` (N, W), the rows to be written.
void Runner::queries_keys(int64_t index, const float* x, const Batch& b) {
  const Layer& l = layers[index];
  const int64_t n = b.tokens, w = shape.cache_width();
  float* both = room(fused, n * l.qkv.n);
  product(x, n, shape.hidden, l.qkv, both, l.qkv.n);
  add_bias(both, n, l.qkv.n, l.qkv_bias);
  float* rows = room(cached, n * w);
  if (!shape.latent) {
    const int64_t hd = shape.width, q = shape.heads * hd;
    float* queries = room(query, n * q);
    for_rows(n, l.qkv.n, [&](int64_t i) {
      float* from = both + i * l.qkv.n;
      for (int64_t h = 0; h < shape.heads + shape.key_heads; ++h) rotate(from + h * hd, turn(b.positions[i]), hd / 2, shape.interleaved);
      std::copy(from, from + q, queries + i * q);
      std::copy(from + q, from + q + w, rows + i * w);
    });
    return;
  }
  const int64_t head = shape.nope + shape.rope, q = shape.heads * head, rank = l.query_rank ? l.query_rank : q;
  const auto eps = static_cast<float>(shape.eps);
  float* queries = room(query, n * q);
  for_rows(n, l.qkv.n, [&](int64_t i) {
    float* from = both + i * l.qkv.n;
    if (l.query_rank) rms_norm(from, data(l.q_norm), eps, rank, from);
    else std::copy(from, from + q, queries + i * q);
    rms_norm(from + rank, data(l.kv_norm), eps, shape.latent, rows + i * w);
    std::copy(from + rank + shape.latent, from + rank + w, rows + i * w + shape.latent);
    rotate(rows + i * w + shape.latent, turn(b.positions[i]), shape.rope / 2, true);
  });
  if (l.query_rank) product(both, n, l.qkv.n, l.q_b, queries, q);
  for_rows(n, q, [&](int64_t i) {
    for (int64_t h = 0; h < shape.heads; ++h) rotate(queries + i * q + h * head + shape.nope, turn(b.positions[i]), shape.rope / 2, true);
  });
}

void Runner::write(int64_t index, const Batch& b) {
  const at::Tensor& cache = caches[index];
  const int64_t size = cache.size(1), w = shape.cache_width(), parts = shape.parts(), width = w / parts;
  by_type(cache, [&](auto* pages) {
    for_rows(b.tokens, w, [&](int64_t i) {
      const int64_t position = b.positions[i];
      const int64_t block = b.tables[b.sequence[i] * b.table_width + position / size];
      for (int64_t part = 0; part < parts; ++part)
        store_row(pages + ((block * parts + part) * size + position % size) * width, cached.data() + i * w + part * width, width);
    });
  });
}

// Tokens [from, to), each over the cached rows of its own sequence; MLA absorbed.
void Runner::paged(int64_t index, const Batch& b, int64_t from, int64_t to) {
  const Layer& l = layers[index];
  const at::Tensor& cache = caches[index];
  const int64_t n = to - from, h = shape.heads, w = shape.cache_width(), size = cache.size(1);
  const auto scale = static_cast<float>(shape.scale);
  const bool dot = use_bf16_dot();
  if (!shape.latent) {
    const int64_t hd = shape.width, group = h / shape.key_heads;
    by_type(cache, [&](auto* pages) {
      in_runs(n * shape.key_heads, [&](int64_t task, int64_t following) {
        const int64_t i = from + task / shape.key_heads, g = task % shape.key_heads;
        const auto of = [&](int64_t token) { return Pages{pages, b.table(token), size, hd, shape.parts(), b.table_width}; };
        attend(dot, group, query.data() + (i * h + g * group) * hd, hd, of(i), b.positions[i] + 1, g, hd, shape.key_heads + g, hd,
               scale, attended.data() + (i * h + g * group) * hd, hd, paged_scratch(),
               Next{of(from + following / shape.key_heads), following % shape.key_heads, shape.key_heads + following % shape.key_heads});
      });
    });
    return;
  }
  // Up-projections moved to the query and the output: q_lat = q_nope W_UK, out = (sum p c) W_UV, head by head.
  const int64_t head = shape.nope + shape.rope, c = shape.latent;
  float *latent = room(gathered, n * h * w), *seen = room(expert_out, n * h * c);
  tasks(h, n * h * shape.nope * c, [&](int64_t j) {
    Rows rows;
    prepare(rows, query.data() + from * h * head + j * head, n, shape.nope, h * head, l.up_key[j].format);
    for (int64_t u = 0; u < l.up_key[j].units(); ++u) unit_product(rows, 0, n, l.up_key[j], u, latent + j * w, h * w);
    for (int64_t i = 0; i < n; ++i) {
      const float* tail = query.data() + ((from + i) * h + j) * head + shape.nope;
      std::copy(tail, tail + shape.rope, latent + (i * h + j) * w + c);
    }
  });
  const int64_t share = n >= at::get_num_threads() ? h : std::min<int64_t>(h, 4), shares = (h + share - 1) / share;
  by_type(cache, [&](auto* pages) {
    in_runs(n * shares, [&](int64_t task, int64_t following) {
      const int64_t i = task / shares, j = task % shares * share;
      const auto of = [&](int64_t token) { return Pages{pages, b.table(from + token), size, w, int64_t{1}, b.table_width}; };
      attend(dot, std::min(share, h - j), latent + (i * h + j) * w, w, of(i), b.positions[from + i] + 1, 0, w, 0, c, scale,
             seen + (i * h + j) * c, c, paged_scratch(), Next{of(following / shares), int64_t{0}, int64_t{0}});
    });
  });
  tasks(h, n * h * shape.value * c, [&](int64_t j) {
    Rows rows;
    prepare(rows, seen + j * c, n, c, h * c, l.up_value[j].format);
    for (int64_t u = 0; u < l.up_value[j].units(); ++u)
      unit_product(rows, 0, n, l.up_value[j], u, attended.data() + (from * h + j) * shape.value, h * shape.value);
  });
}

// --- experts ---------------------------------------------------------------------------------------------------------

// `picks` (N, K) and `weights` (N, K): model/moe.py, Gate.
void Runner::choose(const Layer& l, const float* x, int64_t n) {
  const int64_t e = shape.experts, k = shape.chosen, per_group = e / shape.groups;
  float *s = room(scores, n * e), *chosen_weights = room(weights, n * k);
  product(x, n, shape.hidden, l.router, s, e);
  picks.resize(n * k);
  for_rows(n, 8 * e, [&](int64_t i) {
    float* row = s + i * e;
    if (shape.sigmoid) {
      for (int64_t j = 0; j < e; ++j) row[j] = 1 / (1 + std::exp(-row[j]));
    } else {
      const float top = *std::max_element(row, row + e);
      float total = 0;
      for (int64_t j = 0; j < e; ++j) total += row[j] = std::exp(row[j] - top);
      for (int64_t j = 0; j < e; ++j) row[j] /= total;
    }
    thread_local std::vector<float> biased, group;
    thread_local std::vector<int64_t> ranks;
    biased.assign(row, row + e);
    if (l.router_bias.defined())
      for (int64_t j = 0; j < e; ++j) biased[j] += data(l.router_bias)[j];
    if (shape.by_group) {
      group.resize(shape.groups);
      ranks.resize(shape.groups);
      for (int64_t g = 0; g < shape.groups; ++g) {
        float best = -INFINITY, second = -INFINITY;
        for (int64_t j = g * per_group; j < (g + 1) * per_group; ++j) {
          if (biased[j] > best) second = best, best = biased[j];
          else second = std::max(second, biased[j]);
        }
        group[g] = shape.two_best ? best + second : best;
      }
      std::iota(ranks.begin(), ranks.end(), 0);
      std::partial_sort(ranks.begin(), ranks.begin() + shape.kept_groups, ranks.end(), [&](int64_t a, int64_t c) { return group[a] > group[c]; });
      for (int64_t g = shape.kept_groups; g < shape.groups; ++g) std::fill_n(biased.begin() + ranks[g] * per_group, per_group, -INFINITY);
    }
    ranks.resize(e);
    std::iota(ranks.begin(), ranks.end(), 0);
    std::partial_sort(ranks.begin(), ranks.begin() + k, ranks.end(), [&](int64_t a, int64_t c) { return biased[a] > biased[c]; });
    float total = 0;
    for (int64_t j = 0; j < k; ++j) {
      picks[i * k + j] = ranks[j];
      total += chosen_weights[i * k + j] = row[ranks[j]];
    }
    const float factor = static_cast<float>(shape.routed_scale) / (shape.normalise ? total + 1e-20f : 1.f);
    for (int64_t j = 0; j < k; ++j) chosen_weights[i * k + j] *= factor;
  });
  route_rows.push_back(at::from_blob(picks.data(), {n, k}, at::kLong).clone());
}

// out += sum over the chosen of weight * expert(x). Each expert's tokens are brought together, so its weights are read once.
void Runner::experts(const Layer& l, const float* x, int64_t n, float* out) {
  choose(l, x, n);
  const int64_t d = shape.hidden, k = shape.chosen, total = n * k, wide = l.expert_gate_up[0].n, width = wide / 2;
  std::vector<int64_t> ends(shape.experts + 1, 0);
  for (int64_t i = 0; i < total; ++i) ++ends[picks[i] + 1];
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  slots.resize(total);
  std::vector<int64_t> next(ends.begin(), ends.end() - 1), used;
  for (int64_t i = 0; i < total; ++i) slots[i] = next[picks[i]]++;
  for (int64_t e = 0; e < shape.experts; ++e)
    if (ends[e + 1] > ends[e]) used.push_back(e);
  float *rows = room(gathered, total * d), *wider = room(inner, total * wide), *narrow = room(act, total * width), *made = room(expert_out, total * d);
  for_rows(total, d, [&](int64_t i) { std::copy_n(x + i / k * d, d, rows + slots[i] * d); });
  Rows prepared;
  prepare(prepared, rows, total, d, d, l.expert_gate_up[0].format);
  const auto each = [&](const std::vector<Packed>& stack, const Rows& from, float* to, int64_t ld) {
    const int64_t units = stack[0].units(), count = static_cast<int64_t>(used.size());
    tasks(count * units, [&](int64_t task) {
      const int64_t e = used[task / units], unit = task % units;
      unit_product(from, ends[e], ends[e + 1] - ends[e], stack[e], unit, to + ends[e] * ld, ld);
    });
  };
  each(l.expert_gate_up, prepared, wider, wide);
  for_rows(total, 4 * width, [&](int64_t i) { swiglu(wider + i * wide, width, narrow + i * width); });
  prepare(prepared, narrow, total, width, width, l.expert_down[0].format);
  each(l.expert_down, prepared, made, d);
  for_rows(n, k * d, [&](int64_t i) {
    for (int64_t j = 0; j < k; ++j) {
      const float weight = weights[i * k + j], *from = made + slots[i * k + j] * d;
      for (int64_t a = 0; a < d; ++a) out[i * d + a] += weight * from[a];
    }
  });
}

}  // namespace sputnik

TORCH_LIBRARY(sputnik, m) {
  using sputnik::Runner;
  m.class_<Runner>("Runner")
      .def(torch::init<const c10::Dict<std::string, double>&, const at::Tensor&, const std::string&>())
      .def("add_layer", &Runner::add_layer)
      .def("set_ends", &Runner::set_ends)
      .def("set_caches", &Runner::set_caches)
      .def("set_main_layers", &Runner::set_main_layers)
      .def("set_rope", &Runner::set_rope)
      .def("forward", &Runner::forward)
      .def("add_module", &Runner::add_module)
      .def("ahead", &Runner::ahead)
      .def("logits", &Runner::logits)
      .def("stride", &Runner::stride)
      .def("residual", [](const c10::intrusive_ptr<Runner>& self) { return self->residual; })
      .def("routes", [](const c10::intrusive_ptr<Runner>& self) { return self->routes; });
  m.def("huge_zeros(int[] sizes, ScalarType dtype) -> Tensor", [](at::IntArrayRef sizes, at::ScalarType dtype) { return sputnik::huge_zeros(sizes, dtype); });
  m.def("bf16_dot() -> bool", [] { return sputnik::use_bf16_dot(); });
  m.def("set_bf16_dot(bool on) -> ()", [](bool on) { sputnik::set_bf16_dot(on); });
  m.def("product(Tensor x, Tensor weight, str format) -> Tensor", [](const at::Tensor& x, const at::Tensor& weight, const std::string& format) {
    const sputnik::Packed w = sputnik::pack(weight, sputnik::parse_format(format));
    TORCH_CHECK(x.dim() == 2 && x.size(1) == w.k, "product: ", x.sizes(), " and ", weight.sizes(), " do not fit");
    const at::Tensor rows = x.contiguous();
    at::Tensor out = at::empty({x.size(0), w.n}, at::kFloat);
    sputnik::product(rows.data_ptr<float>(), x.size(0), w.k, w, out.data_ptr<float>(), w.n);
    return out;
  });
}
