"""The published figures of DeepSeek-V3 and R1 are reproduced, and the meter bills what was used and no more."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sputnik.cost import (
    HARDWARE,
    Meter,
    decode_flops_per_token,
    device_hours,
    fleet,
    forward_flops_per_token,
    hardware,
    kv_bytes_per_token,
    measure_cpu,
    parameters,
    training_flops_per_token,
    training_memory,
    weight_bytes,
)
from sputnik.errors import ConfigError
from sputnik.hardware import cache_directory
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer

V3 = ModelConfig.preset("v3-671b")
H800 = HARDWARE["H800"]
QWEN_72B = ModelConfig(
    model_type="qwen2", vocab_size=152064, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, intermediate_size=29568,
)  # fmt: skip
LLAMA_405B = ModelConfig(
    model_type="llama", vocab_size=128256, hidden_size=16384, num_hidden_layers=126, num_attention_heads=128,
    num_key_value_heads=8, intermediate_size=53248,
)  # fmt: skip
SMALL_LLAMA = ModelConfig(model_type="llama", num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True)
SMALL_QWEN = ModelConfig(model_type="qwen2", num_key_value_heads=1)


def near(value: object, within: float = 0.001) -> object:
    return pytest.approx(value, rel=within)


def test_v3_has_671_billion_parameters_of_which_37_active() -> None:
    count = parameters(V3)
    assert count.total == near(671.03e9, 1e-5)
    assert count.mtp == near(11.61e9)
    assert count.active == near(37.55e9)
    assert count.multiplied == near(36.63e9)
    assert count.attention == near(187.1e6)
    assert count.expert == near(44.04e6, 1e-4)
    assert count.moe_ffn == near(11.320e9, 1e-4)
    assert count.dense_ffn == near(396.4e6)
    assert count.embedding == count.head == near(926.7e6, 1e-4)
    assert count.mtp + count.embedding + count.head == near(13.46e9)


def test_other_published_models_have_their_published_sizes() -> None:
    assert parameters(ModelConfig.preset("v2-lite")).total == near(15.7e9, 0.002)
    assert parameters(QWEN_72B).total == near(72.7e9, 0.001)
    assert parameters(LLAMA_405B).total == near(405.9e9, 0.001)


def test_tied_head_is_counted_once_and_multiplied_all_the_same() -> None:
    tied = ModelConfig(model_type="llama", tie_word_embeddings=True)
    apart = ModelConfig(model_type="llama")
    assert parameters(tied).total == parameters(apart).total - apart.vocab_size * apart.hidden_size
    assert parameters(tied).multiplied == parameters(apart).multiplied


@pytest.mark.parametrize("config", [ModelConfig.preset("tiny"), ModelConfig.preset("mini"), SMALL_LLAMA, SMALL_QWEN])
def test_counts_are_those_of_the_real_modules(config: ModelConfig) -> None:
    model = Transformer(config)
    ours = parameters(config)
    assert ours.total + ours.mtp == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("config", [ModelConfig.preset("tiny"), SMALL_LLAMA])
def test_activation_estimate_is_within_a_factor_of_two_of_what_autograd_keeps(config: ModelConfig) -> None:
    model = Transformer(config)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their storages from being used again

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trunk = model.trunk(ids)
        if config.num_nextn_predict_layers:
            model.mtp_hidden(trunk.residual, ids)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimate = training_memory(config, 128, "fp32").activations - 8 * config.vocab_size * 128  # without the logits
    assert real / 2 <= estimate <= 2 * real


def test_v3_training_costs_250_gflops_per_token_at_4k() -> None:
    assert training_flops_per_token(V3, 4096) == near(250e9, 0.005)


def test_v3_cluster_ran_at_385_tflops_causal_and_432_non_causal() -> None:
    per_device = 272.8e9 / 86400 / 2048
    causal = per_device * training_flops_per_token(V3, 4096)
    full = per_device * training_flops_per_token(V3, 4096, causal=False)
    assert causal == near(385e12, 0.005)
    assert full == near(432e12, 0.005)
    assert causal / H800.bf16 == near(0.3894, 0.005)
    assert full / H800.bf16 == near(0.4373, 0.005)


def test_prediction_module_adds_its_block_and_one_more_head() -> None:
    count = parameters(V3)
    assert count.mtp_multiplied + count.embedding == near(2.4e9, 0.06)  # 2.4 billion active, says the weights card
    extra = forward_flops_per_token(V3, 4096, mtp=True) - forward_flops_per_token(V3, 4096)
    assert extra == near(2 * (count.mtp_multiplied + 128 * 320 * 4097 / 2), 1e-9)


def test_decoding_at_context_one_is_a_forward_pass() -> None:
    assert decode_flops_per_token(LLAMA_405B, 1) == forward_flops_per_token(LLAMA_405B, 1)
    assert decode_flops_per_token(V3, 1) == near(forward_flops_per_token(V3, 1), 1e-3)
    assert decode_flops_per_token(V3, 100_000) - decode_flops_per_token(V3, 0) == 2 * 61 * 128 * 1088 * 100_000


def test_v3_caches_70272_bytes_per_token() -> None:
    assert kv_bytes_per_token(V3) == 70_272
    assert kv_bytes_per_token(QWEN_72B) == 327_680
    assert kv_bytes_per_token(LLAMA_405B) == 516_096


def test_v3_release_weighs_688_gigabytes_in_fp8() -> None:
    count = parameters(V3)
    copies = 2 * (count.embedding + count.head)  # the published files repeat both, in BF16, for the prediction module
    assert weight_bytes(V3, "fp8", mtp=True) + copies == near(688.57e9)
    assert weight_bytes(V3, "bf16") == 2 * count.total
    assert weight_bytes(V3, "fp32") == 4 * count.total


def test_training_memory_is_split_over_devices_and_saved_by_recompute() -> None:
    one, eight = training_memory(V3, 4096, "fp8"), training_memory(V3, 4096, "fp8", devices=8)
    assert one.weights + one.gradients + one.optimizer == near(13 * 682.6e9)
    assert eight.optimizer == one.optimizer / 8
    assert eight.activations == one.activations
    assert training_memory(V3, 4096, "fp8", recompute=True).activations < one.activations / 5
    assert one.total == one.weights + one.gradients + one.optimizer + one.activations


def test_v3_cost_table() -> None:
    """Report table 1: 180K H800 hours per trillion tokens, two dollars an hour."""
    pretrain, extension, post = 14.8 * 180e3, 119e3, 5e3
    assert pretrain == near(2664e3, 1e-9)
    usd = [hours * H800.usd_per_hour for hours in (pretrain, extension, post)]
    assert usd == near([5.328e6, 0.238e6, 0.01e6], 1e-9)
    assert (pretrain + extension + post) * H800.usd_per_hour == near(5.576e6, 1e-9)


def test_our_arithmetic_gives_v3s_pretraining_hours() -> None:
    hours = device_hours(14.8e12 * training_flops_per_token(V3, 4096), H800, peak_share=0.3894)
    assert hours == near(2664e3, 0.005)


def test_r1_cost_table() -> None:
    """R1 supplement table 7; the hours follow from 64 x 8 devices for 198 and 80 hours."""
    zero, r1 = 64 * 8 * 198, 64 * 8 * 80
    assert zero == near(101e3, 0.005)
    assert r1 == near(41e3, 0.005)
    hours = [101e3, 5e3, 41e3]
    assert [h * H800.usd_per_hour for h in hours] == [202e3, 10e3, 82e3]
    assert sum(hours) * H800.usd_per_hour == 294e3


def test_fleet_reads_count_and_name() -> None:
    assert fleet("8xH800") == (H800, 8)
    assert fleet("b200") == (HARDWARE["B200"], 1)
    for wrong in ("0xH800", "8 x H800", "H800x8", "-1xH800", ""):
        with pytest.raises(ConfigError):
            fleet(wrong)
    with pytest.raises(ConfigError, match="choose one of cpu, H800"):
        hardware("H9000")


def test_price_given_beats_environment_beats_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPUTNIK_USD_PER_HOUR", "1.25")
    assert hardware("H800").usd_per_hour == 1.25
    assert hardware("H800").price == "given by the user"
    assert hardware("H800", usd_per_hour=0.5).usd_per_hour == 0.5
    assert hardware("H800", usd_per_hour=0.0).usd_per_hour == 0.0
    monkeypatch.setenv("SPUTNIK_USD_PER_HOUR", "two")
    with pytest.raises(ConfigError, match="SPUTNIK_USD_PER_HOUR"):
        hardware("H800")
    for price in ("nan", "inf", "-1"):
        monkeypatch.setenv("SPUTNIK_USD_PER_HOUR", price)
        with pytest.raises(ConfigError, match="dollars per hour are no price"):
            hardware("H800")


def test_cpu_is_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPUTNIK_CACHE", str(tmp_path))
    monkeypatch.setattr("sputnik.hardware.SECONDS_PER_RATE", 0.05)
    monkeypatch.setattr("sputnik.hardware.READ_BYTES", 1 << 24)
    (cache_directory() / "cpu.json").write_text("{broken", encoding="utf-8")
    first = measure_cpu()
    assert first.fp32 > 1e9 and first.bf16 > 1e8 and first.bandwidth > 1e8

    start = time.perf_counter()
    assert measure_cpu() == first
    assert time.perf_counter() - start < 0.1
    assert hardware("cpu").bf16 == max(first.bf16, first.fp32)


def test_two_threads_have_twice_the_peak_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPUTNIK_CACHE", str(tmp_path))
    monkeypatch.setattr("sputnik.hardware.SECONDS_PER_RATE", 0.05)
    monkeypatch.setattr("sputnik.hardware.READ_BYTES", 1 << 20)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = measure_cpu()
        assert torch.get_num_threads() == two.threads == 2
        torch.set_num_threads(1)
        one = measure_cpu()
    finally:
        torch.set_num_threads(before)
    assert two.fp32 == near(2 * one.fp32, 0.5)
    assert two.bf16 == near(2 * one.bf16, 0.5)


def test_meter_bills_the_clock_times_devices_times_price() -> None:
    meter = Meter(H800, count=8)
    meter.add(tokens=100, flops=1e9)
    meter.add(tokens=20)
    time.sleep(0.02)
    total = meter.total
    assert 0.02 <= total.seconds < 5
    assert (total.tokens, total.flops) == (120, 1e9)
    assert total.usd == near(total.seconds / 3600 * 16, 1e-9)
    assert total.tokens_per_s == near(120 / total.seconds, 1e-9)
    assert total.peak_share == near(1e9 / total.seconds / (8 * 989e12), 1e-9)


def test_laps_add_up_to_the_total() -> None:
    meter = Meter(H800)
    laps = []
    for tokens in (5, 7, 11):
        meter.add(tokens=tokens, flops=tokens * 2.0)
        time.sleep(0.002)
        laps.append(meter.lap())
    assert [lap.tokens for lap in laps] == [5, 7, 11]
    assert sum(lap.seconds for lap in laps) == pytest.approx(meter.seconds, abs=0.5)
    assert sum(lap.usd for lap in laps) <= meter.usd


def test_money_goes_on_across_a_resume_and_downtime_is_free() -> None:
    first = Meter(H800)
    first.add(tokens=10, flops=5.0)
    time.sleep(0.01)
    saved = first.state_dict()
    time.sleep(0.2)  # the machine is off
    second = Meter(H800)
    second.add(tokens=1)
    second.load(saved)
    second.add(tokens=2, flops=1.0)
    assert second.total.tokens == 13
    assert second.total.flops == 6.0
    assert saved["seconds"] <= second.seconds < saved["seconds"] + 0.15
    assert second.lap().tokens == 3
    entry = second.entry(stage="rl")
    assert entry["stage"] == "rl" and entry["tokens"] == 13 and entry["hardware"] == "H800"


def test_cost_needs_no_torch() -> None:
    code = "import sys, sputnik.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
