"""config.json and generation_config.json beside weights: damaged ones are one clear line, end tokens of both count."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sputnik.errors import CheckpointError
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer

LLAMA = ModelConfig(
    model_type="llama", vocab_size=33, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4, tie_word_embeddings=True, eos_token_id=(5, 6),
)  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(Transformer(LLAMA).init_weights(torch.Generator().manual_seed(0)), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None, "head_dim": None}, "hidden_size = None: a model needs one"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads = 0: a model needs one"),
        ({"rope_theta": "big"}, "rope_theta = 'big'"),
        ({"rope_scaling": "x"}, "rope_scaling = 'x': must be an object"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_type None is not computed here"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not one of"),
        ({"eos_token_id": ["5"]}, "eos_token_id = '5'"),
    ],
)
def test_a_damaged_config_is_one_clear_line(saved: Path, changes: dict[str, Any], words: str) -> None:
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (saved / "generation_config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_model(saved)
    assert words in str(caught.value) and "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_end_tokens_of_both_files_are_kept(saved: Path) -> None:
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [5, 6]
    assert load_model(saved).config == LLAMA
    (saved / "generation_config.json").write_text('{"eos_token_id": [9, 6]}')
    assert load_model(saved).config.end_ids == (5, 6, 9)
    (saved / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config.json: not valid JSON"):
        load_model(saved)
