"""Byte-level BPE with DeepSeek-V3's pre-tokenizer and special tokens, on top of Hugging Face `tokenizers`.

    tok = Tokenizer.train(texts, vocab_size=8192); tok.save("out"); tok = Tokenizer.load("out")

The split rules and the names and flags of the special tokens are those of the published V3 / R1 files; ids are
compact: 0 BOS, 1 EOS, 2 PAD, then 256 bytes and the merges, then the other special tokens. `load` also reads DeepSeek's
own files, any other byte-level BPE and GGUF files; a token such a file lacks (say `<think>`) is an error at first use,
not at load.

Text and control are kept apart: `encode` never returns a control token, whatever its text spells.
Left out: V3's random splitting of tokens that join punctuation and line breaks (its share is not published).
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sputnik.errors import ConfigError, DataError
from sputnik.text.gguf_header import gguf_file, read_header
from sputnik.text.gguf_vocab import read_vocabulary, vocabulary_metadata
from sputnik.text.named_models import find_model
from sputnik.text.splits import deepseek_stages, pre_tokenizer
from sputnik.text.templates import template_source

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
END_OF_TURN = "<|EOT|>"
TOOL_PARTS = ("calls", "call", "outputs", "output")
TOOLS = tuple(f"<｜tool▁{part}▁{edge}｜>" for part in TOOL_PARTS for edge in ("begin", "end"))
TOOL_SEP = "<｜tool▁sep｜>"
# The published order and flags; "special" tokens vanish when decoding with skip_special, the others stay visible.
ADDED = (THINK, END_THINK, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, END_OF_TURN, *TOOLS, TOOL_SEP)
SPECIAL = frozenset({BOS, EOS, PAD, END_OF_TURN})
CONFIG_KEYS = {BOS: ("bos_token",), EOS: ("eos_token",)}
SMALLEST_VOCABULARY = 256 + 3 + len(ADDED)
LONG = 1 << 14
"""Characters of a text whose encoding takes so long that other threads should run meanwhile."""


class Tokenizer:
    """Text <-> ids. Build one with `train` or `load`."""

    def __init__(self, full: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        self._full = full
        self._plain = _without_control_tokens(full)
        self._config = config
        self._vocab: dict[str, int] = full.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        added = full.get_added_tokens_decoder()
        self._added: dict[int, str] = {id: token.content for id, token in added.items()}
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.control_ids = frozenset(id for id, content in self._added.items() if _is_control(content))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, digits: int = 3) -> "Tokenizer":
        """The same texts give the same tokenizer. V3 groups up to `digits` = 3 digits; 1 helps small models do sums.

        Too little text ends the merges early and gives fewer than `vocab_size` entries.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(f"vocab_size = {vocab_size}: bytes and special tokens alone are {SMALLEST_VOCABULARY}")
        if digits not in (1, 2, 3):
            raise ConfigError(f"digits = {digits}: choose 1 (each digit a token), 2 or 3 (as DeepSeek-V3)")
        full = tokenizers.Tokenizer(models.BPE())
        full.normalizer = normalizers.Sequence([])
        full.pre_tokenizer = pre_tokenizer(deepseek_stages(digits))
        full.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(ADDED),
            special_tokens=[AddedToken(name, normalized=False, special=True) for name in (BOS, EOS, PAD)],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        full.train_from_iterator(texts, trainer)
        _append_control_tokens(full)
        bos_first = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
        full.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos_first])
        return cls(full, _default_config(full))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a directory or a `tokenizer.json`; a `tokenizer_config.json` beside it names BOS, EOS, PAD.

        Without a tokenizer.json it is taken from a GGUF file; a named model ("smollm2") is fetched.
        """
        path = find_model(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file() or file.suffix == ".gguf":
            packed = gguf_file(path)
            if packed is not None:
                return cls(*read_vocabulary(read_header(packed).metadata, packed, frozenset(ADDED) - SPECIAL))
        if not file.is_file():
            raise DataError(f"{path}: no tokenizer.json there; give a checkpoint directory or train one")
        text, data = _read_object(file)
        model = data.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE" or '"ByteLevel"' not in text:
            raise DataError(f"{file}: not a byte-level BPE; only GPT-2, Llama-3, Qwen or DeepSeek style files are read")
        try:
            full = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise DataError(f"{file}: damaged, copy it again: {error}") from None
        config_file, template = file.with_name("tokenizer_config.json"), file.with_name("chat_template.jinja")
        config = _read_object(config_file)[1] if config_file.is_file() else _default_config(full)
        if template.is_file():  # where transformers 5 writes it
            config["chat_template"] = template.read_text(encoding="utf-8")
        return cls(full, config)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template), the files transformers reads."""
        out = Path(directory)
        out.mkdir(parents=True, exist_ok=True)
        (out / "tokenizer.json").write_text(self._full.to_str(), encoding="utf-8")
        config = json.dumps(self._config, ensure_ascii=False, indent=2)
        (out / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")

    def to_gguf(self, rows: int) -> dict[str, Any]:
        """The `tokenizer.*` metadata of a GGUF file for a model with `rows` rows of embedding."""
        return vocabulary_metadata(self._full, self._config, rows)

    def with_control_tokens(self) -> "Tokenizer":
        """A copy of a foreign tokenizer with V3's dialogue tokens appended, as R1's distilled models have them.

        Ids it had stay as they are; its model needs `vocab_size` rows of embedding.
        """
        full = tokenizers.Tokenizer.from_str(self._full.to_str())
        _append_control_tokens(full)
        return Tokenizer(full, {**self._config, "chat_template": template_source("chat")})

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without BOS. A control token spelled in the text ("<think>") stays ordinary text."""
        return _ids(self._plain, text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        for text in texts:
            _check_encodable(text)
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_special(self, text: str) -> list[int]:
        """Ids of trusted text, without BOS: spelled control tokens become control tokens. Never for a user's words."""
        return _ids(self._full, text)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Skipped are BOS, EOS and PAD, never <think>."""
        if skip_special:
            ids = [id for id in ids if id not in self.special_ids]
        return self.token_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of the ids; `token_bytes(encode(text)) == text.encode()`.

        A model may have more rows of embedding than its tokenizer has ids: what those rows say is nothing."""
        table, size = self._bytes, self.vocab_size
        return b"".join([table[id] if id < size else b"" for id in ids])

    @cached_property
    def _bytes(self) -> list[bytes]:
        byte_of = _byte_of_letter()
        table = [b""] * self.vocab_size
        for token, id in self._vocab.items():
            spelled = id in self._added or not byte_of.keys() >= set(token)  # the latter as the library decodes it
            table[id] = token.encode() if spelled else bytes(byte_of[letter] for letter in token)
        return table

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Spelling -> id of every control token."""
        return {self._added[id]: id for id in sorted(self.control_ids)}

    @property
    def has_dialogue(self) -> bool:
        """It has the tokens of DeepSeek's dialogues (text/chat.py); else its own template is used (text/foreign.py)."""
        return {USER, ASSISTANT, THINK, END_THINK} <= self.control_tokens.keys()

    @cached_property
    def has_thoughts(self) -> bool:
        return {THINK, END_THINK} <= self.control_tokens.keys()

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that came with the tokenizer; of several the one called "default"."""
        found = self._config.get("chat_template")
        if isinstance(found, list):
            found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}.get("default")
        return found if isinstance(found, str) else None

    @property
    def named_tokens(self) -> dict[str, str]:
        """What its configuration calls bos_token, eos_token and so on."""
        named = {key: token for key, token in self._config.items() if isinstance(token, str | dict)}
        return {key: _name_of(token) for key, token in named.items() if key.endswith("_token")}

    @cached_property
    def text_start(self) -> tuple[int, ...]:
        """What its makers put in front of a plain text: BOS or nothing."""
        adds = self._config.get("add_bos_token")
        if adds is None:  # then the library's post-processor says it
            names = self.named_tokens
            adds = "bos_token" in names and self._full.encode("").tokens[:1] == [names["bos_token"]]
        return (self.bos_id,) if adds else ()

    def control_id(self, name: str) -> int:
        """Id of V3's token `name`; for BOS and EOS also of the token the file's own configuration calls so."""
        if ids := self._ids_of(name, *CONFIG_KEYS.get(name, ())):
            return ids[0]
        raise DataError(f"this tokenizer has no {name} token: train one, load DeepSeek's or use `with_control_tokens`")

    def _ids_of(self, name: str, *keys: str) -> list[int]:
        candidates = [name, *(_name_of(self._config.get(key)) for key in keys)]
        return [self._vocab[candidate] for candidate in candidates if candidate in self._vocab]

    @cached_property
    def pad_id(self) -> int:
        """Never EOS: a model whose padding is EOS and masked would never learn to stop."""
        for id in self._ids_of(PAD, "pad_token", "unk_token", "bos_token"):
            if id != self.eos_id:
                return id
        raise DataError("this tokenizer has no padding token that differs from its end-of-text token: add one to it")

    @cached_property
    def bos_id(self) -> int:
        return self.control_id(BOS)

    @cached_property
    def eos_id(self) -> int:
        return self.control_id(EOS)

    @cached_property
    def user_id(self) -> int:
        return self.control_id(USER)

    @cached_property
    def assistant_id(self) -> int:
        return self.control_id(ASSISTANT)

    @cached_property
    def think_id(self) -> int:
        return self.control_id(THINK)

    @cached_property
    def end_think_id(self) -> int:
        return self.control_id(END_THINK)

    @cached_property
    def fim_hole_id(self) -> int:
        return self.control_id(FIM_HOLE)

    @cached_property
    def fim_begin_id(self) -> int:
        return self.control_id(FIM_BEGIN)

    @cached_property
    def fim_end_id(self) -> int:
        return self.control_id(FIM_END)


def _read_object(file: Path) -> tuple[str, dict[str, Any]]:
    """The text of a JSON file and the object it is."""
    try:
        text = file.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{file}: damaged, copy it again: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"{file}: damaged, copy it again: it holds no JSON object")
    return text, data


def _append_control_tokens(full: tokenizers.Tokenizer) -> None:
    for name in ADDED:
        token = AddedToken(name, normalized=True, special=name in SPECIAL)
        (full.add_special_tokens if token.special else full.add_tokens)([token])


def _ids(engine: tokenizers.Tokenizer, text: str) -> list[int]:
    _check_encodable(text)
    if len(text) < LONG:
        ids: list[int] = engine.encode(text, add_special_tokens=False).ids
        return ids
    (found,) = engine.encode_batch_fast([text], add_special_tokens=False)  # unlike `encode`, lets other threads run
    return list(found.ids)


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"half of a surrogate pair at character {error.start}: remove or repair it") from None


def _is_control(content: str) -> bool:
    return not content.isspace()  # GPT-NeoX files keep runs of spaces as added tokens: those are text


def _without_control_tokens(full: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, blind to control tokens: neither matched in the text nor reachable as a vocabulary entry."""
    data = json.loads(full.to_str())
    control = {token["content"] for token in data["added_tokens"] if _is_control(token["content"])}
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in control]
    data["model"]["vocab"] = {token: id for token, id in data["model"]["vocab"].items() if token not in control}
    data["post_processor"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def _byte_of_letter() -> dict[str, int]:
    """Inverse of GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest for code points from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _name_of(token: Any) -> str:
    """Name of a token in `tokenizer_config.json`, where it is a string, an object or null."""
    return str(token.get("content") if isinstance(token, dict) else token)


def _default_config(full: tokenizers.Tokenizer) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    for key, name in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD)):
        if full.token_to_id(name) is not None:
            config[key] = name
    if full.token_to_id(ASSISTANT) is not None and full.token_to_id(THINK) is not None:
        config["chat_template"] = template_source("chat")
    return config
