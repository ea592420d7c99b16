import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sputnik.errors import DataError
from sputnik.text.corpus import (
    PackedCorpus,
    bits_per_byte,
    byte_lengths,
    encode_document,
    encode_documents,
    fim,
    mix,
    pieces,
    read_info,
    write_shards,
)
from sputnik.text.tokenizer import Tokenizer


def made_up_documents(count: int = 60, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(500) for _ in range(rng.randrange(1, 40))] for _ in range(count)]


def packed_slowly(documents: list[list[int]], length: int, extra: int, seed: int, epoch: int) -> list[list[int]]:
    """Twin of PackedCorpus: join the whole shuffled epoch, cut it up, shuffle the rows."""
    bits = np.random.PCG64([seed, epoch])
    keys = bits.random_raw(len(documents))
    order = sorted(range(len(documents)), key=lambda n: keys[n])
    tokens = [id for n in order for id in documents[n]]
    rows = [tokens[at : at + length + extra] for at in range(0, len(tokens) - extra - length + 1, length)]
    keys = bits.random_raw(len(rows))
    return [rows[n] for n in sorted(range(len(rows)), key=lambda n: keys[n])]


@pytest.mark.parametrize("extra", [1, 3])
@pytest.mark.parametrize("shard_tokens", [50, 10_000])
def test_rows_equal_the_epoch_joined_and_cut(tmp_path: Path, extra: int, shard_tokens: int) -> None:
    documents = made_up_documents()
    write_shards(documents, tmp_path, vocab_size=500, shard_tokens=shard_tokens)
    corpus = PackedCorpus(tmp_path, length=16, seed=7, extra=extra)
    expected = [row for epoch in range(3) for row in packed_slowly(documents, 16, extra, 7, epoch)]
    assert 3 * corpus.rows_per_epoch == len(expected)
    assert corpus.batch(0, len(expected)).tolist() == expected


def test_batch_depends_on_position_alone(tmp_path: Path) -> None:
    write_shards(made_up_documents(), tmp_path, vocab_size=500)
    corpus = PackedCorpus(tmp_path, length=16, seed=1)
    whole = corpus.batch(0, 200)
    for position in (199, 0, 77, 13):  # out of order, across epochs
        assert (corpus.batch(position, 1) == whole[position : position + 1]).all()
    assert (PackedCorpus(tmp_path, length=16, seed=1).batch(120, 80) == whole[120:]).all()
    assert whole.dtype == np.int64


def test_each_epoch_and_seed_has_its_own_order(tmp_path: Path) -> None:
    write_shards(made_up_documents(), tmp_path, vocab_size=500)
    corpus = PackedCorpus(tmp_path, length=16, seed=1)
    first, second = corpus.batch(0, 10), corpus.batch(corpus.rows_per_epoch, 10)
    assert (first != second).any()
    assert (first != PackedCorpus(tmp_path, length=16, seed=2).batch(0, 10)).any()
    assert corpus.tokens_per_epoch == corpus.rows_per_epoch * 16
    assert corpus.info.tokens - 16 - 1 < corpus.tokens_per_epoch <= corpus.info.tokens


def test_ids_above_two_bytes_survive(tmp_path: Path) -> None:
    document = [0, 65_536, 129_279] * 4
    assert write_shards([document], tmp_path, vocab_size=129_280).dtype == "<u4"
    assert PackedCorpus(tmp_path, length=11, seed=0).batch(0, 1).tolist() == [document]


def test_unfinished_or_damaged_corpus_is_refused(tmp_path: Path) -> None:
    info = write_shards(made_up_documents(), tmp_path, 500, shard_tokens=100)
    assert read_info(tmp_path) == info
    last = tmp_path / f"tokens-{len(info.shards) - 1:05d}.bin"
    last.write_bytes(last.read_bytes()[:-2])
    with pytest.raises(DataError, match="cut short"):
        PackedCorpus(tmp_path, length=16, seed=0)
    with pytest.raises(DataError, match="id 999 but vocab_size = 500"):
        write_shards([*made_up_documents(), [999]], tmp_path, 500, shard_tokens=20)  # stops after some shards
    with pytest.raises(DataError, match="no finished corpus"):
        PackedCorpus(tmp_path, length=16, seed=0)
    (tmp_path / "index.json").write_text(json.dumps({"tokens": 3}))
    with pytest.raises(DataError, match="damaged"):
        PackedCorpus(tmp_path, length=16, seed=0)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        write_shards([[], []], tmp_path, 500)
    write_shards([[1, 2, 3]], tmp_path, 500)
    with pytest.raises(DataError, match="less than a row of 4"):
        PackedCorpus(tmp_path, length=3, seed=0)


def test_equal_tokens_have_equal_fingerprints(tmp_path: Path) -> None:
    infos = [write_shards(made_up_documents(), tmp_path / str(n), 500, shard_tokens=n) for n in (100, 1000)]
    assert infos[0].sha256 == infos[1].sha256
    assert infos[0].sha256 != write_shards(made_up_documents(seed=1), tmp_path / "other", 500).sha256


def test_documents_open_and_close_and_batching_changes_nothing(tok: Tokenizer) -> None:
    texts = [f"text {n}" for n in range(300)]
    documents = list(encode_documents(tok, texts))
    assert documents == [encode_document(tok, text) for text in texts]
    assert all(document[0] == tok.bos_id and document[-1] == tok.eos_id for document in documents)


@given(text=st.text(), seed=st.integers(0, 99))
def test_filling_the_middle_in_gives_the_document_back(tok: Tokenizer, text: str, seed: int) -> None:
    holed = fim(encode_document(tok, text), random.Random(seed), tok, rate=1.0)
    assert [holed[0], holed[1], holed[-1]] == [tok.bos_id, tok.fim_begin_id, tok.eos_id]
    hole, end = holed.index(tok.fim_hole_id), holed.index(tok.fim_end_id)
    prefix, suffix, middle = holed[2:hole], holed[hole + 1 : end], holed[end + 1 : -1]
    assert tok.decode(prefix) + tok.decode(middle) + tok.decode(suffix) == text


def test_fim_takes_its_share_and_leaves_dialogues_alone(tok: Tokenizer) -> None:
    rng = random.Random(0)
    document = encode_document(tok, "a plain document")
    changed = sum(fim(document, rng, tok, rate=0.1) != document for _ in range(2000))
    assert 150 < changed < 250
    dialogue = [tok.bos_id, tok.user_id, *tok.encode("hi"), tok.eos_id]
    assert all(fim(dialogue, rng, tok, rate=1.0) == dialogue for _ in range(20))


def test_mix_gives_each_source_its_share_of_tokens() -> None:
    many, few = made_up_documents(200), [[-1] * 5, [-1] * 7]
    mixed = list(mix([(many, 3.0), (few, 1.0)], tokens=4000))
    counts = Counter(document[0] == -1 for document in mixed for _ in document)
    assert counts[True] == pytest.approx(1000, abs=40)
    assert 4000 <= sum(counts.values()) < 4040
    assert mixed == list(mix([(many, 3.0), (few, 1.0)], tokens=4000))
    with pytest.raises(DataError, match="at least one document"):
        next(mix([(many, 1.0), ([[]], 1.0)], tokens=10))


def test_bytes_of_a_window_are_those_of_its_text(tok: Tokenizer) -> None:
    text = "naïve 你好 text"
    ids = encode_document(tok, text)
    assert byte_lengths(tok)[ids].sum() == len(text.encode())
    assert bits_per_byte(nats=math.log(2) * 30, text_bytes=10) == pytest.approx(3.0)


def test_pieces_lose_nothing_and_stay_short() -> None:
    text = "".join(f"line {n} of a long play\n" for n in range(500)) + "the end"
    parts = pieces(text, 300)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 300 and len(parts) > 30
    assert pieces("one line that is longer than allowed", 10) == ["one line that is longer than allowed"]
    assert pieces("") == []
