"""A base to train on in milliseconds: a small tokenizer, a corpus with structure, a V3-shaped model of 50k weights."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from sputnik.cost import Meter
from sputnik.hardware import Hardware
from sputnik.model.config import ModelConfig
from sputnik.text.corpus import encode_document, write_shards
from sputnik.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Base:
    tok: Tokenizer
    model_config: ModelConfig
    folder: Path
    """Holds tokenizer/, corpus/ and held_out/."""

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def held_out(self) -> Path:
        return self.folder / "held_out"

    def meter(self) -> Meter:
        return Meter(Hardware("test", 1e11, None, 1e10, 1e10, 0.1, "test"))


def sentences(seed: int, count: int) -> list[str]:
    """Sums and their results: far more regular than the frequencies of their tokens."""
    rng = random.Random(seed)
    pairs = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(count * 8)]
    lines = [f"{a} plus {b} is {a + b}.\n" for a, b in pairs]
    return ["".join(lines[n * 8 : n * 8 + 8]) for n in range(count)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    tok = Tokenizer.train(sentences(0, 100), 300)
    tok.save(folder / "tokenizer")
    for name, seed, count in (("corpus", 1, 200), ("held_out", 2, 20)):
        write_shards((encode_document(tok, text) for text in sentences(seed, count)), folder / name, tok.vocab_size)
    config = ModelConfig.preset(
        "tiny", vocab_size=tok.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=64, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, moe_intermediate_size=16, max_position_embeddings=64,
        bos_token_id=tok.bos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id,
    )  # fmt: skip
    return Base(tok, config, folder)
