"""A reward model: a language model whose last hidden state becomes one number, the score of an answer (R1 3.1).

    judge = RewardModel.load("runs/r1/helpful/checkpoint")
    judge.score([prompt_ids, ...], [answer_ids, ...])      # ids as the policy read and wrote them -> scores
    judge.score_texts([messages, ...], ["<think>..."])     # the same from text

Pairwise (helpfulness): only differences of scores mean something; `standardised` puts them on the scale of the training
answers. It judges the final answer alone, so thoughts are cut out here, on both ways in. Pointwise (safety): the score
is the logit of "safe", and it judges the whole output. The score is read at EOS, which is put where it is missing.

    DIRECTORY/                      the backbone, as every checkpoint, with its tokenizer
    DIRECTORY/reward_head.safetensors
    DIRECTORY/reward_model.json     kind, template, mean and standard deviation of the training scores
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sputnik.config import from_dict
from sputnik.engine.sampler import autocast
from sputnik.errors import CheckpointError
from sputnik.hardware import resolve_precision
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.kernels import fused
from sputnik.model.precision import linear_fp32
from sputnik.model.transformer import Transformer
from sputnik.text.chat import Prompt, parse, render, render_example, template_hash
from sputnik.text.preferences import CARD, Kind, split_thought
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.packing import packed, padded

HEAD = "reward_head.safetensors"
MICRO_TOKENS = 16_384
"""Padded tokens that go through the model at once."""


@dataclass(frozen=True)
class Card:
    """What has to be known to use the scores."""

    kind: Kind
    template: str
    template_hash: str
    mean: float = 0.0
    std: float = 1.0
    """Of the scores of the training answers."""


@dataclass(frozen=True)
class Dialogue:
    """Ids of a conversation and the answer to it, EOS included; the first `prompt` of them are the conversation."""

    ids: tuple[int, ...]
    prompt: int

    def __len__(self) -> int:
        return len(self.ids)


class RewardModel(nn.Module):
    """Backbone and head. The head starts at zero: every score is 0 before training."""

    def __init__(self, backbone: Transformer, tok: Tokenizer, card: Card, precision: str = "auto") -> None:
        super().__init__()
        self.backbone = backbone.eval()  # no dropout anywhere; training mode would only add the balance loss
        self.head = nn.Linear(backbone.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.tok = tok
        self.card = card
        self.precision = resolve_precision(precision)

    @classmethod
    def of(cls, checkpoint: Path, kind: Kind, template: str = "chat", precision: str = "auto") -> "RewardModel":
        """An untrained one on the backbone of a language model's checkpoint."""
        card = Card(kind, template, template_hash(template))
        return cls(load_model(checkpoint), Tokenizer.load(checkpoint), card, precision)

    @classmethod
    def load(cls, path: str | Path, precision: str = "auto") -> "RewardModel":
        """The reward model in a checkpoint directory, or in a stage's directory that holds one; frozen."""
        path = Path(path)
        path = path if (path / CARD).is_file() else path / "checkpoint"
        try:
            card = from_dict(Card, json.loads((path / CARD).read_text(encoding="utf-8")), str(path / CARD))
            head = load_file(path / HEAD)
        except FileNotFoundError as error:
            raise CheckpointError(f"{error.filename}: not there; make it with `sputnik reward-model`") from None
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path}: damaged reward model, train or copy it again: {error}") from None
        if card.template_hash != template_hash(card.template):
            raise CheckpointError(f"{path}: trained with another version of template {card.template!r}; train it again")
        found = cls(load_model(path), Tokenizer.load(path), card, precision)
        if {name: value.shape for name, value in head.items()} != {
            n: p.shape for n, p in found.head.named_parameters()
        }:
            raise CheckpointError(f"{path}: {HEAD} belongs to another model; train or copy it again")
        found.head.load_state_dict(head)
        return found.requires_grad_(False)

    def save(self, path: Path, card: Card) -> None:
        """Write the directory, whole or not at all, with `card` on it."""
        save_model(self.backbone, path, tokenizer=_Beside(self, card))

    # --- scores ---

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
        """Raw scores of answers as a policy wrote them to prompts as it read them; its tokenizer must be this one's."""
        return self.score_dialogues([self.from_ids(*each) for each in zip(prompts, responses, strict=True)])

    def score_texts(self, conversations: Sequence[Sequence[Mapping[str, Any]]], answers: Sequence[str]) -> list[float]:
        """Raw scores of written answers, which may begin with a thought."""
        return self.score_dialogues([self.from_text(*each) for each in zip(conversations, answers, strict=True)])

    @torch.no_grad()
    def score_dialogues(self, dialogues: Sequence[Dialogue]) -> list[float]:
        scores = [0.0] * len(dialogues)
        lengths = [len(each) for each in dialogues]
        by_prompt = sorted(range(len(dialogues)), key=lambda i: (dialogues[i].ids[: dialogues[i].prompt], lengths[i]))
        for places in cut(by_prompt, lengths):
            for place, score in zip(places, self([dialogues[i] for i in places]).tolist()):
                scores[place] = score
        return scores

    def standardised(self, scores: Sequence[float]) -> list[float]:
        """With the mean and spread of the training answers taken out."""
        return [(score - self.card.mean) / self.card.std for score in scores]

    def forward(self, dialogues: Sequence[Dialogue]) -> Tensor:
        """(n,) fp32 scores, with gradient where one is kept: packed into one row if the kernels allow, else padded."""
        lengths = torch.tensor([len(each) for each in dialogues])
        ids = torch.zeros(len(dialogues), int(lengths.max()) + 1, dtype=torch.long)
        for row, each in enumerate(dialogues):
            ids[row, : len(each)] = torch.tensor(each.ids)
        if fused.usable(self.head.weight):
            prompts = torch.tensor([each.prompt for each in dialogues])
            layout = packed(ids, lengths + 1, prompts)  # it leaves out the last token, which is not to be EOS
        else:
            layout = padded(ids[:, :-1])
        with autocast(self.precision):
            hidden = self.backbone.trunk(layout.ids, segments=layout.segments).hidden.flatten(0, 1)
            last = hidden.index_select(0, layout.place[torch.arange(len(dialogues)), lengths - 1])
            return (linear_fp32(last, self.head.weight) + self.head.bias)[:, 0]

    # --- what is judged ---

    def from_text(self, messages: Sequence[Mapping[str, Any]], answer: str) -> Dialogue:
        """The dialogue as the model reads it; of a pairwise one without the thought."""
        thinking, final = split_thought(answer)
        return self._dialogue(messages, None if self.card.kind == "pairwise" else thinking, final)

    def from_ids(self, prompt: Sequence[int], response: Sequence[int]) -> Dialogue:
        """The same from ids. A pairwise one reads a closed thought and the final answer instead of what was drawn."""
        tok = self.tok
        response = response[:-1] if response and response[-1] == tok.eos_id else response
        if self.card.kind == "pairwise":
            start = Prompt.of(tok, prompt)
            done = parse(tok, response, in_thought=start.in_thought, finished=True, template=self.card.template)
            response = self._written(None, done.answer)
            if start.in_thought:
                opened = len(prompt) - 1 - list(reversed(prompt)).index(tok.think_id)
                prompt = [*prompt[:opened], tok.end_think_id]
        return Dialogue((*prompt, *response, tok.eos_id), len(prompt))

    def _dialogue(self, messages: Sequence[Mapping[str, Any]], thinking: str | None, answer: str) -> Dialogue:
        start = render(self.tok, messages, template=self.card.template, thinking=thinking is not None)
        return Dialogue((*start.ids, *self._written(thinking, answer), self.tok.eos_id), len(start.ids))

    def _written(self, thinking: str | None, answer: str) -> list[int]:
        """Ids of what a model writes, without EOS; they do not depend on the prompt."""
        ids, own = render_example(self.tok, "", thinking, answer, template=self.card.template)
        return [id for id, mine in zip(ids, own) if mine][:-1]


def cut(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places, in this order, in runs of at most MICRO_TOKENS padded tokens (at least one place each)."""
    run: list[int] = []
    widest = 0
    for place in order:
        widest = max(widest, lengths[place])
        if run and widest * (len(run) + 1) > MICRO_TOKENS:
            yield run
            run, widest = [], lengths[place]
        run.append(place)
    if run:
        yield run


class _Beside:
    """What lies beside the backbone's weights, written in the same step as they are."""

    def __init__(self, model: RewardModel, card: Card) -> None:
        self.model, self.card = model, card

    def save(self, directory: Path) -> None:
        self.model.tok.save(directory)
        head = {name: value.detach().contiguous() for name, value in self.model.head.named_parameters()}
        save_file(head, directory / HEAD, metadata={"format": "pt"})
        (directory / CARD).write_text(json.dumps(asdict(self.card), indent=1) + "\n", encoding="utf-8")
        (directory / HEAD).chmod(0o644)  # safetensors writes 0600
