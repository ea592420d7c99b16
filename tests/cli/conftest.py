"""A real, tiny, untrained checkpoint with its tokenizer: enough to talk to, though it babbles."""

from pathlib import Path

import pytest
import torch

from sputnik.model.checkpoint import save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tok = Tokenizer.train(["What is 1 + 2? The answer is 3."] * 4, vocab_size=400)
    config = ModelConfig.preset("tiny", vocab_size=tok.vocab_size, eos_token_id=tok.eos_id, bos_token_id=tok.bos_id)
    save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), folder / "checkpoint", tokenizer=tok)
    return folder / "checkpoint"
