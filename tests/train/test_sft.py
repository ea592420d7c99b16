"""Fine-tuning on dialogues: packed equals padded, examples are alone, the run resumes to the bit and learns."""

import dataclasses
import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from sputnik.errors import ConfigError, DataError
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.kernels import load
from sputnik.model.transformer import Transformer
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.examples import Example, read_examples
from sputnik.train.rows import packed_rows
from sputnik.train.sft import FineTuning, SFTConfig, train_sft
from sputnik.train.state import read_jsonl

Base = Any  # conftest.Base: this directory is no package to import it from
needs_kernels = pytest.mark.skipif(not load(), reason="the kernels are not built on this machine")
SHORT = SFTConfig(epochs=2, batch=16, micro_tokens=256, precision="fp32", evaluations=2, held_out=0.1)
TIMES = {"tokens_per_s", "flops_per_s", "peak_share", "seconds", "usd"}
DENSE = {
    "model_type": "llama", "vocab_size": 0, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def lines(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    for _ in range(count):
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        asked, answer = {"role": "user", "content": f"{a} plus {b}"}, f"{a} plus {b} is {a + b}."
        if rng.random() < 0.3:
            more = [{"role": "user", "content": "so"}, {"role": "assistant", "content": str(a + b)}]
            found.append({"messages": [asked, {"role": "assistant", "content": answer}, *more]})
        else:
            found.append({"prompt": asked["content"], "answer": str(a + b), "thinking": answer})
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines(96)))
    return file


def shaped(base: Base, shape: str) -> ModelConfig:
    if shape == "v3":
        return base.model_config
    return ModelConfig(**{**DENSE, "vocab_size": base.tok.vocab_size, "model_type": shape})


def model_of(base: Base, shape: str) -> Transformer:
    config = replace(shaped(base, shape), initializer_range=0.1)
    return Transformer(config).init_weights(torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parent(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parent") / "checkpoint"
    save_model(model_of(base, "v3"), path, tokenizer=base.tok)
    return path


def examples(base: Base, data: Path) -> list[Example]:
    return read_examples([data], base.tok, longest=64).examples


def make_stage(base: Base, data: Path, config: SFTConfig = SHORT, shape: str = "v3") -> FineTuning:
    return FineTuning(config, model_of(base, shape), base.tok, examples(base, data), [])


def run(base: Base, parent: Path, data: Path, out: Path, config: SFTConfig = SHORT) -> dict[str, Any]:
    return train_sft(config, parent, [data], out, base.meter(), Console(quiet=True))


def assert_same_sums(ours: FineTuning, plain: FineTuning) -> None:
    """Losses, loads and gradients of the first batch."""
    one, other = (stage.accumulate(stage.batch_of(1)) for stage in (ours, plain))
    assert float(one.loss) > 1
    for key in ("loss", "mtp", "balance"):
        assert float(getattr(one, key)) == pytest.approx(float(getattr(other, key)), rel=1e-5), key
    assert one.load.keys() == other.load.keys() == ours.gates.keys()
    assert all(one.load[layer].equal(other.load[layer]) for layer in one.load)
    found, expected = (
        {name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None} for stage in (ours, plain)
    )
    assert found.keys() == expected.keys() and len(found) > 15
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].abs().max()))


def metrics(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_jsonl(out / "metrics.jsonl")]


# --- the sum of a step ---


@needs_kernels
@pytest.mark.parametrize("shape", ["v3", "llama", "qwen2"])
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(base: Base, data: Path, shape: str) -> None:
    config = replace(SHORT, mtp_weight=0.3, balance_alpha=0.1)
    packed, padded = (make_stage(base, data, config, shape) for _ in range(2))
    assert packed.packed and len(packed.gates) == (2 if shape == "v3" else 0)
    padded.packed = False
    assert_same_sums(packed, padded)


@needs_kernels
@pytest.mark.parametrize("shape", ["v3", "llama"])
def test_no_token_of_one_example_influences_another(base: Base, data: Path, shape: str) -> None:
    net = model_of(base, shape)
    batch = examples(base, data)[:5]
    other = replace(batch[2], ids=batch[2].ids[::-1].copy())
    places = torch.tensor([len(each.ids) - 1 for each in batch]).cumsum(0)
    own = torch.arange(int(places[-1]))
    own = (own < places[1]) | (own >= places[2])
    results = []
    for rows in (packed_rows(batch, 0), packed_rows([*batch[:2], other, *batch[3:]], 0)):
        trunk = net.trunk(rows.ids, segments=rows.segments)
        ahead = net.mtp_hidden(trunk.residual, rows.ids, None, rows.segments).hidden
        results.append([state[0, own] for state in (trunk.hidden, *ahead)])
        assert len(results[-1]) == (2 if shape == "v3" else 1)
    for before, after in zip(*results, strict=True):
        usable = before.new_ones(len(before), dtype=torch.bool)
        if before is not results[0][0]:  # a prediction module knows no token behind the end
            lengths = [len(each.ids) - 1 for each in (*batch[:2], *batch[3:])]
            usable = torch.cat([torch.arange(length) < length - 1 for length in lengths])
        assert before[usable].equal(after[usable])


def test_the_cut_into_rows_changes_no_sum(base: Base, data: Path) -> None:
    assert_same_sums(make_stage(base, data), make_stage(base, data, replace(SHORT, micro_tokens=64)))


def test_the_loss_is_the_mean_over_answer_tokens_and_the_end(base: Base, data: Path) -> None:
    stage = make_stage(base, data)
    batch = stage.batch_of(1)
    sums = stage.accumulate(batch)
    nats: list[list[Tensor]] = [[], []]
    for example in batch:
        ids, learned = torch.from_numpy(example.ids)[None], torch.from_numpy(example.mask)
        assert bool(learned[-1]) and example.ids[-1] == base.tok.eos_id and not bool(learned[0])
        with torch.no_grad():
            trunk = stage.model.trunk(ids[:, :-1])
            (ahead,) = stage.model.mtp_hidden(trunk.residual, ids[:, :-1]).hidden
            for depth, hidden in enumerate((trunk.hidden, ahead)):
                lost = torch.nn.functional.cross_entropy(
                    stage.model.head(hidden)[0], ids[0, 1 + depth :], reduction="none"
                )
                nats[depth].append(lost[learned[1 + depth :]])
    assert float(sums.loss) == pytest.approx(float(torch.cat(nats[0]).mean()), rel=1e-5)
    assert float(sums.mtp) == pytest.approx(float(torch.cat(nats[1]).mean()), rel=1e-5)


def test_the_prediction_modules_learn_unless_their_weight_is_0(base: Base, data: Path) -> None:
    found = {}
    for weight in (0.0, 0.1):
        stage = make_stage(base, data, replace(SHORT, mtp_weight=weight))
        before = {name: value.clone() for name, value in stage.model.mtp.state_dict().items()}
        stage._update(stage.accumulate(stage.batch_of(1)), 1)
        after = stage.model.mtp.state_dict()
        found[weight] = [name for name in before if not after[name].equal(before[name])]
    assert found[0.0] == [] and {"0.eh_proj.weight", "0.block.mlp.experts.down_proj"} <= set(found[0.1])
    assert "0.block.mlp.gate.e_score_correction_bias" in found[0.1]


def test_gamma_moves_the_biases_after_the_load_of_the_whole_batch(base: Base, data: Path) -> None:
    stage = make_stage(base, data, replace(SHORT, micro_tokens=64, bias_gamma=0.01))
    batch = stage.batch_of(1)
    sums = stage.accumulate(batch)
    read = sum(len(example.ids) - 1 for example in batch)
    assert [int(load.sum()) for load in sums.load.values()] == [2 * read, 2 * (read - len(batch))]
    stage._update(sums, 1)
    for layer, counted in sums.load.items():
        bias = stage.gates[layer].e_score_correction_bias
        assert bias is not None and bias.allclose(0.01 * (counted.mean() - counted).sign())


def test_a_step_that_is_not_finite_changes_nothing_and_names_the_tensor(base: Base, data: Path) -> None:
    stage = make_stage(base, data)
    sums = stage.accumulate(stage.batch_of(1))
    head = stage.model.lm_head.weight
    assert head.grad is not None
    head.grad[0, 0] = float("inf")
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    name, norm = stage._update(sums, 1)
    assert name is not None and "lm_head.weight (1 of" in name and math.isinf(norm)
    assert all(value.equal(before[key]) for key, value in stage.model.state_dict().items())


# --- the schedule ---


def test_an_epoch_reads_every_example_once_in_parts_of_equal_size(base: Base, data: Path) -> None:
    stage = make_stage(base, data, replace(SHORT, batch=17, epochs=3))
    total = len(stage.training)
    assert stage.per_epoch == math.ceil(total / 17) and stage.steps == 3 * stage.per_epoch
    orders = []
    for epoch in range(3):
        batches = [stage.batch_of(epoch * stage.per_epoch + part) for part in range(1, stage.per_epoch + 1)]
        assert {len(batch) for batch in batches} <= {total // stage.per_epoch, total // stage.per_epoch + 1}
        orders.append([example.where + str(len(example.ids)) for batch in batches for example in batch])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2]) and orders[0] != orders[1] != orders[2]


def test_the_learning_rate_rises_and_falls_along_a_cosine_to_a_tenth(base: Base, data: Path) -> None:
    stage = make_stage(base, data, replace(SHORT, epochs=20, batch=8))
    rates = [stage.lr(step) for step in range(1, stage.steps + 1)]
    peak = rates.index(max(rates))
    assert peak + 1 == stage.warmup == 20 and rates[0] == pytest.approx(SHORT.lr / 20)
    assert all(b > a for a, b in pairwise(rates[: peak + 1])) and all(b < a for a, b in pairwise(rates[peak:]))
    assert rates[-1] == pytest.approx(SHORT.lr / 10)
    middle = stage.lr((stage.steps + 1) // 2)
    assert middle == pytest.approx(0.55 * SHORT.lr, rel=0.01)


# --- whole runs ---


@pytest.fixture(scope="module")
def finished(base: Base, parent: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "sft"
    run(base, parent, data, out, replace(SHORT, epochs=12, lr=1e-2, bias_gamma=0.01))
    return out


def test_fine_tuning_learns_the_answers_and_not_the_questions(base: Base, data: Path, finished: Path) -> None:
    first, *_, last = metrics(finished)
    assert first["step"] == 0 and last["val_loss"] < first["val_loss"] - 2
    assert last["val_mtp_loss"] < first["val_mtp_loss"] - 2 and last["loss"] < 1.5 and last["mtp_loss"] < 2.5
    net = load_model(finished / "checkpoint")
    nats: dict[bool, list[float]] = {True: [], False: []}
    for example in examples(base, data)[:20]:
        ids = torch.from_numpy(example.ids)
        logprobs = net(ids[None]).detach().log_softmax(-1)[0, :-1].gather(1, ids[1:, None])[:, 0]
        for learned, logprob in zip(example.mask[1:].tolist(), logprobs.tolist(), strict=True):
            nats[learned].append(-logprob)
    assert fmean(nats[True]) < 1 < 3 < fmean(nats[False])


def test_metrics_carry_what_a_reader_needs(finished: Path) -> None:
    found = read_jsonl(finished / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(len(found)))
    every = {
        "step", "epoch", "tokens", "trained_tokens", "loss", "mtp_loss", "balance_loss", "lr", "grad_norm",
        "expert_imbalance", "dead_experts", *TIMES,
    }  # fmt: skip
    scored = {"val_loss", "val_mtp_loss", "bits_per_byte"}
    assert all(line.keys() == every for line in found[1:] if "val_loss" not in line)
    assert [line.keys() - every for line in found if "val_loss" in line] == [scored] + 2 * [{*scored, "expert_load"}]
    assert found[-1]["epoch"] == 12 and all(b["usd"] > a["usd"] for a, b in pairwise(found))


def test_the_directory_says_what_was_trained_on(base: Base, data: Path, finished: Path) -> None:
    told = json.loads((finished / "data.json").read_text())
    every = examples(base, data)
    assert told["lines"] == 96 and told["examples"] + told["held_out"] == len(every)
    assert 0 < told["held_out"] < 0.3 * len(every) and told["bad_lines"] == told["too_long"] == []
    assert told["trained_tokens"] < told["tokens"] < sum(len(example.ids) for example in every)
    page = (finished / "samples.md").read_text()
    assert page.count("## ") == 8 and "\n+ " in page and "<｜end▁of▁sentence｜>\n" in page
    assert page.count("<｜end▁of▁sentence｜>") >= 8
    tok = Tokenizer.load(finished / "checkpoint")
    assert tok.encode("3 plus 4") == base.tok.encode("3 plus 4") and tok.chat_template == base.tok.chat_template


def test_a_second_call_changes_nothing(base: Base, parent: Path, data: Path, tmp_path: Path) -> None:
    first = run(base, parent, data, tmp_path / "sft")
    before = {path: path.read_bytes() for path in (tmp_path / "sft").rglob("*") if path.is_file()}
    assert run(base, parent, data, tmp_path / "sft") == first
    assert {path: path.read_bytes() for path in (tmp_path / "sft").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_dense_students_learn_too(base: Base, data: Path, tmp_path: Path, shape: str) -> None:
    save_model(model_of(base, shape), tmp_path / "student", tokenizer=base.tok)
    run(base, tmp_path / "student", data, tmp_path / "sft", replace(SHORT, lr=1e-2, epochs=6))
    first, *_, last = metrics(tmp_path / "sft")
    assert (
        last["val_loss"] < first["val_loss"] - 2
        and last["mtp_loss"] == 0
        and {"expert_load", "val_mtp_loss"}.isdisjoint(last)
    )


def test_other_settings_data_or_parent_in_the_same_directory_are_refused(
    base: Base, parent: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sft"
    run(base, parent, data, out)
    with pytest.raises(DataError, match=r"begun with other settings \(lr was 0.0005, is 0.001\)"):
        run(base, parent, data, out, replace(SHORT, lr=1e-3))
    more = tmp_path / "more.jsonl"
    more.write_text(data.read_text() * 2)
    with pytest.raises(DataError, match=r"examples was '\w+', is"):
        run(base, parent, more, out)
    save_model(model_of(base, "llama"), tmp_path / "other", tokenizer=base.tok)
    with pytest.raises(DataError, match=r"parent was '\w+', is"):
        run(base, tmp_path / "other", data, out)
    run(base, parent, data, out, replace(SHORT, save_seconds=1.0))  # changes nothing about the result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs = 0: set it above 0"),
        ({"lr": -1.0}, "lr = -1.0: set it above 0"),
        ({"mtp_weight": -0.1}, "mtp_weight = -0.1: set it to 0 or more"),
        ({"held_out": 1.0}, "held_out = 1.0"),
        ({"length": 1}, "length = 1"),
        ({"length": 65}, "length = 65 is over the model's context of 64"),
        ({"template": "caht"}, "unknown template 'caht'"),
        ({"repeats": {"more.jsonl": 2}}, "repeats: more.jsonl is not among the data; choose of .*sums.jsonl"),
    ],
)
def test_settings_that_cannot_work_are_one_line_and_leave_nothing(
    base: Base, parent: Path, data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        run(base, parent, data, tmp_path / "sft", replace(SHORT, **change))
    assert "\n" not in str(error.value) and not (tmp_path / "sft").exists()


def test_data_that_cannot_be_used_leaves_nothing(base: Base, parent: Path, data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data.read_text() + "{\n")
    with pytest.raises(DataError, match=r"bad.jsonl:97: not JSON"):
        run(base, parent, bad, tmp_path / "sft")
    room = max(len(example.ids) for example in examples(base, data)) - 1
    with pytest.raises(DataError, match=rf"longer than {room} tokens, the first .*sums.jsonl:\d+: {room + 1} tokens"):
        run(base, parent, data, tmp_path / "sft", replace(SHORT, length=room))
    with pytest.raises(ConfigError, match="no data: name JSONL files"):
        train_sft(SHORT, parent, [], tmp_path / "sft", base.meter())
    assert not (tmp_path / "sft").exists()


def test_what_is_left_out_is_said_and_counted(
    base: Base, parent: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(data.read_text() + "{\n")
    room = max(len(example.ids) for example in examples(base, data)) - 1
    config = replace(SHORT, epochs=1, bad_lines="drop", too_long="drop", length=room)
    train_sft(config, parent, [mixed], tmp_path / "sft", base.meter(), Console(width=200))
    told, said = json.loads((tmp_path / "sft/data.json").read_text()), capsys.readouterr().out
    assert len(told["bad_lines"]) == 1 and told["too_long"] and told["lines"] == 96 - len(told["too_long"])
    assert f"left out: {mixed}:97: not JSON" in said and f"1 bad lines, {len(told['too_long'])} too long" in said
    assert "carries loss in" in said and "what carries loss in green" in said


def test_data_that_comes_twice_in_an_epoch_is_data_written_twice(
    base: Base, parent: Path, data: Path, tmp_path: Path
) -> None:
    """A file and how often it comes are settings of the run: others are refused, the same two written out are not."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:8]))
    settings = replace(SHORT, repeats={str(few): 3}, epochs=1)
    figures = train_sft(settings, parent, [data, few], tmp_path / "sft", base.meter())
    written = train_sft(replace(settings, repeats={}), parent, [data, few, few, few], tmp_path / "sft", base.meter())
    assert figures["examples"] == written["examples"]
    assert json.loads((tmp_path / "sft/data.json").read_text())["lines"] == 96 + 3 * 8
    with pytest.raises(DataError, match=r"examples was '\w+', is"):
        train_sft(replace(settings, repeats={}), parent, [data, few], tmp_path / "sft", base.meter())
    with pytest.raises(ConfigError, match=r"few.jsonl = 0: set it above 0"):
        train_sft(replace(settings, repeats={str(few): 0}), parent, [data, few], tmp_path / "sft", base.meter())


def test_the_knobs_are_few() -> None:
    assert len(dataclasses.fields(SFTConfig)) <= 20
