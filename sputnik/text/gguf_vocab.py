"""A tokenizer as GGUF metadata, both ways: byte-level BPE with its merges, special tokens and chat template.

    full, config = read_vocabulary(header.metadata, where, shown)    what tokenizer.json and tokenizer_config.json hold
    metadata = vocabulary_metadata(full, config, rows)               `tokenizer.*` keys for llama.cpp

llama.cpp knows a pre-tokenizer by name alone (`splits.py`), applies no normaliser, and always finds "user-defined"
tokens in a text; those are our visible tags such as <think>. Left out: SentencePiece and WordPiece vocabularies.
"""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from sputnik.errors import CheckpointError
from sputnik.text import splits

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
IDS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
FIX = "put the model's tokenizer.json into a directory with this file and give the directory"


def read_vocabulary(
    metadata: Mapping[str, Any], where: object, shown: frozenset[str]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The library's tokenizer and its configuration.

    GGUF marks more tokens as control tokens than their makers did; those named in `shown` stay visible when decoding.
    """
    split = _split_name(metadata, where)
    vocab, kinds = _tokens(metadata, where)
    merges = [_merge(text, vocab, where) for text in _list_of_text(metadata, "tokenizer.ggml.merges", where)]
    full = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split == splits.LLAMA_BPE))
    full.pre_tokenizer = splits.pre_tokenizer(splits.GGUF_SPLITS[split])
    full.decoder = decoders.ByteLevel()
    hidden = [token for token in vocab if kinds[token] in (CONTROL, UNKNOWN) and token not in shown]
    visible = [token for token in vocab if kinds[token] in (CONTROL, UNKNOWN, USER_DEFINED) and token not in hidden]
    full.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in hidden])
    full.add_tokens([AddedToken(token, normalized=False, special=False) for token in visible])
    config = _config(metadata, where)
    _add_post_processor(full, config)
    return full, config


def vocabulary_metadata(full: tokenizers.Tokenizer, config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """`tokenizer.*` metadata; `rows` is the height of the embedding, ids without a token get an unused one."""
    data = json.loads(full.to_str())
    model, split = data["model"], splits.gguf_name(splits.stages_of(data["pre_tokenizer"]))
    if split is None:
        raise CheckpointError("llama.cpp knows no pre-tokenizer like this tokenizer's; write a Hugging Face directory")
    if bool(model.get("ignore_merges")) != (split == splits.LLAMA_BPE):
        raise CheckpointError(f"llama.cpp applies merges otherwise for {split}; write a Hugging Face directory")
    vocab = full.get_vocab(with_added_tokens=True)
    last = max(vocab.values())
    if last >= rows:
        raise CheckpointError(
            f"tokenizer ids go up to {last}, the model has {rows} rows: use the tokenizer saved with it"
        )
    tokens, kinds = [f"[PAD{id}]" for id in range(rows)], [UNUSED] * rows
    for token, id in vocab.items():
        tokens[id], kinds[id] = token, NORMAL
    for id, added in full.get_added_tokens_decoder().items():
        kinds[id] = CONTROL if added.special or _looks_special(added.content) else USER_DEFINED
    key = "tokenizer.ggml."
    metadata = {
        key + "model": "gpt2",
        key + "pre": split,
        key + "tokens": tokens,
        key + "token_type": kinds,
        key + "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        key + "add_bos_token": bool(config.get("add_bos_token", False)),
    }
    for name, short in IDS.items():
        special = config.get(name)
        content = special["content"] if isinstance(special, dict) else special
        if content in vocab:
            metadata[f"{key}{short}_token_id"] = vocab[content]
    if isinstance(config.get("chat_template"), str):
        metadata["tokenizer.chat_template"] = config["chat_template"]
    return metadata


def _split_name(metadata: Mapping[str, Any], where: object) -> str:
    kind, name = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre"))
    if kind != "gpt2":
        raise CheckpointError(f"{where}: its vocabulary is of kind {kind!r}, only byte-level BPE (gpt2) is read; {FIX}")
    name = splits.ALIASES.get(name, name)
    if name not in splits.GGUF_SPLITS:
        raise CheckpointError(f"{where}: the pre-tokenizer {name!r} is not known here; {FIX}")
    return name


def _tokens(metadata: Mapping[str, Any], where: object) -> tuple[dict[str, int], dict[str, int]]:
    """Ids and kinds of all tokens but the unused ones."""
    tokens = _list_of_text(metadata, "tokenizer.ggml.tokens", where)
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    used = [(token, id, kind) for id, (token, kind) in enumerate(zip(tokens, kinds)) if kind != UNUSED]
    vocab = {token: id for token, id, _ in used}
    if len(kinds) != len(tokens) or len(vocab) != len(used):
        raise CheckpointError(f"{where}: the list of tokens is damaged (repeated or untyped tokens); {FIX}")
    letters = set("".join(token for token, _, kind in used if kind == NORMAL))
    strange = letters - set(pre_tokenizers.ByteLevel.alphabet())
    if strange:
        raise CheckpointError(f"{where}: tokens hold {min(strange)!r}, no letter of byte-level BPE; {FIX}")
    return vocab, {token: kind for token, _, kind in used}


def _merge(text: str, vocab: Mapping[str, int], where: object) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    if left not in vocab or right not in vocab or left + right not in vocab:
        raise CheckpointError(f"{where}: the merge {text!r} joins no two tokens; {FIX}")
    return left, right


def _list_of_text(metadata: Mapping[str, Any], key: str, where: object) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{where}: the GGUF header has no list {key}; {FIX}")
    return value


def _config(metadata: Mapping[str, Any], where: object) -> dict[str, Any]:
    tokens = _list_of_text(metadata, "tokenizer.ggml.tokens", where)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
    }
    for name, short in IDS.items():
        id = metadata.get(f"tokenizer.ggml.{short}_token_id")
        if id is not None and not 0 <= id < len(tokens):
            raise CheckpointError(f"{where}: {short}_token_id {id} is not in the list of tokens; {FIX}")
        if id is not None:
            config[name] = tokens[id]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def _add_post_processor(full: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """What transformers shall do with a saved copy; our own `encode` adds nothing."""
    steps: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=False)]
    bos = config.get("bos_token")
    if config["add_bos_token"] and bos is not None:
        steps.append(processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, full.token_to_id(bos))]))
    full.post_processor = processors.Sequence(steps)


def _looks_special(token: str) -> bool:
    """Tags between bars (<|EOT|>, <｜User｜>) are control tokens to llama.cpp whatever their flag says."""
    return token[:2] in ("<|", "<｜") and token[-2:] in ("|>", "｜>")
