import dataclasses
import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sputnik.errors import ConfigError, DataError
from sputnik.model.checkpoint import load_model
from sputnik.model.transformer import Transformer
from sputnik.text.corpus import PackedCorpus
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.pretrain import PretrainConfig, Pretraining, load_figures, pretrain
from sputnik.train.state import read_jsonl

Base = Any  # conftest.Base: this directory is no package to import it from
SHORT = PretrainConfig(tokens=32 * 8 * 10, length=32, batch=8, micro_batch=8, precision="fp32", evaluations=2)


def make_stage(base: Base, config: PretrainConfig = SHORT, **model_changes: Any) -> Pretraining:
    model = Transformer(replace(base.model_config, **model_changes)).init_weights(torch.Generator().manual_seed(0))
    corpus, held_out = (PackedCorpus(path, config.length, 0) for path in (base.corpus, base.held_out))
    return Pretraining(config, model, base.tok, corpus, held_out)


def run(base: Base, out: Path, config: PretrainConfig = SHORT) -> dict[str, Any]:
    return pretrain(config, base.model_config, base.tok, base.corpus, base.held_out, out, base.meter())


def batch_of(stage: Pretraining, rows: int = 8) -> Tensor:
    return torch.from_numpy(stage.corpus.batch(0, rows))


def gradients(stage: Pretraining) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in stage.model.named_parameters() if p.grad is not None}


# --- losses and gradients ---


def test_eight_small_batches_equal_one_large(base: Base) -> None:
    whole, parts = make_stage(base), make_stage(base, replace(SHORT, micro_batch=1))
    one, eight = whole.accumulate(batch_of(whole), 0.3), parts.accumulate(batch_of(parts), 0.3)
    for key in ("loss", "mtp", "balance"):
        assert float(getattr(eight, key)) == pytest.approx(float(getattr(one, key)), rel=1e-6)
    assert one.load.keys() == eight.load.keys() and all(one.load[k].equal(eight.load[k]) for k in one.load)
    expected = gradients(whole)
    for name, value in gradients(parts).items():
        assert value.allclose(expected[name], rtol=1e-3, atol=1e-7), name


def test_a_loss_is_the_mean_over_tokens(base: Base) -> None:
    stage = make_stage(base)
    ids = batch_of(stage)
    sums = stage.accumulate(ids, 0.3)
    logits = stage.model(ids[:, :-1]).detach()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(sums.loss) == pytest.approx(float(expected), rel=1e-5)
    trunk = stage.model.trunk(ids[:, :-1])
    (ahead,) = stage.model.mtp_hidden(trunk.residual, ids[:, :-1]).hidden
    expected = torch.nn.functional.cross_entropy(stage.model.head(ahead).detach().flatten(0, 1), ids[:, 2:].flatten())
    assert float(sums.mtp) == pytest.approx(float(expected), rel=1e-5)


def test_lambda_scales_the_mtp_gradient_and_nothing_else(base: Base) -> None:
    stage = make_stage(base, replace(SHORT, balance_alpha=0.0))
    ids = batch_of(stage)
    found = {}
    for weight in (0.0, 0.3, 0.6):
        stage.accumulate(ids, weight)
        found[weight] = gradients(stage)
    module = "mtp.0.eh_proj.weight"
    assert float(found[0.0][module].abs().max()) == 0 < float(found[0.3][module].abs().max())
    assert found[0.6][module].allclose(2 * found[0.3][module], rtol=1e-4, atol=1e-8)
    shared = "model.embed_tokens.weight"
    assert not found[0.3][shared].allclose(found[0.0][shared], rtol=1e-3)


def test_alpha_changes_the_gates_gradient(base: Base) -> None:
    without, with_alpha = make_stage(base, replace(SHORT, balance_alpha=0.0)), make_stage(base)
    gate = "model.layers.1.mlp.gate.weight"
    for stage in (without, with_alpha):
        stage.accumulate(batch_of(stage), 0.0)
    difference = gradients(with_alpha)[gate] - gradients(without)[gate]
    assert float(difference.abs().max()) > 0
    double = make_stage(base, replace(SHORT, balance_alpha=2e-4))
    double.accumulate(batch_of(double), 0.0)
    twice = gradients(double)[gate] - gradients(without)[gate]
    assert twice.allclose(2 * difference, rtol=0.02, atol=1e-9)


def test_gamma_moves_each_bias_towards_the_mean_load_of_the_whole_batch(base: Base, tmp_path: Path) -> None:
    config = replace(SHORT, micro_batch=2, bias_gamma=0.01)
    stage = make_stage(base, config)
    sums = stage.accumulate(batch_of(stage), 0.3)
    assert sums.load.keys() == {1, 2}  # the expert layer and the MTP module's
    assert all(int(load.sum()) == 8 * tokens * 2 for load, tokens in zip(sums.load.values(), (32, 31), strict=True))
    stage._update(sums, 1)
    for layer, load in sums.load.items():
        bias = stage.gates[layer].e_score_correction_bias
        assert bias is not None and bias.allclose(0.01 * (load.mean() - load).sign())


def test_without_gamma_the_biases_stay(base: Base) -> None:
    stage = make_stage(base, replace(SHORT, bias_gamma=0.0))
    stage._update(stage.accumulate(batch_of(stage), 0.3), 1)
    assert all(not bool(gate.e_score_correction_bias.any()) for gate in stage.gates.values())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change", [{"lr": 1e-3}, {"weight_decay": 0.0}, {"mtp_weight": 0.0}, {"bias_gamma": 0.1}, {"seed": 1}, {"batch": 4}]
)
def test_every_setting_changes_the_result(base: Base, change: dict[str, Any], reference: dict[str, Tensor]) -> None:
    stage = make_stage(base, replace(SHORT, **change)) if "seed" not in change else None
    if stage is None:
        stage = make_stage(base)
        stage.corpus = PackedCorpus(base.corpus, SHORT.length, seed=1)
    few_steps(stage)
    assert any(not value.equal(reference[name]) for name, value in stage.model.state_dict().items())


def few_steps(stage: Pretraining) -> None:
    for step in (1, 2, 3):
        start, rows = stage.plan.starts[step - 1], stage.plan.rows[step - 1]
        ids = torch.from_numpy(stage.corpus.batch(start, rows))
        stage._update(stage.accumulate(ids, stage.plan.mtp_weight(step, stage.config.mtp_weight)), step)


@pytest.fixture(scope="module")
def reference(base: Base) -> dict[str, Tensor]:
    stage = make_stage(base)
    few_steps(stage)
    return stage.model.state_dict()


def test_a_step_that_is_not_finite_changes_nothing_and_names_the_tensor(base: Base) -> None:
    stage = make_stage(base)
    sums = stage.accumulate(batch_of(stage), 0.3)
    gate = stage.model.get_parameter("model.layers.1.mlp.gate.weight")
    assert gate.grad is not None
    gate.grad[0, 0] = float("nan")
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    name, norm = stage._update(sums, 1)
    assert name == "gradient of model.layers.1.mlp.gate.weight (1 of 256 values)" and math.isnan(norm)
    assert all(value.equal(before[key]) for key, value in stage.model.state_dict().items())
    assert stage.optimizer.state == {}


def test_bf16_computes_nearly_the_same_losses_and_keeps_fp32_gradients(base: Base) -> None:
    exact, rough = make_stage(base), make_stage(base, replace(SHORT, precision="bf16"))
    one, other = exact.accumulate(batch_of(exact), 0.3), rough.accumulate(batch_of(rough), 0.3)
    assert 0 < abs(float(one.loss) - float(other.loss)) < 0.02 * float(one.loss)
    assert {value.dtype for value in gradients(rough).values()} == {torch.float32}


def test_fp8_rounds_the_products_and_keeps_fp32_gradients(base: Base) -> None:
    exact, rough = make_stage(base), make_stage(base, replace(SHORT, precision="fp8"))
    one, other = exact.accumulate(batch_of(exact), 0.3), rough.accumulate(batch_of(rough), 0.3)
    assert 0 < abs(float(one.loss) - float(other.loss)) < 0.01 * float(one.loss)
    assert 0 < abs(float(one.mtp) - float(other.mtp)) < 0.01 * float(one.mtp)
    assert {value.dtype for value in gradients(rough).values()} == {torch.float32}


def test_load_figures_find_the_worst_layer_and_the_dead() -> None:
    load = {1: torch.tensor([4.0, 4.0, 4.0, 4.0]), 2: torch.tensor([12.0, 4.0, 0.0, 0.0])}
    assert load_figures(load) == {"expert_imbalance": 3.0, "dead_experts": 2}
    assert load_figures({}) == {}


# --- whole runs ---


@pytest.fixture(scope="module")
def finished(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "base"
    config = replace(SHORT, tokens=32 * 16 * 60, batch=16, micro_batch=16, lr=1e-2, bias_gamma=0.01)
    run(base, out, config)
    return out


def test_a_tiny_run_beats_the_unigram_entropy(base: Base, finished: Path) -> None:
    """The best that token frequencies alone can do on the held-out text; the corpus has much more order than that."""
    held_out = PackedCorpus(base.held_out, 32, 0)
    counts = Counter(held_out.batch(0, held_out.rows_per_epoch)[:, 1:].flatten().tolist())
    total = sum(counts.values())
    unigram = -sum(n / total * math.log(n / total) for n in counts.values())
    last = read_jsonl(finished / "metrics.jsonl")[-1]
    assert last["val_loss"] < unigram - 1.0
    assert last["loss"] < unigram - 1.0 and last["mtp_loss"] < unigram - 0.5


def test_metrics_carry_every_agreed_field(base: Base, finished: Path) -> None:
    lines = read_jsonl(finished / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1))
    every = {
        "step", "tokens", "loss", "mtp_loss", "balance_loss", "lr", "grad_norm", "tokens_per_s", "flops_per_s",
        "peak_share", "seconds", "usd", "expert_imbalance", "dead_experts",
    }  # fmt: skip
    evaluated = {"val_loss", "bits_per_byte", "expert_load"}
    assert all(line.keys() == every for line in lines if "val_loss" not in line)
    assert [line.keys() == every | evaluated for line in lines if "val_loss" in line] == [True, True]
    last = lines[-1]
    assert "val_loss" in last and 32 * 16 * 59 < last["tokens"] <= 32 * 16 * 60
    assert [len(layer) for layer in last["expert_load"]] == [8, 8]
    assert all(sum(layer) == pytest.approx(1.0) for layer in last["expert_load"])
    assert 0.5 < last["balance_loss"] < 8 and last["seconds"] > 0 and last["usd"] > 0
    assert all(b["seconds"] > a["seconds"] for a, b in pairwise(lines))


def test_bits_per_byte_is_the_loss_over_the_text_bytes(base: Base, finished: Path) -> None:
    last = read_jsonl(finished / "metrics.jsonl")[-1]
    held_out = PackedCorpus(base.held_out, 32, 0)
    targets = held_out.batch(0, min(SHORT.held_out_rows, held_out.rows_per_epoch))[:, 1:]
    control = base.tok.control_ids
    text = sum(len(base.tok.token_bytes([int(i)])) for i in targets.flatten() if int(i) not in control)
    assert last["bits_per_byte"] == pytest.approx(last["val_loss"] * targets.size / text / math.log(2))


def test_the_checkpoint_holds_the_trained_weights_and_the_tokenizer(base: Base, finished: Path) -> None:
    model = load_model(finished / "checkpoint")
    stage = make_stage(base)
    stage.model = model
    last = read_jsonl(finished / "metrics.jsonl")[-1]
    assert stage.evaluate()["val_loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert Tokenizer.load(finished / "checkpoint").encode("3 plus 4") == base.tok.encode("3 plus 4")


def test_a_second_call_changes_nothing(base: Base, tmp_path: Path) -> None:
    out = tmp_path / "base"
    first = run(base, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(base, out) == first
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_ema_is_released_on_request(base: Base, tmp_path: Path) -> None:
    run(base, tmp_path / "raw")
    run(base, tmp_path / "ema", replace(SHORT, release="ema"))
    raw, ema = (load_model(tmp_path / name / "checkpoint").lm_head.weight for name in ("raw", "ema"))
    assert not raw.equal(ema)
    assert (
        read_jsonl(tmp_path / "raw/metrics.jsonl")[-1]["loss"] == read_jsonl(tmp_path / "ema/metrics.jsonl")[-1]["loss"]
    )


def test_other_settings_in_the_same_directory_are_refused(base: Base, tmp_path: Path) -> None:
    run(base, tmp_path / "base")
    with pytest.raises(DataError, match=r"begun with other settings \(lr was 0.002, is 0.001\)"):
        run(base, tmp_path / "base", replace(SHORT, lr=1e-3))
    run(base, tmp_path / "base", replace(SHORT, save_seconds=1.0, save_steps=3))  # changes nothing about the result


def test_a_model_that_is_trained_on_begins_where_it_ended(base: Base, finished: Path, tmp_path: Path) -> None:
    start, out, still = finished / "checkpoint", tmp_path / "on", replace(SHORT, lr=1e-9, bias_gamma=0.0)
    going_on = pretrain(still, base.model_config, base.tok, base.corpus, base.held_out, out, base.meter(), start=start)
    assert going_on["val_loss"] == pytest.approx(read_jsonl(finished / "metrics.jsonl")[-1]["val_loss"], abs=1e-4)
    with pytest.raises(DataError, match="begun with other settings"):
        run(base, out, still)
    with pytest.raises(ConfigError, match="of another shape .*hidden_size = "):
        shape = replace(base.model_config, hidden_size=2 * base.model_config.hidden_size)
        pretrain(SHORT, shape, base.tok, base.corpus, base.held_out, tmp_path / "x", base.meter(), start=start)


def test_a_run_in_fp8_ends_near_one_in_fp32_and_is_not_taken_for_it(base: Base, tmp_path: Path) -> None:
    plain, rounded = run(base, tmp_path / "plain"), run(base, tmp_path / "fp8", replace(SHORT, precision="fp8"))
    assert 0 < abs(rounded["val_loss"] - plain["val_loss"]) < 0.01 * plain["val_loss"]
    assert (
        rounded["parameters"]
        == plain["parameters"]
        == sum(
            weight.numel()
            for name, weight in load_model(tmp_path / "fp8/checkpoint").named_parameters()
            if "mtp" not in name
        )
    )
    assert plain["cache_bytes_per_token"] == 2 * (16 + 4) * 2  # two layers, latent and rotary key, two bytes
    with pytest.raises(DataError, match="precision was 'fp8', is 'fp32'"):
        run(base, tmp_path / "fp8")


def test_auto_precision_that_decides_otherwise_is_refused(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = replace(SHORT, precision="auto")
    for choice in ("fp32", "bf16"):
        monkeypatch.setattr("sputnik.train.pretrain.resolve_precision", lambda precision, choice=choice: choice)
        if choice == "fp32":
            run(base, tmp_path / "base", auto)
    with pytest.raises(DataError, match="precision was 'fp32', is 'bf16'"):
        run(base, tmp_path / "base", auto)
    monkeypatch.undo()
    run(base, tmp_path / "base")  # saying fp32 is the same thing


def test_another_machine_is_a_warning(base: Base, tmp_path: Path) -> None:
    run(base, tmp_path / "base")
    (state,) = (tmp_path / "base/resume").glob(f"step-*{read_jsonl(tmp_path / 'base/metrics.jsonl')[-1]['step']}")
    record = json.loads((state / "state.json").read_text())
    record["meta"]["machine"]["threads"] = 97
    (state / "state.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=r"threads 97 -> \d+: results may differ"):
        run(base, tmp_path / "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 100}, "less than one batch"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"length": 128, "tokens": 10_000}, "max_position_embeddings"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    base: Base, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        run(base, tmp_path / "base", replace(SHORT, **change))
    assert "\n" not in str(error.value)


def test_another_vocabulary_is_refused(base: Base, tmp_path: Path) -> None:
    small = replace(base, model_config=replace(base.model_config, vocab_size=280))
    with pytest.raises(ConfigError, match="do not fit"):
        run(small, tmp_path / "base")


def test_the_knobs_are_few() -> None:
    assert len(dataclasses.fields(PretrainConfig)) <= 20
