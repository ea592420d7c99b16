"""Checkpoints: exact round trips, every broken input one clear line, nothing half-written."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sputnik.errors import CheckpointError
from sputnik.files import replace_directory
from sputnik.model.checkpoint import check_tokenizer, load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer

DEEPSEEK = ModelConfig(
    vocab_size=33, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
    qk_nope_head_dim=6, v_head_dim=6, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
    first_k_dense_replace=1, num_nextn_predict_layers=2, max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip
LLAMA = ModelConfig(
    model_type="llama", vocab_size=33, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4, tie_word_embeddings=True, initializer_range=0.1,
)  # fmt: skip


def fresh(config: ModelConfig, seed: int = 0) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).init_weights(generator).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            tensor.normal_(generator=generator)
    return model


def assert_same_tensors(a: Transformer, b: Transformer) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def ids() -> torch.Tensor:
    return torch.randint(33, (2, 9), generator=torch.Generator().manual_seed(3))


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [5e9, 4000])
@pytest.mark.parametrize("config", [DEEPSEEK, LLAMA, dataclasses.replace(DEEPSEEK, tie_word_embeddings=True)])
@torch.no_grad()
def test_round_trip_is_exact(config: ModelConfig, max_shard_bytes: float, tmp_path: Path) -> None:
    model = fresh(config)
    save_model(model, tmp_path, max_shard_bytes=max_shard_bytes)
    back = load_model(tmp_path)
    assert back.config == config and not back.training
    assert_same_tensors(model, back)
    assert torch.equal(model(ids()), back(ids()))
    hidden = model.trunk(ids()).residual
    for left, right in zip(model.mtp_hidden(hidden, ids()).hidden, back.mtp_hidden(hidden, ids()).hidden, strict=True):
        assert torch.equal(left, right)


def test_tied_head_stays_tied(tmp_path: Path) -> None:
    save_model(fresh(LLAMA), tmp_path)
    back = load_model(tmp_path)
    before = back.head(torch.ones(1, 1, 16))
    with torch.no_grad():
        back.state_dict()["model.embed_tokens.weight"].mul_(2)
    assert torch.equal(back.head(torch.ones(1, 1, 16)), 2 * before)
    assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in fresh(LLAMA).parameters())
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_loaded_model_trains(tmp_path: Path) -> None:
    save_model(fresh(DEEPSEEK), tmp_path)
    model = load_model(tmp_path).train()
    model(ids()).logsumexp(-1).mean().backward()
    assert all(p.requires_grad for p in model.parameters())
    assert model.state_dict(keep_vars=True)["model.embed_tokens.weight"].grad is not None


def test_casts_keep_routing_biases_in_fp32(tmp_path: Path) -> None:
    model = fresh(DEEPSEEK)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    back = load_model(tmp_path, dtype=torch.bfloat16)
    for name, tensor in back.state_dict().items():
        original = model.state_dict()[name]
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, original)
        else:
            assert torch.equal(tensor, original.to(torch.bfloat16)), name
    wide = load_model(tmp_path, dtype=torch.float32)
    assert all(t.dtype == torch.float32 for t in wide.state_dict().values())


def test_saving_a_bf16_model_keeps_bf16(tmp_path: Path) -> None:
    save_model(fresh(DEEPSEEK), tmp_path / "a", dtype=torch.bfloat16)
    save_model(load_model(tmp_path / "a", dtype=torch.bfloat16), tmp_path / "b")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_stacked_experts_on_disk_are_read(tmp_path: Path) -> None:
    model = fresh(dataclasses.replace(DEEPSEEK, num_nextn_predict_layers=0))
    save_model(model, tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert_same_tensors(model, load_model(tmp_path))


# --- layout ----------------------------------------------------------------------------------------------------------


def test_layout_is_that_of_the_published_deepseek_files(tmp_path: Path) -> None:
    model = fresh(DEEPSEEK)
    save_model(model, tmp_path)
    disk, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    stack = state["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(disk["model.layers.1.mlp.experts.5.gate_proj.weight"], stack[5, :12])
    assert torch.equal(disk["model.layers.1.mlp.experts.5.up_proj.weight"], stack[5, 12:])
    assert torch.equal(disk["model.layers.4.shared_head.norm.weight"], state["mtp.1.norm.weight"])
    assert torch.equal(disk["model.layers.3.eh_proj.weight"], state["mtp.0.eh_proj.weight"])
    assert torch.equal(
        disk["model.layers.3.self_attn.kv_b_proj.weight"], state["mtp.0.block.self_attn.kv_b_proj.weight"]
    )
    for layer in (3, 4):
        assert torch.equal(disk[f"model.layers.{layer}.embed_tokens.weight"], disk["model.embed_tokens.weight"])
        assert torch.equal(disk[f"model.layers.{layer}.shared_head.head.weight"], disk["lm_head.weight"])
    assert not any(name.startswith("mtp.") for name in disk)


def test_config_says_what_other_engines_need(tmp_path: Path) -> None:
    save_model(fresh(DEEPSEEK), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["model_type"] == "deepseek_v3"
    assert config["scoring_func"] == "sigmoid" and config["topk_method"] == "noaux_tc"
    assert config["num_nextn_predict_layers"] == 2
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["bos_token_id"] == 0 and generation["eos_token_id"] == 1
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_shards_respect_the_limit_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    save_model(fresh(DEEPSEEK), tmp_path, max_shard_bytes=6000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "model.safetensors").exists()
    total = 0
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 6000
        assert all(index["weight_map"][name] == file.name for name in tensors)
        total += sum(t.nbytes for t in tensors.values())
    assert index["metadata"]["total_size"] == total


# --- broken inputs ---------------------------------------------------------------------------------------------------

Breakage = Callable[[Path], object]


def edit_config(**changes: object) -> Breakage:
    def apply(root: Path) -> None:
        config = json.loads((root / "config.json").read_text())
        (root / "config.json").write_text(json.dumps(config | changes))

    return apply


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Breakage:
    def apply(root: Path) -> None:
        tensors = load_file(root / "model.safetensors")
        change(tensors)
        save_file(tensors, root / "model.safetensors")

    return apply


def truncate(root: Path) -> None:
    file = root / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BROKEN: dict[str, tuple[Breakage, str]] = {
    "no config": (lambda root: (root / "config.json").unlink(), "config.json: no such file"),
    "no weights": (lambda root: (root / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "config not JSON": (lambda root: (root / "config.json").write_text("{'a': 1}"), "not valid JSON"),
    "config not text": (lambda root: (root / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "config a list": (lambda root: (root / "config.json").write_text("[]"), "no JSON object"),
    "config of another kind": (lambda root: (root / "config.json").write_text("{}"), "model_type"),
    "config without sizes": (
        lambda root: (root / "config.json").write_text('{"model_type": "llama"}'),
        "hidden_size = None: a model needs one",
    ),
    "size a string": (edit_config(hidden_size="16"), "hidden_size"),
    "unknown model type": (edit_config(model_type="mamba"), "model_type 'mamba'"),
    "fewer than no shared experts": (edit_config(n_shared_experts=-1), "n_shared_experts = -1: must be 0 or more"),
    "quantised otherwise": (edit_config(quantization_config={"quant_method": "awq", "bits": 4}), "quantised (awq)"),
    "FP8 without blocks": (edit_config(quantization_config={"quant_method": "fp8"}), "weight_block_size such as [128"),
    "too few layers": (edit_config(num_hidden_layers=2, num_nextn_predict_layers=0), "unexpected: model.layers.2."),
    "too many layers": (edit_config(num_hidden_layers=6), "missing: model.layers."),
    "other width": (edit_config(intermediate_size=28), "3 of another shape: model.layers.0.mlp.gate_proj.weight is"),
    "empty file": (lambda root: (root / "model.safetensors").write_bytes(b""), "truncated or corrupt"),
    "truncated file": (truncate, "truncated or corrupt"),
    "not safetensors": (lambda root: (root / "model.safetensors").write_bytes(b"PK" * 500), "truncated or corrupt"),
    "missing tensor": (edit_weights(lambda t: t.pop("model.norm.weight")), "1 missing: model.norm.weight"),
    "extra tensor": (edit_weights(lambda t: t.update(extra=torch.ones(2))), "1 unexpected: extra"),
    "missing expert": (
        edit_weights(lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight")),
        "1 missing: model.layers.1.mlp.experts.3.up_proj.weight",
    ),
    "half an MTP module": (
        edit_weights(lambda t: t.pop("model.layers.3.eh_proj.weight")),
        "1 missing: model.layers.3.eh_proj.weight",
    ),
    "own MTP embedding": (
        edit_weights(lambda t: t["model.layers.3.embed_tokens.weight"].add_(1)),
        "model.layers.3.embed_tokens.weight differs from model.embed_tokens.weight",
    ),
    "own MTP head": (
        edit_weights(lambda t: t.update({"model.layers.4.shared_head.head.weight": torch.ones(2, 2)})),
        "model.layers.4.shared_head.head.weight differs from lm_head.weight",
    ),
    "FP8 tensor": (
        edit_weights(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})),
        "lm_head.weight is F8_E4M3",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_one_clear_line(name: str, tmp_path: Path) -> None:
    save_model(fresh(DEEPSEEK), tmp_path)
    breakage, words = BROKEN[name]
    breakage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_broken_shards_are_one_clear_line(tmp_path: Path) -> None:
    save_model(fresh(DEEPSEEK), tmp_path, max_shard_bytes=6000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    for damage, words in ((content[:-1], "corrupt"), (None, "no such file")):
        shard.unlink() if damage is None else shard.write_bytes(damage)
        with pytest.raises(CheckpointError, match=words):
            load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_model(fresh(DEEPSEEK), tmp_path, max_shard_bytes=6000)
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    save_file(load_file(second) | load_file(first), second)
    with pytest.raises(CheckpointError, match="is in model-00001"):
        load_model(tmp_path)


def test_pickled_weights_are_named_not_opened(tmp_path: Path) -> None:
    save_model(fresh(LLAMA), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="give the directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"cannot be read|give the directory"):
        load_model(tmp_path / "pytorch_model.bin")


def test_the_tokenizer_of_a_larger_model_is_refused() -> None:
    check_tokenizer(LLAMA, 33, "model")
    with pytest.raises(CheckpointError, match="the tokenizer has 34 ids and the model 33 rows"):
        check_tokenizer(LLAMA, 34, "model")


def test_tables_of_old_llama_files_are_ignored(tmp_path: Path) -> None:
    model = fresh(LLAMA)
    save_model(model, tmp_path)
    edit_weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))(tmp_path)
    assert_same_tensors(model, load_model(tmp_path))


def test_announced_but_absent_mtp_gives_a_model_without(tmp_path: Path) -> None:
    save_model(fresh(dataclasses.replace(DEEPSEEK, num_nextn_predict_layers=0)), tmp_path)
    edit_config(num_nextn_predict_layers=1)(tmp_path)
    assert load_model(tmp_path).config.num_nextn_predict_layers == 0


def test_mtp_copies_may_be_absent(tmp_path: Path) -> None:
    model = fresh(DEEPSEEK)
    save_model(model, tmp_path)
    edit_weights(lambda t: [t.pop(n) for n in list(t) if n.endswith((".embed_tokens.weight", "head.head.weight"))
                            and "layers" in n])(tmp_path)  # fmt: skip
    assert_same_tensors(model, load_model(tmp_path))


# --- safety of the target --------------------------------------------------------------------------------------------


class FakeTokenizer:
    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")


def test_saving_again_replaces_weights_and_keeps_other_files(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    save_model(fresh(DEEPSEEK), target, max_shard_bytes=6000, tokenizer=FakeTokenizer())
    (target / "README.md").write_text("ours")
    model = fresh(DEEPSEEK, seed=1)
    save_model(model, target)
    assert {file.name for file in target.iterdir()} == {
        "README.md", "tokenizer.json", "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    assert_same_tensors(model, load_model(target))
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_a_directory_with_more_than_a_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="more than a checkpoint"):
        save_model(fresh(LLAMA), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    class Full:
        def save(self, directory: Path) -> None:
            with Path("/dev/full").open("w") as device:
                device.write("x" * 100_000)

    target, old = tmp_path / "checkpoint", fresh(LLAMA)
    save_model(old, target)
    with pytest.raises(CheckpointError, match=r"nothing there was changed: .*No space left"):
        save_model(fresh(LLAMA, seed=1), target, tokenizer=Full())
    assert_same_tensors(old, load_model(target))
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def save_and_die(model: Transformer, target: Path, steps: int) -> None:
    """In a child process: save, and kill -9 just before step number `steps` of: rename away, rename in, sweep up."""
    child = os.fork()
    if child == 0:
        try:
            taken = 0
            rename, rmtree = Path.rename, shutil.rmtree

            def step() -> None:
                nonlocal taken
                if taken == steps:
                    os.kill(os.getpid(), signal.SIGKILL)
                taken += 1

            Path.rename = lambda self, to: (step(), rename(self, to))[1]  # type: ignore[method-assign]
            shutil.rmtree = lambda *a, **k: (step() if taken == 2 else None, rmtree(*a, **k))[1]  # type: ignore
            save_model(model, target)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("steps", [0, 2])
def test_killed_save_leaves_a_whole_checkpoint(steps: int, tmp_path: Path) -> None:
    target, old, new = tmp_path / "checkpoint", fresh(LLAMA), fresh(LLAMA, seed=1)
    save_model(old, target)
    save_and_die(new, target, steps)
    assert_same_tensors(old if steps == 0 else new, load_model(target))
    save_model(new, target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_save_killed_between_its_renames_says_where_the_old_checkpoint_is(tmp_path: Path) -> None:
    target, old, new = tmp_path / "checkpoint", fresh(LLAMA), fresh(LLAMA, seed=1)
    save_model(old, target)
    save_and_die(new, target, steps=1)
    with pytest.raises(
        CheckpointError, match=r"interrupted save left the previous checkpoint in .*/\.checkpoint\.replaced"
    ):
        load_model(target)
    with replace_directory(target) as directory:  # the next save puts it back before it writes anything
        assert_same_tensors(old, load_model(target))
        shutil.copytree(target, directory, dirs_exist_ok=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
