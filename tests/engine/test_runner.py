"""Both runners against the plain model: chunks, pages and batches in any order change nothing but the time."""

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sputnik.engine.config import EngineConfig
from sputnik.engine.engine import Engine
from sputnik.engine.gpu_runner import GpuRunner
from sputnik.engine.metrics import WEIGHT_BYTES
from sputnik.engine.params import SamplingParams
from sputnik.engine.runner import FORMATS, FlatBatch, NativeRunner, TorchRunner, make_runner
from sputnik.engine.sample import Request
from sputnik.errors import ConfigError
from sputnik.model import kernels
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer

MLA: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 40, "intermediate_size": 56, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 16, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "max_position_embeddings": 256, "routed_scaling_factor": 2.5,
}  # fmt: skip
GQA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V2 = {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False, "n_shared_experts": 2}
CASES: dict[str, dict[str, Any]] = {
    "v3": MLA,
    "v3-yarn": MLA | {"rope_scaling": YARN, "rms_norm_eps": 1e-2},
    "v3-full-queries": MLA | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "v3-no-shared": MLA | {"n_shared_experts": 0},
    "v2-softmax": MLA | V2,
    "v2-greedy": MLA | {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "llama": GQA,
    "llama-tied-one-key-head": GQA | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2": GQA | {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 4},
}
native = pytest.mark.skipif(not kernels.load(), reason="kernels not built: python -m sputnik.model.kernels")
RUNNERS = [pytest.param(NativeRunner, marks=native, id="native"), pytest.param(TorchRunner, id="torch")]
ALL = [*RUNNERS, pytest.param(GpuRunner, id="gpu")]  # here with the twins of its kernels


def make_model(changes: dict[str, Any], seed: int = 0) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(ModelConfig(**(changes | {"initializer_range": 0.15}))).init_weights(generator)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or name.endswith("bias"):
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    return model.eval()


def make(kind: type, model: Transformer, precision: str = "fp32", exact: bool = False) -> Any:
    if kind is NativeRunner:
        return NativeRunner(model, 64, 4, precision, precision, exact)
    if kind is GpuRunner:
        return GpuRunner(model, 64, 4, precision, None)
    return TorchRunner(model, 64, 4, precision, exact)


class Program:
    """Sequences computed in random chunks and random company, pages handed out in random order."""

    def __init__(self, runner: Any, texts: list[list[int]], seed: int, longest: int = 40) -> None:
        self.random = random.Random(seed)
        free = list(range(64))
        self.random.shuffle(free)
        self.runner, self.texts, self.longest = runner, texts, longest
        self.blocks = [[free.pop() for _ in range(-(-len(text) // 4))] for text in texts]
        self.done = [0] * len(texts)

    def run(self) -> list[Tensor]:
        """Logits of every position of every text."""
        out: list[list[Tensor]] = [[] for _ in self.texts]
        while open_ := [s for s, text in enumerate(self.texts) if self.done[s] < len(text)]:
            chosen = self.random.sample(open_, self.random.randint(1, len(open_)))
            spans, owners = [], []
            for s in chosen:
                count = self.random.choice([1, 1, 2, 3, 11, self.longest])
                tokens = self.texts[s][self.done[s] : self.done[s] + count]
                spans.append((tokens, self.done[s], self.blocks[s]))
                owners += [s] * len(tokens)
                self.done[s] += len(tokens)
            hidden = self.runner.forward(FlatBatch.of(spans, range(len(owners))))
            for s, row in zip(owners, self.runner.head(hidden), strict=True):
                out[s].append(row)
        return [torch.stack(rows) for rows in out]


def some_texts(lengths: tuple[int, ...] = (1, 5, 17, 40), seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(97) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_pages_chunks_and_company_give_the_plain_models_logits(kind: type, case: str) -> None:
    model, texts = make_model(CASES[case]), some_texts()
    for text, logits in zip(texts, Program(make(kind, model), texts, seed=1).run(), strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([text]))[0], atol=2e-4, rtol=1e-4)


@native
@pytest.mark.parametrize("case", ["v3", "llama"])
@torch.no_grad()
def test_blocks_of_a_single_token_give_the_plain_models_logits(case: str) -> None:
    """Token by token: at 14 and 15 of 16 the last scores end where the next head's begin."""
    model, text = make_model(CASES[case]), some_texts((18,))[0]
    runner = NativeRunner(model, 64, 1, "fp32", "fp32", False)
    steps = [FlatBatch.of([([token], place, range(40, 40 + place + 1))], [0]) for place, token in enumerate(text)]
    logits = torch.cat([runner.head(runner.forward(step)) for step in steps])
    torch.testing.assert_close(logits, model(torch.tensor([text]))[0], atol=2e-4, rtol=1e-4)


@native
@pytest.mark.skipif(not kernels.load() or not torch.ops.sputnik.bf16_dot(), reason="this CPU multiplies no bf16 pairs")
@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_attention_by_bf16_pairs_is_that_of_single_numbers(
    case: str, size: int, request: pytest.FixtureRequest
) -> None:
    """The same bf16 cache, queries and weights rounded or not. Somewhere that may change an expert."""
    model, texts = make_model(CASES[case]), some_texts((3, 18, 40))
    request.addfinalizer(lambda: torch.ops.sputnik.set_bf16_dot(True))
    found = []
    for dot in (False, True):
        torch.ops.sputnik.set_bf16_dot(dot)
        program = Program(NativeRunner(model, 256, size, "bf16", "fp32", True), texts, seed=1)
        program.blocks = [[64 * s + n for n in range(-(-len(text) // size))] for s, text in enumerate(texts)]
        found.append(torch.cat(program.run()))
    apart = (found[0] - found[1]).abs() / found[0].std()
    assert 0 < apart.median() < 0.01 and apart.quantile(0.9) < 0.05


@native
def test_a_batch_outside_of_its_blocks_is_refused() -> None:
    runner = NativeRunner(make_model(GQA), 64, 4, "fp32", "fp32", False)
    with pytest.raises(RuntimeError, match="position 4 of 4"):
        runner.forward(FlatBatch.of([([1, 2], 3, [0])], [0]))
    with pytest.raises(RuntimeError, match="must be its tokens"):
        runner.forward(replace(FlatBatch.of([([1, 2], 0, [0])], [0]), starts=torch.tensor([0, 3])))


@torch.no_grad()
def test_a_prompt_longer_than_a_step_is_answered() -> None:
    """More than the 2048 tokens of an engine's step, so that the first step asks for no logits."""
    model = make_model(GQA | {"max_position_embeddings": 2100, "num_hidden_layers": 1})
    prompt = [3 + place * place % 90 for place in range(2090)]
    request = Request(prompt, SamplingParams(temperature=0, max_tokens=1))
    ((each,),) = Engine(model, (), EngineConfig(precision="fp32", cache_tokens=4096)).run([request])
    assert each.written == [int(model(torch.tensor([prompt]))[0, -1].argmax())]


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("case", ["v3", "llama"])
def test_exact_mode_gives_the_same_bits_in_any_company(kind: type, case: str) -> None:
    model, texts = make_model(CASES[case]), some_texts()
    first, second = (Program(make(kind, model, exact=True), texts, seed).run() for seed in (1, 2))
    alone = [Program(make(kind, model, exact=True), [text], seed=3, longest=1).run()[0] for text in texts]
    for one, two, three in zip(first, second, alone, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("case", ["v3", "v3-no-shared"])
@torch.no_grad()
def test_prediction_modules_look_ahead_as_in_training(kind: type, case: str) -> None:
    model, texts = make_model(CASES[case] | {"num_nextn_predict_layers": 2}), some_texts((9, 14))
    runner, blocks = make(kind, model), [[5, 0, 7, 2], [9, 3, 1, 4]]
    trunks = [model.trunk(torch.tensor([text])) for text in texts]
    wanted = [model.mtp_hidden(trunk.residual, torch.tensor([text])).hidden for trunk, text in zip(trunks, texts)]
    for first, last in ((0, 5), (5, 6), (6, 9)):
        spans = [(text[first:last], first, own) for text, own in zip(texts, blocks)]
        batch = FlatBatch.of(spans, range(2 * (last - first)))
        runner.forward(batch)
        hidden = None
        for depth in (0, 1):  # every position's next token is known here, up to the last but two
            following = torch.tensor([[*text, 0, 0][i + depth + 1] for text in texts for i in range(first, last)])
            hidden = runner.ahead(batch, following, depth, hidden)
            rows = [depths[depth][0, first:last] for depths in wanted]
            for ours, theirs in zip(hidden.split(last - first), rows, strict=True):
                torch.testing.assert_close(ours[: len(theirs)], theirs, atol=2e-4, rtol=1e-4)


@pytest.fixture(params=[False, True], ids=["fp32-products", "bf16-products"])
def bf16_dot(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways of multiplying bf16 weights, whichever this CPU prefers."""
    preferred = torch.ops.sputnik.bf16_dot()
    torch.ops.sputnik.set_bf16_dot(request.param)
    yield
    torch.ops.sputnik.set_bf16_dot(preferred)


@native
@pytest.mark.parametrize("case", ["v3", "llama"])
@pytest.mark.parametrize("weights", FORMATS)
def test_weights_stored_in_half_the_bytes_are_packed_alike(weights: str, case: str) -> None:
    narrow, texts = make_model(CASES[case]).bfloat16(), some_texts()
    wide = copy.deepcopy(narrow).float()
    both = [Program(NativeRunner(m, 64, 4, "fp32", weights, exact=False), texts, seed=1).run() for m in (narrow, wide)]
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours, theirs)


@native
@pytest.mark.usefixtures("bf16_dot")
@pytest.mark.parametrize("case", ["v3", "v3-full-queries", "llama"])
@torch.no_grad()
def test_bf16_weights_are_the_rounded_weights(case: str) -> None:
    model, texts = make_model(CASES[case]), some_texts()
    runner = NativeRunner(model, 64, 4, "fp32", "bf16", exact=False)
    logits = Program(runner, texts, seed=1).run()
    for name, tensor in model.named_parameters():
        if tensor.ndim >= 2 and not name.endswith(("gate.weight", "embed_tokens.weight")):
            tensor.copy_(tensor.bfloat16())
    for text, ours in zip(texts, logits, strict=True):
        theirs = model(torch.tensor([text]))[0]
        if torch.ops.sputnik.bf16_dot():  # x is rounded too, which may change an expert
            assert float((ours - theirs).norm() / theirs.norm()) < 0.1
        else:
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def rounded(weight: Tensor, weights: str) -> Tensor:
    """What int8 or int4 weights stand for: groups of 32 along the rows, with an fp16 scale and for int4 a minimum."""
    groups = weight.unflatten(-1, (-1, 32))
    least, most = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    if weights == "int4":
        scale, start = ((most - least) / 15).half().float(), least.half().float()
        return (((groups - start) / torch.where(scale == 0, 1, scale)).round().clamp(0, 15) * scale + start).flatten(-2)
    scale = (torch.maximum(-least, most) / 127).half().float()
    return ((groups / torch.where(scale == 0, 1, scale)).round().clamp(-127, 127) * scale).flatten(-2)


def test_int4_weights_of_a_gguf_file_survive() -> None:
    """Q4_1 has the same groups, so rounding what such a file holds changes nothing."""
    generator = torch.Generator().manual_seed(0)
    scale, start = (torch.rand(5, 7, 1, generator=generator).half().float() for _ in range(2))
    numbers = torch.randint(0, 16, (5, 7, 32), generator=generator)
    numbers[..., 0], numbers[..., 1] = 0, 15
    held = (numbers * scale - start).flatten(-2)
    assert float((rounded(held, "int4") - held).abs().max()) < 2e-3


@native
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_quantised_product_is_that_of_the_rounded_weights(weights: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(9, 192, generator=generator), torch.randn(75, 192, generator=generator)
    theirs = x @ rounded(w, weights).t()
    ours = torch.ops.sputnik.product(x, w, weights)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.01  # x is rounded to 8 bits too


@native
@pytest.mark.parametrize("weights", ["int8", "int4"])
@torch.no_grad()
def test_a_quantised_model_is_that_of_the_rounded_weights(weights: str) -> None:
    model, texts = make_model(GQA | {"hidden_size": 192, "intermediate_size": 256}), some_texts()
    logits = Program(NativeRunner(model, 64, 4, "fp32", weights, exact=False), texts, seed=1).run()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            weight.copy_(rounded(weight, "int8" if "lm_head" in name else weights))
    for text, ours in zip(texts, logits, strict=True):
        theirs = model(torch.tensor([text]))[0]
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_a_refresh_shows_new_weights(kind: type) -> None:
    model = make_model(GQA)
    runner = make(kind, model)
    model.lm_head.weight.mul_(2)
    model.model.layers[0].mlp.down_proj.weight.mul_(3)
    runner.refresh()
    text = some_texts((9,))
    torch.testing.assert_close(Program(runner, text, 0).run()[0], model(torch.tensor(text))[0], atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_a_copied_block_serves_another_sequence(kind: type) -> None:
    model, text = make_model(MLA), some_texts((7,))[0]
    runner = make(kind, model)
    runner.forward(FlatBatch.of([(text[:6], 0, [3, 9])], [5]))
    runner.copy([(9, 20)])
    wanted = runner.forward(FlatBatch.of([(text[6:], 6, [3, 9])], [0]))
    assert torch.equal(runner.forward(FlatBatch.of([(text[6:], 6, [3, 20])], [0])), wanted)


@native
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_a_product_does_not_depend_on_the_number_of_rows(weights: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 96, generator=generator), torch.randn(75, 96, generator=generator)
    whole = torch.ops.sputnik.product(x, w, weights)
    for count in (1, 2, 5, 11, 12, 13, 25):
        assert torch.equal(torch.ops.sputnik.product(x[:count], w, weights), whole[:count])
    bound = {"fp32": 1e-6, "bf16": 5e-3, "int8": 0.02, "int4": 0.15}[weights]
    assert float((whole - x @ w.t()).norm() / (x @ w.t()).norm()) < bound


@native
@pytest.mark.parametrize("place", [0, 1, 17, 31])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_products_keep_nan(weights: str, place: int) -> None:
    x, w = torch.randn(3, 64), torch.randn(40, 64)
    x[1, place] = torch.nan
    assert torch.ops.sputnik.product(x, w, weights).isnan().all(dim=1).tolist() == [False, True, False]
    x, w[5, place] = torch.randn(3, 64), torch.nan
    assert torch.ops.sputnik.product(x, w, weights).isnan().all(dim=0).nonzero().tolist() == [[5]]
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.sputnik.product(x[:, :32], w, weights)


def test_unknown_weight_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="int8, int4"):
        make_runner(make_model(GQA), 8, 4, weights="int3")


def test_all_forms_of_weights_have_a_size() -> None:
    assert set(WEIGHT_BYTES) == {*FORMATS, "fp8"}
