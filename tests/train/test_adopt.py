"""A small Llama of another maker, whose tokenizer knows no thoughts, learns to write ours; nothing else changes."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from sputnik.errors import ConfigError
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.text.chat import render_example
from sputnik.text.tokenizer import END_THINK, THINK, USER, Tokenizer
from sputnik.train.adopt import PretrainedConfig, adopt, adopt_checkpoint, new_rows, read_lessons, teach

TEXTS = ["user asks and the assistant thinks", "what is 3 + 5?", "3 + 5 = 8", "<b>so</b> it is 8", "one two three"] * 3


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory as others publish them: plain BPE, <s> and </s>, no dialogue tokens."""
    folder = tmp_path_factory.mktemp("foreign")
    full = tokenizers.Tokenizer(models.BPE())
    full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    full.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    full.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet)
    )
    (folder / "tokenizer.json").write_text(full.to_str())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def model_for(tok: Tokenizer, tied: bool, spare: int = 0) -> Transformer:
    config = ModelConfig(
        model_type="llama", vocab_size=tok.vocab_size + spare, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64, max_position_embeddings=256,
        initializer_range=0.05, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    return Transformer(config).init_weights(torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_old_rows_stay_and_new_ones_begin_at_their_description(foreign: Path, tied: bool) -> None:
    old = Tokenizer.load(foreign)
    model = model_for(old, tied)
    ids = torch.tensor([old.encode("what is 3 + 5?")])
    before, rows = model(ids).detach(), model.lm_head.weight.detach().clone()
    model, tok = adopt(model, old)
    assert tok.has_dialogue and not old.has_dialogue
    assert model.config.vocab_size % 64 == 0 and model.config.vocab_size >= tok.vocab_size
    assert (model.config.bos_token_id, model.config.eos_token_id) == (old.bos_id, old.eos_id) and tok.pad_id != 1
    assert torch.equal(model(ids)[..., : old.vocab_size], before)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert weight.shape == (model.config.vocab_size, 32) and weight.requires_grad
    head = model.lm_head.weight
    assert torch.equal(head[: old.vocab_size], rows)
    assert torch.allclose(head[tok.user_id], rows[old.encode("user\n")].mean(dim=0))
    assert torch.allclose(head[tok.end_think_id], rows[old.encode("</")].mean(dim=0))
    assert torch.allclose(head[tok.fim_hole_id], rows.mean(dim=0)) and torch.allclose(head[-1], rows.mean(dim=0))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_spare_rows_of_the_model_are_used_and_what_is_ours_is_left_alone(foreign: Path) -> None:
    old = Tokenizer.load(foreign)
    model, tok = adopt(model_for(old, tied=False, spare=200), old)
    assert model.config.vocab_size == old.vocab_size + 200
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    again, same = adopt(model, tok)
    assert same is tok and all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    assert new_rows(tok, same) == {}


@pytest.mark.parametrize("tied", [True, False])
def test_lessons_move_the_four_rows_and_nothing_else(foreign: Path, tied: bool) -> None:
    old = Tokenizer.load(foreign)
    model, tok = adopt(model_for(old, tied), old)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    rows = list(new_rows(old, tok))
    assert rows == [tok.user_id, tok.assistant_id, tok.think_id, tok.end_think_id]
    lessons = read_lessons(tok)
    ids, own = render_example(tok, "What is 3 + 5?", "3 + 5 = 8", "8")
    assert (lessons[0].ids.tolist(), lessons[0].mask.tolist()) == (ids, own)
    losses = teach(model, rows, lessons, steps=30, lr=0.05)
    assert losses[-1] < losses[0] - 0.2
    for name, value in model.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            kept = torch.ones(len(value), dtype=torch.bool)
            kept[rows] = False
            assert torch.equal(value[kept], weights[name][kept])
            assert (value[rows] != weights[name][rows]).any(dim=1).sum() >= 3
        else:
            assert torch.equal(value, weights[name])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_checkpoint_speaks_our_dialogue_and_comes_out_the_same_again(foreign: Path, tmp_path: Path) -> None:
    old = Tokenizer.load(foreign)
    save_model(model_for(old, tied=True), tmp_path / "theirs", tokenizer=old)
    config = PretrainedConfig(source=str(tmp_path / "theirs"), steps=3)
    seen: list[int] = []
    figures = adopt_checkpoint(config, tmp_path / "once", lambda step, loss: seen.append(step))
    assert adopt_checkpoint(config, tmp_path / "twice") == figures and seen == [1, 2, 3]
    assert figures["loss"] < figures["loss_before"]
    first, second = (load_model(tmp_path / name / "checkpoint") for name in ("once", "twice"))
    assert all(torch.equal(second.state_dict()[name], value) for name, value in first.state_dict().items())
    tok = Tokenizer.load(tmp_path / "once/checkpoint")
    assert tok.has_dialogue and {THINK, END_THINK, USER} <= tok.control_tokens.keys()
    taken = adopt_checkpoint(PretrainedConfig(source=str(tmp_path / "once/checkpoint")), tmp_path / "third")
    assert "loss" not in taken, "ours already: taken over as it is"
    third = load_model(tmp_path / "third/checkpoint")
    assert all(torch.equal(third.state_dict()[name], value) for name, value in first.state_dict().items())


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="set steps to 0 or more and lr above 0"):
        PretrainedConfig(steps=-1)
