"""A model of other makers is given our dialogue tokens: <｜User｜>, <｜Assistant｜>, <think>, </think> and V3's others.

    old = Tokenizer.load("smollm2")
    model, tok = adopt(load_model("smollm2"), old)     # new rows of the embedding, near what the tokens say
    teach(model, new_rows(old, tok), read_lessons(tok), steps=40, lr=0.02)      # and what they are for, by examples

    figures = adopt_checkpoint(PretrainedConfig(source="smollm2"), out)   # both, into out/checkpoint

A row begins as the mean of the rows of the words that describe its token, the other new ones as the mean of all rows,
as R1's distilled models have it. A model that has never read `</think>` never writes it either, and reinforcement
learning can only make likelier what happens: so the rows of the four dialogue tokens, and nothing else, are fitted to a
few examples of the form. That is 2,304 of SmolLM2's 134.5 million numbers; no layer moves.

Left out: MTP modules for a model without, and a BOS token for a tokenizer that has none.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sputnik.engine.sampler import autocast
from sputnik.errors import ConfigError
from sputnik.hardware import resolve_precision
from sputnik.model.checkpoint import check_tokenizer, load_model, save_model
from sputnik.model.head import IGNORE, head_loss
from sputnik.model.transformer import Transformer
from sputnik.text.tokenizer import ASSISTANT, END_THINK, THINK, USER, Tokenizer
from sputnik.train.examples import Example, read_examples

LIKE = ((USER, "user\n"), (ASSISTANT, "\nassistant\n"), (THINK, "<"), (END_THINK, "</"))
"""Token -> the text whose rows its own begins as the mean of."""
MULTIPLE = 64
"""The vocabulary is padded to so many rows, for the sake of matrix products; no token has the last ones."""


@dataclass(frozen=True)
class PretrainedConfig:
    """A pretrained model with our dialogue tokens; one that has them is taken over as it is."""

    source: str = "smollm2"
    """A name, a GGUF file or a checkpoint directory."""
    examples: str = ""
    """JSONL of worked examples that show the form (prompt, thinking, answer); default: two dozen that come along."""
    steps: int = 40
    """Steps in which the four new rows learn it; 0 leaves them as described."""
    lr: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 0 or self.lr <= 0:
            raise ConfigError(f"steps = {self.steps}, lr = {self.lr}: set steps to 0 or more and lr above 0")


def adopt(model: Transformer, tok: Tokenizer) -> tuple[Transformer, Tokenizer]:
    """The model, grown in place, and a tokenizer with our tokens; both as they are if it has them already."""
    check_tokenizer(model.config, tok.vocab_size, "adopt")
    if tok.has_dialogue:
        return model, tok
    known = tok.vocab_size
    grown = tok.with_control_tokens()
    rows = max(model.config.vocab_size, -(-grown.vocab_size // MULTIPLE) * MULTIPLE)
    described = {id: grown.encode(text) for id, text in new_rows(tok, grown).items()}
    embedding = model.model.embed_tokens
    tied = model.config.tie_word_embeddings
    embedding.weight = nn.Parameter(_grown(embedding.weight.detach(), known, rows, described))
    head = embedding.weight if tied else nn.Parameter(_grown(model.lm_head.weight.detach(), known, rows, described))
    model.lm_head.weight = head
    embedding.num_embeddings = model.lm_head.out_features = rows
    model.config = replace(
        model.config, vocab_size=rows, bos_token_id=grown.bos_id, eos_token_id=grown.eos_id, pad_token_id=grown.pad_id
    )
    return model, grown


def new_rows(old: Tokenizer, new: Tokenizer) -> dict[int, str]:
    """Ids of the dialogue tokens that the old tokenizer did not have, with their descriptions."""
    return {id: text for name, text in LIKE if (id := new.control_id(name)) >= old.vocab_size}


def _grown(weight: Tensor, known: int, rows: int, described: dict[int, list[int]]) -> Tensor:
    """(rows, D): the first `known` rows as they were, then the mean of them, or of those of a description."""
    old = weight[:known]
    new = old.mean(dim=0).expand(rows, -1).clone()
    new[:known] = old
    for id, like in described.items():
        new[id] = old[like].mean(dim=0)
    return new


def read_lessons(tok: Tokenizer, file: Path | None = None) -> list[Example]:
    """Worked examples of the form, from `file` or those of the package."""
    own = Path(str(files("sputnik.train"))) / "lessons.jsonl"
    return read_examples([file or own], tok, longest=1024).examples


def teach(
    model: Transformer,
    rows: Iterable[int],
    lessons: Sequence[Example],
    steps: int,
    lr: float,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    precision: str = "fp32",
) -> list[float]:
    """Fit these rows of embedding and head to the lessons, all of them in each step; every other weight stays as it is,
    bit for bit. Returns the losses (nats per token that an assistant writes) before each step."""
    weights = list(dict.fromkeys([model.model.embed_tokens.weight, model.lm_head.weight]))
    places = torch.tensor(list(rows))
    ids, targets = _batch(lessons)
    written = int((targets != IGNORE).sum())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    parts = [nn.Parameter(weight[places].clone()) for weight in weights]
    optimizer = torch.optim.Adam(parts, lr=lr, betas=(0.9, 0.95))
    losses: list[float] = []
    for step in range(steps):
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        with autocast(precision):
            hidden = model.trunk(ids[:, :-1]).hidden.flatten(0, 1)
            loss = head_loss(hidden, model.lm_head.weight, targets.flatten()) / written
        loss.backward()  # type: ignore[no-untyped-call]
        for weight, part in zip(weights, parts, strict=True):
            assert weight.grad is not None
            part.grad = weight.grad[places]
            weight.requires_grad_(False)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()
        for weight, part in zip(weights, parts, strict=True):
            weight[places] = part.detach()
            weight.grad = None
        losses.append(float(loss.detach()))
        on_step(step + 1, losses[-1])
    for parameter in trainable:
        parameter.requires_grad_(True)
    return losses


def _batch(lessons: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Right-padded ids (n, T) and the targets (n, T - 1) of their predecessors."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.from_numpy(lesson.ids) for lesson in lessons], batch_first=True)
    own = pad([torch.from_numpy(lesson.mask) for lesson in lessons], batch_first=True)
    return ids, ids.masked_fill(~own, IGNORE)[:, 1:]


def adopt_checkpoint(
    config: PretrainedConfig, out: Path, on_step: Callable[[int, float], None] = lambda step, loss: None
) -> dict[str, Any]:
    """Write OUT/checkpoint; returns what was added and the loss on the lessons before and after."""
    old = Tokenizer.load(config.source)
    model, tok = adopt(load_model(config.source), old)
    size = sum(parameter.numel() for parameter in model.parameters())
    figures: dict[str, Any] = {"parameters": size, "rows": model.config.vocab_size}
    if config.steps and (rows := new_rows(old, tok)):
        lessons = read_lessons(tok, Path(config.examples) if config.examples else None)
        losses = teach(model, rows, lessons, config.steps, config.lr, on_step, resolve_precision("auto"))
        figures |= {"loss_before": losses[0], "loss": losses[-1]}
    save_model(model, out / "checkpoint", tokenizer=tok)
    return figures
